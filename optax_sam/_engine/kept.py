"""What the base keeps in its state, for ascents along it: found by its name."""

from collections.abc import Callable
from typing import Any, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_sam._base import trees
from optax_sam._base.checks import refuse

# Small parameters and a state of the base for them; None where it cannot be tried.
Tried: TypeAlias = Callable[[], tuple[optax.Params, optax.OptState] | None]


def kept_by_base(
    owner: str,
    names: tuple[str, ...],
    base_state: optax.OptState,
    params: optax.Params,
    remedy: str,
) -> chex.ArrayTree:
    """A tree like the parameters that the base keeps, for all of them or for some.

    Parts of it, of `optax.partition` say, are put together. It is absent for parameters
    of which the base keeps none, and for those that are absent.

    Args:
      owner: The function that the user called, for messages.
      names: The names that fields of states may have for it, the usual one first.
      base_state: The state of the base, or None if it was not given.
      params: The parameters, or a tree like them.
      remedy: What to do where there is none, for messages.

    Raises:
      ValueError: If there is none at all, or several for one parameter.
    """
    if base_state is None:
        raise ValueError(
            f"{owner}: base_state, the state of the base, is missing; make the link a "
            "part of the ascent, sharpness_aware(base, link), and pass the whole state "
            "to diagnostics."
        )
    kept = [
        tree
        for name in names
        for _, tree in optax.tree.get_all_with_path(base_state, name)
        if _is_of(params, tree)
    ]

    def only(path: Any, p: Any, *of_leaf: Any) -> Any:
        present = [x for x in of_leaf if not (trees.is_absent(p) or trees.is_absent(x))]
        if len(present) > 1:
            where = f"params{jax.tree_util.keystr(path)}"
            what = f"base must keep one {names[0]} of {where}"
            refuse(owner, what, f"{len(present)} of them", "leave one of them out")
        return present[0] if present else optax.MaskedNode()

    found: chex.ArrayTree = jax.tree.map_with_path(
        only, params, *kept, is_leaf=trees.is_absent
    )
    if jax.tree.leaves(params) and not jax.tree.leaves(found):
        what = (
            f"base must keep a tree like params, as {' or '.join(names)} of its state"
        )
        refuse(owner, what, type(base_state).__name__, remedy)
    return found


def _is_of(params: Any, tree: Any) -> bool:
    """Whether a tree is like the parameters, of which some may be absent."""

    def are_alike(p: Any, x: Any) -> bool:
        absent = trees.is_absent(p) or trees.is_absent(x)
        is_leaf = jax.tree_util.all_leaves([x])  # And no list, which SM3 has for each.
        return absent or (is_leaf and jnp.shape(p) == jnp.shape(x))

    try:
        alike = jax.tree.map(are_alike, params, tree, is_leaf=trees.is_absent)
    except (TypeError, ValueError):
        return False
    return all(jax.tree.leaves(alike)) and bool(jax.tree.leaves(tree))


def check_keeps_gradients(
    owner: str,
    names: tuple[str, ...],
    base_state: optax.OptState,
    params: optax.Params,
    tried: Tried,
    remedies: tuple[str, str],
) -> None:
    """Refuses a base that keeps no such tree, or updates where gradients belong.

    Args:
      owner: As for :func:`kept_by_base`.
      names: As there.
      base_state: As there.
      params: As there.
      tried: See `Tried`.
      remedies: What to do where there is none, and where it is of updates.
    """
    none, of_updates = remedies
    kept_by_base(owner, names, base_state, params, none)
    found = tried()
    if found is None:
        return
    kept = kept_by_base(owner, names, found[1], found[0], none)
    # Not by jax.numpy, which would trace them where init is compiled.
    sums = [float(np.asarray(x).sum()) for x in jax.tree.leaves(kept)]
    if min(sums) < 0:
        what = (
            f"base must accumulate gradients in its {names[0]}: those of 1 must give a "
            "positive sum"
        )
        refuse(owner, what, min(sums), f"it accumulates its own updates; {of_updates}")


def check_kept(
    owner: str,
    ascent_state: optax.OptState,
    base_state: optax.OptState,
    params: Any,
    tried: Tried,
) -> None:
    """Lets the links of an ascent look for what they need the base to keep.

    They may also look at what it keeps of gradients that are one, `tried()`. Not where
    there are no parameters, as in `optax.tree.map_params`.
    """

    def needs(node: Any) -> bool:
        return hasattr(node, "check_base")

    if not jax.tree.leaves(params):
        return
    for link in filter(needs, jax.tree.leaves(ascent_state, is_leaf=needs)):
        link.check_base(owner, base_state, params, tried)
