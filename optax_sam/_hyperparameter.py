"""Scalar hyperparameters: a number, an array, a traced value or a schedule."""

import math
import numbers
from typing import Any, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

ScalarOrSchedule: TypeAlias = chex.Numeric | optax.Schedule


def check_scalar(
    owner: str, name: str, value: Any, *, low: float = 0.0, high: float = math.inf
) -> None:
    """Refuses a scalar hyperparameter that can be seen to be wrong.

    Schedules and traced values are let through: what they will be is not known yet.

    Args:
      owner: The function the hyperparameter belongs to, for the message.
      name: The hyperparameter, for the message.
      value: What the user gave.
      low: Smallest value allowed.
      high: Largest value allowed; infinity stands for any finite value.

    Raises:
      TypeError: If `value` is neither a real number nor a callable.
      ValueError: If `value` is not a scalar or lies outside the interval.
    """
    if callable(value):
        return
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
    if isinstance(value, jax.core.Tracer):
        return
    number = float(value)
    # Written so that NaN fails.
    if not (low <= number <= high and math.isfinite(number)):
        raise ValueError(f"{owner}: {name} = {number:g} is out of range; {remedy}.")


def value_at(
    value: ScalarOrSchedule, count: chex.Numeric, dtype: chex.ArrayDType | None = None
) -> jax.Array:
    """The value of a scalar hyperparameter after `count` steps, as an array."""
    return jnp.asarray(value(count) if callable(value) else value, dtype)
