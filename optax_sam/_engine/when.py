"""When to ascend: conditions on the count of steps, and the branches of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import chex
import jax
import numpy as np

from optax_sam._base.checks import called, refuse
from optax_sam._base.hyperparameters import check_integer

AscendWhen: TypeAlias = Callable[[chex.Numeric], Any]
Branch = TypeVar("Branch")
_REMEDY = (
    "pass a function from the count of steps to a bool scalar, such as "
    "optax_sam.every(2)"
)


def every(k: chex.Numeric) -> AscendWhen:
    r"""Ascends in every `k`-th step, the first of them included.

    .. math:: t \bmod k = 0

    Args:
      k: The period, an integer of at least 1; 1 is always.

    Returns:
      A function from the count of steps to a bool scalar, for `ascend_when` of
      :func:`optax_sam.sharpness_aware`.

    Raises:
      TypeError: If `k` is no integer.
      ValueError: If `k` is less than 1.

    Examples:
      >>> import optax_sam
      >>> ascends = optax_sam.every(3)
      >>> print([t for t in range(8) if ascends(t)])
      [0, 3, 6]
    """
    k = check_integer(called("every"), "k", k, low=1)
    return lambda count: count % k == 0


def between(first: chex.Numeric, last: chex.Numeric | None = None) -> AscendWhen:
    r"""Ascends from one step to another, both included.

    .. math:: \text{first} \le t \le \text{last}

    Args:
      first: Count of the first step that ascends, an integer of at least 0.
      last: Count of the last one, an integer; None for all that follow.

    Returns:
      A function from the count of steps to a bool scalar, for `ascend_when` of
      :func:`optax_sam.sharpness_aware`.

    Raises:
      TypeError: If `first` or `last` is no integer.
      ValueError: If `first` is less than 0, or `last` less than `first`.

    Examples:
      >>> import optax_sam
      >>> ascends = optax_sam.between(2, 4)
      >>> print([t for t in range(8) if ascends(t)])
      [2, 3, 4]
    """
    owner = called("between")
    first = check_integer(owner, "first", first, low=0)
    last = check_integer(owner, "last", last, optional=True)
    if last is None:
        return lambda count: count >= first
    if isinstance(first, int) and isinstance(last, int) and last < first:
        what = f"last must be at least first, which is {first}"
        refuse(owner, what, last, "pass the counts of two steps in their order")
    return lambda count: (first <= count) & (count <= last)


def decide(
    owner: str, ascend_when: AscendWhen | None, step: jax.Array
) -> bool | jax.Array | None:
    """Whether a step ascends, by what `sharpness_aware` was given; None for always."""
    if ascend_when is None:
        return None
    try:
        found = ascend_when(step)
    except jax.errors.TracerBoolConversionError as error:
        raise TypeError(
            f"{owner}: ascend_when has to know the count of steps to return, by `if`, "
            "`and`, `or`, `not` or a comparison of three, and it is traced; combine "
            f"conditions by &, | and ~, or {_REMEDY}."
        ) from error
    if isinstance(found, bool | np.bool_):
        return bool(found)
    if not (isinstance(found, jax.Array) and found.dtype == bool and not found.shape):
        refuse(owner, "ascend_when must return a bool scalar", found, _REMEDY)
    return found


def check_when(owner: str, ascend_when: Any) -> None:
    """Refuses what cannot be asked."""
    if ascend_when is not None and not callable(ascend_when):
        what = "ascend_when must be a function or None"
        refuse(owner, what, ascend_when, _REMEDY, TypeError)


def either(
    ascends: bool | jax.Array | None,
    one: Callable[[], Branch],
    other: Callable[[], Branch],
) -> Branch:
    """What one branch returns where a step ascends, or else the other one."""
    if ascends is None or isinstance(ascends, bool):
        return one() if ascends in (None, True) else other()
    cond: Any = jax.lax.cond
    chosen: Branch = cond(ascends, one, other)
    return chosen
