"""What the links of Sparse SAM do with masks of bools that they keep in their state."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from optax_sam._base import trees
from optax_sam._base.checks import check_like
from optax_sam._base.devices import vary_like


def apply(mask: chex.ArrayTree, updates: optax.Updates) -> optax.Updates:
    """Zeros where the mask is False; what is absent stays absent."""
    return trees.map_present(
        lambda u, m: jnp.where(m, u, jnp.zeros_like(u)), updates, mask
    )


def present(tree: chex.ArrayTree, updates: optax.Updates) -> chex.ArrayTree:
    """The leaves of `tree` that are present in `updates`."""
    return trees.map_present(lambda _, x: x, updates, tree)


def refresh_if(
    due: jax.Array,
    make: Callable[[], chex.ArrayTree],
    mask: chex.ArrayTree,
    updates: optax.Updates,
    then: Callable[[chex.ArrayTree], Any] = lambda mask: mask,
) -> Any:
    """A new mask where it is due; leaves absent from that stay as they are.

    In `shard_map` it varies over devices if `updates` do. What is made of the mask by
    `then` is made in the same branch.
    """

    def refresh() -> Any:
        mixed = trees.fill(make(), mask)
        return then(vary_like(mixed, updates))

    return jax.lax.cond(due, refresh, lambda: then(vary_like(mask, updates)))


def check(name: str, mask: chex.ArrayTree, like: chex.ArrayTree) -> chex.ArrayTree:
    """Returns a mask that has the structure and shapes of `like`, or refuses it."""
    remedy = (
        "A mask has one bool for each parameter: start from init(params) of this very "
        "transformation, and let a pattern map over the scores with jax.tree.map."
    )
    check_like(name, mask, like, remedy)
    for path, m in jax.tree.leaves_with_path(mask):
        if jnp.result_type(m) != jnp.bool_:
            raise TypeError(
                f"{name}{jax.tree_util.keystr(path)} has dtype {jnp.result_type(m)}. "
                f"{remedy}"
            )
    return mask
