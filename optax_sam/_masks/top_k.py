"""The exact largest entries of a whole pytree, without a sort and without a gather.

Unsigned integers that order like the scores settle the threshold two bits at a time: a
pass counts, leaf by leaf, how many entries reach each of three candidates. Counts are
scalars, so they sum across leaves and across devices, and sharded leaves stay where
they are.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from optax_sam._base import trees
from optax_sam._base.devices import vary_like


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
    weights = jnp.asarray(sizes, counter)[None]
    before = [0, *itertools.accumulate(x.size for x in keys)]
    offsets = jnp.asarray(before[:-1], counter)

    def weigh(thresholds: jax.Array, ends: jax.Array) -> jax.Array:
        """What the entries ahead of each of several points count for."""
        # Else the arithmetic on candidates is copied into the code of every leaf, and
        # the positions, which seem not to change, are kept in memory.
        thresholds, ends, first = trees.opaque((thresholds, ends, offsets))
        counts = [
            _count(_ahead(x, p, thresholds, ends), counter)
            for x, p in _with_positions(keys, first)
        ]
        return jnp.sum(trees.stack(counts).T * weights, axis=1)

    point = _settle(keys, before[-1], weigh, k)
    masks = [
        _ahead(x, p, *point)[0] & (x > 0) & (k > 0)
        for x, p in _with_positions(keys, offsets)
    ]
    return jax.tree.unflatten(structure, masks)


def count_true(masks: chex.ArrayTree) -> jax.Array:
    """How many entries of a tree of bools are True."""
    leaves = jax.tree.leaves(masks)
    counter = _counter([m.size for m in leaves])
    counts = [jnp.sum(m, dtype=counter) for m in leaves]
    return jnp.sum(trees.stack([jnp.zeros([], counter), *counts]), dtype=counter)


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


def _ahead(
    keys: jax.Array, positions: jax.Array, thresholds: jax.Array, ends: jax.Array
) -> list[jax.Array]:
    """Which entries are above each threshold, or tie with it before its end."""
    return [
        (keys > threshold) | ((keys == threshold) & (positions < end))
        for threshold, end in zip(thresholds, ends, strict=True)
    ]


def _with_positions(
    keys: list[jax.Array], offsets: jax.Array
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """The leaves, each with the row-major positions of its entries in the tree."""
    for x, offset in zip(keys, offsets, strict=True):
        position = jnp.full(x.shape, offset)
        for axis in range(x.ndim):
            stride = jnp.asarray(math.prod(x.shape[axis + 1 :]), offset.dtype)
            iota = jax.lax.broadcasted_iota(offset.dtype, x.shape, axis)
            position += stride * iota
        yield x, position


def _count(conditions: list[jax.Array], counter: Any) -> jax.Array:
    """How often each of several conditions holds."""
    # As one reduction of several operands: XLA on the CPU stores the operand of a plain
    # sum before it adds it up, and would need five times as long.
    sums = jax.lax.reduce(
        tuple(c.astype(counter) for c in conditions),
        (jnp.zeros([], counter),) * len(conditions),
        lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True)),
        tuple(range(conditions[0].ndim)),
    )
    return jnp.stack(sums)


def _settle(
    keys: list[jax.Array],
    num_entries: int,
    weigh: Callable[..., jax.Array],
    k: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The threshold and the end of the ties with it that just `k` are ahead of.

    The threshold is the largest that at least `k` entries reach. Unless just `k` do,
    the end is behind the last tie that less than `k` entries are ahead of. One loop
    settles the bits of both, since its body is compiled anew for every leaf.
    """
    key = keys[0].dtype
    key_rounds = 4 * key.itemsize
    rounds = key_rounds + (num_entries.bit_length() + 1) // 2
    counter = k.dtype
    everything = jnp.asarray(np.iinfo(counter).max, counter)

    def unsettled(carry: Any) -> Any:
        i, _, _, reached = carry
        return (i < key_rounds) | ((i < rounds) & (reached != k))

    def settle_two_bits(carry: Any) -> Any:
        i, threshold, last, reached = carry
        on_keys = i < key_rounds
        shift = 2 * (jnp.where(on_keys, key_rounds, rounds) - 1 - i)
        digits = jnp.arange(1, 4)
        of_key = jnp.where(on_keys, digits, 0).astype(key) << shift.astype(key)
        of_last = jnp.where(on_keys, 0, digits).astype(counter) << shift.astype(counter)
        thresholds, lasts = threshold | of_key, last | of_last
        weights = weigh(thresholds, jnp.where(on_keys, everything, lasts))
        digit = jnp.sum(jnp.where(on_keys, weights >= k, weights < k), dtype=jnp.int32)
        chosen = digit - 1
        return (
            i + 1,
            jnp.where(on_keys & (digit > 0), thresholds[chosen], threshold),
            jnp.where(on_keys | (digit == 0), last, lasts[chosen]),
            jnp.where(on_keys & (digit > 0), weights[chosen], reached),
        )

    start = (0, jnp.zeros([], key), jnp.zeros([], counter), everything)
    i, threshold, last, _ = jax.lax.while_loop(
        unsettled, settle_two_bits, vary_like(start, (keys, k))
    )
    return threshold[None], jnp.where(i < rounds, everything, last + 1)[None]
