"""Where ascent and base lead, as it is seen when the state is made.

By their states and, where these do not tell, by a trial on small parameters, with all
arguments of the training step.
"""

import operator
import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_sam._base.checks import refuse
from optax_sam._engine.states import SharpnessAwareState
from optax_sam._engine.value_and_update import value_and_update

# Of sizes that no bound and no radius has both of.
_SLOPES = (1.0, -8.0)
_STEPS = 32  # To accumulate gradients over, or for a schedule to leave zero.
_Moves: TypeAlias = dict[str, np.ndarray]


def check_directions(
    owner: str,
    base: optax.GradientTransformationExtraArgs,
    ascent: optax.GradientTransformationExtraArgs,
    state: SharpnessAwareState,
    params: optax.Params,
) -> None:
    """Refuses an ascent that leads downhill, and a base that leads uphill.

    Warns of an ascent that gives the gradient back, or of two lengths in a row.

    Args:
      owner: The function that the user called.
      base: The base optimizer.
      ascent: The ascent.
      state: Their first states.
      params: The parameters, of which shapes and dtypes are read.
    """
    _check_is_plain(owner, "ascent", state.ascent_state)
    _check_is_plain(owner, "base", state.base_state)
    _check_has_no_descent(owner, state.ascent_state)
    links = _links(state.ascent_state)
    are_own = all(map(_is_of_this_package, links))
    lengths = [getattr(link, "sets_length", False) for link in links]
    if any(map(operator.and_, lengths, lengths[1:])):  # A mask between has its place.
        warnings.warn(
            f"{owner}: two links of the ascent, one after the other, give the "
            "perturbation a length, and the second one counts; leave one out.",
            stacklevel=3,
        )
    if not (are_own and any(lengths)):
        _check_ascent(owner, are_own, *_tried(ascent, state.ascent_state, params))
    if _found(_is_of_an_ascent, state.base_state):
        _check_base(owner, *_tried(base, state.base_state, params))


def _check_is_plain(owner: str, name: str, state: optax.OptState) -> None:
    """Refuses a sharpness-aware optimizer within a sharpness-aware one."""
    kinds = (SharpnessAwareState, optax.contrib.SAMState)
    for found in _found(lambda x: isinstance(x, kinds), state):
        refuse(
            owner,
            f"{name} must not be sharpness-aware itself, as its state says",
            type(found).__name__,
            "pass the optimizer that is in it as base, and "
            "optax_sam.scale_to_radius(rho) as ascent, which optax_sam.sam does; to "
            "combine methods, chain their ascents, sharpness_aware(base, optax.chain("
            "...))",
        )


def _check_has_no_descent(owner: str, state: optax.OptState) -> None:
    """Refuses in an ascent what is a link of the base."""
    for found in _found(lambda x: getattr(x, "descends", False), state):
        refuse(
            owner,
            "ascent must have no link of the base, as its state says",
            type(found).__name__,
            "put it first in the base, sharpness_aware(optax.chain(link, sgd), ascent)",
        )


def _check_ascent(owner: str, are_own: bool, along: _Moves, against: _Moves) -> None:
    # Along the gradient and along minus the gradient: others may lead anywhere.
    downhill = [p for p in along if np.sum(along[p]) < 0 < np.sum(against[p])]
    if downhill:
        refuse(
            owner,
            "ascent must lead uphill, since it is added to the parameters: a gradient "
            f"of 1 of params{downhill[0]} must give a positive number",
            float(np.mean(along[downhill[0]])),
            "an optimizer leads downhill, and belongs first, in sharpness_aware(base, "
            "ascent); pass optax_sam.scale_to_radius(rho) as ascent, also for the "
            "adversary chain(normalize(), sgd(rho)) of optax.contrib.sam, and "
            "optax.scale(rho) for sgd(rho) alone",
        )
    moves = zip(_SLOPES, (along, against), strict=True)
    raw = all(np.all(e == g) for g, found in moves for e in found.values())
    # Links of this package that cannot be tried replace the gradient by another.
    if raw and (any(map(np.any, along.values())) or (are_own and not along)):
        warnings.warn(
            f"{owner}: the ascent gives back the gradient as it is, so that the "
            "perturbation is as long as the gradient; end it with "
            "optax_sam.scale_to_radius(rho) or optax.scale(r).",
            stacklevel=4,
        )


