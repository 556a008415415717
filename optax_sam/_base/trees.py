"""Arithmetic on pytrees of arrays that `optax.tree` lacks.

Everything here works leaf by leaf: no leaf is raveled, concatenated or sorted, so
that sharded leaves stay where they are. A leaf that is `optax.MaskedNode` is
*absent*: it takes part in nothing and is handed on as it is.
"""

import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax


def is_absent(node: Any) -> bool:
    """Whether a node of a tree stands for a leaf that takes part in nothing."""
    return isinstance(node, optax.MaskedNode)


def map_present(
    fn: Callable[..., Any], tree: chex.ArrayTree, *rest: chex.ArrayTree
) -> chex.ArrayTree:
    """Maps `fn` over the leaves of `tree` that are present, with those of `rest`."""
    return jax.tree.map(
        lambda leaf, *others: leaf if is_absent(leaf) else fn(leaf, *others),
        tree,
        *rest,
        is_leaf=is_absent,
    )


def size(tree: chex.ArrayTree) -> int:
    """The number of entries."""
    return sum(math.prod(jnp.shape(x)) for x in jax.tree.leaves(tree))


def accumulator_dtype(dtype: chex.ArrayDType) -> chex.ArrayDType:
    """The dtype to accumulate `dtype` in: float32 or wider."""
    return jnp.promote_types(dtype, jnp.float32)


def cast_like(tree: chex.ArrayTree, like: chex.ArrayTree) -> chex.ArrayTree:
    """Casts every leaf of `tree` to the dtype of its counterpart in `like`."""
    return map_present(lambda x, y: jnp.asarray(x, jnp.result_type(y)), tree, like)


def displace(params: optax.Params, displacement: chex.ArrayTree) -> optax.Params:
    """The parameters displaced, in their dtypes; one rounding for the sum.

    Leaves that are absent from the displacement stay as they are.
    """

    def move(d: Any, p: Any) -> Any:
        if is_absent(d):
            return p
        dtype = jnp.result_type(p)
        wide = accumulator_dtype(dtype)
        return (jnp.asarray(p, wide) + jnp.asarray(d, wide)).astype(dtype)

    return jax.tree.map(move, displacement, params, is_leaf=is_absent)


def all_finite(tree: chex.ArrayTree) -> jax.Array:
    """Whether no entry of a tree is infinite or NaN."""
    # Not isfinite(max_abs): XLA on the CPU drops NaN from large float32 maxima.
    return jnp.all(stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))


def ratio(x: Any, size: jax.Array) -> Any:
    """The quotient `x / size` of something and its size, zero where that is zero."""
    # Fires where x is all zeros: 0 / 1 is the zero wanted, 0 / 0 is NaN.
    return x / jnp.where(size == 0, 1, size)


def scale_to_unit(tree: chex.ArrayTree) -> chex.ArrayTree:
    """Divides a tree by its largest absolute value, unless that is zero.

    The result is in the default float type, which is float64 under `jax_enable_x64`, or
    wider, and its entries are in [-1, 1] whatever the scale and type of `tree`.
    """
    leaves = [jnp.max(jnp.abs(x), initial=0.0) for x in jax.tree.leaves(tree)]
    largest = jnp.max(stack(leaves), initial=0.0)
    largest = largest.astype(jnp.promote_types(largest.dtype, jnp.zeros([]).dtype))
    return map_present(lambda x: ratio(x, largest), tree)


def scale_to_norm(tree: chex.ArrayTree, norm: chex.Numeric) -> chex.ArrayTree:
    r"""Scales a tree to a global Euclidean norm: :math:`\text{norm} \cdot x / \|x\|`.

    Dividing by the largest absolute value first leaves a norm of 1 or more: no square
    overflows, none that matters underflows, and the scale of `tree` drops out.

    Args:
      tree: Pytree of real arrays of any shapes.
      norm: Scalar, the norm of the result.

    Returns:
      The scaled tree, in the default float type or wider. Zeros if `tree` is all zeros;
      not finite if `tree` is not.
    """
    unit = scale_to_unit(tree)
    squares = [jnp.sum(jnp.square(x)) for x in jax.tree.leaves(unit)]
    total = jnp.sum(stack(squares))
    # Fires where the tree is all zeros: any other has an entry of size one here.
    factor = norm / jnp.sqrt(jnp.where(total == 0, 1, total))
    return map_present(lambda x: x * factor, unit)


def stack(scalars: chex.ArrayTree) -> jax.Array:
    """The leaves of a tree of scalars as a vector, empty if there are none."""
    leaves = jax.tree.leaves(scalars)
    if not leaves:
        return jnp.ones([0])
    # Without the barrier XLA on the CPU copies the arithmetic on all scalars into every
    # fusion that reads the result, once per leaf: a quarter of SAM's time in a scan.
    stacked: jax.Array = opaque(jnp.stack(leaves))
    return stacked


def opaque(tree: Any) -> Any:
    """A tree of which compilers do not know how it was made, nor make it again."""
    barrier: Any = jax.lax.optimization_barrier
    return barrier(tree)
