"""Steps inside `shard_map` and `pmap`, of devices that share a batch by an axis."""

import functools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from jax.sharding import AxisType, PartitionSpec
from test_distributed import BATCH, DEVICES, PROBLEM, collectives, mesh

import optax_sam

REPLICATED, SPLIT = PartitionSpec(), PartitionSpec("data")
RADIUS = optax_sam.scale_to_radius(0.1)

ASCENTS = {
    "sam": RADIUS,
    "asam": optax_sam.adapt_to_scale(0.5),
    "vasso": optax.chain(optax_sam.suppress_variance(0.4), RADIUS),
    # Of 20 examples, 12 are on other devices than the first.
    "fisher": optax.chain(
        RADIUS,
        optax_sam.sparsify_by_fisher(
            optax_sam.unstructured(0.5), refresh_every=3, num_examples=20
        ),
    ),
    "fisher by probes": optax.chain(
        RADIUS,
        optax_sam.sparsify_by_fisher(
            optax_sam.n_m(2, 4), refresh_every=3, num_examples=20, estimator="probes"
        ),
    ),
    "dynamic": optax.chain(
        RADIUS,
        optax_sam.sparsify_dynamically(
            0.5, refresh_every=3, decay_steps=20, drop_by="weight", key=0
        ),
    ),
    "reweighted": optax.chain(
        optax_sam.reweight_by_sharpness(
            0.5, key=0, estimator="jvp", num_probes=2, normalize=True
        ),
        RADIUS,
    ),
}
every_ascent = pytest.mark.parametrize("ascent", ASCENTS)
checks = pytest.mark.parametrize("check_vma", [True, False])


def base():
    return optax.sgd(0.1, momentum=0.9)


def over_devices(step, *, check_vma=True):
    """`shard_map` of a step that returns what is the same on all devices."""
    return jax.shard_map(
        step,
        mesh=mesh(),
        in_specs=(REPLICATED, REPLICATED, SPLIT),
        out_specs=REPLICATED,
        check_vma=check_vma,
    )


def make_step(tx, **options):
    return optax_sam.value_and_update(PROBLEM.loss_fn, tx, **options)


def train(step, tx, steps=20):
    """Parameters and state after some steps, and the value before each."""

    def body(carry, _):
        params, opt_state = carry
        value, updates, opt_state = step(params, opt_state, PROBLEM.batch)
        return (optax.apply_updates(params, updates), opt_state), value

    @jax.jit
    def run(params, opt_state):
        return jax.lax.scan(body, (params, opt_state), length=steps)

    return run(PROBLEM.params, tx.init(PROBLEM.params))


@functools.cache
def on_one_device(ascent, micro_batch_size=None):
    tx = optax_sam.sharpness_aware(
        base(),
        ASCENTS[ascent],
        micro_batch_size=micro_batch_size,
        micro_batches_at_once=None,
    )
    return train(make_step(tx), tx)


def assert_trains_like(expected, tx, *, check_vma=True):
    step = over_devices(make_step(tx, axis_name="data"), check_vma=check_vma)
    problems.assert_trees_close(train(step, tx), expected, rtol=2e-5, atol=2e-5)


@checks
@every_ascent
def test_synchronised_ascents_are_those_of_one_device(ascent, check_vma):
    tx = optax_sam.sharpness_aware(base(), ASCENTS[ascent])
    assert_trains_like(on_one_device(ascent), tx, check_vma=check_vma)