def _check_base(owner: str, along: _Moves, against: _Moves) -> None:
    for path in along:
        if np.sum(along[path]) > 0 > np.sum(against[path]):
            refuse(
                owner,
                "base must lead downhill, since its update is added to the parameters: "
                f"a gradient of 1 of params{path} must give a negative number",
                float(np.mean(along[path])),
                "an ascent leads uphill, and belongs second, in sharpness_aware(base, "
                "ascent); pass an optimizer such as optax.sgd(0.1) as base",
            )


def _links(state: Any) -> tuple[Any, ...]:
    """The states of the links of a chain, or of the only one."""
    return state if type(state) is tuple else (state,)


def _is_of_an_ascent(state: Any) -> bool:
    return _is_of_this_package(state) and not getattr(state, "descends", False)


def _is_of_this_package(state: Any) -> bool:
    package, *_ = __name__.split(".")
    return type(state).__module__.split(".")[0] == package


def _found(wanted: Callable[[Any], bool], tree: Any) -> list[Any]:
    """The outermost nodes of a tree that are wanted."""
    return list(filter(wanted, jax.tree.leaves(tree, is_leaf=wanted)))


def tried_uphill(
    base: optax.GradientTransformationExtraArgs,
    state: optax.OptState,
    params: optax.Params,
) -> tuple[optax.Params, optax.OptState] | None:
    """Small parameters and a base's state there, of gradients that are one.

    None if it cannot be tried.
    """
    with jax.ensure_compile_time_eval():
        for small in _small(state, params):
            try:
                return small, _first_move(base, small)(_SLOPES[0])[1]
            except Exception:  # Of all kinds: it is made for other parameters.
                continue
    return None


def _tried(
    tx: optax.GradientTransformationExtraArgs,
    state: optax.OptState,
    params: optax.Params,
) -> tuple[_Moves, _Moves]:
    """Where a transformation leads along a gradient and along minus the gradient."""
    with jax.ensure_compile_time_eval():
        for small in _small(state, params):
            moves = _moves(tx, small)
            if moves[0]:
                break
    return moves


def _small(state: optax.OptState, params: optax.Params) -> list[optax.Params]:
    """What to try a transformation on, by its state for the parameters.

    A single array, which is soon compiled, if it can be tried there and says all.
    """
    trees = [jax.tree.map(_corner, params)]
    by_parts = (optax.MaskedState, optax.PartitionState)
    if not _found(lambda x: isinstance(x, by_parts), state):
        trees.insert(0, jnp.ones(256))  # So many that sparse masks keep some.
    return trees


def _corner(p: Any) -> jax.Array:
    """Few entries of a parameter, which are one, in as many dimensions."""
    return jnp.ones([min(n, 4) for n in jnp.shape(p)], jnp.result_type(p))


def _moves(
    tx: optax.GradientTransformationExtraArgs, params: optax.Params
) -> tuple[_Moves, _Moves]:
    """The first updates that are not zero, by path; none if it cannot be tried."""
    try:
        (along, _), (against, _) = map(_first_move(tx, params), _SLOPES)
        return along, against
    except Exception:  # Of all kinds: it is made for other parameters.
        return {}, {}


def _first_move(
    tx: optax.GradientTransformationExtraArgs, params: optax.Params
) -> Callable[[float], tuple[_Moves, optax.OptState]]:
    """From a slope to the first updates that are not zero, and the state with them."""
    step = jax.jit(value_and_update(_losses, tx))

    def move(slope: float) -> tuple[_Moves, optax.OptState]:
        state, found = tx.init(params), {}
        for _ in range(_STEPS):
            _, updates, state = step(params, state, jnp.full(2, slope))
            leaves = jax.tree.leaves_with_path(updates)
            found = {jax.tree_util.keystr(p): np.asarray(x, float) for p, x in leaves}
            if any(np.any(e) for e in found.values()):
                break
        return found, state

    return move


def _losses(params: optax.Params, slopes: jax.Array) -> jax.Array:
    """Losses of 1 where all entries are 1, with a slope along each of them."""
    rise = sum(jnp.sum(p - 1) for p in jax.tree.leaves(params))
    return 1 + slopes * rise
