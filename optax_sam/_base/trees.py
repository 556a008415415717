"""Arithmetic on pytrees of arrays that `optax.tree` lacks.

Everything here works leaf by leaf: no leaf is raveled, concatenated or sorted, so
that sharded leaves stay where they are. A leaf that is `optax.MaskedNode` is
*absent*: it takes part in nothing and is handed on as it is.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import chex
import jax
import jax.numpy as jnp
import optax

# Of arrays, each with the weights of its entries for a norm, if there are any.
_Leaves: TypeAlias = list[tuple[jax.Array, ...]]


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


def fill(tree: chex.ArrayTree, other: chex.ArrayTree) -> chex.ArrayTree:
    """A tree with the leaves of another in place of those that are absent."""
    return jax.tree.map(
        lambda leaf, spare: spare if is_absent(leaf) else leaf,
        tree,
        other,
        is_leaf=is_absent,
    )


def size(tree: chex.ArrayTree) -> int:
    """The number of entries."""
    return sum(math.prod(jnp.shape(x)) for x in jax.tree.leaves(tree))


def accumulator_dtype(dtype: chex.ArrayDType) -> chex.ArrayDType:
    """The dtype to accumulate `dtype` in: float32 or wider."""
    return jnp.promote_types(dtype, jnp.float32)


def accumulators(tree: chex.ArrayTree, dtype: Any = None) -> chex.ArrayTree:
    """Zeros to accumulate a tree in, of a dtype or, without, in float32 or wider."""

    def zeros(x: Any) -> jax.Array:
        own = accumulator_dtype(jnp.result_type(x)) if dtype is None else dtype
        return jnp.zeros_like(x, dtype=own)

    return jax.tree.map(zeros, tree)


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


def inner(a: chex.ArrayTree, b: chex.ArrayTree) -> jax.Array:
    """The inner product of two trees, in float32 or wider."""

    def of_leaves(x: Any, y: Any) -> jax.Array:
        wide = accumulator_dtype(jnp.result_type(x, y))
        return jnp.sum(jnp.asarray(x, wide) * jnp.asarray(y, wide))

    return jnp.sum(stack(jax.tree.map(of_leaves, a, b)))


def all_finite(tree: chex.ArrayTree, *, kept: bool = False) -> jax.Array:
    """Whether no entry of a tree is infinite or NaN; `kept` as in `scale_to_norm`."""
    leaves = [(jnp.asarray(x, float),) for x in jax.tree.leaves(tree)]
    found: jax.Array = jax.lax.platform_dependent(
        leaves,
        cpu=_have_finite_squares if kept else _are_finite,
        cuda=_have_finite_parts,
        default=_are_finite,
    )
    return found


def _have_finite_squares(leaves: _Leaves) -> jax.Array:
    """On a CPU: by the sum that the norm needs as well, unless entries are large."""
    finite = jnp.isfinite(_sum_of_squares(leaves))
    found: jax.Array = jax.lax.cond(finite, lambda: finite, lambda: _are_finite(leaves))
    return found


def _have_finite_parts(leaves: _Leaves) -> jax.Array:
    """On a GPU: by those of the norm's sums that cannot overflow."""
    return jnp.all(jnp.isfinite(stack([_joint_squares(*leaf)[0] for leaf in leaves])))


def _are_finite(leaves: _Leaves) -> jax.Array:
    # Not by a maximum: XLA on the CPU drops NaN from large ones.
    differences = [jnp.sum(x - x) for (x,) in leaves]  # 0 or NaN.
    return jnp.all(jnp.isfinite(stack(differences)))


def ratio(x: Any, size: jax.Array) -> Any:
    """The quotient `x / size` of something and its size, zero where that is zero."""
    # Fires where x is all zeros: 0 / 1 is the zero wanted, 0 / 0 is NaN.
    return x / jnp.where(size == 0, 1, size)


def scale_to_norm(
    tree: chex.ArrayTree,
    norm: chex.Numeric,
    weights: chex.ArrayTree | None = None,
    *,
    kept: bool = False,
) -> chex.ArrayTree:
    r"""Scales a tree to a norm: :math:`\text{norm} \cdot x / \|w \odot x\|`.

    The norm is the Euclidean one of the whole tree. Squares are added up on several
    scales in one read of it, of which one counts: there no square overflows, and none
    that matters underflows. So the scale of `tree` drops out.

    Args:
      tree: Pytree of real arrays of any shapes.
      norm: Scalar, the norm of the weighted result.
      weights: Pytree of the same shapes, what entries are multiplied by for their norm
        alone; None for ones.
      kept: Whether the tree is kept from the step before. A CPU, which reads it once
        for each scale, then adds up on one, and on others only where that does not do.
        Of a gradient, which is made in the step, it would keep a copy for that.

    Returns:
      The scaled tree, in the default float type, which is float64 under
      `jax_enable_x64`. Zeros if all products are; not finite if `tree` is not.
    """
    scaled, _ = scaling_to_norm(tree, norm, weights, kept=kept)
    return scaled(tree)


