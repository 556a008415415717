from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_sam._base.hyperparameters import (
    as_key,
    as_schedule,
    check_choice,
    check_integer,
    key_at,
    key_data,
)


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


@pytest.mark.parametrize(
    ("value", "low", "high", "held"),
    [
        (0.5, 0.0, 1.0, 0.5),
        (5.0, 0.0, 1.0, 1.0),
        (np.inf, 0.0, 1.0, 1.0),
        (5.0, 0.0, np.inf, 5.0),
        (5, 0.0, np.inf, 5.0),
        (np.inf, 0.0, np.inf, 0.0),
        (np.nan, 0.0, np.inf, 0.0),
        (-0.1, 0.0, np.inf, 0.0),
        (-np.inf, 1e-37, np.inf, 1e-37),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_holds_what_is_not_known_yet_to_the_interval(value, low, high, held, dtype):
    value = jnp.asarray(value, None if isinstance(value, int) else dtype)

    def at_step(x, count):
        return as_schedule("method", "rho", x, low=low, high=high)(count)

    schedule = at_step(lambda count: value, 3)
    traced = jax.jit(at_step)(value, 3)
    for found in (schedule, traced):
        expected = np.float32(held) if isinstance(value, int) else jnp.asarray(held)
        np.testing.assert_array_equal(found, expected.astype(found.dtype))
        assert found.dtype == value.dtype or value.dtype == jnp.int32


@pytest.mark.parametrize(("value", "held"), [(np.nan, 0.5), (-1.0, 0.0), (2.0, 1.0)])
def test_what_stands_for_nan(value, held):
    def at_step(x):
        return as_schedule("method", "theta", x, high=1.0, harmless=0.5)(0)

    assert at_step(lambda count: value) == jax.jit(at_step)(value) == held


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


@pytest.mark.parametrize("value", [3, np.int64(3), jnp.int32(3), np.array(3)])
def test_integers(value):
    assert check_integer("method", "count", value, low=1) == 3


@pytest.mark.parametrize("value", [3.0, True, None, "3", jnp.ones(2, int), [3]])
def test_what_is_no_integer(value):
    with pytest.raises(TypeError, match=r"^method: count must be an integer >= 1, got"):
        check_integer("method", "count", value, low=1)


def test_integers_out_of_range_and_traced():
    with pytest.raises(ValueError, match=r"^method: count = 0 is out of range.* >= 1"):
        check_integer("method", "count", 0, low=1)
    assert jax.jit(lambda n: check_integer("m", "n", n, low=1) + 1)(-5) == 2


def test_choices():
    check_choice("method", "by", "a", ("a", "b"))
    for value in ("c", None, 0):
        with pytest.raises(ValueError, match=r"^method: by = .* pass 'a' or 'b'"):
            check_choice("method", "by", value, ("a", "b"))


@pytest.mark.parametrize(
    "key",
    [7, np.int32(7), jnp.int32(7), jax.random.key(7), jax.random.PRNGKey(7)],
    ids=["int", "numpy", "jax", "typed", "data"],
)
def test_keys_of_any_form(key):
    typed = as_key("method", key)
    np.testing.assert_array_equal(key_data(typed), jax.random.PRNGKey(7))
    step = jax.random.fold_in(jax.random.key(7), 3)
    drawn = key_at(typed, key_data(typed), jnp.int32(3))
    assert jax.random.bits(drawn) == jax.random.bits(step)


def test_keys_of_another_generator():
    typed = as_key("method", jax.random.key(7, impl="rbg"))
    step = jax.random.fold_in(typed, 3)
    drawn = key_at(typed, key_data(typed), jnp.int32(3))
    assert jax.random.bits(drawn) == jax.random.bits(step)


@pytest.mark.parametrize(
    "key", [0.5, None, "seed", True, jnp.ones(2), jax.random.split(jax.random.key(0))]
)
def test_what_is_no_key(key):
    with pytest.raises(TypeError, match=r"^method: key must be an integer or one PRNG"):
        as_key("method", key)
