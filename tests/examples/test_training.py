from functools import cache, partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from example_support import make_dataset
from sam_examples.data import Split, normalize
from sam_examples.devices.sharding import by_examples, make_mesh, replicated
from sam_examples.models.convolution import PatchConv
from sam_examples.models.resnet import ResNet
from sam_examples.settings.command_line import NoisyDigits
from sam_examples.settings.methods import (
    METHODS,
    hyperparameters,
    is_functional,
    make_tx,
)
from sam_examples.settings.optimizers import make_schedule, momentum_sgd
from sam_examples.training.epochs import draw_epoch, shuffled_batches
from sam_examples.training.evaluation import make_evaluate
from sam_examples.training.images import steps_per_call
from sam_examples.training.run import call_means
from sam_examples.training.step import (
    find_gap,
    make_init,
    make_loss_fn,
    make_prepare,
    make_scoring_loss_fn,
    make_step,
    make_train_steps,
)

import optax_sam

SEED = 3


# The stem and the head alone, which compile fast: they have both of what is tested.
MODEL = ResNet((), 3, width=4, conv=PatchConv)
DROPOUT_MODEL = MODEL.clone(dropout_rate=0.5)
NO_MOVE = optax.sgd(0.0)


@cache
def initializer(model):
    return make_init(model, make_dataset())


def compiled_steps(model, tx, augmented=False, **options):
    prepare = make_prepare(make_dataset(), augmented)
    return make_train_steps(make_step(model, tx, prepare, **options))


def train(model, tx, indices, **options):
    """The state before, that after some steps, and the metrics."""
    batches = make_dataset().train.take(np.asarray(indices))
    before, state = initializer(model)(SEED, tx), initializer(model)(SEED, tx)
    keys = jax.random.split(jax.random.key(1), len(indices))
    after, metrics = compiled_steps(model, tx, **options)(state, batches, keys)
    return before, after, metrics


