"""Trees of arrays as vectors: inner products, random directions, points near params.

Leaf by leaf, in float32 or wider whatever the dtype of the parameters. A leaf that is
`optax.MaskedNode` counts as zeros.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from optax_sam._base import trees
from optax_sam._base.checks import check_parameters, checked
from optax_sam._base.devices import place
from optax_sam._base.losses import check_losses


def widen(tree: chex.ArrayTree) -> chex.ArrayTree:
    """The tree in float32 or wider."""
    return trees.map_present(lambda x: jnp.asarray(x, _wide(x)), tree)


def zeros_like(tree: chex.ArrayTree) -> chex.ArrayTree:
    """Zeros in float32 or wider, placed as the leaves are."""
    return trees.map_present(
        lambda x: place(jnp.zeros(jnp.shape(x), _wide(x)), x), tree
    )


def dot(a: chex.ArrayTree, b: chex.ArrayTree) -> jax.Array:
    """The inner product of two trees in float32 or wider."""
    products = jax.tree.map(lambda x, y: jnp.sum(x * y), widen(a), widen(b))
    return jnp.sum(trees.stack(products))


def norm(tree: chex.ArrayTree) -> jax.Array:
    """The Euclidean norm; no square in it overflows or vanishes."""
    tree = widen(tree)
    peaks = [jnp.max(jnp.abs(x), initial=0.0) for x in jax.tree.leaves(tree)]
    largest = jnp.max(trees.stack(peaks), initial=0.0)
    relative = scale(tree, trees.ratio(1, largest))
    return largest * jnp.sqrt(dot(relative, relative))


def unit(tree: chex.ArrayTree) -> chex.ArrayTree:
    """The tree divided by its norm; zeros stay zeros."""
    scaled = trees.scale_to_norm(tree, 1.0)
    # Under x64 it is in float64 whatever came in, which no loop would carry on.
    return trees.map_present(lambda x, y: x.astype(_wide(y)), scaled, tree)


def scale(tree: chex.ArrayTree, factor: chex.Numeric) -> chex.ArrayTree:
    """The tree times a scalar, in its own dtypes."""
    return trees.map_present(lambda x: x * jnp.asarray(factor, x.dtype), tree)


def add(x: chex.ArrayTree, y: chex.ArrayTree, factor: chex.Numeric = 1.0) -> Any:
    """The sum `x + factor * y`, in the dtypes of `x`."""
    return trees.map_present(
        lambda a, b: a + jnp.asarray(factor, a.dtype) * b.astype(a.dtype), x, y
    )


def draw(
    sampler: Callable[..., jax.Array], key: jax.Array, like: chex.ArrayTree
) -> chex.ArrayTree:
    """Draws a tree with `sampler(key, shape, dtype)`, the same for every sharding."""
    leaves, structure = jax.tree.flatten(like)
    drawn = [
        place(sampler(jax.random.fold_in(key, i), jnp.shape(x), _wide(x)), x)
        for i, x in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, drawn)


def losses_function(
    loss_fn: Any, params: optax.Params, batch: Any
) -> Callable[[chex.ArrayTree], jax.Array]:
    """The losses of a batch, as a function of parameters in float32 or wider.

    They are rounded to the dtypes of `params` for `loss_fn`, which may rely on those.
    """
    owner = "diagnostics"
    check_parameters(owner, params)
    loss_fn = checked(owner, "loss_fn", loss_fn, "params", "batch")

    def losses(wide: chex.ArrayTree) -> jax.Array:
        at = trees.cast_like(wide, params)
        found: jax.Array = widen(check_losses(owner, "loss_fn", loss_fn(at, batch)))
        return found

    return losses


def _wide(x: Any) -> Any:
    return trees.accumulator_dtype(jnp.result_type(x))
