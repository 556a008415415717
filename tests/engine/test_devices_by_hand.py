"""Updates by hand inside `pmap` and `shard_map`, with gradients of each device."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from meshes import (
    ASCENTS,
    BATCH,
    DEVICES,
    PROBLEM,
    RADIUS,
    base,
    make_step,
    mean_gradient,
    on_one_device,
    over_devices,
    train,
)
from methods import cover

import optax_sam


@cover(sync=[True, False], given=["grad_fn", "loss_fn"])
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
    state = jax.tree.map(lambda x: np.stack([x] * DEVICES), state)
    batch = jax.tree.map(lambda x: x.reshape(DEVICES, -1, *x.shape[1:]), PROBLEM.batch)
    for _ in range(20):
        state = step(*state, batch)
    state = problems.without_losses(jax.device_get(state))
    expected, _ = on_one_device("vasso", None if sync else BATCH // DEVICES)
    expected = problems.without_losses(expected)
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
    states = map(problems.without_losses, (actual, expected))
    problems.assert_trees_close(*states, rtol=2e-5, atol=2e-5)
    # A sum or a mean? There is no way to tell.
    with pytest.raises(ValueError, match=r"same on all devices of 'data'.*pcast"):
        train(over_devices(partial(step, cast=False)), tx)


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
    states = map(problems.without_losses, (actual, expected))
    problems.assert_trees_close(*states, rtol=1e-4, atol=2e-5)


@cover(sync=[True, False], ascent=["reweighted", "fisher by probes"])
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