def assert_trees(compare, actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(compare, actual, expected)


@pytest.mark.full
def test_batch_statistics_are_those_of_the_clean_pass():
    dataset = make_dataset()
    tx = optax_sam.sam(optax.sgd(0.1), rho=0.5)
    before, after, _ = train(MODEL, tx, jnp.arange(16).reshape(1, 16))

    images = normalize(dataset.train.images, dataset.mean, dataset.std)
    batch = Split(images, dataset.train.labels)

    @jax.jit
    def statistics_and_gradient(params):
        def loss(params):
            losses, (batch_stats, _) = make_loss_fn(MODEL)(
                params, batch, before.batch_stats, jax.random.key(0)
            )
            return jnp.mean(losses), batch_stats

        gradient, batch_stats = jax.grad(loss, has_aux=True)(params)
        return batch_stats, gradient

    clean, gradient = statistics_and_gradient(before.params)
    assert_trees(
        partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
        after.batch_stats,
        clean,
    )

    # By hand for the first normalisation: a tenth of the batch's, the rest as it was.
    kernel = before.params["PatchConv_0"]["kernel"]
    outputs = PatchConv(4, (3, 3), padding=1).apply(
        {"params": {"kernel": kernel}}, images
    )
    np.testing.assert_allclose(
        after.batch_stats["BatchNorm_0"]["mean"],
        0.1 * jnp.mean(outputs, axis=(0, 1, 2)),
        atol=1e-6,
    )
    # And nothing of the perturbed pass, which has others.
    scale = 0.5 / optax.tree.norm(gradient)
    perturbed, _ = statistics_and_gradient(
        jax.tree.map(lambda p, g: p + scale * g, before.params, gradient)
    )
    assert optax.tree.norm(optax.tree.sub(perturbed, clean)) > 1e-2


@pytest.mark.full
def test_dropout_draws_are_the_same_in_both_passes():
    # With rho = 0 both passes are at the same parameters: only another draw of dropout
    # could make SAM's gradient another than SGD's, up to how XLA rounds two programs.
    indices = shuffled_batches(jax.random.key(0), 16, 4)
    base = momentum_sgd(0.1, 8, 1e-3)
    before, sgd, _ = train(DROPOUT_MODEL, base, indices)
    _, sam, _ = train(DROPOUT_MODEL, optax_sam.sam(base, rho=0.0), indices)
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    assert_trees(close, sam._replace(opt_state=()), sgd._replace(opt_state=()))
    assert optax.tree.norm(optax.tree.sub(sam.params, before.params)) > 0.1


@pytest.mark.full
def test_every_step_has_its_own_dropout():
    batch = jnp.arange(8)
    losses = [
        train(DROPOUT_MODEL, NO_MOVE, jnp.stack(batches))[2].loss
        for batches in ([batch], [batch, batch])
    ]
    assert losses[0] != losses[1]


@pytest.mark.full
@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(method):
    dataset = make_dataset()
    base = momentum_sgd(0.05, 60, 0.0)
    # The defaults are for a larger model and larger batches.
    small = {"rho": 0.05, "micro_batch_size": 4, "every": 2}
    values = hyperparameters([method])[method]
    tx = make_tx(method, base, {k: small.get(k, v) for k, v in values.items()}, 60)
    indices = jnp.concatenate(
        [shuffled_batches(jax.random.key(epoch), 16, 8) for epoch in range(30)]
    )
    before, after, _ = train(MODEL, tx, indices, functional=is_functional(method))
    evaluate = make_evaluate(MODEL, dataset)
    assert (
        evaluate(after, dataset.test).loss < evaluate(before, dataset.test).loss - 0.2
    )


def test_the_gap_is_that_of_the_steps_that_ascend():
    # Parameters do not move, and so the steps are the same but for the ascents.
    indices = jnp.arange(16).reshape(4, 4)
    sam = optax_sam.sam(NO_MOVE, 0.5)
    _, state, of_sam = train(MODEL, sam, indices[::2])
    some = make_tx("every", NO_MOVE, {"rho": 0.5, "k": 2}, 4)
    _, _, of_some = train(MODEL, some, indices)
    assert of_some.gap == pytest.approx(float(of_sam.gap), rel=1e-4)
    gap = find_gap(state.opt_state)
    assert gap == state.opt_state.perturbed_loss - state.opt_state.clean_loss > 0
    one_pass = state.opt_state._replace(perturbed_loss=state.opt_state.clean_loss)
    assert np.isnan(find_gap(one_pass))
    assert find_gap(NO_MOVE.init(state.params)) is None


def test_a_call_without_a_gap_does_not_count_for_that_of_an_epoch():
    calls = [[1.0, 0.5, float("nan")], [3.0, 0.75, 0.25]]
    assert call_means(calls) == {"loss": 2, "accuracy": 0.625, "gap": 0.25}
    assert call_means(calls[:1]) == {"loss": 1, "accuracy": 0.5}
    assert call_means([[1.0, 0.5]]) == {"loss": 1, "accuracy": 0.5}


@pytest.mark.full
def test_perturbations_come_from_the_ascent_loss_and_updates_do_not():
    tx, indices = optax_sam.sam(optax.sgd(0.1), rho=0.5), jnp.arange(16).reshape(1, 16)

    def level(*args):
        losses, aux = make_loss_fn(MODEL)(*args)
        return 0 * losses, aux

    _, unperturbed, metrics = train(MODEL, tx, indices, ascent_loss_fn=level)
    _, sgd, _ = train(MODEL, optax.sgd(0.1), indices)
    _, sam, _ = train(MODEL, tx, indices)
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    assert_trees(close, unperturbed.params, sgd.params)
    assert_trees(close, unperturbed.batch_stats, sgd.batch_stats)
    assert optax.tree.norm(optax.tree.sub(sam.params, sgd.params)) > 1e-3
    assert metrics.loss == 0
    assert metrics.gap is None  # The two losses are not of the same.


@pytest.mark.full
def test_functional_sam_pulls_back_the_clean_derivative():
    tx, indices = optax_sam.sam(optax.sgd(1.0), rho=0.5), jnp.arange(16).reshape(1, 16)
    before, after, _ = train(MODEL, tx, indices, functional=True)
    dataset = make_dataset()
    images = normalize(dataset.train.images, dataset.mean, dataset.std)
    labels = jax.nn.one_hot(dataset.train.labels, 3)

    def outputs_fn(params):
        variables = {"params": params, "batch_stats": before.batch_stats}
        return MODEL.apply(variables, images, train=True, mutable=["batch_stats"])

    @jax.jit
    def by_hand(params):
        logits, pullback, clean_stats = jax.vjp(outputs_fn, params, has_aux=True)
        derivative = (jax.nn.softmax(logits) - labels) / len(labels)
        (uphill,) = pullback(derivative)
        scale = 0.5 / optax.tree.norm(uphill)
        ahead = jax.tree.map(lambda p, u: p + scale * u, params, uphill)
        _, pullback, _ = jax.vjp(outputs_fn, ahead, has_aux=True)
        (gradient,) = pullback(derivative)
        moved = jax.tree.map(lambda p, g: p - g, params, gradient)
        return moved, clean_stats["batch_stats"]

    expected = by_hand(before.params)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    assert_trees(close, (after.params, after.batch_stats), expected)
    _, sam, _ = train(MODEL, tx, indices)
    assert optax.tree.norm(optax.tree.sub(sam.params, after.params)) > 1e-2


@pytest.mark.full
def test_sparse_sam_scores_in_evaluation_mode():
    # In training mode the batch statistics of an example of one would be scored.
    dataset = make_dataset()
    tx = make_tx(
        "sparse_sam", NO_MOVE, {"rho": 1.0, "sparsity": 0.5, "refresh_every": 9}, 1
    )
    before, after, _ = train(DROPOUT_MODEL, tx, jnp.arange(16).reshape(1, 16))
    images = normalize(dataset.train.images, dataset.mean, dataset.std)
    batch = Split(images, dataset.train.labels)
    scoring = make_scoring_loss_fn(DROPOUT_MODEL)
    losses = partial(scoring, batch_stats=before.batch_stats, key=None)
    evaluate = make_evaluate(DROPOUT_MODEL, dataset)
    np.testing.assert_allclose(
        losses(before.params, batch).mean(),
        evaluate(before, dataset.train).loss,
        rtol=1e-5,
    )
    scores = optax_sam.fisher_diagonal(losses, before.params, batch)
    expected = jax.tree.leaves(optax_sam.unstructured(0.5)(scores))
    mask = jax.tree.leaves(optax.tree.get(after.opt_state, "mask"))
    same = sum(int(jnp.sum(a == b)) for a, b in zip(expected, mask, strict=True))
    assert same >= 0.99 * sum(m.size for m in mask)  # Two programs round differently.


@pytest.mark.parametrize("method", ["sparse_sam", "dynamic_sparse_sam"])
def test_hyperparameters_of_sparse_methods_are_checked(method):
    with pytest.raises(ValueError, match="sparsity = 2 is out of range"):
        make_tx(method, NO_MOVE, hyperparameters([method], ["sparsity=2"])[method], 1)
    with pytest.raises(ValueError, match=r"no whole number after '='"):
        hyperparameters([method], ["refresh_every=1.5"])


@pytest.mark.full
def test_dynamic_masks_stay_after_the_training_that_they_are_made_for():
    values = hyperparameters(["dynamic_sparse_sam"], ["refresh_every=1"])
    tx = make_tx("dynamic_sparse_sam", NO_MOVE, values["dynamic_sparse_sam"], 5)
    params = jnp.zeros(64)

    @jax.jit
    def update(state):
        _, state = tx.update(jnp.ones(64), state, params, grad_fn=lambda _: params)
        return state

    state, masks = tx.init(params), []
    for _ in range(8):
        state = update(state)
        masks.append(np.asarray(optax.tree.get(state, "mask")))
    changed = [np.any(a != b) for a, b in pairwise(masks)]
    assert any(changed[:4])
    assert not any(changed[4:])


@pytest.mark.full
def test_training_compiles_once_and_donates_its_state():
    dataset = make_dataset()
    tx = optax_sam.sam(momentum_sgd(0.1, 4, 0.0), rho=0.1)
    init, train_steps = initializer(MODEL), compiled_steps(MODEL, tx)
    for seed in range(2):
        state = first = init(seed, tx)
        for epoch in range(2):
            state, _ = train_steps(state, *draw_epoch(dataset.train, 8, seed, epoch))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))
    assert train_steps._cache_size() == 1


