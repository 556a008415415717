import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_sam._hyperparameter import check_scalar, value_at


@pytest.mark.parametrize(
    "value", [-1, -0.1, float("nan"), float("inf"), np.float32(-1)]
)
def test_refuses_values_out_of_range(value):
    with pytest.raises(
        ValueError, match=r"^method: rho = .* out of range; pass a finite"
    ):
        check_scalar("method", "rho", value)


@pytest.mark.parametrize("value", ["0.1", None, True, 1j, [0.1], np.bool_(True)])
def test_refuses_what_is_no_number(value):
    with pytest.raises(TypeError, match=r"^method: rho must be a real scalar.*got"):
        check_scalar("method", "rho", value)


def test_refuses_arrays_with_axes_traced_or_not():
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        check_scalar("method", "rho", jnp.ones(2))
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        jax.jit(lambda x: check_scalar("method", "rho", x))(jnp.ones(2))


@pytest.mark.parametrize(
    "value", [0, 1, 0.5, np.float64(0.5), np.array(0.5), jnp.array(0.5), lambda t: -t]
)
def test_lets_scalars_and_schedules_through(value):
    check_scalar("method", "theta", value, high=1.0)


def test_lets_traced_values_through():
    jax.jit(lambda x: check_scalar("method", "theta", x, high=1.0))(5.0)


def test_upper_bound():
    with pytest.raises(ValueError, match=r"theta = 1.01 .* \[0, 1\]"):
        check_scalar("method", "theta", 1.01, high=1.0)


def test_value_at():
    assert value_at(0.5, 3) == 0.5
    assert value_at(lambda t: 2.0 * t, jnp.int32(3)) == 6.0
    assert value_at(1, 0, jnp.float32).dtype == jnp.float32
