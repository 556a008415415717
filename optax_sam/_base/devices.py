"""Devices: those that share a batch, and where the state of an optimizer is.

Inside `jax.shard_map` and `jax.pmap` every device has its own examples, and what is of
all of them takes a collective over a named axis. Under `jit` with sharded arrays JAX
sees to all of that.
"""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, TypeAlias

import chex
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

AxisName: TypeAlias = Hashable | tuple[Hashable, ...]


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices along the axis of a name, or this one alone where it is None."""

    axis_name: AxisName | None = None

    def check(self, owner: str) -> None:
        """Refuses a name that is not bound where it is used."""
        try:
            self.size()
        except NameError:
            raise ValueError(
                f"{owner}: axis_name = {self.axis_name!r} is the name of no axis here; "
                "call the step inside jax.shard_map or jax.pmap over this axis, or "
                "leave axis_name out under jax.jit, where arrays may be sharded "
                "without it."
            ) from None

    def size(self) -> int:
        """Their number."""
        return 1 if self.axis_name is None else jax.lax.axis_size(self.axis_name)

    def index(self) -> Any:
        """The place of this one among them."""
        return 0 if self.axis_name is None else jax.lax.axis_index(self.axis_name)

    def part(self, x: jax.Array) -> jax.Array:
        """This device's part of an array, along its first axis."""
        if self.axis_name is None:
            return x
        size = x.shape[0] // self.size()
        return jax.lax.dynamic_slice_in_dim(x, self.index() * size, size)

    def mean(self, tree: chex.ArrayTree) -> chex.ArrayTree:
        """The mean over devices; what is known to be the same on all is its own."""
        pmean: Callable[..., Any] = jax.lax.pmean
        psum: Callable[..., Any] = jax.lax.psum

        def mean(x: jax.Array, axis_name: AxisName) -> Any:
            if x.dtype.itemsize >= 4:
                return pmean(x, axis_name)
            # Half precision might not hold the sum.
            return psum(x / jnp.asarray(self.size(), x.dtype), axis_name)

        return self._reduce(mean, tree)

    def sum(self, tree: chex.ArrayTree) -> chex.ArrayTree:
        """The sum over devices of what differs between them."""
        if self.axis_name is None:
            return tree
        psum: Callable[..., chex.ArrayTree] = jax.lax.psum
        return psum(self.vary(tree), self.axis_name)

    def max(self, tree: chex.ArrayTree) -> chex.ArrayTree:
        """The maximum over devices."""
        return self._reduce(jax.lax.pmax, tree)

    def all(self, flag: jax.Array) -> jax.Array:
        """Whether a flag is set on all devices."""
        if self.axis_name is None:
            return flag
        none_fails: jax.Array = self.sum(jnp.where(flag, 0, 1)) == 0
        return none_fails

    def vary(self, tree: chex.ArrayTree) -> chex.ArrayTree:
        """Lets every device have its own version of a tree.

        With `check_vma=True`, the gradient with respect to what is the same on all
        devices is a sum over them; with respect to the result it is a device's own.
        """
        axes = self._checked_axes()
        return jax.tree.map(lambda x: _vary(x, axes), tree)

    def own(self, name: str, gradient: chex.ArrayTree) -> chex.ArrayTree:
        """Returns a gradient that is a device's own, or refuses one that is a sum.

        As far as JAX knows: it keeps account of that with `check_vma=True`.
        """
        axes = self._checked_axes()
        for path, x in jax.tree.leaves_with_path(gradient):
            if not axes <= _varying(x):
                raise ValueError(
                    f"{name}{jax.tree_util.keystr(path)} is the same on all devices of "
                    f"{self.axis_name!r}: jax.shard_map has added it up, or it is a "
                    "mean already. Differentiate with respect to "
                    f"jax.lax.pcast(params, {self.axis_name!r}, to='varying'), or let "
                    "optax_sam.value_and_update(..., axis_name=...) make the call."
                )
        return gradient

    def _reduce(
        self, collective: Callable[..., Any], tree: chex.ArrayTree
    ) -> chex.ArrayTree:
        axes = self._checked_axes()

        def reduce(x: Any) -> Any:
            if self.axis_name is None or (axes and not axes & _varying(x)):
                return x
            return collective(_vary(x, axes), self.axis_name)

        return jax.tree.map(reduce, tree)

    def _checked_axes(self) -> frozenset[Hashable]:
        """The axes for which JAX keeps account of what varies along them."""
        if self.axis_name is None:
            return frozenset()
        return _varying(jax.lax.axis_index(self.axis_name))


def vary_like(tree: chex.ArrayTree, like: chex.ArrayTree) -> chex.ArrayTree:
    """Lets a tree vary along every axis that something in `like` varies along.

    The branches of a `cond`, the carry of a loop and a tangent must agree in that with
    their counterparts.
    """
    axes = axes_of(like)
    return jax.tree.map(lambda x: _vary(x, axes), tree)


def axes_of(tree: chex.ArrayTree) -> frozenset[Hashable]:
    """The axes that something in a tree is known to vary along."""
    return frozenset().union(*map(_varying, jax.tree.leaves(tree)))


def place(x: jax.Array, like: Any) -> jax.Array:
    """Places `x`, of the shape of `like` behind any leading axes, as `like` is placed.

    New arrays, of zeros or random numbers, would otherwise be made on every device.
    """
    sharding = jax.typeof(like).sharding
    leading = x.ndim - jnp.ndim(like)
    if _has_explicit_axes(like):
        make: Any = PartitionSpec  # Its constructor is not typed.
        spec = make(*(None,) * leading, *sharding.spec)
        reshard: Callable[..., jax.Array] = jax.sharding.reshard
        return reshard(x, NamedSharding(sharding.mesh, spec))
    # Never, but XLA does not know, and computes entries where `like` has them.
    never = jnp.isnan(like) & (like == 0)
    return jnp.where(jnp.expand_dims(never, tuple(range(leading))), jnp.ones_like(x), x)


def place_like(state: chex.ArrayTree, params: chex.ArrayTree) -> chex.ArrayTree:
    """Under `jit`, places what belongs to a parameter as the parameter is placed.

    That is what is found in `state` under the path of the parameter and has its shape.
    New arrays, of zeros say, are otherwise copied to every device, since nothing but
    their shape follows from the parameters. Outside of `jit`, and on a mesh of explicit
    axes, they are placed already.
    """
    by_path = {
        tuple(path): p
        for path, p in jax.tree.leaves_with_path(params)
        if isinstance(p, jax.core.Tracer) and not _has_explicit_axes(p)
    }
    if not by_path:
        return state

    def place_one(path: Any, x: Any) -> Any:
        if jnp.issubdtype(jnp.result_type(x), jax.dtypes.prng_key):
            return x
        for i in range(len(path) + 1):
            p = by_path.get(tuple(path[i:]))
            if p is not None and jnp.shape(p) == jnp.shape(x):
                return place(x, p)
        return x

    return jax.tree.map_with_path(place_one, state)


def _has_explicit_axes(x: Any) -> bool:
    return AxisType.Explicit in (jax.typeof(x).sharding.mesh.axis_types or ())


def _varying(x: Any) -> frozenset[Hashable]:
    kind: Any = jax.typeof(x)
    if hasattr(kind, "manual_axis_type"):
        return frozenset(kind.manual_axis_type.varying)
    return frozenset(kind.vma)  # Before jax 0.10.


def _vary(x: Any, axes: frozenset[Hashable]) -> Any:
    missing = tuple(axes - _varying(x)) if axes else ()
    return jax.lax.pcast(x, missing, to="varying") if missing else x
