"""The losses of a step's passes, which its state has for nothing."""

import jax
import jax.numpy as jnp
import optax
import problems
import pytest
from meshes import (
    BATCH,
    DEVICES,
    PROBLEM,
    RADIUS,
    base,
    collectives,
    data_parallel,
    fully_sharded,
    make_step,
    over_devices,
)
from methods import cover

import optax_sam
from optax_sam import diagnostics

MEASURE = jax.jit(diagnostics.ascent_metrics(PROBLEM.loss_fn, RADIUS))


def found(state):
    return [
        float(optax.tree.get(state, f"{name}_loss")) for name in ("clean", "perturbed")
    ]


def expected(size=BATCH):
    """The means over groups of neighbours that ascend each for itself."""
    groups = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), PROBLEM.batch)
    state = RADIUS.init(PROBLEM.params)
    metrics = jax.vmap(lambda batch: MEASURE(PROBLEM.params, state, batch))(groups)
    return [float(jnp.mean(x)) for x in (metrics.clean_loss, metrics.perturbed_loss)]


def take_step(tx, step=None, params=PROBLEM.params, batch=PROBLEM.batch):
    step = make_step(tx) if step is None else step
    return jax.jit(step)(params, tx.init(params), batch)


def test_they_are_those_of_both_passes():
    tx = optax_sam.sam(base(), 0.1)
    state = tx.init(PROBLEM.params)
    assert found(state) == [0, 0]
    value, _, state = take_step(tx)
    assert found(state) == pytest.approx(expected(), rel=1e-5)
    assert found(state)[0] == value
    _, perturbed = found(state)
    assert perturbed > float(value) + 1e-3


def test_links_of_the_base_and_wrappers_change_nothing():
    for tx in (
        optax_sam.wsam(optax.adam(0.1), 0.1, 0.9),
        optax_sam.look_sam(base(), 0.1),
        optax.inject_hyperparams(optax_sam.sam)(base(), rho=0.1),
        optax_sam.sam(optax.MultiSteps(base(), 2), 0.1),
    ):
        assert found(take_step(tx)[2]) == pytest.approx(expected(), rel=1e-5)


@cover(size=[8, 32], at_once=[1, None])
def test_of_micro_batches_they_are_means(size, at_once):
    tx = optax_sam.m_sam(base(), 0.1, size, micro_batches_at_once=at_once)
    value, _, state = take_step(tx)
    assert found(state) == pytest.approx(expected(size), rel=1e-5)
    assert found(state)[0] == pytest.approx(float(value), rel=1e-6)


@cover(sync=[True, False], check_vma=[True, False])
def test_of_devices_they_are_means(sync, check_vma):
    tx = optax_sam.sharpness_aware(base(), RADIUS, sync_ascent=sync)
    step = over_devices(make_step(tx, axis_name="data"), check_vma=check_vma)
    _, _, state = take_step(tx, step)
    size = BATCH if sync else BATCH // DEVICES
    assert found(state) == pytest.approx(expected(size), rel=1e-5)


def test_of_sharded_arrays_they_are_those_of_all_examples():
    tx = optax_sam.sam(base(), 0.1)
    params = data_parallel(PROBLEM.params)
    _, _, state = take_step(tx, params=params, batch=fully_sharded(PROBLEM.batch))
    assert found(state) == pytest.approx(expected(), rel=1e-5)


def test_where_the_ascent_has_a_loss_of_its_own_the_clean_one_is_that():
    def triple(params, batch):
        return 3 * PROBLEM.loss_fn(params, batch)

    tx = optax_sam.sam(base(), 0.1)
    value, _, state = take_step(tx, make_step(tx, ascent_loss_fn=triple))
    clean, perturbed = expected()
    assert found(state) == pytest.approx([3 * clean, perturbed], rel=1e-5)
    assert value == pytest.approx(3 * clean, rel=1e-5)


def test_by_hand_they_are_known_with_the_clean_one_only():
    tx = optax_sam.sam(base(), 0.1)
    params, state = PROBLEM.params, tx.init(PROBLEM.params)
    mean_loss = problems.mean_loss(PROBLEM)
    value, grads = jax.value_and_grad(mean_loss)(params)
    given = {"loss_fn": PROBLEM.loss_fn, "batch": PROBLEM.batch}
    for arguments, losses in (
        (given, [0, 0]),
        (given | {"value": value}, expected()),
        (given | {"losses": PROBLEM.loss_fn(params, PROBLEM.batch)}, expected()),
        ({"grad_fn": jax.grad(mean_loss), "value": value}, [0, 0]),
    ):
        _, after = tx.update(grads, state, params, **arguments)
        assert found(after) == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("ascend_when", [None, optax_sam.every(2)])
def test_of_devices_that_have_a_gradient_by_hand_they_are_not_known(ascend_when):
    tx = optax_sam.sharpness_aware(
        base(), RADIUS, axis_name="data", sync_ascent=False, ascend_when=ascend_when
    )

    def step(params, state, batch):
        own = jax.lax.pcast(params, "data", to="varying")

        def grad_fn(p):
            return jax.grad(lambda p: PROBLEM.loss_fn(p, batch).mean())(p)

        value = jnp.mean(PROBLEM.loss_fn(own, batch))
        _, state = tx.update(grad_fn(own), state, params, grad_fn=grad_fn, value=value)
        return state

    state = jax.jit(over_devices(step))(
        PROBLEM.params, tx.init(PROBLEM.params), PROBLEM.batch
    )
    assert found(state) == [0, 0]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_they_are_in_the_default_float_type(dtype):
    problem = problems.perceptron(dtype)
    tx = optax_sam.sam(base(), 0.1)
    step = jax.jit(optax_sam.value_and_update(problem.loss_fn, tx))
    state = tx.init(problem.params)
    _, _, after = step(problem.params, state, problem.batch)
    assert after.clean_loss.dtype == after.perturbed_loss.dtype == jnp.float32
    with jax.enable_x64(True):
        state = tx.init(problem.params)
        _, _, after = step(problem.params, state, problem.batch)
        assert state.clean_loss.dtype == after.perturbed_loss.dtype == jnp.float64


def compiled(tx, kept):
    """A program that returns all of a step, or what there was before the losses."""
    step = make_step(tx)

    def run(*inputs):
        value, updates, state = step(*inputs)
        if not kept:
            state = state.ascent_state, state.base_state
        return value, updates, state

    params = data_parallel(PROBLEM.params)
    batch = fully_sharded(PROBLEM.batch)
    return jax.jit(run).lower(params, tx.init(params), batch).compile()


@pytest.mark.parametrize("size", [None, BATCH // DEVICES])
def test_they_cost_a_mean(size):
    tx = optax_sam.sharpness_aware(
        base(), RADIUS, micro_batch_size=size, micro_batches_at_once=None
    )
    with_losses, without = (compiled(tx, kept) for kept in (True, False))
    flops = [x.cost_analysis()["flops"] for x in (with_losses, without)]
    assert 0 <= flops[0] - flops[1] < 8 * BATCH  # Less than a tenth of a pass.
    sizes = [[size for _, size in collectives(x)] for x in (with_losses, without)]
    arrays = [sum(size > DEVICES for size in found) for found in sizes]
    assert arrays[0] == arrays[1] > 0
    assert sum(sizes[0]) - sum(sizes[1]) <= 2
