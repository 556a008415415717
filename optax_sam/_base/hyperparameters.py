"""Hyperparameters: scalars that may be schedules, integers, choices, PRNG keys."""

import math
import numbers
from collections.abc import Callable
from typing import Any, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

ScalarOrSchedule: TypeAlias = chex.Numeric | optax.Schedule
_NUMERIC = (jax.Array, np.ndarray, np.generic, int, float)


def as_schedule(
    owner: str, name: str, value: Any, *, low: float = 0.0, high: float = math.inf
) -> Callable[[chex.Numeric], jax.Array]:
    """Makes a function of the count of steps out of a scalar hyperparameter.

    Refuses what can be seen to be wrong. Values of schedules and traced values are let
    through: they are not known yet.

    Args:
      owner: The function the hyperparameter belongs to, for the message.
      name: The hyperparameter, for the message.
      value: What the user gave.
      low: Smallest value allowed.
      high: Largest value allowed; infinity stands for any finite value.

    Returns:
      The function from the count of steps to a scalar array.

    Raises:
      TypeError: If `value` is neither a real number nor a callable.
      ValueError: If `value` is not a scalar or lies outside the interval; in a step, if
        a schedule does not return a scalar.
    """
    if callable(value):
        return _checked_schedule(owner, name, value)
    interval = (
        f"[{low:g}, {high:g}]" if high < math.inf else f"a finite number >= {low:g}"
    )
    remedy = f"pass {'a number in ' if high < math.inf else ''}{interval} or a schedule"
    is_array = isinstance(value, jax.Array | np.ndarray | np.generic)
    dtype = jnp.result_type(value) if is_array else None
    is_real_array = dtype is not None and (
        jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
    )
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not (is_number or is_real_array):
        raise TypeError(
            f"{owner}: {name} must be a real scalar or a schedule, got "
            f"{value!r} of type {type(value).__name__}; {remedy}."
        )
    if np.shape(value):
        raise ValueError(
            f"{owner}: {name} must be a scalar, got an array of shape "
            f"{np.shape(value)}; {remedy}."
        )
    if not isinstance(value, jax.core.Tracer):
        number = float(value)
        # Written so that NaN fails.
        if not (low <= number <= high and math.isfinite(number)):
            raise ValueError(f"{owner}: {name} = {number:g} is out of range; {remedy}.")
    constant = value if is_array else float(value)
    return lambda count: jnp.asarray(constant)


def _checked_schedule(
    owner: str, name: str, schedule: optax.Schedule
) -> Callable[[chex.Numeric], jax.Array]:
    def checked(count: chex.Numeric) -> jax.Array:
        value = schedule(count)
        if not isinstance(value, _NUMERIC) or jnp.shape(value):
            raise ValueError(
                f"{owner}: the schedule {name} must return a scalar, got {value!r}; "
                f"pass a function from the count of steps to {name}."
            )
        return jnp.asarray(value)

    return checked


def check_integer(
    owner: str, name: str, value: Any, low: int | None = None, *, static: bool = False
) -> Any:
    """Returns an integer, or refuses it; unless it is static, an array will do."""
    is_array = isinstance(value, jax.Array | np.ndarray | np.generic)
    is_integer = (
        jnp.issubdtype(jnp.result_type(value), jnp.integer) and not np.shape(value)
        if is_array
        else isinstance(value, int) and not isinstance(value, bool)
    )
    at_least = "" if low is None else f" >= {low}"
    if not is_integer or (static and isinstance(value, jax.Array)):
        raise TypeError(
            f"{owner}: {name} must be an integer{at_least}, got {value!r} of type "
            f"{type(value).__name__}; under optax.inject_hyperparams name it in "
            "static_args."
        )
    if isinstance(value, jax.core.Tracer):
        return value
    if low is not None and value < low:
        raise ValueError(
            f"{owner}: {name} = {value} is out of range; pass an integer{at_least}."
        )
    return int(value)


def check_choice(owner: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuses a value that is not among the choices."""
    if not (isinstance(value, str) and value in choices):
        raise ValueError(
            f"{owner}: {name} = {value!r} is unknown; pass "
            f"{' or '.join(map(repr, choices))}, and under optax.inject_hyperparams "
            "name it in static_args."
        )


def as_key(owner: str, key: Any) -> Any:
    """Makes a typed PRNG key of an integer, a typed key or the data of a key."""
    if isinstance(key, int) and not isinstance(key, bool):
        return jax.random.key(key)
    if isinstance(key, jax.Array | np.ndarray | np.generic):
        array = jnp.asarray(key)
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key) and not array.ndim:
            return array
        if array.dtype == jnp.uint32 and array.ndim == 1:
            return jax.random.wrap_key_data(array)
        if jnp.issubdtype(array.dtype, jnp.integer) and not array.ndim:
            return jax.random.key(array)
    raise TypeError(
        f"{owner}: key must be an integer or one PRNG key, got {key!r}; pass for "
        "example jax.random.key(0)."
    )


def key_data(key: jax.Array) -> jax.Array:
    """The data of a typed key, to keep in a state: a typed key breaks checkpoints."""
    return jnp.copy(jax.random.key_data(key))  # A buffer of its own, for donation.


def key_at(key: jax.Array, data: jax.Array, count: jax.Array) -> jax.Array:
    """The key of a step, by the data in the state; `key` only says of which kind."""
    key = jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))
    return jax.random.fold_in(key, count)
