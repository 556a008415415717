"""Arithmetic on pytrees of arrays that `optax.tree` lacks.

Everything here works leaf by leaf: nothing is raveled, concatenated or sorted, so
that sharded leaves stay where they are. A leaf that is `optax.MaskedNode` is
*absent*: it takes part in nothing and is handed on as it is.
"""

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


def accumulator_dtype(dtype: chex.ArrayDType) -> chex.ArrayDType:
    """The dtype to accumulate `dtype` in: float32 or wider."""
    return jnp.promote_types(dtype, jnp.float32)


def upcast(tree: chex.ArrayTree) -> chex.ArrayTree:
    """Casts every leaf to the dtype that its type accumulates in."""

    def wide(leaf: Any) -> jax.Array:
        return jnp.asarray(leaf, accumulator_dtype(jnp.result_type(leaf)))

    return map_present(wide, tree)


def cast_like(tree: chex.ArrayTree, like: chex.ArrayTree) -> chex.ArrayTree:
    """Casts every leaf of `tree` to the dtype of its counterpart in `like`."""
    return map_present(lambda x, y: jnp.asarray(x, jnp.result_type(y)), tree, like)


def max_abs(tree: chex.ArrayTree) -> jax.Array:
    """The largest absolute value in a tree, NaN if there is one; 0 if it is empty.

    In the default float type, which is float64 under `jax_enable_x64`, or wider.
    """
    return jnp.max(
        _stack([jnp.max(jnp.abs(x), initial=0.0) for x in jax.tree.leaves(tree)])
    )


def scale_to_norm(tree: chex.ArrayTree, norm: chex.Numeric) -> chex.ArrayTree:
    r"""Scales a tree to a global Euclidean norm: :math:`\text{norm} \cdot x / \|x\|`.

    Dividing by the largest absolute value first leaves entries in [-1, 1] of norm 1 or
    more: no square overflows, none that matters underflows, and the scale of `tree`
    drops out whatever it is.

    Args:
      tree: Pytree of real arrays of any shapes.
      norm: Scalar, the norm of the result.

    Returns:
      The scaled tree, in the default float type or wider. Zeros if `tree` is all zeros;
      not finite if `tree` is not.
    """
    largest = max_abs(tree)
    # Fires where the tree is all zeros: 0 / 1 is the zero wanted, 0 / 0 is NaN.
    largest = jnp.where(largest == 0, 1, largest)
    # In the type of `largest`, so that nothing is rounded to half precision below.
    unit = map_present(lambda x: x / largest, tree)
    total = jnp.sum(_stack([jnp.sum(jnp.square(x)) for x in jax.tree.leaves(unit)]))
    # The same case: any other tree has an entry of absolute value one here.
    total = jnp.where(total == 0, 1, total)
    factor = norm / jnp.sqrt(total)
    return map_present(lambda x: x * factor, unit)


def _stack(scalars: list[jax.Array]) -> jax.Array:
    """A zero and one scalar of each leaf, in the default float type or wider."""
    stacked = jnp.stack([jnp.zeros([]), *scalars])
    # Without the barrier XLA on the CPU copies the arithmetic on all scalars into every
    # fusion that reads the result, once per leaf: a quarter of SAM's time in a scan.
    barrier: Callable[[jax.Array], jax.Array] = jax.lax.optimization_barrier
    return barrier(stacked)
