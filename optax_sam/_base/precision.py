"""The precision that a function computes in, as its jaxpr tells."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

_FULL = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)


def equations(jaxpr: Any) -> Iterator[Any]:
    """The equations of a jaxpr and of all that it calls, loops and branches."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in _called(equation):
            yield from equations(inner)


def is_below_float32(jaxpr: Any) -> bool:
    """Whether an input is of less than float32, or anything is rounded to less."""
    made = [v for equation in equations(jaxpr) for v in equation.outvars]
    return any(_bits(v) < 32 for v in (*jaxpr.invars, *made))


def has_platforms_precision(jaxpr: Any) -> bool:
    """Whether there are products of float32 whose precision is left to the platform.

    CPUs take that of float32, TPUs round the factors to bfloat16 and GPUs to TF32.
    """
    return any(
        equation.params.get("precision", _FULL) != _FULL
        and any(_bits(v) == 32 for v in equation.outvars)
        for equation in equations(jaxpr)
    )


def without_forward_mode(jaxpr: Any) -> list[str]:
    """The names of functions with a `jax.custom_vjp`: they have no tangents."""
    return [
        str(inner.debug_info.func_name)
        for equation in equations(jaxpr)
        if equation.primitive.name.startswith("custom_vjp_call")
        for inner in _called(equation)
    ]


def _called(equation: Any) -> Iterator[Any]:
    """The jaxprs in an equation's parameters, closed ones or not."""
    for value in jax.tree.leaves(list(equation.params.values())):
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns"):
            yield inner


def _bits(variable: Any) -> int:
    """The size of a floating-point number of an array; 64 where there is none."""
    dtype = getattr(variable.aval, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        return 64
    return int(jnp.finfo(dtype).bits)  # type: ignore[no-untyped-call]
