"""One ascent: from a clean gradient to a perturbation that is finite.

An ascent is any gradient transformation; nothing here knows which.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_sam._base import trees
from optax_sam._engine import protocol

_CLEAN = ("losses", "value", "grad")  # Of the clean pass, beside the gradient itself.


class Ascended(NamedTuple):
    """Where an ascent leads to.

    Attributes:
      epsilon: The perturbation: a tree like the parameters, or with
        `optax.MaskedNode` for leaves that are not perturbed; zeros unless finite.
      state: The ascent's new state, or the one before.
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
    advances: jax.Array | None = None,
) -> Ascended:
    """Ascends along a clean gradient; one that is not finite leads nowhere.

    Its state advances where what it reads is finite, or where it is told to.
    """
    return Ascent(ascent, gradient, state, params, arguments, advances)()


class Ascent:
    """An ascent, traced once, to be made where it is called: also in branches.

    What it reads is seen in the trace, which is then evaluated.

    Attributes:
      reads_clean_pass: Whether it reads anything that the clean pass has found.
      reads_whole_gradient: Whether it reads the clean gradient of every parameter, and
        so leads nowhere where one is not finite.
    """

    def __init__(
        self,
        ascent: optax.GradientTransformationExtraArgs,
        gradient: optax.Updates,
        state: optax.OptState,
        params: optax.Params,
        arguments: dict[str, Any],
        advances: jax.Array | None = None,
    ) -> None:
        """Traces it; the arguments are those of :func:`ascend`."""
        leaves, structure = jax.tree.flatten(gradient)
        clean = {name: arguments[name] for name in _CLEAN if name in arguments}
        kept, kept_structure = jax.tree.flatten(arguments.get("base_state"))
        noted = {n: _Noting(arguments[n]) for n in ("pullback",) if n in arguments}

        def update(
            condition: jax.Array,
            leaves: list[jax.Array],
            clean: dict[str, Any],
            kept: list[jax.Array],
        ) -> tuple[optax.Updates, optax.OptState]:
            given = arguments | noted | clean
            given["base_state"] = jax.tree.unflatten(kept_structure, kept)
            given["advance"] = advance = _Advance(condition)
            given["is_gradient"] = _IsGradient(leaves)
            gradient = jax.tree.unflatten(structure, leaves)
            epsilon, new = ascent.update(gradient, state, params, **given)
            return epsilon, advance(new, state)

        trace: Any = jax.make_jaxpr(update, return_shape=True)
        self._closed, self._shapes = trace(True, leaves, clean, kept)
        jaxpr = self._closed.jaxpr
        _check_no_leaf_is_raw(jaxpr.invars[1 : len(leaves) + 1], jaxpr, self._shapes[0])
        read = iter(_read(jaxpr)[1:])
        self._read, clean_read, kept_read = (
            [next(read) for _ in jax.tree.leaves(x)] for x in (leaves, clean, kept)
        )
        called = any(n.called for n in noted.values())
        self.reads_clean_pass = any(self._read + clean_read) or called
        self.reads_whole_gradient = all(self._read)
        # Along what the base keeps, and no gradient of its own.
        self._follows_base = any(kept_read) and not called
        self._finite = trees.all_finite(_floating(leaves, self._read))
        self._finite &= trees.all_finite(_floating(kept, kept_read), kept=True)
        self._inputs = leaves, clean, kept
        self._state, self._advances = state, advances

    def __call__(self) -> Ascended:
        """Makes the ascent."""
        epsilon, new = self._evaluated(self._finite)
        finite, new = self._checked(self._finite, epsilon, new)
        return Ascended(zero_unless(finite, epsilon), new, finite)

    def not_made(self) -> Ascended:
        """What a step makes of it that does not ascend: a state that sees the gradient.

        A gradient of the ascent's own is only made where its state sees that as well.
        """
        finite = trees.all_finite(self._inputs[0])
        epsilon, new = self._evaluated(finite)
        finite, new = self._checked(finite, epsilon, new, moves=False)
        return Ascended(None, new, finite)

    def _evaluated(self, finite: jax.Array) -> tuple[optax.Updates, optax.OptState]:
        """The trace, for a state that advances where it is told to, or is finite."""
        condition = finite if self._advances is None else self._advances
        evaluate: Any = jax.core.eval_jaxpr
        inputs = jax.tree.leaves((condition, *self._inputs))
        found = evaluate(self._closed.jaxpr, self._closed.consts, *inputs)
        made: tuple[Any, Any] = jax.tree.unflatten(
            jax.tree.structure(self._shapes), found
        )
        return made

    def _checked(
        self,
        finite: jax.Array,
        epsilon: optax.Updates,
        new: optax.OptState,
        *,
        moves: bool = True,
    ) -> tuple[jax.Array, optax.OptState]:
        """Whether a gradient of its own is finite too, if it has one, and its state."""
        own = [] if self._follows_base else _own(self._read, epsilon)
        if not own:
            return finite, new
        seen = list(filter(_is_floating, jax.tree.leaves(new)))
        finite &= trees.all_finite(own + seen if moves else seen)
        if self._advances is None:
            new = _Advance(finite)(new, self._state)
        return finite, new


