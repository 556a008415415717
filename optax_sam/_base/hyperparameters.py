"""Hyperparameters: scalars that may be schedules, integers, choices, PRNG keys."""

import math
import numbers
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NoReturn, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_sam._base.checks import refuse, shown

ScalarOrSchedule: TypeAlias = chex.Numeric | optax.Schedule
KeyLike: TypeAlias = int | jax.Array
_ARRAYS = (jax.Array, np.ndarray, np.generic)
_STATIC = "under optax.inject_hyperparams name it in static_args"


def as_schedule(
    owner: str,
    name: str,
    value: Any,
    *,
    low: float = 0.0,
    high: float = math.inf,
    harmless: float | None = None,
) -> Callable[[chex.Numeric], jax.Array]:
    """Makes a function of the count of steps out of a scalar hyperparameter.

    Refuses what can be seen to be wrong. Values of schedules and traced values, which
    are not known yet, are held to the interval. For NaN, and for infinity where there
    is no other upper bound, stands the value that leaves the step as it is without:
    `rho` = 0 the base's, `strength` = 0, `theta` = 1 and `gamma` = 1/2 SAM's, `eta` = 0
    ASAM's, `drop_fraction` = 0 the mask; of `delta` its default.

    Args:
      owner: The function the hyperparameter belongs to, for the message.
      name: The hyperparameter, for the message.
      value: What the user gave.
      low: Smallest value allowed.
      high: Largest value allowed; infinity stands for any finite value.
      harmless: What stands for NaN, without it `low`.

    Returns:
      The function from the count of steps to a scalar array.

    Raises:
      TypeError: If `value` is neither a real number nor a callable.
      ValueError: If `value` is not a scalar or lies outside the interval; in a step, if
        a schedule does not return a scalar.
    """
    harmless = low if harmless is None else harmless
    if not callable(value):
        or_schedule = " or a schedule"
        value = check_number(owner, name, value, low=low, high=high, other=or_schedule)
        constant = value if isinstance(value, _ARRAYS) else float(value)
        if isinstance(value, jax.core.Tracer):
            constant = _held(value, low, high, harmless)
        return lambda count: jnp.asarray(constant)

    def checked(count: chex.Numeric) -> jax.Array:
        found = value(count)
        if not isinstance(found, (*_ARRAYS, int, float)) or jnp.shape(found):
            what = f"the schedule {name} must return a scalar"
            remedy = f"pass a function from the count of steps to {name}"
            refuse(owner, what, found, remedy)
        return _held(jnp.asarray(found), low, high, harmless)

    return checked


def _held(value: jax.Array, low: float, high: float, harmless: float) -> jax.Array:
    """The value held to an interval of finite numbers."""
    held = jnp.clip(value, low, high)
    return jnp.where(jnp.isfinite(held), held, harmless)


def check_number(
    owner: str,
    name: str,
    value: Any,
    *,
    low: float = 0.0,
    high: float = math.inf,
    positive: bool = False,
    other: str = "",
) -> Any:
    """Returns a real scalar of an interval, or above zero if positive, or refuses it.

    `other` names, for the message, what else would do.
    """
    interval = f"a finite number {'>' if positive else '>='} {low:g}"
    if high < math.inf:
        interval = f"a number in [{low:g}, {high:g}]"
    remedy = f"pass {interval}{other}"
    kind = f"a real scalar{other}"
    if not _is_number(value, numbers.Real, jnp.floating, jnp.integer):
        refuse(owner, f"{name} must be {kind}", value, remedy, TypeError)
    if np.shape(value):
        what = f"{name} must be a scalar and not an array of shape {np.shape(value)}"
        refuse(owner, what, value, remedy)
    if isinstance(value, jax.core.Tracer):
        return value
    number = float(value)
    in_range = low <= number <= high and math.isfinite(number)  # NaN is not.
    if not in_range or (positive and number == 0):
        _refuse_size(owner, name, f"{number:g}", remedy)
    return value


def check_integer(
    owner: str,
    name: str,
    value: Any,
    low: int | None = None,
    *,
    static: bool = False,
    optional: bool = False,
) -> Any:
    """Returns an integer, or refuses it; unless it is static, an array will do."""
    if optional and value is None:
        return None
    at_least = "an integer" if low is None else f"an integer >= {low}"
    is_integer = _is_number(value, int, jnp.integer) and not np.shape(value)
    if not is_integer or (static and isinstance(value, jax.Array)):
        refuse(owner, f"{name} must be {at_least}", value, _STATIC, TypeError)
    if isinstance(value, jax.core.Tracer):
        return value if low is None else jnp.maximum(value, low)
    if low is not None and value < low:
        _refuse_size(owner, name, value, f"pass {at_least}")
    return int(value)


def as_decimal(number: Any) -> Fraction:
    """The decimal that was written, exactly; the float itself is a little off it."""
    return Fraction(str(number))


def check_bool(owner: str, name: str, value: Any) -> bool:
    """Returns a bool, or refuses what is none."""
    if not isinstance(value, bool):
        refuse(owner, f"{name} must be True or False", value, _STATIC, TypeError)
    return value


def check_choice(owner: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuses a value that is not among the choices."""
    if not (isinstance(value, str) and value in choices):
        raise ValueError(
            f"{owner}: {name} = {shown(value)} is unknown; pass "
            f"{' or '.join(map(repr, choices))}, and {_STATIC}."
        )


def _is_number(value: Any, python: type, *arrays: Any) -> bool:
    """Whether a value is of a Python type of numbers, or of one of dtypes."""
    if isinstance(value, _ARRAYS):
        return any(jnp.issubdtype(jnp.result_type(value), kind) for kind in arrays)
    return isinstance(value, python) and not isinstance(value, bool)


def _refuse_size(owner: str, name: str, value: Any, remedy: str) -> NoReturn:
    raise ValueError(f"{owner}: {name} = {value} is out of range; {remedy}.")


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
    what = "key must be an integer or one PRNG key"
    refuse(owner, what, key, "pass for example jax.random.key(0)", TypeError)


def key_data(key: jax.Array) -> jax.Array:
    """The data of a typed key, to keep in a state: a typed key breaks checkpoints."""
    return jnp.copy(jax.random.key_data(key))  # A buffer of its own, for donation.


def key_at(key: jax.Array, data: jax.Array, count: jax.Array) -> jax.Array:
    """The key of a step, by the data in the state; `key` only says of which kind."""
    key = jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))
    return jax.random.fold_in(key, count)
