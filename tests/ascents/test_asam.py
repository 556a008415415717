import jax.numpy as jnp
import numpy as np
import problems
import pytest

import optax_sam


def epsilon(params, grads, rho=0.5, **kwargs):
    ascent = optax_sam.adapt_to_scale(rho, **kwargs)
    return ascent.update(grads, ascent.init(params), params)[0]


def reference(params, grads, rho, eta):
    w, g = np.asarray(params, np.float64), np.asarray(grads, np.float64)
    t = np.abs(w) + eta
    return rho * t**2 * g / np.linalg.norm(t * g)


@pytest.mark.parametrize("eta", [0.0, 0.3])
def test_closed_form(eta):
    params, grads = jnp.array([1.0, -2.0, 0.5]), jnp.array([3.0, 2.0, -4.0])
    np.testing.assert_allclose(
        epsilon(params, grads, eta=eta), reference(params, grads, 0.5, eta), rtol=1e-6
    )


def test_rescaling_weights_rescales_epsilon_with_them():
    # The same function with weights c times as large has gradients c times as small.
    params, grads = jnp.array([1.0, -2.0, 0.5]), jnp.array([3.0, 2.0, -4.0])
    c = jnp.array([4.0, 0.25, 2.0])
    np.testing.assert_allclose(
        epsilon(c * params, grads / c), c * epsilon(params, grads), rtol=1e-6
    )


def test_zero_gradient_and_zero_weights_give_zero():
    zeros, ones = jnp.zeros(3), jnp.ones(3)
    np.testing.assert_array_equal(epsilon(ones, zeros), zeros)
    np.testing.assert_array_equal(epsilon(zeros, ones), zeros)
    assert problems.norm(epsilon(zeros, ones, eta=0.1)) > 0


def test_float16_products_that_overflow():
    out = epsilon(jnp.full(4, 1e3, jnp.float16), jnp.full(4, 6e4, jnp.float16))
    assert out.dtype == jnp.float16
    np.testing.assert_array_equal(out, np.full(4, 250.0, np.float16))


@pytest.mark.parametrize(("g", "w"), [(1e30, 1e10), (1e-30, 1e-15)])
def test_float32_products_out_of_range(g, w):
    out = epsilon(jnp.full(4, w), jnp.full(4, g))
    np.testing.assert_allclose(out, np.full(4, 0.25 * w), rtol=1e-6)


def test_dtypes_are_the_parameters():
    out = epsilon(jnp.ones(2, jnp.float32), jnp.ones(2, jnp.bfloat16))
    assert out.dtype == jnp.float32


def test_schedules():
    ascent = optax_sam.adapt_to_scale(lambda t: 1.0 + t, eta=lambda t: 0.5 * t)
    params, grads = jnp.array([1.0, -2.0]), jnp.array([3.0, 4.0])
    state = ascent.init(params)
    for t in range(3):
        out, state = ascent.update(grads, state, params)
        np.testing.assert_allclose(
            out, reference(params, grads, 1.0 + t, 0.5 * t), rtol=1e-6
        )


def test_needs_params():
    ascent = optax_sam.adapt_to_scale(0.5)
    with pytest.raises(ValueError, match="adapt_to_scale: params is None"):
        ascent.update(jnp.ones(2), ascent.init(jnp.ones(2)))