class _Noting:
    """A function that notes whether an ascent has called it."""

    def __init__(self, fn: Any) -> None:
        self._fn, self.called = fn, False

    def __call__(self, *args: Any) -> Any:
        self.called = True
        return self._fn(*args)


class _Advance:
    """`advance(new, old)`: a new state where a scalar condition holds, or the old one.

    What it has chosen before it leaves as it is: compilers would not see that to choose
    twice is to choose once, and keep the old state for the second time.
    """

    def __init__(self, condition: jax.Array) -> None:
        self._condition = condition
        self._chosen: list[Any] = []

    def __call__(self, new: chex.ArrayTree, old: chex.ArrayTree) -> chex.ArrayTree:
        """Chooses leaf by leaf."""

        def choose(a: Any, b: Any) -> Any:
            if not any(a is x for x in self._chosen):
                a = jnp.where(self._condition, a, b)
                self._chosen.append(a)
            return a

        return jax.tree.map(choose, new, old)


class _IsGradient:
    """`is_gradient(updates)`: whether updates are leaves of the gradient themselves.

    In a branch or a loop that cannot be seen, and they may be.
    """

    def __init__(self, leaves: list[jax.Array]) -> None:
        self._leaves = leaves
        self._trace = protocol.trace_now()

    def __call__(self, updates: optax.Updates) -> bool:
        own = set(map(id, self._leaves))
        here = protocol.trace_now() == self._trace
        return not here or own.issuperset(map(id, jax.tree.leaves(updates)))


def _check_no_leaf_is_raw(leaves: Any, jaxpr: Any, epsilon: optax.Updates) -> None:
    """Refuses to add some gradients as they are, beside others that are scaled."""
    gradient = set(map(id, leaves))
    paths = [
        jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(epsilon)
    ]
    raw = [p for p, v in zip(paths, jaxpr.outvars, strict=False) if id(v) in gradient]
    if 0 < len(raw) < len(paths):
        raise ValueError(
            f"sharpness_aware: the ascent hands on the gradient of params{raw[0]} as "
            "it is, to be added to it, while it scales others: so does optax.masked. "
            "Put optax_sam.perturb_only(mask) before it, which leaves parameters where "
            "they are, or give each group a radius, optax.partition({'a': "
            "optax_sam.scale_to_radius(0.1), ...}, labels)."
        )


def _read(jaxpr: Any) -> list[bool]:
    """Which inputs an ascent reads: of the gradient, those leaves have to be finite.

    To look at a leaf that the ascent leaves unread, since a static mask drops it or a
    gradient of its own replaces it, would make XLA compute it; one that is dropped
    after an average or a norm has read it must be looked at.
    """
    used = {id(v) for eqn in jaxpr.eqns for v in eqn.invars} | set(
        map(id, jaxpr.outvars)
    )
    return [id(v) in used for v in jaxpr.invars]


def _own(read: list[bool], epsilon: optax.Updates) -> list[jax.Array]:
    """Where epsilon shows a gradient of the ascent's own; its state does then."""
    made = jax.tree.leaves(epsilon, is_leaf=trees.is_absent)
    return [e for e, r in zip(made, read, strict=True) if not (r or trees.is_absent(e))]


def _floating(leaves: list[Any], read: list[bool]) -> list[Any]:
    """The leaves that are read and floating point."""
    return [x for x, r in zip(leaves, read, strict=True) if r and _is_floating(x)]


def _is_floating(x: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(x), jnp.floating))


def zero_unless(condition: jax.Array, epsilon: optax.Updates) -> optax.Updates:
    """A perturbation, of zeros unless a scalar condition holds.

    By a mask of bits: where a float is selected, XLA may fuse the product that scales
    it with the addition to the parameters, rounding once for two. Whether it does
    depends on what else is in the chain, and a mask of ones would not be SAM exactly.
    """

    def of_leaf(e: Any) -> jax.Array:
        e = jnp.asarray(e)
        unsigned = jnp.dtype(f"uint{8 * e.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(e, unsigned) & -condition.astype(unsigned)
        return jax.lax.bitcast_convert_type(bits, e.dtype)

    return trees.map_present(of_leaf, epsilon)
