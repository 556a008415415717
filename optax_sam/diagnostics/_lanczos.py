r"""The Lanczos process on trees: a symmetric operator as a small tridiagonal matrix.

.. math:: A Q = Q T + \beta_m q_{m+1} e_m^\top, \qquad Q^\top Q = 1
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from optax_sam._base import random
from optax_sam._base.devices import place
from optax_sam.diagnostics import _loop, _vector


class Krylov(NamedTuple):
    r"""A Krylov space and the operator in it.

    Attributes:
      basis: The columns of :math:`Q`: a tree of leaves `[m, *shape]`, each placed as
        the leaf of the vectors is.
      diagonal: That of :math:`T`, shape `[m]`.
      off_diagonal: That of :math:`T` below its diagonal, shape `[m]`; the last entry is
        :math:`\beta_m`, the norm of what is left over.
    """

    basis: chex.ArrayTree
    diagonal: jax.Array
    off_diagonal: jax.Array


def process(
    product: Callable[[chex.ArrayTree], chex.ArrayTree], num: int
) -> Callable[[chex.ArrayTree], Krylov]:
    """Makes a function that takes `num` Lanczos steps with full reorthogonalisation.

    Where the space turns out to be invariant the process goes on from another vector,
    which is orthogonal to it, and :math:`T` falls into blocks. That finds the
    further copies of repeated eigenvalues, and nothing is ever divided by zero.

    Args:
      product: The operator, from a tree in float32 or wider to another like it.
      num: Number of steps, at most the number of entries of a tree.

    Returns:
      The function from a tree of norm one, where the process starts, to the space and
      the operator in it.
    """

    def step(carry: Any, i: jax.Array) -> Any:
        basis, vector, size = carry
        basis = jax.tree.map(
            lambda q, v: jax.lax.dynamic_update_index_in_dim(q, v, i, 0), basis, vector
        )
        rest, coefficients = _orthogonalise(product(vector), basis)
        alpha, beta = coefficients[i].astype(size.dtype), _vector.norm(rest)
        beta = beta.astype(size.dtype)
        size = jnp.maximum(size, jnp.maximum(jnp.abs(alpha), beta))
        finfo: Any = jnp.finfo
        exhausted = beta <= 10 * float(finfo(size.dtype).eps) * size
        vector = jax.lax.cond(
            exhausted,
            lambda: _new_direction(i, basis),
            lambda: _vector.unit(rest),
        )
        return (basis, vector, size), (alpha, jnp.where(exhausted, 0, beta))

    @_loop.compiled
    def empty(start: chex.ArrayTree) -> chex.ArrayTree:
        return jax.tree.map(
            lambda v: place(jnp.zeros((num, *v.shape), v.dtype), v), start
        )

    steps = _loop.scan(step)

    def decompose(start: chex.ArrayTree) -> Krylov:
        size = jnp.zeros([], jnp.result_type(*jax.tree.leaves(start)))
        carry, found = steps((empty(start), start, size), jnp.arange(num))
        return Krylov(carry[0], *found)

    return decompose


def eigenpairs(diagonal: jax.Array, off_diagonal: jax.Array) -> Any:
    """Eigenvalues `[..., m]` in ascending order and eigenvectors `[..., m, m]` of T."""
    m = diagonal.shape[-1]
    rows, columns = jnp.arange(m), jnp.arange(m - 1)
    matrix = jnp.zeros((*diagonal.shape, m), diagonal.dtype)
    matrix = matrix.at[..., rows, rows].set(diagonal)
    below = off_diagonal[..., : m - 1]
    matrix = matrix.at[..., columns, columns + 1].set(below)
    matrix = matrix.at[..., columns + 1, columns].set(below)
    return jnp.linalg.eigh(matrix)


def combine(basis: chex.ArrayTree, coefficients: jax.Array) -> chex.ArrayTree:
    """Combinations of basis vectors by coefficients `[k, m]`, leaves `[k, *shape]`."""

    def leaf(q: jax.Array) -> jax.Array:
        return jnp.tensordot(
            coefficients.astype(q.dtype), q, axes=1, precision="highest"
        )

    return jax.tree.map(leaf, basis)


def _orthogonalise(
    vector: chex.ArrayTree, basis: chex.ArrayTree
) -> tuple[chex.ArrayTree, jax.Array]:
    """Takes out of a vector what lies in the basis; the coefficients `[m]` of that.

    Twice: the first time leaves rounding errors of the size of what it takes out.
    """
    first, vector = _project(vector, basis)
    _, vector = _project(vector, basis)
    return vector, first


def _project(vector: chex.ArrayTree, basis: chex.ArrayTree) -> Any:
    def inner(q: jax.Array, v: jax.Array) -> jax.Array:
        # A product and a sum, which fuse, rather than a matrix product, which
        # accelerators would make in half precision.
        return jnp.sum(q * v[None], axis=tuple(range(1, q.ndim)))

    parts = jax.tree.leaves(jax.tree.map(inner, basis, vector))
    coefficients = jnp.sum(jnp.stack(parts), axis=0)

    def take_out(v: chex.ArrayTree, of_basis: Any) -> tuple[chex.ArrayTree, None]:
        c, q = of_basis
        return jax.tree.map(lambda v, q: v - c.astype(q.dtype) * q, v, q), None

    # A vector at a time: a sum over all of them XLA on the CPU would fuse with the sums
    # above, and compute the two up to a hundred times slower.
    return coefficients, jax.lax.scan(take_out, vector, (coefficients, basis))[0]


def _new_direction(i: jax.Array, basis: chex.ArrayTree) -> chex.ArrayTree:
    """A vector that is orthogonal to the basis, another one for every `i`."""
    leaves, structure = jax.tree.flatten(jax.tree.map(lambda q: q[0], basis))

    def draw(number: int, like: jax.Array) -> jax.Array:
        pair = jnp.stack([i.astype(jnp.uint32), jnp.uint32(number)])
        bits = random.bits(random.with_origin(pair), like.shape)
        return place(bits.astype(like.dtype) / 2.0**31 - 1, like)

    drawn = [draw(number, x) for number, x in enumerate(leaves)]
    start = _vector.unit(jax.tree.unflatten(structure, drawn))
    return _vector.unit(_orthogonalise(start, basis)[0])
