r"""The Lanczos process on trees: a symmetric operator as a small tridiagonal matrix.

.. math:: A Q = Q T + \beta_m q_{m+1} e_m^\top, \qquad Q^\top Q = 1
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from optax_sam import _vector


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


def decompose(
    product: Callable[[chex.ArrayTree], chex.ArrayTree],
    start: chex.ArrayTree,
    num: int,
    key: jax.Array,
) -> Krylov:
    """Takes `num` Lanczos steps with full reorthogonalisation.

    Where the space turns out to be invariant the process goes on from a new random
    vector, which is orthogonal to it, and :math:`T` falls into blocks. That finds the
    further copies of repeated eigenvalues, and nothing is ever divided by zero.

    Args:
      product: The operator, from a tree like `start` to another.
      start: A tree of norm one in float32 or wider.
      num: Number of steps, at most the number of entries of `start`.
      key: For the new vectors.

    Returns:
      The space and the operator in it.
    """
    dtype = jnp.result_type(*jax.tree.leaves(start))
    finfo: Any = jnp.finfo
    rounding = 10 * float(finfo(dtype).eps)

    def step(carry: Any, i: jax.Array) -> Any:
        basis, vector, size = carry
        basis = jax.tree.map(
            lambda q, v: jax.lax.dynamic_update_index_in_dim(q, v, i, 0), basis, vector
        )
        rest, coefficients = _orthogonalise(product(vector), basis)
        alpha, beta = coefficients[i].astype(dtype), _vector.norm(rest).astype(dtype)
        size = jnp.maximum(size, jnp.maximum(jnp.abs(alpha), beta))
        exhausted = beta <= rounding * size
        vector = jax.lax.cond(
            exhausted,
            lambda: _new_direction(jax.random.fold_in(key, i), basis),
            lambda: _vector.unit(rest),
        )
        return (basis, vector, size), (alpha, jnp.where(exhausted, 0, beta))

    basis = jax.tree.map(
        lambda v: _vector.place(jnp.zeros((num, *v.shape), v.dtype), v), start
    )
    carry = basis, start, jnp.zeros([], dtype)
    (basis, _, _), (alpha, beta) = jax.lax.scan(step, carry, jnp.arange(num))
    return Krylov(basis, alpha, beta)


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

    def take_out(v: jax.Array, q: jax.Array) -> jax.Array:
        c = coefficients.astype(q.dtype).reshape(-1, *(1,) * v.ndim)
        return v - jnp.sum(c * q, axis=0)

    return coefficients, jax.tree.map(take_out, vector, basis)


def _new_direction(key: jax.Array, basis: chex.ArrayTree) -> chex.ArrayTree:
    like = jax.tree.map(lambda q: q[0], basis)
    drawn = _vector.unit(_vector.draw(jax.random.normal, key, like))
    return _vector.unit(_orthogonalise(drawn, basis)[0])