@pytest.mark.full
def test_batches_can_be_shared_among_devices():
    tx = optax_sam.sam(momentum_sgd(0.1, 4, 1e-3), rho=0.1)
    batches = make_dataset().train.take(np.arange(32).reshape(4, 8) % 16)
    keys = jax.random.split(jax.random.key(1), 4)
    mesh = make_mesh()

    def run(placement, batch_sharding):
        train_steps = compiled_steps(MODEL, tx, batch_sharding=batch_sharding)
        state = initializer(MODEL)(SEED, tx)
        inputs = *jax.device_put((state, batches), placement), keys
        compiled = train_steps.lower(*inputs).compile()
        return compiled(*inputs), compiled.cost_analysis()["flops"]

    alone, flops = run(jax.devices()[0], None)
    shared, flops_shared = run(replicated(mesh), by_examples(mesh))
    assert_trees(
        partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), shared, alone
    )
    assert flops_shared < flops / 4
    for leaf in jax.tree.leaves(shared):
        assert leaf.sharding.is_fully_replicated


@pytest.mark.full
def test_metrics_are_means_over_the_steps():
    indices = jnp.arange(16).reshape(2, 8)
    both = train(MODEL, NO_MOVE, indices)[2]
    single = [train(MODEL, NO_MOVE, indices[i : i + 1])[2] for i in range(2)]
    np.testing.assert_allclose(
        both.loss, (single[0].loss + single[1].loss) / 2, rtol=1e-5
    )
    assert both.accuracy == (single[0].accuracy + single[1].accuracy) / 2
    assert both.accuracy * 16 in range(17)


