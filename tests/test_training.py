from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from data import Dataset, Split, normalize
from methods import METHODS, hyperparameters, momentum_sgd
from models.convolution import PatchConv
from models.resnet import ResNet
from training import (
    make_evaluate,
    make_init,
    make_loss_fn,
    make_train_steps,
    shuffled_batches,
    steps_per_call,
)

import optax_sam

SEED = 3


def make_dataset(size=16):
    rng = np.random.default_rng(0)
    images = rng.normal(2, 3, (size, 4, 4, 1)).astype(np.float32)
    split = Split(images, rng.integers(0, 3, size).astype(np.int32))
    mean, std = np.array([2], np.float32), np.array([3], np.float32)
    return Dataset("noise", 3, split, split, split, mean, std)


def make_model(dropout_rate=0.0):
    return ResNet((1,), 3, width=4, conv=PatchConv, dropout_rate=dropout_rate)


def train(model, tx, dataset, indices, **kwargs):
    """The state before, that after some steps, and the metrics."""
    init = make_init(model, dataset)
    before, state = init(SEED, tx), init(SEED, tx)
    train_steps = make_train_steps(model, tx, dataset, **kwargs)
    after, metrics = train_steps(state, dataset.train, indices, jax.random.key(1))
    return before, after, metrics


def assert_trees(compare, actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(compare, actual, expected)


def test_batch_statistics_are_those_of_the_clean_pass():
    dataset, model = make_dataset(), make_model()
    tx = optax_sam.sam(optax.sgd(0.1), rho=0.5)
    indices = jnp.arange(16).reshape(1, 16)
    before, after, _ = train(model, tx, dataset, indices)

    images = normalize(dataset.train.images, dataset.mean, dataset.std)
    batch = Split(images, dataset.train.labels)

    @jax.jit
    def statistics_and_gradient(params):
        def loss(params):
            losses, (batch_stats, _) = make_loss_fn(model)(
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


def test_dropout_draws_are_the_same_in_both_passes():
    # With rho = 0 both passes are at the same parameters: only another draw of dropout
    # could make SAM's gradient another than SGD's.
    dataset, model = make_dataset(), make_model(dropout_rate=0.5)
    indices = shuffled_batches(jax.random.key(0), 16, 4)
    base = momentum_sgd(0.1, 8, 1e-3)
    _, sgd, _ = train(model, base, dataset, indices)
    _, sam, _ = train(model, optax_sam.sam(base, rho=0.0), dataset, indices)
    assert_trees(np.testing.assert_array_equal, sam.params, sgd.params)
    assert_trees(np.testing.assert_array_equal, sam.batch_stats, sgd.batch_stats)


def test_every_step_has_its_own_dropout():
    dataset, model = make_dataset(), make_model(dropout_rate=0.5)
    no_move = optax.sgd(0.0)
    batch = jnp.arange(8)
    losses = [
        train(model, no_move, dataset, jnp.stack(batches))[2].loss
        for batches in ([batch], [batch, batch])
    ]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(method):
    dataset, model = make_dataset(), make_model()
    base = momentum_sgd(0.05, 60, 0.0)
    tx = METHODS[method](base, **METHODS[method].keywords)
    indices = jnp.concatenate(
        [shuffled_batches(jax.random.key(epoch), 16, 8) for epoch in range(30)]
    )
    before, after, _ = train(model, tx, dataset, indices)
    evaluate = make_evaluate(model, dataset)
    assert (
        evaluate(after, dataset.test).loss < evaluate(before, dataset.test).loss - 0.2
    )


def test_training_compiles_once_and_donates_its_state():
    dataset, model = make_dataset(), make_model()
    tx = optax_sam.sam(momentum_sgd(0.1, 4, 0.0), rho=0.1)
    init, train_steps = make_init(model, dataset), make_train_steps(model, tx, dataset)
    for seed in range(2):
        state = first = init(seed, tx)
        for epoch in range(2):
            key = jax.random.key(epoch)
            indices = shuffled_batches(key, 16, 8)
            state, _ = train_steps(state, dataset.train, indices, key)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))
    assert train_steps._cache_size() == 1


def test_metrics_are_means_over_the_steps():
    dataset, model = make_dataset(), make_model()
    no_move = optax.sgd(0.0)
    indices = jnp.arange(16).reshape(2, 8)
    both = train(model, no_move, dataset, indices)[2]
    single = [train(model, no_move, dataset, indices[i : i + 1])[2] for i in range(2)]
    np.testing.assert_allclose(
        both.loss, (single[0].loss + single[1].loss) / 2, rtol=1e-5
    )
    assert both.accuracy == (single[0].accuracy + single[1].accuracy) / 2
    assert both.accuracy * 16 in range(17)


def test_augmentation_is_applied_on_request():
    dataset, model = make_dataset(), make_model()
    no_move = optax.sgd(0.0)
    indices = jnp.arange(16).reshape(1, 16)
    plain = train(model, no_move, dataset, indices)[2]
    augmented = train(model, no_move, dataset, indices, augmented=True)[2]
    assert abs(plain.loss - augmented.loss) > 1e-3


@pytest.mark.parametrize("chunk_size", [4, 7, 16, 100])
def test_evaluation_covers_the_whole_split_with_running_statistics(chunk_size):
    dataset, model = make_dataset(), make_model(dropout_rate=0.5)
    state = make_init(model, dataset)(SEED, optax.sgd(0.1))
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
    assert plain == {method: METHODS[method].keywords for method in methods}
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
