"""The two passes of a sharpness-aware step over some examples.

A clean gradient that is not finite gives a perturbation of zero.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from optax_sam._base import trees
from optax_sam._engine import protocol

Ascended: TypeAlias = tuple[optax.Updates, optax.OptState]


class Passes(NamedTuple):
    """What the two passes give.

    Attributes:
      clean_gradient: The gradient at the parameters.
      gradient: The gradient at the perturbed parameters.
      finite: Whether what the ascent read was finite, a bool scalar.
    """

    clean_gradient: optax.Updates
    gradient: optax.Updates
    finite: jax.Array


def two_passes(
    ascend: Callable[[optax.Updates], Ascended],
    clean_gradient: optax.Updates,
    params: optax.Params,
    gradient_at: Callable[[optax.Params], optax.Updates],
) -> tuple[Passes, optax.OptState]:
    """Ascends along the clean gradient, and takes the gradient there.

    Args:
      ascend: From the clean gradient to the perturbation and the ascent's new state.
      clean_gradient: A tree like `params`.
      params: The parameters.
      gradient_at: From parameters to the gradient there.

    Returns:
      The gradients, and the new state, which counts only if all was finite.
    """
    epsilon, ascent_state = ascend(clean_gradient)
    finite = trees.all_finite(_read(ascend, clean_gradient, epsilon, ascent_state))
    epsilon = trees.map_present(lambda e: _zero_unless(finite, e), epsilon)
    gradient = gradient_at(_perturb(params, epsilon))
    protocol.check_gradient("grad_fn(params)", gradient, params)
    return Passes(clean_gradient, gradient, finite), ascent_state


def _perturb(params: optax.Params, epsilon: optax.Updates) -> optax.Params:
    """Adds the leaves of `epsilon` that are present, in the parameters' dtypes."""

    def add(e: Any, p: Any) -> Any:
        return p if trees.is_absent(e) else p + jnp.asarray(e, jnp.result_type(p))

    return jax.tree.map(add, epsilon, params, is_leaf=trees.is_absent)


def _zero_unless(condition: jax.Array, e: Any) -> jax.Array:
    """Zeros unless a scalar condition holds.

    By a mask of bits: where a float is selected, XLA may fuse the product that scales
    it with the addition to the parameters, rounding once for two. Whether it does
    depends on what else is in the chain, and a mask of ones would not be SAM exactly.
    """
    e = jnp.asarray(e)
    unsigned = jnp.dtype(f"uint{8 * e.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(e, unsigned) & -condition.astype(unsigned)
    return jax.lax.bitcast_convert_type(bits, e.dtype)


def _read(
    ascend: Callable[[optax.Updates], Any],
    gradient: optax.Updates,
    epsilon: optax.Updates,
    state: optax.OptState,
) -> list[jax.Array]:
    """What has to be finite: all of the gradient that the ascent reads.

    To look at a leaf that the ascent leaves unread, since a static mask drops it or a
    gradient of its own replaces it, would make XLA compute it; one that is dropped
    after an average or a norm has read it must be looked at. A gradient of the
    ascent's own is seen in what it makes of it, epsilon and its state.
    """
    leaves, structure = jax.tree.flatten(gradient)
    jaxpr = jax.make_jaxpr(lambda *g: ascend(jax.tree.unflatten(structure, g)))(
        *leaves
    ).jaxpr
    used = {id(v) for eqn in jaxpr.eqns for v in eqn.invars} | set(
        map(id, jaxpr.outvars)
    )
    unread = [id(v) not in used for v in jaxpr.invars]
    made = jax.tree.leaves(epsilon, is_leaf=trees.is_absent)
    own = [e for e, u in zip(made, unread, strict=True) if u and not trees.is_absent(e)]
    if own:
        numbers = jax.tree.leaves(state)
        own += [x for x in numbers if jnp.issubdtype(jnp.result_type(x), jnp.floating)]
    return [g for g, u in zip(leaves, unread, strict=True) if not u] + own