@pytest.mark.full
def test_augmentation_is_applied_on_request():
    indices = jnp.arange(16).reshape(1, 16)
    plain = train(MODEL, NO_MOVE, indices)[2]
    augmented = train(MODEL, NO_MOVE, indices, augmented=True)[2]
    assert abs(plain.loss - augmented.loss) > 1e-3


@pytest.mark.full
@pytest.mark.parametrize("chunk_size", [4, 7, 16, 100])
def test_evaluation_covers_the_whole_split_with_running_statistics(chunk_size):
    dataset, model = make_dataset(), DROPOUT_MODEL
    state = initializer(model)(SEED, optax.sgd(0.1))
    batch_stats = jax.tree.map(lambda x: x + 0.3, state.batch_stats)
    state = state._replace(batch_stats=batch_stats)
    metrics = make_evaluate(model, dataset, chunk_size=chunk_size)(state, dataset.test)

    images = normalize(dataset.test.images, dataset.mean, dataset.std)
    variables = {"params": state.params, "batch_stats": batch_stats}
    logits = jax.jit(partial(model.apply, train=False))(variables, images)
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits, dataset.test.labels
    )
    np.testing.assert_allclose(metrics.loss, jnp.mean(losses), rtol=1e-5)
    correct = jnp.argmax(logits, axis=-1) == dataset.test.labels
    np.testing.assert_allclose(metrics.accuracy, jnp.mean(correct), rtol=1e-6)


