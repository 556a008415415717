"""Sparsity patterns: pure functions from a tree of scores to a tree of bool masks.

A pattern keeps the entries of large score. Masks have the shapes of the scores, and an
absent leaf (`optax.MaskedNode`) stays absent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np

from optax_sam._base import trees
from optax_sam._base.checks import refuse
from optax_sam._base.hyperparameters import as_decimal, check_choice, check_integer
from optax_sam._masks import top_k

Pattern: TypeAlias = Callable[[chex.ArrayTree], chex.ArrayTree]


def unstructured(sparsity: float) -> Pattern:
    r"""Keeps the single entries of largest score, over all tensors at once.

    .. math:: k = \lfloor N (1 - \text{sparsity}) \rfloor

    of the :math:`N` entries are kept, exactly, for the decimal that was written: of 10,
    a sparsity of 0.9 keeps 1. Of equal scores those of earlier leaves, then those
    earlier in row-major order, stay.

    Args:
      sparsity: Share of the entries to leave out, in [0, 1]; a Python number, since it
        fixes a count.

    Returns:
      A function from a tree of floating-point scores of any shapes to a tree of bools
      of the same shapes, which runs under `jit` and on sharded arrays without gathering
      them.

    Raises:
      TypeError: If `sparsity` is no number; in the function, if scores are not floating
        point.
      ValueError: If `sparsity` is outside [0, 1]; in the function, if scores are known
        to have a NaN. Traced NaN scores are never kept.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> scores = {"a": jnp.array([3.0, 1.0]), "b": jnp.array([2.0, 4.0])}
      >>> print(optax_sam.unstructured(0.5)(scores))
      {'a': Array([ True, False], dtype=bool), 'b': Array([False,  True], dtype=bool)}

    References:
      Mi et al., `Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation
      Approach <https://arxiv.org/abs/2210.05177>`_, 2022
    """
    sparsity = check_sparsity("unstructured", sparsity)

    def pattern(scores: chex.ArrayTree) -> chex.ArrayTree:
        scores = _checked("unstructured", scores)
        return top_k.largest(scores, num_kept(scores, sparsity))

    return pattern


def structured(sparsity: float, unit: str = "layer") -> Pattern:
    r"""Keeps whole tensors or whole filters, those of largest mean score.

    Units are taken in the order of their mean score until at least
    :math:`\lfloor N (1 - \text{sparsity}) \rfloor` of the :math:`N` weights are kept.
    Of equal units the earlier ones go first.

    Args:
      sparsity: Share of the weights to leave out, in [0, 1]; a Python number.
      unit: `"layer"` for whole tensors, `"filter"` for all weights of an output
        feature, which is an index of the last axis.

    Returns:
      A function from a tree of floating-point scores of any shapes to a tree of bools
      of the same shapes, as that of :func:`unstructured`.

    Raises:
      TypeError: If `sparsity` is no number; in the function, if scores are not floating
        point.
      ValueError: If `sparsity` is outside [0, 1] or `unit` unknown; in the function, if
        scores are known to have a NaN. A unit with a traced NaN is never kept.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> scores = {"w": jnp.array([[1.0, 4.0], [2.0, 5.0]])}
      >>> print(optax_sam.structured(0.5, unit="filter")(scores)["w"])
      [[False  True]
       [False  True]]

    References:
      Mi et al., `Systematic Investigation of Sparse Perturbed Sharpness-Aware
      Minimization Optimizer <https://arxiv.org/abs/2306.17504>`_, 2023
    """
    sparsity = check_sparsity("structured", sparsity)
    check_choice("structured", "unit", unit, ("layer", "filter"))

    def mean(x: jax.Array) -> jax.Array:
        axes = tuple(range(x.ndim - 1 if unit == "filter" else x.ndim))
        return jnp.mean(x, axes, dtype=trees.accumulator_dtype(x.dtype), keepdims=True)

    def pattern(scores: chex.ArrayTree) -> chex.ArrayTree:
        scores = _checked("structured", scores)
        # The mean of no entries is a NaN that stands for nothing.
        means = jax.tree.map(lambda x: mean(x) if x.size else x, scores)
        sizes = jax.tree.map(lambda x, m: x.size // max(1, m.size) or 1, scores, means)
        kept = top_k.largest(means, num_kept(scores, sparsity), weigh_by=sizes)
        return jax.tree.map(lambda x, k: jnp.broadcast_to(k, x.shape), scores, kept)

    return pattern


def n_m(n: int, m: int, axis: int = -1) -> Pattern:
    r"""Keeps the `n` largest of every `m` consecutive entries along an axis.

    A last group of only :math:`r < m` entries keeps :math:`\min(n, r)` of them. Vectors
    and scalars are kept whole. Of equal scores the earlier ones stay.

    Args:
      n: Entries to keep in a group, from 0 to `m`.
      m: Entries of a group, at least 1.
      axis: The axis along which entries are grouped, of the tensors of rank 2 or more.
        Kernels of Flax have the input features before the last axis.

    Returns:
      A function from a tree of floating-point scores of any shapes to a tree of bools
      of the same shapes, which runs under `jit`.

    Raises:
      TypeError: If an argument is no integer; in the function, if scores are not
        floating point.
      ValueError: If `n` is negative or larger than `m`, or `m` less than 1; in the
        function, if a tensor of rank 2 or more has no such axis, or if scores are known
        to have a NaN. Traced NaN scores are never kept in a group.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> print(optax_sam.n_m(2, 4)(jnp.array([[1.0, 4.0, 2.0, 3.0]])))
      [[False  True False  True]]

    References:
      Mi et al., `Systematic Investigation of Sparse Perturbed Sharpness-Aware
      Minimization Optimizer <https://arxiv.org/abs/2306.17504>`_, 2023
    """
    m = check_integer("n_m", "m", m, low=1)
    n = check_integer("n_m", "n", n, low=0)
    axis = check_integer("n_m", "axis", axis)
    if n > m:
        raise ValueError(
            f"n_m: n = {n} is more than m = {m}; n entries of every m are kept, as in "
            "n_m(2, 4)."
        )

    def mask(path: Any, x: jax.Array) -> jax.Array:
        if x.ndim < 2:
            return jnp.ones(x.shape, bool)
        if not -x.ndim <= axis < x.ndim:
            raise ValueError(
                f"n_m: scores{jax.tree_util.keystr(path)} has shape {x.shape} and no "
                f"axis {axis}; pass an axis that all tensors of rank 2 or more have."
            )
        return _keep_in_groups(x, n, m, axis % x.ndim)

    def pattern(scores: chex.ArrayTree) -> chex.ArrayTree:
        return jax.tree.map_with_path(mask, _checked("n_m", scores))

    return pattern


def _keep_in_groups(x: jax.Array, n: int, m: int, axis: int) -> jax.Array:
    size = x.shape[axis]
    (keys,) = top_k.sort_keys([x])
    padding = [(0, -size % m if a == axis else 0) for a in range(x.ndim)]
    groups = jnp.pad(keys, padding)  # With 0, which is below every number.
    shape = groups.shape
    groups = groups.reshape(*shape[:axis], shape[axis] // m, m, *shape[axis + 1 :])
    own = jnp.expand_dims(groups, axis + 2)
    other = jnp.expand_dims(groups, axis + 1)
    place = jnp.arange(m).reshape(
        *(m if a == axis + 1 else 1 for a in range(own.ndim - 1))
    )
    earlier = jnp.expand_dims(place, axis + 1) < jnp.expand_dims(place, axis + 2)
    ahead = (other > own) | ((other == own) & earlier)
    rank = jnp.sum(ahead, axis=axis + 2, dtype=jnp.int32)
    kept = ((rank < n) & (groups > 0)).reshape(shape)
    return jax.lax.slice_in_dim(kept, 0, size, axis=axis)


def check_pattern(owner: str, pattern: Any) -> None:
    """Refuses what is no pattern, such as a function that makes one."""
    if not callable(pattern) or pattern in (unstructured, structured, n_m):
        what = "pattern must be a function from scores to masks"
        remedy = "pass what optax_sam.unstructured(0.5), say, returns"
        refuse(owner, what, pattern, remedy, TypeError)


def check_sparsity(owner: str, sparsity: Any) -> float:
    """Returns a sparsity that is a number in [0, 1], or refuses it."""
    kinds = int | float | np.integer | np.floating
    if not isinstance(sparsity, kinds) or isinstance(sparsity, bool):
        remedy = (
            "it fixes how many entries are kept, so it can be neither traced nor "
            "scheduled. Under optax.inject_hyperparams name it, or the pattern, in "
            "static_args"
        )
        what = "sparsity must be a Python number"
        refuse(owner, what, sparsity, remedy, TypeError)
    number = float(str(sparsity))  # np.float32(0.9) stands for 0.9.
    if not 0 <= number <= 1:  # Fails for NaN.
        raise ValueError(
            f"{owner}: sparsity = {number:g} is out of range; pass the share of the "
            "weights to leave out, in [0, 1]."
        )
    return number


def num_kept(tree: chex.ArrayTree, sparsity: float) -> int:
    """How many entries of a tree are kept."""
    return math.floor(trees.size(tree) * (1 - as_decimal(sparsity)))


def _checked(owner: str, scores: chex.ArrayTree) -> chex.ArrayTree:
    """The scores as arrays, if they are floating point and not known to be NaN."""

    def check(path: Any, x: Any) -> Any:
        where = f"{owner}: scores{jax.tree_util.keystr(path)}"
        x = jnp.asarray(x)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(
                f"{where} has dtype {x.dtype}; pass floating-point scores, one for "
                "each parameter. Under optax.inject_hyperparams name a pattern in "
                "static_args, or it is taken for a schedule."
            )
        if not isinstance(x, jax.core.Tracer) and bool(jnp.any(jnp.isnan(x))):
            raise ValueError(
                f"{where} has a NaN, which has no rank; find the step that made it, or "
                "pass jnp.nan_to_num(scores, nan=-jnp.inf) to rank it last."
            )
        return x

    return jax.tree.map_with_path(check, scores)
