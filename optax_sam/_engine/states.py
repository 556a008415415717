"""The state of a sharpness-aware optimizer, and errors that are due to a wrong one."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class SharpnessAwareState(NamedTuple):
    """State of :func:`sharpness_aware`.

    The losses are what the last step has computed anyway; in a step that did not ascend
    both are the clean one. Both are 0 before the first step and of a gradient that was
    given without a loss, by `grad_fn`.

    Attributes:
      ascent_state: State of the ascent.
      base_state: State of the base optimizer.
      step: Number of steps taken, an int32 scalar.
      clean_loss: The mean loss at the parameters, that which the step reports; in a
        step of one gradient the perturbed one. A scalar in the default float type.
      perturbed_loss: The mean loss at the perturbed parameters, a scalar as well.
    """

    ascent_state: optax.OptState
    base_state: optax.OptState
    step: jax.Array
    clean_loss: jax.Array
    perturbed_loss: jax.Array

    @classmethod
    def first(
        cls, ascent_state: optax.OptState, base_state: optax.OptState
    ) -> "SharpnessAwareState":
        """That before any step."""
        step = jnp.zeros([], jnp.int32)
        return cls(ascent_state, base_state, step, jnp.zeros([]), jnp.zeros([]))

    def after(
        self,
        ascent_state: optax.OptState,
        base_state: optax.OptState,
        clean_loss: jax.Array,
        perturbed_loss: jax.Array,
    ) -> "SharpnessAwareState":
        """That after one more step."""
        step = optax.safe_increment(self.step)
        losses = (jnp.asarray(x, float) for x in (clean_loss, perturbed_loss))
        return SharpnessAwareState(ascent_state, base_state, step, *losses)


def explaining(
    owner: str, tx: optax.GradientTransformationExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """The same transformation, which says so if it fails for the state it was given."""

    @functools.wraps(tx.update)
    def update(
        updates: optax.Updates, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        try:
            made: tuple[Any, Any] = tx.update(updates, state, params, **extra_args)
            return made
        except Exception as error:
            explain(owner, tx, params, state, error)
            raise

    return tx._replace(update=update)


def explain(
    owner: str,
    tx: optax.GradientTransformation,
    params: Any,
    state: Any,
    error: Exception,
    *others: Any,
) -> None:
    """Says so if an error is due to the state: another, or in another's place.

    Args:
      owner: The function that the user called.
      tx: The transformation.
      params: The parameters that were given.
      state: The state that was given.
      error: The error.
      *others: What else was given.
    """
    swapped = _first_state(tx, state)
    if swapped is not None and _are_alike(swapped, params):
        raise TypeError(
            f"{owner}: params and the state of the optimizer are swapped, params is "
            f"{_description(params)}; call step(params, opt_state, *args), or "
            "tx.update(grads, state, params)."
        ) from error
    first = _first_state(tx, params)
    if first is None or _are_alike(first, state):
        return
    if any(_are_alike(first, other) for other in others):
        raise TypeError(
            f"{owner}: the state of the optimizer comes after the batch, and in its "
            f"place is {_description(state)}; call step(params, opt_state, *args)."
        ) from error
    where, expected, got = _difference(first, state)
    remedy = "start from tx.init(params), or make a new nnx.Optimizer of this model"
    if isinstance(first, SharpnessAwareState) and _are_alike(first.base_state, state):
        remedy = (
            "it is the state of its base, which tx.init(params)._replace("
            "base_state=opt_state) goes on from"
        )
    raise TypeError(
        f"{owner}: the state is of another optimizer or of other parameters: "
        f"opt_state{where} must be {expected}, got {got}; {remedy}."
    ) from error


def _first_state(tx: optax.GradientTransformation, params: Any) -> Any:
    """The shapes of `tx.init(params)`; None where that fails."""
    try:
        return jax.eval_shape(tx.init, params)
    except Exception:
        return None


def _are_alike(tree: Any, other: Any) -> bool:
    """Whether two trees have the same structure and shapes."""

    def description(tree: Any) -> Any:
        return jax.tree.structure(tree), list(map(np.shape, jax.tree.leaves(tree)))

    return bool(description(tree) == description(other))


def _difference(tree: Any, other: Any, path: Any = ()) -> tuple[str, str, str]:
    """The first path at which two trees differ, and what there is in each."""
    found, others = _children(tree), _children(other)
    if type(tree) is type(other) and found.keys() == others.keys():
        for key in filter(None, found):  # That of a leaf is empty.
            if not _are_alike(found[key], others[key]):
                return _difference(found[key], others[key], path + key)
    return jax.tree_util.keystr(path), _description(tree), _description(other)


def _children(tree: Any) -> dict[Any, Any]:
    return dict(jax.tree.leaves_with_path(tree, is_leaf=lambda x: x is not tree))


def _description(node: Any) -> str:
    """The dtype and shape of an array, or the kind of a node and where it leads to."""
    if hasattr(node, "dtype"):
        return f"{node.dtype}{list(np.shape(node))}"
    names = [jax.tree_util.keystr(key, simple=True) for key in _children(node) if key]
    shown = ", ".join(names[:8] + ["..."] * (len(names) > 8))
    return f"{type(node).__name__}({shown})"
