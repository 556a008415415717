"""The losses of a batch: what they must be, their mean, and their linearisation."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from optax_sam._base import trees
from optax_sam._base.checks import checked
from optax_sam._base.devices import vary_like

Pullback: TypeAlias = Callable[[jax.Array], optax.Updates]


class CleanPass(NamedTuple):
    """The losses at some parameters, and how they depend on those.

    Attributes:
      losses: The losses of the examples, shape `[B]`, or their mean as a scalar.
      pullback: `weights[B] -> gradient of sum(weights * losses)`.
      value: The mean loss, in float32 or wider.
      grad: The gradient of the mean loss, a tree like the parameters.
    """

    losses: jax.Array
    pullback: Pullback
    value: jax.Array
    grad: optax.Updates


def clean_pass(losses: jax.Array, pullback: Pullback) -> CleanPass:
    """The clean pass that losses and their pullback describe."""
    gradient = pullback(uniform_weights(losses))
    return CleanPass(losses, pullback, mean_loss(losses), gradient)


def linearise(losses_fn: Any, params: optax.Params, has_aux: bool = False) -> Any:
    """The losses at `params`, and `weights -> gradient of sum(weights * losses)`.

    With `has_aux`, auxiliary data come third.
    """
    losses, vjp, *aux = differentiate(losses_fn, params, has_aux)
    return losses, lambda weights: vjp(jnp.asarray(weights, losses.dtype))[0], *aux


def differentiate(fn: Any, params: Any, has_aux: bool = False) -> Any:
    """As `jax.vjp`: what a function gives, its transposed derivative, auxiliary data.

    Of parameters that each device has for itself, the derivative is its own, even if
    the function takes a mean over devices.
    """

    def own(params: Any) -> Any:
        if not has_aux:
            return vary_like(fn(params), params)
        found, aux = fn(params)
        return vary_like(found, params), aux

    vjp: Any = jax.vjp  # Its type does not allow for either of two.
    return vjp(own, params, has_aux=has_aux)


def mean_loss(losses: jax.Array) -> jax.Array:
    """The mean of losses, in float32 or wider."""
    return jnp.mean(losses, dtype=trees.accumulator_dtype(losses.dtype))


def uniform_weights(losses: jax.Array) -> jax.Array:
    """The weights that average `losses`: `1 / B` each, or 1 for a scalar."""
    return jnp.full_like(losses, 1 / losses.size)


def check_losses(owner: str, name: str, losses: Any) -> jax.Array:
    """Returns `losses` if they are per-example losses `[B]` or a scalar loss.

    Args:
      owner: The function that the user called, for the message.
      name: The function that returned the losses, for the message.
      losses: What it returned.
    """
    if not isinstance(losses, jax.Array):
        remedy = "Return losses computed from params with jax.numpy."
        if isinstance(losses, tuple) and name == "scoring_loss_fn":
            remedy = "It has no auxiliary data, whatever has_aux is."
        elif isinstance(losses, tuple):
            remedy = (
                "If it returns (losses, aux), make the step with has_aux=True, or "
                "leave aux out of the loss_fn given to update."
            )
        raise TypeError(
            f"{owner}: {name} must return a JAX array of losses, [B] or a scalar, got "
            f"{type(losses).__name__}. {remedy}"
        )
    if not jnp.issubdtype(losses.dtype, jnp.floating):
        raise TypeError(
            f"{owner}: {name} must return real floating-point losses, got "
            f"{losses.dtype}; a loss that cannot be differentiated gives no direction "
            "to ascend."
        )
    if losses.ndim > 1:
        raise ValueError(
            f"{owner}: {name} must return one loss per example, shape [B], or a "
            f"scalar; got shape {losses.shape}. Reduce the other axes, for example "
            "with losses.mean(axis=tuple(range(1, losses.ndim)))."
        )
    if losses.size == 0:
        raise ValueError(
            f"{owner}: {name} returned no losses, shape [0]; pass a batch with "
            "examples in it."
        )
    return losses


def check_per_example(
    owner: str, name: str, losses: Any, size: int | None = None
) -> jax.Array:
    """Returns losses of single examples, of `size` of them if given, or refuses."""
    shape = losses.shape if isinstance(losses, jax.Array) else None
    if shape == () or (shape is not None and size is not None and shape != (size,)):
        remedy = "leave the mean over the batch out of it"
        if shape:
            remedy = (
                "only its first argument after params is cut, so pass all that belongs "
                "to the examples in it, as one batch such as (x, y), and return a "
                "number for each"
            )
        raise ValueError(
            f"{owner}: needs the loss of each example, shape [{size or 'B'}], and "
            f"{name} returned shape {list(shape)}; {remedy}."
        )
    return check_losses(owner, name, losses)


def per_example(
    owner: str, name: str, loss_fn: Any
) -> Callable[[optax.Params, Any], jax.Array]:
    """`loss_fn(params, batch)`, which has to give the loss of each example."""
    loss_fn = checked(owner, name, loss_fn, "params", "batch")
    return lambda params, batch: check_per_example(owner, name, loss_fn(params, batch))


def of_example(
    owner: str, name: str, loss_fn: Callable[..., Any], params: Any, example: Any
) -> jax.Array:
    """The loss of a single example, as a batch of one."""
    losses = loss_fn(params, jax.tree.map(lambda x: x[None], example))
    return check_per_example(owner, name, losses, 1)[0]
