"""Random numbers of a whole tree, by a hash of where each entry is.

They fuse with what reads them, are made where a sharded leaf has its entries, and
depend on no sharding. `jax.random` for every leaf would take long to compile.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from optax_sam._base import trees


def words(key: jax.Array, num: int) -> jax.Array:
    """The random words `[num, 3]`, uint32, that the bits of so many leaves hang on."""
    return with_origin(jax.random.bits(key, (num, 2), jnp.uint32))


def with_origin(pairs: jax.Array) -> jax.Array:
    """Pairs of words `[..., 2]` and, third, a zero that compilers do not know as one.

    All at once: a barrier for each leaf would take a kernel for each on a GPU.
    """
    origin = jnp.zeros_like(pairs[..., :1])
    known: jax.Array = trees.opaque(jnp.concatenate([pairs, origin], axis=-1))
    return known


def bits(words: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Random bits for every entry of a leaf, uint32, from its words `[3]`.

    No two of 2**32 entries have the same: for given words this is a permutation.
    """
    # Counted from an origin that is not known, or XLA would keep the positions, which
    # do not change, in a loop over draws.
    first, second, origin = words
    position = jnp.full(shape, origin)
    for axis in range(len(shape)):
        along = origin + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        position += along * np.uint32(math.prod(shape[axis + 1 :]) % 2**32)
    return _mixed(_mixed(position ^ first) + second)


def _mixed(h: jax.Array) -> jax.Array:
    """The last steps of MurmurHash3, after which every bit hangs on every bit."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h = (h ^ (h >> shift)) * np.uint32(factor)
    return h ^ (h >> 16)