def test_epochs_are_shuffled_and_drop_what_fills_no_batch():
    first, second = (shuffled_batches(jax.random.key(i), 10, 4) for i in range(2))
    assert first.shape == (2, 4)
    assert len(np.unique(first)) == 8
    assert np.max(first) < 10
    assert not jnp.array_equal(first, second)


@pytest.mark.parametrize(
    ("steps", "expected"), [(16, 16), (351, 13), (390, 15), (17, 1), (1, 1), (5, 5)]
)
def test_calls_divide_an_epoch_evenly(steps, expected):
    assert steps_per_call(steps) == expected


@pytest.mark.full
def test_learning_rate_falls_to_zero_along_a_cosine_and_weights_decay():
    params = jnp.ones(1)

    def displacements(weight_decay, gradient):
        tx = momentum_sgd(0.4, 4, weight_decay)
        state = tx.init(params)
        for _ in range(5):
            updates, state = tx.update(gradient, state, params)
            yield float(updates[0])

    momentum = np.cumsum(0.9 ** np.arange(5))
    cosine = 0.4 * 0.5 * (1 + np.cos(np.pi * np.arange(5) / 4))
    expected = -cosine * momentum
    np.testing.assert_allclose(
        list(displacements(0.0, jnp.ones(1))), expected, rtol=1e-5, atol=1e-7
    )
    np.testing.assert_allclose(
        list(displacements(0.1, jnp.zeros(1))), 0.1 * expected, rtol=1e-5, atol=1e-7
    )


def test_hyperparameters_are_defaults_then_assignments():
    methods = ["sgd", "sam", "vasso"]
    plain = hyperparameters(methods)
    assert plain == {method: METHODS[method] for method in methods}
    changed = hyperparameters(methods, ["rho=0.3", "vasso.rho=1e-2", "theta=1"])
    assert changed == {
        "sgd": {},
        "sam": {"rho": 0.3},
        "vasso": {"rho": 0.01, "theta": 1.0},
    }
    assert isinstance(changed["vasso"]["theta"], float)
    assert hyperparameters(methods) == plain
    replaced = hyperparameters(["sam"], [], {"sam": {"rho": 7.0}, "asam": {"rho": 8.0}})
    assert replaced == {"sam": {"rho": 7.0}}


def test_micro_batches_have_a_smaller_radius_than_the_batch():
    methods = ["sam", "m_sam", "m_sam+vasso", "m_sam+asam", "asam"]
    values = hyperparameters([*methods, "look_sam", "look_sam+vasso"])
    rho = {method: of_method["rho"] for method, of_method in values.items()}
    share = values["m_sam"]["micro_batch_size"] / NoisyDigits.batch_size
    assert rho["m_sam"] == rho["sam"] * share**0.5
    assert rho["m_sam+vasso"] == rho["m_sam"]
    assert rho["m_sam+asam"] == rho["asam"]
    assert rho["look_sam+vasso"] == rho["look_sam"]


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("theta=0.2", r"no chosen method takes 'theta'; they take sam\.rho"),
        ("asam.rho=1", r"takes 'asam\.rho'"),
        ("rho", "no number after '='; write for example rho="),
        ("rho=big", "no number"),
        ("", "no chosen method"),
    ],
)
def test_wrong_hyperparameters_are_refused(assignment, message):
    with pytest.raises(ValueError, match=message):
        hyperparameters(["sgd", "sam"], [assignment])


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="unknown method 'adam'; choose from sgd, sam"):
        hyperparameters(["adam"])


def test_a_learning_rate_can_fall_as_the_root_of_the_step():
    rate = make_schedule("inverse_sqrt", 0.2, 100, 4)
    expected = [0, 0.1, 0.2, 0.1, 0.04]
    steps = [0, 2, 4, 16, 100]
    np.testing.assert_allclose([rate(s) for s in steps], expected, rtol=1e-6)
    with pytest.raises(ValueError, match="needs a step of warm-up at least"):
        make_schedule("inverse_sqrt", 0.2, 100)
