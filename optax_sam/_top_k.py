"""The exact largest entries of a whole pytree, without a sort and without a gather.

Unsigned integers that order like the scores settle the threshold two bits at a time: a
pass counts, leaf by leaf, how many entries reach each of three candidates. Counts are
scalars, so they sum across leaves and across devices, and sharded leaves stay where
they are.
"""

import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from optax_sam import _tree


def largest(
    scores: chex.ArrayTree, k: chex.Numeric, *, weigh_by: chex.ArrayTree | None = None
) -> chex.ArrayTree:
    """Selects the `k` largest entries of a tree, ties by position.

    Args:
      scores: Tree of arrays of any shapes, all floating point or all of one unsigned
        integer type. NaN and the unsigned 0 are never selected.
      k: How many, a scalar integer, which may be traced.
      weigh_by: Tree of Python ints, how many entries an entry of each leaf counts for;
        None for one each. Entries are then selected until they count for `k` or more.

    Returns:
      Tree of bools. Exactly `k` are True where entries count for one and no NaN is in
      the way. Of equal entries those of earlier leaves, then those earlier in row-major
      order, come first.

    Raises:
      ValueError: If the entries cannot be counted in 32 bits and x64 is off.
    """
    leaves, structure = jax.tree.flatten(scores)
    keys = sort_keys(leaves)
    if not keys:
        return scores
    sizes = [1] * len(keys) if weigh_by is None else jax.tree.leaves(weigh_by)
    counter = _counter([w * x.size for w, x in zip(sizes, keys, strict=True)])
    k = jnp.asarray(k, counter)
    weights = jnp.asarray(sizes, counter)

    def reach(candidates: jax.Array) -> jax.Array:
        """What the entries from each candidate upwards count for, per leaf."""
        return _count([[x >= c for c in candidates] for x in keys], counter)

    threshold = _settle(
        keys[0].dtype, [], lambda c: jnp.sum(reach(c) * weights, axis=1) >= k
    )
    # NaN has the key 0, and is no tie even if there is nothing else left to select.
    tied = [(x == threshold) & (x > 0) for x in keys]
    num_above, num_tied = _count(
        [[x > threshold, t] for x, t in zip(keys, tied, strict=True)], counter
    )
    missing = k - jnp.minimum(k, jnp.sum(num_above * weights))
    quota = _quota(missing, num_tied, weights)
    end = _ends(tied, num_tied, quota)
    masks = [
        (x > threshold) | (t & (_position(t.shape, counter) < end[i]))
        for i, (x, t) in enumerate(zip(keys, tied, strict=True))
    ]
    return jax.tree.unflatten(structure, masks)


def count_true(masks: chex.ArrayTree) -> jax.Array:
    """How many entries of a tree of bools are True."""
    leaves = jax.tree.leaves(masks)
    counter = _counter([m.size for m in leaves])
    counts = [jnp.sum(m, dtype=counter) for m in leaves]
    return jnp.sum(_tree.stack([jnp.zeros([], counter), *counts]), dtype=counter)


def sort_keys(leaves: list[Any]) -> list[jax.Array]:
    """Unsigned integers that order like the entries, 0 for NaN."""
    if not leaves or jnp.issubdtype(leaves[0].dtype, jnp.unsignedinteger):
        return leaves
    dtype = jnp.result_type(*leaves)
    dtype = dtype if dtype.itemsize > 1 else jnp.float32
    unsigned = jnp.dtype(f"uint{8 * jnp.dtype(dtype).itemsize}")
    sign = jnp.asarray(1 << (8 * unsigned.itemsize - 1), unsigned)

    def key(x: Any) -> jax.Array:
        # In integers throughout: XLA on the CPU takes the smallest floats for zeros.
        x = jnp.asarray(x, dtype)
        bits = jax.lax.bitcast_convert_type(x, unsigned)
        bits = jnp.where(bits == sign, 0, bits)  # -0 is 0.
        return jnp.where(jnp.isnan(x), 0, jnp.where(bits < sign, bits | sign, ~bits))

    return [key(x) for x in leaves]


def _counter(sizes: list[int]) -> Any:
    """An unsigned integer type that counts all entries."""
    counter = jax.dtypes.canonicalize_dtype(jnp.uint64)
    if sum(sizes) > np.iinfo(counter).max:
        raise ValueError(
            f"largest: scores have {sum(sizes):,} entries, more than 32 bits count; "
            "set jax_enable_x64, or select in parts."
        )
    return counter


def _count(conditions: list[list[jax.Array]], counter: Any) -> jax.Array:
    """How often each of several conditions holds: `[num_conditions, num_leaves]`."""

    def count(conditions: list[jax.Array]) -> Any:
        # As one reduction of several operands: XLA on the CPU stores the operand of a
        # plain sum before it adds it up, and would need five times as long.
        sums = jax.lax.reduce(
            tuple(c.astype(counter) for c in conditions),
            (jnp.zeros([], counter),) * len(conditions),
            lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True)),
            tuple(range(conditions[0].ndim)),
        )
        return jnp.stack(sums)

    return _tree.stack([count(c) for c in conditions]).T


def _settle(
    dtype: Any, shape: Any, holds: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """The largest unsigned integers for which a condition holds that once ceases to.

    Args:
      dtype: Their type.
      shape: Their shape.
      holds: Maps candidates `[3, *shape]` to bools.
    """
    digits = jnp.arange(1, 4, dtype=dtype).reshape(3, *(1 for _ in shape))
    num_rounds = 4 * jnp.dtype(dtype).itemsize

    def settle_two_bits(i: jax.Array, value: jax.Array) -> Any:
        shift = (2 * (num_rounds - 1 - i)).astype(dtype)
        digit = jnp.sum(holds(value | digits << shift), axis=0, dtype=dtype)
        return value | digit << shift

    start = jnp.zeros(shape, dtype)
    settled: jax.Array = jax.lax.fori_loop(0, num_rounds, settle_two_bits, start)
    return settled


def _quota(missing: jax.Array, num_tied: jax.Array, weights: jax.Array) -> jax.Array:
    """How many ties each leaf has to select, the earlier leaves first."""
    before = jnp.cumsum(num_tied * weights) - num_tied * weights
    wanted = missing - jnp.minimum(missing, before)
    wanted = wanted // weights + (wanted % weights > 0).astype(wanted.dtype)
    return jnp.minimum(wanted, num_tied)


def _ends(tied: list[jax.Array], num_tied: jax.Array, quota: jax.Array) -> jax.Array:
    """The positions that ties have to come before, one for each leaf."""
    everything = jnp.asarray(np.iinfo(quota.dtype).max, quota.dtype)

    def within(candidates: jax.Array) -> jax.Array:
        positions = [_position(t.shape, quota.dtype) for t in tied]
        conditions = [
            [t & (p < c) for c in candidates[:, i]]
            for i, (t, p) in enumerate(zip(tied, positions, strict=True))
        ]
        return _count(conditions, quota.dtype) <= quota

    ends: jax.Array = jax.lax.cond(
        jnp.any((quota > 0) & (quota < num_tied)),
        lambda: _settle(quota.dtype, quota.shape, within),
        lambda: jnp.where(quota > 0, everything, jnp.zeros_like(quota)),
    )
    return ends


def _position(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """The row-major positions of the entries of an array."""
    axes = range(len(shape))
    strides = [math.prod(shape[axis + 1 :]) for axis in axes]
    return sum(
        (
            jax.lax.broadcasted_iota(dtype, shape, axis) * jnp.asarray(stride, dtype)
            for axis, stride in zip(axes, strides, strict=True)
        ),
        jnp.zeros(shape, dtype),
    )
