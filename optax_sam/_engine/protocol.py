"""The extra arguments of a sharpness-aware step, what they must be, and errors.

`tx.update(grads, state, params, *, loss_fn, batch, grad_fn, losses, pullback)`:

loss_fn, batch
    `loss_fn(params, batch)` gives the losses of the examples, shape `[B]`; a scalar
    (their mean) will do where no method asks for single examples.
grad_fn
    `grad_fn(params)` gives the gradient; it replaces the gradient of the mean of
    `loss_fn` in the perturbed pass.
losses, pullback
    The clean losses `[B]`, and `pullback(weights[B])`, the gradient of
    `sum(weights * losses)` at `params`. Where given, nothing runs the clean forward
    pass again.
scoring_loss_fn, scoring_batch
    `scoring_loss_fn(params, batch)` gives losses `[B]` to score parameters by, such as
    those in evaluation mode; without it, `loss_fn` does. They are those of
    `scoring_batch`, or else of `batch`: a micro-batch that ascends for itself shares
    its scores with the others.
ascent_loss_fn
    `ascent_loss_fn(params, batch)` gives the losses whose gradient the clean pass of a
    micro-batch takes; without it, `loss_fn` does.
axis_name, scoring_axis_name
    The name of the axis of `jax.shard_map` or `jax.pmap` over which devices share the
    examples. `batch`, `losses` and `pullback` are then those of one device, while the
    gradient, `value` and `grad` are means over all. `scoring_axis_name` is that of
    `scoring_batch`, where it is another: a device that ascends for itself has no
    `axis_name`, but shares its scores with the others.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_sam._base import trees
from optax_sam._base.devices import vary_like

ARGUMENTS = frozenset(
    {
        "loss_fn",
        "batch",
        "grad_fn",
        "losses",
        "pullback",
        "scoring_loss_fn",
        "scoring_batch",
        "ascent_loss_fn",
        "axis_name",
        "scoring_axis_name",
    }
)
MISSING: Any = object()  # For a batch that is not given; None is an empty pytree.


def checked(name: str, fn: Any, *arguments: str) -> Callable[..., Any]:
    """Returns `fn` with an error that says how it is called, should that not work."""
    call = f"{name}({', '.join(arguments)})"
    if not callable(fn):
        raise TypeError(f"{name} must be a function, called as {call}; got {fn!r}.")

    @functools.wraps(fn)
    def checked_fn(*args: Any) -> Any:
        try:
            return fn(*args)
        except TypeError as error:
            if _can_be_called(fn, len(arguments)):
                raise  # A problem of its own, not of how it was called.
            raise TypeError(
                f"{name} is called as {call}, but {error}; wrap it in a function of "
                f"{len(arguments)} positional argument(s)."
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


def check_losses(losses: Any) -> jax.Array:
    """Returns `losses` if they are per-example losses `[B]` or a scalar loss."""
    if not isinstance(losses, jax.Array):
        remedy = "Return losses computed from params with jax.numpy."
        if isinstance(losses, tuple):
            remedy = (
                "If it returns (losses, aux), use value_and_update(..., has_aux=True), "
                "or leave aux out of the loss_fn given to update."
            )
        raise TypeError(
            "loss_fn must return a JAX array of losses, [B] or a scalar, got "
            f"{type(losses).__name__}. {remedy}"
        )
    if not jnp.issubdtype(losses.dtype, jnp.floating):
        raise TypeError(
            f"loss_fn must return real floating-point losses, got {losses.dtype}; "
            "a loss that cannot be differentiated gives no direction to ascend."
        )
    if losses.ndim > 1:
        raise ValueError(
            "loss_fn must return one loss per example, shape [B], or a scalar; got "
            f"shape {losses.shape}. Reduce the other axes, for example with "
            "losses.mean(axis=tuple(range(1, losses.ndim)))."
        )
    if losses.size == 0:
        raise ValueError(
            "loss_fn returned no losses, shape [0]; pass a batch with examples in it."
        )
    return losses


def check_parameters(params: optax.Params | None) -> None:
    """Refuses parameters that cannot be perturbed, by the path of the leaf."""
    if params is None:
        raise ValueError(
            "params is None: a sharpness-aware step evaluates the gradient at "
            "params + epsilon; call tx.update(grads, state, params, ...)."
        )
    leaves = jax.tree.leaves_with_path(params, is_leaf=trees.is_absent)
    for path, leaf in leaves:
        where = f"params{jax.tree_util.keystr(path)}"
        if trees.is_absent(leaf):
            raise ValueError(
                f"{where} is optax.MaskedNode: inside optax.masked or optax.partition "
                "a sharpness-aware step does not see the parameters that its loss "
                "needs. Put it outside: sharpness_aware(optax.masked(...), ascent), "
                "and perturb_only(mask) in the ascent."
            )
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"{where} has dtype {jnp.result_type(leaf)}, which cannot be perturbed "
                "along a real gradient; keep integer leaves out of params (beside the "
                "batch, say), and complex ones as their real and imaginary parts."
            )


def check_per_example(owner: str, losses: Any, size: int | None = None) -> jax.Array:
    """Returns losses of single examples, of `size` of them if given, or refuses."""
    checked = check_losses(losses)
    if checked.ndim == 0 or size not in (None, checked.size):
        raise ValueError(
            f"{owner}: needs the loss of each example, shape [{size or 'B'}], and "
            f"loss_fn returned shape {list(checked.shape)}; leave the mean over the "
            "batch out of it."
        )
    return checked


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


def check_gradient(name: str, gradient: optax.Updates, params: optax.Params) -> None:
    """Refuses a gradient whose tree structure or shapes are not the parameters'."""
    remedy = "Take the gradient with respect to the same tree that is passed as params."
    check_like(name, gradient, params, remedy)


