import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import optax_sam


def epsilon(rho, grads, params=None):
    ascent = optax_sam.scale_to_radius(rho)
    return ascent.update(grads, ascent.init(grads), params)[0]


def test_closed_form_over_the_whole_tree():
    out = epsilon(0.5, {"a": jnp.array([[3.0]]), "b": jnp.array(4.0)})
    np.testing.assert_allclose(out["a"], [[0.3]], rtol=1e-6)
    np.testing.assert_allclose(out["b"], 0.4, rtol=1e-6)


def test_zero_gradient_gives_zero():
    np.testing.assert_array_equal(epsilon(0.5, jnp.zeros(4)), np.zeros(4))


def test_float16_gradients_whose_squares_overflow():
    out = epsilon(0.5, jnp.full(16, 6e4, jnp.float16))
    assert out.dtype == jnp.float16
    np.testing.assert_array_equal(out, np.full(16, 0.125, np.float16))


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
def test_scale_of_the_loss_drops_out(scale):
    grads = problems.quadratic().params
    problems.assert_trees_equal(
        epsilon(0.1, jax.tree.map(lambda g: g * scale, grads)), epsilon(0.1, grads)
    )


def test_dtypes_are_the_parameters_where_given():
    grads = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2, jnp.float32)}
    params = {"a": jnp.ones(2, jnp.float32), "b": jnp.ones(2, jnp.float16)}
    assert epsilon(0.1, grads)["a"].dtype == jnp.bfloat16
    out = epsilon(0.1, grads, params)
    assert (out["a"].dtype, out["b"].dtype) == (jnp.float32, jnp.float16)


def test_schedule_sees_the_count_of_steps():
    ascent = optax_sam.scale_to_radius(lambda count: 1.0 + count)
    state = ascent.init(jnp.ones(4))
    for step in range(3):
        out, state = ascent.update(jnp.ones(4), state)
        assert problems.norm(out) == pytest.approx(1.0 + step)
    assert state.count == 3


def test_radius_as_an_injected_hyperparameter():
    ascent = optax.inject_hyperparams(optax_sam.scale_to_radius)(rho=0.5)
    state = ascent.init(jnp.ones(4))
    out, state = jax.jit(ascent.update)(jnp.ones(4), state)
    assert problems.norm(out) == pytest.approx(0.5)
    state.hyperparams["rho"] = jnp.float32(2.0)
    out, _ = jax.jit(ascent.update)(jnp.ones(4), state)
    assert problems.norm(out) == pytest.approx(2.0)
