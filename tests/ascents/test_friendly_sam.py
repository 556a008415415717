import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references

import optax_sam

SGD = optax.sgd(0.1, momentum=0.9)


@pytest.mark.parametrize("decay", [0.0, 1e-2])
def test_steps_are_those_of_the_paper(decay):
    rho, sigma, beta = 0.5, 0.8, 0.7
    common = []

    def step(w, g, gradient_at):
        direction = g - sigma * common[-1] if common else g
        common.append(beta * common[-1] + (1 - beta) * g if common else g)
        return gradient_at(w + references.scaled(direction, rho)), 0

    base = references.Sgd(decay)
    tx = optax_sam.friendly_sam(base.tx, rho, sigma, beta)
    references.assert_replays(tx, step, base)


def test_sigma_zero_is_sam_and_rho_zero_the_base():
    friendly = optax_sam.friendly_sam
    references.assert_is(friendly(SGD, 0.1, sigma=0.0), optax_sam.sam(SGD, 0.1))
    references.assert_is(friendly(SGD, 0.0), SGD)


def test_nothing_is_left_of_gradients_that_are_all_the_same():
    link = optax_sam.remove_common_direction()
    g = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(3.0)}
    state = link.init(g)
    first, state = link.update(g, state)
    second, state = link.update(g, state)
    np.testing.assert_array_equal(first["a"], g["a"])
    assert not any(map(np.any, jax.tree.leaves(second)))


def test_the_average_is_in_float32_and_absent_where_nothing_is_perturbed():
    params = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2)}
    ascent = optax.chain(
        optax_sam.perturb_only({"a": True, "b": False}),
        optax_sam.remove_common_direction(),
    )
    state = ascent.init(params)
    direction, state = ascent.update(params, state, params)
    assert state[1].common["a"].dtype == jnp.float32
    assert isinstance(direction["b"], optax.MaskedNode)
    np.testing.assert_array_equal(state[1].common["b"], 0)