@checks
@every_ascent
def test_without_synchronisation_devices_are_micro_batches(ascent, check_vma):
    tx = optax_sam.sharpness_aware(base(), ASCENTS[ascent], sync_ascent=False)
    expected = on_one_device(ascent, BATCH // DEVICES)
    assert_trains_like(expected, tx, check_vma=check_vma)


@pytest.mark.parametrize("size", [2, BATCH // DEVICES, BATCH])
def test_micro_batches_of_a_part_of_a_device_of_one_and_of_all(size):
    tx = optax_sam.sharpness_aware(base(), ASCENTS["vasso"], micro_batch_size=size)
    assert_trains_like(on_one_device("vasso", size), tx)


def test_micro_batches_do_not_span_devices():
    tx = optax_sam.m_sam(base(), 0.1, 16)
    with pytest.raises(ValueError, match=r"16 does not divide the 8 examples of a dev"):
        train(over_devices(make_step(tx, axis_name="data")), tx)


def mean_gradient(params, batch):
    return jax.grad(lambda p: jnp.mean(PROBLEM.loss_fn(p, batch)))(params)


@pytest.mark.parametrize("sync", [True, False])
@pytest.mark.parametrize("given", ["grad_fn", "loss_fn"])
def test_by_hand_in_pmap(sync, given):
    """Gradients are those of each device, and so are the arguments of update."""
    tx = optax_sam.sharpness_aware(
        base(), ASCENTS["vasso"], axis_name="data", sync_ascent=sync
    )

    def step(params, opt_state, batch):
        arguments = {"grad_fn": partial(mean_gradient, batch=batch)}
        if given == "loss_fn":
            arguments = {"loss_fn": PROBLEM.loss_fn, "batch": batch}
        grads = mean_gradient(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params, **arguments)
        return optax.apply_updates(params, updates), opt_state

    # The state of a device is kept on it, as users of pmap do.
    step = jax.pmap(step, axis_name="data", in_axes=(0, 0, 0))
    state = PROBLEM.params, tx.init(PROBLEM.params)
    state = jax.tree.map(lambda x: jnp.stack([x] * DEVICES), state)
    batch = jax.tree.map(lambda x: x.reshape(DEVICES, -1, *x.shape[1:]), PROBLEM.batch)
    for _ in range(20):
        state = step(*state, batch)
    expected, _ = on_one_device("vasso", None if sync else BATCH // DEVICES)
    for device in range(DEVICES):
        of_device = jax.tree.map(lambda x, i=device: x[i], state)
        problems.assert_trees_close(of_device, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("sync", [True, False])
def test_by_hand_in_shard_map(sync):
    tx = optax_sam.sharpness_aware(base(), RADIUS, axis_name="data", sync_ascent=sync)

    def step(params, opt_state, batch, *, cast=True):
        own = jax.lax.pcast(params, "data", to="varying") if cast else params
        updates, opt_state = tx.update(
            mean_gradient(own, batch),
            opt_state,
            params,
            grad_fn=partial(mean_gradient, batch=batch),
        )
        return jnp.zeros([]), updates, opt_state

    actual, _ = train(over_devices(step), tx)
    expected, _ = on_one_device("sam", None if sync else BATCH // DEVICES)
    problems.assert_trees_close(actual, expected, rtol=2e-5, atol=2e-5)
    # A sum or a mean? There is no way to tell.
    with pytest.raises(ValueError, match=r"same on all devices of 'data'.*pcast"):
        train(over_devices(partial(step, cast=False)), tx)


@checks
@pytest.mark.parametrize(
    "tx",
    [
        optax.sgd(0.1, momentum=0.9),
        optax.lbfgs(0.5, memory_size=3),
        optax_sam.sam(optax.contrib.momo(0.05), 0.1),
    ],
    ids=["sgd", "line search", "needs value"],
)
def test_every_optimizer_gets_means_over_devices(tx, check_vma):
    expected = train(make_step(tx), tx, steps=5)
    step = over_devices(make_step(tx, axis_name="data"), check_vma=check_vma)
    actual = train(step, tx, steps=5)
    problems.assert_trees_close(actual, expected, rtol=1e-4, atol=2e-5)


def test_the_first_examples_are_those_of_the_first_devices():
    """Others do not count, be they infinite."""
    batch = jnp.arange(1.0, BATCH + 1)[:, None].at[9].set(jnp.inf)
    for num_examples, chunk_size in ((9, 4), (3, 2), (8, 8)):
        score = partial(
            optax_sam.fisher_diagonal,
            lambda w, batch: jnp.sum(w[None] * batch, axis=-1),
            num_examples=num_examples,
            chunk_size=chunk_size,
        )
        over = jax.shard_map(
            lambda w, batch, score=score: score(w, batch, axis_name="data"),
            mesh=mesh(),
            in_specs=(REPLICATED, SPLIT),
            out_specs=REPLICATED,
        )
        w = jnp.zeros(1)
        np.testing.assert_allclose(over(w, batch), score(w, batch), rtol=1e-6)
    with pytest.raises(ValueError, match=r"fisher_diagonal: axis_name = 'data' is"):
        score(w, batch, axis_name="data")


def test_several_axes():
    names = ("host", "device")
    grid = jax.make_mesh((2, 4), names, axis_types=(AxisType.Auto,) * 2)
    tx = optax_sam.sharpness_aware(base(), ASCENTS["fisher"])
    step = jax.shard_map(
        make_step(tx, axis_name=names),
        mesh=grid,
        in_specs=(REPLICATED, REPLICATED, PartitionSpec(names)),
        out_specs=REPLICATED,
    )
    expected = on_one_device("fisher")
    problems.assert_trees_close(train(step, tx), expected, rtol=2e-5, atol=2e-5)


@checks
def test_a_loss_that_is_a_mean_over_devices_already(check_vma):
    tx = optax_sam.sam(base(), 0.1)

    def loss_fn(params, batch):
        return jax.lax.pmean(jnp.mean(PROBLEM.loss_fn(params, batch)), "data")

    named = optax_sam.value_and_update(loss_fn, tx, axis_name="data")
    unnamed = optax_sam.value_and_update(loss_fn, tx)
    for step in (named, unnamed) if check_vma else (named,):
        actual = train(over_devices(step, check_vma=check_vma), tx)
        expected = on_one_device("sam")
        problems.assert_trees_close(actual, expected, rtol=2e-5, atol=2e-5)


def test_a_forgotten_axis_is_refused():
    tx = optax_sam.sam(base(), 0.1)
    with pytest.raises(
        ValueError, match=r"differ along the axes \['data'\].*axis_name"
    ):
        train(over_devices(make_step(tx)), tx)


@checks
def test_the_sum_over_devices_may_exceed_half_precision(check_vma):
    tx = optax_sam.sam(optax.sgd(1.0), 0.1)
    step = optax_sam.value_and_update(
        lambda w, batch: 2e4 * w[0] * batch[:, 0], tx, axis_name="data"
    )
    w = jnp.zeros(1, jnp.float16)
    batch = jnp.ones((BATCH, 1), jnp.float16)
    _, updates, _ = over_devices(step, check_vma=check_vma)(w, tx.init(w), batch)
    np.testing.assert_allclose(updates, [-2e4], rtol=1e-3)


def test_by_hand_the_base_gets_the_mean_value():
    tx = optax_sam.sharpness_aware(optax.contrib.momo(1e3), RADIUS, axis_name="data")

    def step(params, opt_state, batch):
        own = jax.lax.pcast(params, "data", to="varying")
        value, grads = jax.value_and_grad(
            lambda p: jnp.mean(PROBLEM.loss_fn(p, batch))
        )(own)
        grad_fn = partial(mean_gradient, batch=batch)
        updates, opt_state = tx.update(
            grads, opt_state, params, grad_fn=grad_fn, value=value
        )
        return jax.lax.pmean(value, "data"), updates, opt_state

    alone = optax_sam.sam(optax.contrib.momo(1e3), 0.1)
    expected = train(make_step(alone), alone, steps=3)
    actual = train(over_devices(step), tx, steps=3)
    problems.assert_trees_close(actual, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("sync", [True, False])
@pytest.mark.parametrize("ascent", ["reweighted", "fisher by probes"])
def test_a_pullback_that_adds_up_devices_is_refused(ascent, sync):
    tx = optax_sam.sharpness_aware(base(), ASCENTS[ascent], sync_ascent=sync)

    def step(params, opt_state, batch):
        losses, pull = jax.vjp(lambda p: PROBLEM.loss_fn(p, batch), params)
        updates, opt_state = tx.update(
            jax.tree.map(jnp.zeros_like, params),
            opt_state,
            params,
            loss_fn=PROBLEM.loss_fn,
            batch=batch,
            losses=losses,
            pullback=lambda w: pull(w)[0],
            axis_name="data",
        )
        return jnp.zeros([]), updates, opt_state

    with pytest.raises(ValueError, match=r"same on all devices of 'data'.*pcast"):
        train(over_devices(step), tx)


@pytest.mark.parametrize("sync", [True, False])
def test_one_bad_device_keeps_all_from_ascending(sync):
    tx = optax_sam.sharpness_aware(
        optax.apply_if_finite(base(), 5), ASCENTS["vasso"], sync_ascent=sync
    )
    images, labels = PROBLEM.batch
    batch = images.at[BATCH - 1, 0].set(jnp.nan), labels
    step = jax.jit(over_devices(make_step(tx, axis_name="data")))
    _, _, opt_state = step(PROBLEM.params, tx.init(PROBLEM.params), PROBLEM.batch)
    _, updates, after = step(PROBLEM.params, opt_state, batch)
    problems.assert_trees_equal(after.ascent_state, opt_state.ascent_state)
    assert problems.norm(updates) == 0
    assert after.base_state.notfinite_count == 1


class Net(nn.Module):
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16)(x)
        x = nn.BatchNorm(use_running_average=False, axis_name=self.axis_name)(x)
        return nn.Dense(8)(nn.relu(x))


def norm_loss_fn(model):
    def loss_fn(params, batch, statistics):
        logits, updated = model.apply(
            {"params": params, "batch_stats": statistics},
            batch[0],
            mutable=["batch_stats"],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
        return losses, updated["batch_stats"]

    return loss_fn


@checks
@pytest.mark.parametrize("across", [True, False])
def test_batch_normalisation_with_and_without_statistics_across_devices(
    across, check_vma
):
    variables = Net().init(jax.random.key(0), PROBLEM.batch[0])
    params, statistics = variables["params"], variables["batch_stats"]
    tx = optax_sam.sam(optax.sgd(1.0), 0.1)
    opt_state = tx.init(params)

    def whole(params, batch, statistics):
        """One device: one normalisation, or one for what each device would have."""
        if across:
            return norm_loss_fn(Net())(params, batch, statistics)
        parts = jax.tree.map(lambda x: x.reshape(DEVICES, -1, *x.shape[1:]), batch)
        losses, updated = jax.vmap(norm_loss_fn(Net()), (None, 0, None))(
            params, parts, statistics
        )
        return losses.reshape(-1), updated

    expected = optax_sam.value_and_update(whole, tx, has_aux=True)(
        params, opt_state, PROBLEM.batch, statistics
    )

    def local(params, opt_state, batch):
        model = Net("data" if across else None)
        step = optax_sam.value_and_update(
            norm_loss_fn(model), tx, has_aux=True, axis_name="data"
        )
        (value, updated), updates, opt_state = step(
            params, opt_state, batch, statistics
        )
        # Statistics are a device's own, even where they are equal.
        updated = jax.tree.map(lambda x: x[None], updated)
        return (value, updated), updates, opt_state

    actual = jax.jit(
        jax.shard_map(
            local,
            mesh=mesh(),
            in_specs=(REPLICATED, REPLICATED, SPLIT),
            out_specs=((REPLICATED, SPLIT), REPLICATED, REPLICATED),
            check_vma=check_vma,
        )
    )(params, opt_state, PROBLEM.batch)
    (value, updated), *others = actual
    (expected_value, expected_updated), *expected_others = expected
    problems.assert_trees_close(
        (value, others), (expected_value, expected_others), rtol=1e-4, atol=2e-6
    )
    expected_updated = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (DEVICES, *x.shape[-1:])), expected_updated
    )
    problems.assert_trees_close(updated, expected_updated, rtol=1e-4, atol=1e-6)


@checks
def test_collectives(check_vma):
    """Two reductions of gradients, one where devices ascend alone, and no others."""

    def arrays(ascent, **options):
        tx = optax_sam.sharpness_aware(base(), ASCENTS[ascent], **options)
        step = over_devices(make_step(tx, axis_name="data"), check_vma=check_vma)
        inputs = PROBLEM.params, tx.init(PROBLEM.params), PROBLEM.batch
        found = collectives(jax.jit(step).lower(*inputs).compile())
        assert {kind for kind, _ in found} == {"all-reduce"}
        return sum(size for _, size in found if size > DEVICES) / entries

    entries = sum(x.size for x in jax.tree.leaves(PROBLEM.params))
    near = partial(pytest.approx, abs=0.05)  # Scalars may travel with them.
    for ascent in ("sam", "vasso", "dynamic", "reweighted"):
        assert arrays(ascent) == near(2)
    for ascent in ("sam", "asam"):
        assert arrays(ascent, sync_ascent=False) == near(1)
    # These have the mean of the clean gradients in their states.
    for ascent in ("vasso", "dynamic"):
        assert arrays(ascent, sync_ascent=False) == near(2)


def test_refuses_an_axis_that_is_not_there_or_another():
    step = make_step(optax_sam.sam(base(), 0.1), axis_name="rows")
    inputs = PROBLEM.params, optax_sam.sam(base(), 0.1).init(PROBLEM.params)
    with pytest.raises(ValueError, match=r"value_and_update: axis_name = 'rows' is"):
        step(*inputs, PROBLEM.batch)
    with pytest.raises(ValueError, match=r"value_and_update: axis_name = 'rows' is"):
        jax.jit(over_devices(step))(*inputs, PROBLEM.batch)
    for options, message in (
        ({"axis_name": "rows"}, r"sharpness_aware: axis_name = 'rows' is the name of"),
        ({"sync_ascent": False}, r"sync_ascent=False .* axis_name is missing"),
    ):
        tx = optax_sam.sharpness_aware(base(), RADIUS, **options)
        with pytest.raises(ValueError, match=message):
            make_step(tx)(*inputs, PROBLEM.batch)
    tx = optax_sam.sharpness_aware(base(), RADIUS, axis_name="rows")
    with pytest.raises(ValueError, match=r"'rows', but update was called with .*'data"):
        jax.jit(over_devices(make_step(tx, axis_name="data")))(*inputs, PROBLEM.batch)
    with pytest.raises(TypeError, match=r"sync_ascent must be True or False, got 1"):
        optax_sam.sharpness_aware(base(), RADIUS, sync_ascent=1)


def test_a_mean_gradient_does_not_tell_what_each_device_ascends_along():
    tx = optax_sam.sharpness_aware(base(), RADIUS, sync_ascent=False)

    def step(params, opt_state, batch):
        grads = jax.lax.pmean(mean_gradient(params, batch), "data")
        return tx.update(
            grads,
            opt_state,
            params,
            loss_fn=PROBLEM.loss_fn,
            batch=batch,
            axis_name="data",
        )

    with pytest.raises(ValueError, match=r"sync_ascent=False: losses is missing"):
        jax.jit(over_devices(step, check_vma=False))(
            PROBLEM.params, tx.init(PROBLEM.params), PROBLEM.batch
        )