def as_transformation(name: str, tx: Any) -> optax.GradientTransformationExtraArgs:
    """Returns `tx` with support for extra arguments, or refuses it."""
    if not (
        callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))
    ):
        raise TypeError(
            f"{name} must be an Optax gradient transformation, such as "
            f"optax.sgd(0.1); got {tx!r} of type {type(tx).__name__}."
        )
    keywords = [p for p in _parameters(tx.update).values() if p.kind is p.VAR_KEYWORD]
    if keywords and not isinstance(tx, optax.GradientTransformationExtraArgs):
        # Such as optax.MultiSteps: it takes extra arguments but its type denies it.
        return optax.GradientTransformationExtraArgs(tx.init, tx.update)
    return optax.with_extra_args_support(tx)


def given(batch: Any = MISSING, **others: Any) -> dict[str, Any]:
    """The arguments of the protocol that are given, by name."""
    named = {name: arg for name, arg in others.items() if arg is not None}
    return named if batch is MISSING else named | {"batch": batch}


def require(owner: str, **arguments: Any) -> None:
    """Refuses to go on without an argument that a method needs."""
    for name, value in arguments.items():
        if value is None or value is MISSING:
            raise ValueError(
                f"{owner}: {name} is missing; call tx.update(grads, state, params, "
                "loss_fn=..., batch=...) with loss_fn(params, batch) -> losses [B], or "
                "let optax_sam.value_and_update make the call."
            )


def linearise(losses_fn: Any, params: optax.Params, has_aux: bool = False) -> Any:
    """The losses at `params`, and `weights -> gradient of sum(weights * losses)`.

    With `has_aux`, auxiliary data come third. Of parameters that each device has for
    itself, the gradients are its own, even if the losses are a mean over devices.
    """

    def own_losses(params: optax.Params) -> Any:
        if not has_aux:
            return vary_like(losses_fn(params), params)
        losses, aux = losses_fn(params)
        return vary_like(losses, params), aux

    differentiate: Any = jax.vjp  # Its type does not allow for either of two.
    losses, vjp, *aux = differentiate(own_losses, params, has_aux=has_aux)
    return losses, lambda weights: vjp(jnp.asarray(weights, losses.dtype))[0], *aux


def pass_over(batch: Any, loss_fn: Any, params: optax.Params) -> Any:
    """The losses of a batch and their pullback, as :func:`linearise` gives them."""
    return linearise(lambda p: check_losses(loss_fn(p, batch)), params)


def clean_arguments(
    losses: jax.Array, pullback: Callable[[jax.Array], optax.Updates]
) -> dict[str, Any]:
    """The extra arguments that describe a clean pass."""
    return {
        "losses": losses,
        "pullback": pullback,
        "value": mean_loss(losses),
        "grad": pullback(uniform_weights(losses)),
    }


def mean_loss(losses: jax.Array) -> jax.Array:
    """The mean of losses, in float32 or wider."""
    return jnp.mean(losses, dtype=trees.accumulator_dtype(losses.dtype))


def uniform_weights(losses: jax.Array) -> jax.Array:
    """The weights that average `losses`: `1 / B` each, or 1 for a scalar."""
    return jnp.full_like(losses, 1 / losses.size)


def gradient_function(
    loss_fn: Any, batch: Any, grad_fn: Any
) -> Callable[[optax.Params], optax.Updates]:
    """The function `params -> gradient` that the extra arguments describe.

    It is built like the clean pass of `value_and_update`, so that where parameters
    agree, gradients do, to the last bit.

    Args:
      loss_fn: Per-example or scalar losses of `(params, batch)`, or None.
      batch: The batch for `loss_fn`, or `MISSING`.
      grad_fn: The gradient as a function of params, or None; wins over `loss_fn`.

    Returns:
      The gradient of the mean loss as a function of params.

    Raises:
      ValueError: If neither `grad_fn` nor both `loss_fn` and `batch` are given.
      TypeError: If one of them cannot be called as it has to be.
    """
    if grad_fn is not None:
        return checked("grad_fn", grad_fn, "params")
    for name, missing in (("loss_fn", loss_fn is None), ("batch", batch is MISSING)):
        if missing:
            raise ValueError(
                "sharpness_aware: update needs the gradient at params + epsilon, and "
                f"{name} is missing; call tx.update(grads, state, params, "
                "loss_fn=..., batch=...), or pass grad_fn=..., or let "
                "optax_sam.value_and_update make the call."
            )
    loss_fn = checked("loss_fn", loss_fn, "params", "batch")

    def mean_gradient(params: optax.Params) -> optax.Updates:
        losses, pullback = pass_over(batch, loss_fn, params)
        gradient: optax.Updates = pullback(uniform_weights(losses))
        return gradient

    return mean_gradient


def accepted(
    update: Callable[..., Any],
    extra_args: Mapping[str, Any],
    *,
    withhold: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """The extra arguments to pass to an update function.

    Args:
      update: The update function.
      extra_args: What there is to pass.
      withhold: Names to pass only to an update function that spells them out.

    Returns:
      The arguments that `update` spells out and, if it takes any (`**extra_args`),
      the others that are not withheld.
    """
    parameters = _parameters(update)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = list(parameters)[3:]  # After updates, state and params.
    return {
        name: value
        for name, value in extra_args.items()
        if name in named or (takes_any and name not in withhold)
    }


def _parameters(fn: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(fn).parameters
