"""Steps inside `shard_map` and `pmap`, of devices that share a batch by an axis."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from jax.sharding import AxisType, PartitionSpec
from meshes import (
    ASCENTS,
    BATCH,
    DEVICES,
    PROBLEM,
    RADIUS,
    REPLICATED,
    SPLIT,
    base,
    checks,
    collectives,
    make_step,
    mesh,
    on_one_device,
    over_devices,
    train,
)
from methods import cover, defaults

import optax_sam


def assert_trains_like(expected, tx, *, check_vma=True):
    step = over_devices(make_step(tx, axis_name="data"), check_vma=check_vma)
    problems.assert_trees_close(train(step, tx), expected, rtol=2e-5, atol=2e-5)


@cover(
    ascent=ASCENTS.keys(),
    check_vma=[True, False],
    default=("sam-True", "vasso-False", "fisher-False", "reweighted-True"),
)
def test_synchronised_ascents_are_those_of_one_device(ascent, check_vma):
    tx = optax_sam.sharpness_aware(base(), ASCENTS[ascent])
    assert_trains_like(on_one_device(ascent), tx, check_vma=check_vma)


@cover(
    ascent=ASCENTS.keys(),
    check_vma=[True, False],
    default=("sam-False", "vasso-True"),
)
def test_without_synchronisation_devices_are_micro_batches(ascent, check_vma):
    tx = optax_sam.sharpness_aware(base(), ASCENTS[ascent], sync_ascent=False)
    expected = on_one_device(ascent, BATCH // DEVICES)
    assert_trains_like(expected, tx, check_vma=check_vma)


@pytest.mark.parametrize("size", defaults([2, BATCH // DEVICES, BATCH], [2]))
def test_micro_batches_of_a_part_of_a_device_of_one_and_of_all(size):
    tx = optax_sam.sharpness_aware(base(), ASCENTS["vasso"], micro_batch_size=size)
    assert_trains_like(on_one_device("vasso", size), tx)


def test_micro_batches_do_not_span_devices():
    tx = optax_sam.m_sam(base(), 0.1, 16)
    with pytest.raises(ValueError, match=r"16 does not divide the 8 examples of a dev"):
        train(over_devices(make_step(tx, axis_name="data")), tx)
    tx = optax_sam.sharpness_aware(
        base(), RADIUS, sync_ascent=False, micro_batch_size=BATCH
    )
    with pytest.raises(ValueError, match=r"64 does not divide the 8 examples of a dev"):
        train(over_devices(make_step(tx, axis_name="data")), tx)


def noisy_loss(params, batch, key):
    """With dropout; the auxiliary data are of a part, of examples and of nothing."""
    x, labels = batch
    x *= jax.random.bernoulli(key, 0.7, x.shape)
    losses = PROBLEM.loss_fn(params, (x, labels))
    return losses, (jnp.max(losses), losses, key)


def noisy_step(tx, **options):
    step = optax_sam.value_and_update(noisy_loss, tx, has_aux=True, **options)
    key = jax.random.key(1)

    def with_key(params, batch):
        (value, aux), updates, _ = step(params, tx.init(params), batch, key)
        return value, updates, aux

    return with_key


@cover(
    size_sync=[(2, True), (BATCH // DEVICES, True), (2, False), (None, False)],
    check_vma=[True, False],
    default=("(2, True)-True", "(None, False)-False"),
)
def test_draws_are_those_of_micro_batches_on_one_device(size_sync, check_vma):
    size, sync = size_sync
    options = {"micro_batch_size": size, "sync_ascent": sync}
    tx = optax_sam.sharpness_aware(base(), RADIUS, **options)
    step = noisy_step(tx, axis_name="data")

    def local(params, batch):
        value, updates, (largest, losses, key) = step(params, batch)
        return value, updates, (largest[None], losses), key

    over = jax.shard_map(
        local,
        mesh=mesh(),
        in_specs=(REPLICATED, SPLIT),
        out_specs=(REPLICATED, REPLICATED, SPLIT, REPLICATED),
        check_vma=check_vma,
    )
    *actual, (largest, losses), key = jax.jit(over)(PROBLEM.params, PROBLEM.batch)

    one = optax_sam.m_sam(base(), 0.1, size or BATCH // DEVICES)
    *expected, (mean, of_examples, _) = jax.jit(noisy_step(one))(*PROBLEM[::2])
    tolerances = {"rtol": 2e-5, "atol": 2e-6}
    problems.assert_trees_close(actual, expected, **tolerances)
    problems.assert_trees_close(losses, of_examples, **tolerances)
    np.testing.assert_allclose(largest.mean(), mean, rtol=1e-5)
    problems.assert_trees_equal(jax.random.key_data(key), np.array([0, 1], "u4"))


@pytest.mark.parametrize("size", [None, BATCH])
def test_a_device_alone_draws_as_one_that_has_none_beside_it(size):
    tx = optax_sam.sharpness_aware(
        base(), RADIUS, sync_ascent=False, micro_batch_size=size
    )
    sam = optax_sam.sam(base(), 0.1)
    alone = jax.vmap(noisy_step(tx, axis_name="data"), (None, 0), axis_name="data")
    batch = jax.tree.map(lambda x: x[None], PROBLEM.batch)
    actual = jax.tree.map(lambda x: x[0], jax.jit(alone)(PROBLEM.params, batch))
    expected = jax.jit(noisy_step(sam))(PROBLEM.params, PROBLEM.batch)
    problems.assert_trees_close(actual[:2], expected[:2], rtol=1e-5, atol=1e-6)


@cover(
    tx={
        "sgd": optax.sgd(0.1, momentum=0.9),
        "line search": optax.lbfgs(0.5, memory_size=3),
        "needs value": optax_sam.sam(optax.contrib.momo(0.05), 0.1),
        "gsam": optax_sam.gsam(base(), 0.1, 0.2),
        "wsam": optax_sam.wsam(base(), 0.1, 0.8),
        "look_sam": optax_sam.look_sam(base(), 0.1, 2),
    },
    check_vma=[True, False],
    default=("sgd-True", "needs value-False", "gsam-True"),
)
def test_every_optimizer_gets_means_over_devices(tx, check_vma):
    expected = train(make_step(tx), tx, steps=5)
    step = over_devices(make_step(tx, axis_name="data"), check_vma=check_vma)
    actual = train(step, tx, steps=5)
    problems.assert_trees_close(actual, expected, rtol=1e-4, atol=2e-5)


@checks
def test_the_gradient_of_a_function_of_the_value_is_a_mean_over_devices(check_vma):
    def update_fn(updates, state, params, *, value_fn):
        del updates
        return jax.grad(lambda p: -3 * value_fn(p) ** 2)(params), state

    tx = optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)
    state = tx.init(PROBLEM.params)
    expected = jax.jit(make_step(tx))(PROBLEM.params, state, PROBLEM.batch)
    step = over_devices(make_step(tx, axis_name="data"), check_vma=check_vma)
    actual = jax.jit(step)(PROBLEM.params, state, PROBLEM.batch)
    problems.assert_trees_close(actual, expected, rtol=2e-5, atol=2e-6)


def test_the_first_examples_are_those_of_the_first_devices():
    """Others do not count, be they infinite."""
    batch = problems.replaced(np.arange(1, BATCH + 1, dtype="f")[:, None], 9, np.inf)
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
        w = np.zeros(1, np.float32)
        alone = jax.jit(score)(w, batch)
        np.testing.assert_allclose(jax.jit(over)(w, batch), alone, rtol=1e-6)
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
    w, batch = np.zeros(1, np.float16), np.ones((BATCH, 1), np.float16)
    step = jax.jit(over_devices(step, check_vma=check_vma))
    _, updates, _ = step(w, tx.init(w), batch)
    np.testing.assert_allclose(updates, [-2e4], rtol=1e-3)


@pytest.mark.parametrize("sync", defaults([True, False], [False]))
def test_one_bad_device_keeps_all_from_ascending(sync):
    tx = optax_sam.sharpness_aware(
        optax.apply_if_finite(base(), 5), ASCENTS["vasso"], sync_ascent=sync
    )
    images, labels = PROBLEM.batch
    batch = problems.replaced(images, (BATCH - 1, 0), np.nan), labels
    step = jax.jit(over_devices(make_step(tx, axis_name="data")))
    _, _, opt_state = step(PROBLEM.params, tx.init(PROBLEM.params), PROBLEM.batch)
    _, updates, after = step(PROBLEM.params, opt_state, batch)
    problems.assert_trees_equal(after.ascent_state, opt_state.ascent_state)
    assert problems.norm(updates) == 0
    assert after.base_state.notfinite_count == 1


@pytest.mark.full
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