def scaling_to_norm(
    tree: chex.ArrayTree,
    norm: chex.Numeric,
    weights: chex.ArrayTree | None = None,
    *,
    kept: bool = False,
) -> tuple[Callable[[chex.ArrayTree], chex.ArrayTree], jax.Array]:
    """The function that scales a tree so, and the norm of the products before that.

    In a branch, the tree can be scaled there by numbers found outside.
    """
    tree = map_present(lambda x: jnp.asarray(x, float), tree)
    given = () if weights is None else (map_present(lambda _, w: w, tree, weights),)
    leaves = list(zip(*map(jax.tree.leaves, (tree, *given)), strict=True))
    scale, total = jax.lax.platform_dependent(
        leaves,
        cpu=_on_usual_scale if kept else functools.partial(_on_scales, clip=False),
        cuda=_on_joint_scales,
        default=_on_scales,
    )
    # Fires where the tree is all zeros.
    root = jnp.sqrt(jnp.where(total == 0, 1, total))
    factor = norm / root

    # One after the other: the product of the two may overflow.
    def scaled(tree: chex.ArrayTree) -> chex.ArrayTree:
        return map_present(lambda x: jnp.asarray(x, float) * scale * factor, tree)

    return scaled, jnp.where(total == 0, 0, root) / scale


def _on_usual_scale(leaves: _Leaves) -> tuple[jax.Array, jax.Array]:
    """As `_on_scales`, on a CPU by a single sum if it can; in `vmap` all are made."""
    total = _sum_of_squares(leaves)
    least = _scales()[0] ** 0.75
    cond: Any = jax.lax.cond
    found: tuple[jax.Array, jax.Array] = cond(
        (least < total) & (total < 1 / least),
        lambda: (jnp.ones_like(total), total),
        lambda: _on_scales(leaves, clip=False),
    )
    return found


def _sum_of_squares(leaves: _Leaves) -> jax.Array:
    """Of products with weights, as they are."""
    return jnp.sum(stack([jnp.sum(jnp.square(math.prod(leaf))) for leaf in leaves]))


def _on_scales(leaves: _Leaves, *, clip: bool = True) -> tuple[jax.Array, jax.Array]:
    """The scale that counts, and the sum of squares on it."""
    sums = [tuple(map(jnp.sum, _scaled_squares(*leaf, clip=clip))) for leaf in leaves]
    return _which_counts(leaves, sums)


def _on_joint_scales(leaves: _Leaves) -> tuple[jax.Array, jax.Array]:
    """The same on a GPU."""
    return _which_counts(leaves, [_joint_squares(*leaf) for leaf in leaves])


def _which_counts(
    leaves: _Leaves, sums: list[tuple[jax.Array, ...]]
) -> tuple[jax.Array, jax.Array]:
    """The largest scale on which the sum over leaves does not overflow, and that."""
    scales = _scales(*(leaves[0][1:] if leaves else ()))
    totals = [jnp.sum(stack([s[i] for s in sums])) for i in range(len(scales))]
    scale, total = jnp.asarray(scales[-1]), totals[-1]
    for smaller, its_total in zip(scales[-2::-1], totals[-2::-1], strict=True):
        counts = ~(its_total < scales[0] ** 0.75)  # Far from underflow, or NaN.
        # Not by where: that of numbers which are the same on all devices by a condition
        # of each is refused by jax 0.9, if axes are explicit.
        share = counts.astype(scale.dtype)
        scale = share * smaller + (1 - share) * scale
        total = jnp.where(counts, its_total, total)
    return scale, total


def _scales(*weights: Any) -> tuple[float, ...]:
    """Powers of two, ascending, whose multiples of any entry have squares in between.

    Products with weights can be smaller than entries, and take one more.
    """
    limits: Any = jnp.finfo(jnp.zeros([]).dtype)  # type: ignore[no-untyped-call]
    step = 2.0 ** (5 * limits.maxexp // 8)
    return 1 / step, 1.0, step, *(step**1.5 for _ in weights)


def _scaled_squares(
    x: jax.Array, *weights: jax.Array, clip: bool = True
) -> list[jax.Array]:
    """The squares of an array's products with weights, on each scale."""
    scaled = [math.prod(weights, start=x * scale) for scale in _scales(*weights)]
    # Else a compiler may square the scale by itself, to zero or infinity. XLA on the
    # CPU does so where a device has a single entry only, and is slow at clipping.
    if clip or x.size <= jax.device_count():
        limits: Any = jnp.finfo(x.dtype)  # type: ignore[no-untyped-call]
        scaled = [jnp.minimum(jnp.abs(y), limits.max) for y in scaled]
    return [jnp.square(y) for y in scaled]


def _joint_squares(*leaf: jax.Array) -> tuple[jax.Array, ...]:
    """Their sums by one reduction, as a GPU reduces in two rounds: less kernels.

    XLA for TPUs would not make it part of the product that makes `x`.
    """
    squares = _scaled_squares(*leaf)
    zero = jnp.zeros_like(squares[0], shape=())
    sums: tuple[jax.Array, ...] = jax.lax.reduce(
        tuple(squares),
        (zero,) * len(squares),
        lambda a, b: tuple(map(jnp.add, a, b)),
        tuple(range(squares[0].ndim)),
    )
    # Else what is not read is left out, before it is seen that others read it.
    kept: tuple[jax.Array, ...] = opaque(sums)
    return kept


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
