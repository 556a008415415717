"""Checks of what users pass, and errors that say what to do instead."""

import contextlib
import contextvars
import functools
import inspect
import numbers
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_sam._base import trees

_LONGEST = 200  # Characters of a value in a message.
_CALLED: contextvars.ContextVar[str | None] = contextvars.ContextVar("called")


@contextlib.contextmanager
def calling(alias: str) -> Iterator[None]:
    """What is made here is what the user called, and messages name it so."""
    token = _CALLED.set(alias)
    try:
        yield
    finally:
        _CALLED.reset(token)


def called(name: str) -> str:
    """The function that the user called: this one, unless an alias made the call."""
    return _CALLED.get(None) or name


def shown(value: Any) -> str:
    """A value as messages show it: the shapes of its arrays, if any, and cut short."""
    arrays = filter(_is_array, jax.tree.leaves(value))
    text = ", ".join(f"{x.dtype}{list(x.shape)}" for x in arrays) or repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray) and bool(x.ndim)


def refuse(
    owner: str,
    what: str,
    value: Any,
    remedy: str,
    error: type[Exception] = ValueError,
) -> NoReturn:
    """Raises an error that says who refuses what, what there was, and what to do.

    Args:
      owner: The function that the user called.
      what: What must be so.
      value: What there was instead; of a TypeError its type is named as well.
      remedy: What to do.
      error: The kind of error.
    """
    of_type = f" of type {type(value).__name__}" if error is TypeError else ""
    raise error(f"{owner}: {what}, got {shown(value)}{of_type}; {remedy}.")


def checked(owner: str, name: str, fn: Any, *arguments: str) -> Callable[..., Any]:
    """Returns `fn` with an error that says how it is called, should that not work."""
    call = f"{name}({', '.join(arguments)})"
    if not callable(fn):
        raise TypeError(
            f"{owner}: {name} must be a function, called as {call}; got {shown(fn)}."
        )

    @functools.wraps(fn)
    def checked_fn(*args: Any) -> Any:
        try:
            return fn(*args)
        except TypeError as error:
            if _can_be_called(fn, len(arguments)):
                raise  # A problem of its own, not of how it was called.
            raise TypeError(
                f"{owner}: {name} is called as {call}, but {error}; wrap it in a "
                f"function of {len(arguments)} positional argument(s)."
            ) from error

    return checked_fn


def _can_be_called(fn: Callable[..., Any], num_arguments: int) -> bool:
    try:
        inspect.signature(fn).bind(*range(num_arguments))
    except ValueError:  # Some builtins have no signature.
        return True
    except TypeError:
        return False
    return True


def check_parameters(owner: str, params: optax.Params | None) -> None:
    """Refuses parameters that cannot be perturbed, by the path of the leaf."""
    if params is None:
        raise ValueError(
            f"{owner}: params is None: a sharpness-aware step evaluates the gradient "
            "at params + epsilon; call tx.update(grads, state, params, ...)."
        )
    leaves = jax.tree.leaves_with_path(params, is_leaf=trees.is_absent)
    for path, leaf in leaves:
        where = f"{owner}: params{jax.tree_util.keystr(path)}"
        if trees.is_absent(leaf):
            raise ValueError(
                f"{where} is optax.MaskedNode: inside optax.masked or optax.partition "
                "a sharpness-aware step does not see the parameters that its loss "
                "needs. Put it outside: sharpness_aware(optax.masked(...), ascent), "
                "and perturb_only(mask) in the ascent."
            )
        if not (hasattr(leaf, "dtype") or isinstance(leaf, numbers.Number)):
            refuse(
                where,
                "parameters must be arrays",
                leaf,
                "keep functions, strings and other constants out of params; of an "
                "Equinox module, take params, static = eqx.partition(model, "
                "eqx.is_inexact_array) and eqx.combine(params, static) in the loss",
                TypeError,
            )
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"{where} has dtype {jnp.result_type(leaf)}, which cannot be perturbed "
                "along a real gradient; keep integer leaves out of params (beside the "
                "batch, say), and complex ones as their real and imaginary parts; an "
                "NNX model as a whole is for optax_sam.flax.nnx_value_and_update."
            )


def check_like(name: str, tree: Any, params: optax.Params, remedy: str) -> None:
    """Refuses a tree whose structure or shapes are not the parameters'."""
    expected, got = jax.tree.structure(params), jax.tree.structure(tree)
    if got != expected:  # type: ignore[operator]
        raise ValueError(
            f"{name} must have the tree structure of params, {expected}; got {got}. "
            f"{remedy}"
        )
    for (path, p), x in zip(
        jax.tree.leaves_with_path(params), jax.tree.leaves(tree), strict=True
    ):
        if jnp.shape(p) != jnp.shape(x):
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} has shape {jnp.shape(x)}, its "
                f"parameter {jnp.shape(p)}. {remedy}"
            )
