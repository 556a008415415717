"""What diagnostics take and give besides trees: numbers, and means over samples."""

import math
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Estimate(NamedTuple):
    """The mean of random samples.

    Attributes:
      mean: The mean, a scalar in float32 or wider.
      standard_error: The standard deviation of the mean, estimated from the spread of
        the samples; infinite if there is one sample only.
    """

    mean: jax.Array
    standard_error: jax.Array


def estimate(samples: jax.Array) -> Estimate:
    """The mean of samples `[n]`, and how far it may be off."""
    n = samples.shape[0]
    mean = jnp.mean(samples)
    if n == 1:
        return Estimate(mean, jnp.full_like(mean, jnp.inf))
    return Estimate(mean, jnp.std(samples, ddof=1) / n**0.5)


def check_number(owner: str, name: str, value: Any, *, positive: bool = False) -> Any:
    """Returns a real scalar of at least zero, or above it, or refuses it."""
    is_array = isinstance(value, jax.Array | np.ndarray | np.generic)
    remedy = f"pass a finite number {'>' if positive else '>='} 0"
    if is_array:
        real = jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(
            value.dtype, jnp.integer
        )
    else:
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or np.shape(value):
        raise TypeError(
            f"{owner}: {name} must be a real scalar, got {value!r} of type "
            f"{type(value).__name__}; {remedy}."
        )
    if isinstance(value, jax.core.Tracer):
        return value
    number = float(value)
    # Written so that NaN fails.
    if not (0 <= number < math.inf) or (positive and number == 0):
        raise ValueError(f"{owner}: {name} = {number:g} is out of range; {remedy}.")
    return value
