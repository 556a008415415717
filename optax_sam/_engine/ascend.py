"""One ascent: from a clean gradient to a perturbation that is finite.

An ascent is any gradient transformation; nothing here knows which.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_sam._base import trees


class Ascended(NamedTuple):
    """Where an ascent leads to.

    Attributes:
      epsilon: The perturbation: a tree like the parameters, or with
        `optax.MaskedNode` for leaves that are not perturbed; zeros unless finite.
      state: The ascent's new state, which counts only if finite.
      finite: Whether what the ascent read was finite, a bool scalar.
    """

    epsilon: optax.Updates
    state: optax.OptState
    finite: jax.Array


def ascend(
    ascent: optax.GradientTransformationExtraArgs,
    gradient: optax.Updates,
    state: optax.OptState,
    params: optax.Params,
    arguments: dict[str, Any],
) -> Ascended:
    """Ascends along a clean gradient; one that is not finite leads nowhere.

    The ascent is traced once. What it reads is seen in the trace, which is then
    evaluated.
    """
    leaves, structure = jax.tree.flatten(gradient)

    def update(*leaves: jax.Array) -> tuple[optax.Updates, optax.OptState]:
        gradient = jax.tree.unflatten(structure, leaves)
        epsilon, new = ascent.update(gradient, state, params, **arguments)
        return epsilon, new

    trace: Any = jax.make_jaxpr(update, return_shape=True)
    evaluate: Any = jax.core.eval_jaxpr
    closed, shapes = trace(*leaves)
    found = evaluate(closed.jaxpr, closed.consts, *leaves)
    epsilon, new = jax.tree.unflatten(jax.tree.structure(shapes), found)
    read = _read(closed.jaxpr, leaves, epsilon, new)
    finite = trees.all_finite(read)
    epsilon = trees.map_present(lambda e: _zero_unless(finite, e), epsilon)
    return Ascended(epsilon, new, finite)


def advance_if(
    condition: jax.Array, new: chex.ArrayTree, old: chex.ArrayTree
) -> chex.ArrayTree:
    """The new state of an ascent if a scalar condition holds, or the old one."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def _read(
    jaxpr: Any,
    gradient: list[jax.Array],
    epsilon: optax.Updates,
    state: optax.OptState,
) -> list[jax.Array]:
    """What has to be finite: all of the gradient that the ascent reads.

    To look at a leaf that the ascent leaves unread, since a static mask drops it or a
    gradient of its own replaces it, would make XLA compute it; one that is dropped
    after an average or a norm has read it must be looked at. A gradient of the
    ascent's own is seen in what it makes of it, epsilon and its state.
    """
    used = {id(v) for eqn in jaxpr.eqns for v in eqn.invars} | set(
        map(id, jaxpr.outvars)
    )
    unread = [id(v) not in used for v in jaxpr.invars]
    made = jax.tree.leaves(epsilon, is_leaf=trees.is_absent)
    own = [e for e, u in zip(made, unread, strict=True) if u and not trees.is_absent(e)]
    if own:
        numbers = jax.tree.leaves(state)
        own += [x for x in numbers if jnp.issubdtype(jnp.result_type(x), jnp.floating)]
    return [g for g, u in zip(gradient, unread, strict=True) if not u] + own


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
