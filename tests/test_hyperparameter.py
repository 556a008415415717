from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_sam._hyperparameter import as_schedule


@pytest.mark.parametrize(
    "value", [-1, -0.1, float("nan"), float("inf"), np.float32(-1)]
)
def test_refuses_values_out_of_range(value):
    with pytest.raises(
        ValueError, match=r"^method: rho = .* out of range; pass a finite"
    ):
        as_schedule("method", "rho", value)


@pytest.mark.parametrize("value", ["0.1", None, True, 1j, [0.1], np.bool_(True)])
def test_refuses_what_is_no_number(value):
    with pytest.raises(TypeError, match=r"^method: rho must be a real scalar.*got"):
        as_schedule("method", "rho", value)


def test_refuses_arrays_with_axes_traced_or_not():
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        as_schedule("method", "rho", jnp.ones(2))
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        jax.jit(lambda x: as_schedule("method", "rho", x)(0))(jnp.ones(2))


@pytest.mark.parametrize(
    "value", [0, 1, 0.5, np.float64(0.5), np.array(0.5), jnp.array(0.5), lambda t: -t]
)
def test_lets_scalars_and_schedules_through(value):
    as_schedule("method", "theta", value, high=1.0)


def test_lets_traced_values_through():
    out = jax.jit(lambda x: as_schedule("method", "theta", x, high=1.0)(0))(5.0)
    assert out == 5.0


def test_upper_bound():
    with pytest.raises(ValueError, match=r"theta = 1.01 .* \[0, 1\]"):
        as_schedule("method", "theta", 1.01, high=1.0)


def test_values():
    assert as_schedule("method", "rho", 0.5)(3) == 0.5
    assert as_schedule("method", "rho", Fraction(1, 2))(3) == 0.5
    assert as_schedule("method", "rho", lambda t: 2.0 * t)(jnp.int32(3)) == 6.0


@pytest.mark.parametrize("value", [jnp.ones(3), jnp.ones(1), None, "0.1"])
def test_refuses_schedules_that_return_no_scalar(value):
    schedule = as_schedule("method", "rho", lambda count: value)
    with pytest.raises(ValueError, match="the schedule rho must return a scalar, got"):
        schedule(0)
