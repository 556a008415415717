"""Sparse SAM: perturbing a part of the weights (arXiv 2210.05177, 2306.17504)."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import numpy as np
import optax

from optax_sam import _tree


def perturb_only(
    mask: chex.ArrayTree | Callable[[optax.Params], chex.ArrayTree],
) -> optax.GradientTransformationExtraArgs:
    r"""Perturbs the leaves that a mask fixed at trace time selects, and no others.

    .. math:: \varepsilon_l = g_l \text{ where mask}_l, \text{ absent elsewhere}

    The other leaves become `optax.MaskedNode`. They are absent rather than zero, so XLA
    computes no clean gradient for them unless something else reads it. Before
    :func:`scale_to_radius` the perturbed part has the norm `rho`; after it, that part
    keeps the length that it has in SAM, and every gradient is computed for the norm.
    `optax.masked` is no substitute in an ascent: it hands the other leaves' raw
    gradients on, to be added to the parameters.

    To freeze parameters, so that they neither move nor are perturbed, use the same mask
    on both sides::

        trained = {"backbone": False, "head": True}  # Of params with these two keys.
        frozen = jax.tree.map(operator.not_, trained)
        tx = optax_sam.sharpness_aware(
            optax.chain(optax.sgd(0.1), optax.masked(optax.set_to_zero(), frozen)),
            optax.chain(
                optax_sam.perturb_only(trained), optax_sam.scale_to_radius(rho=0.05)
            ),
        )

    Args:
      mask: A tree of bools with the structure of the parameters, or a prefix of it:
        True for leaves to perturb. Or a callable from the parameters to such a tree,
        which also fits where Flax NNX passes plain arrays for its Variables.

    Returns:
      A link of an ascent for :func:`optax_sam.sharpness_aware`, without state. Leaves
      that stay have the shapes and dtypes they came with.

    Raises:
      TypeError: In update, if an entry of the mask is no bool; traced values cannot be
        known in time.
      ValueError: In update, if the mask is no prefix of the parameters' tree.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> link = optax_sam.perturb_only({"kernel": True, "bias": False})
      >>> grads = {"kernel": jnp.ones(2), "bias": jnp.ones(1)}
      >>> updates, _ = link.update(grads, link.init(grads))
      >>> print(updates)
      {'bias': MaskedNode(), 'kernel': Array([1., 1.], dtype=float32)}

    References:
      Mi et al., `Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation
      Approach <https://arxiv.org/abs/2210.05177>`_, 2022
    """

    def update_fn(
        updates: optax.Updates,
        state: optax.EmptyState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del extra_args
        tree = updates if params is None else params
        entries = mask(tree) if callable(mask) else mask
        selected = _leaf_mask(entries, updates)
        updates = _tree.map_present(
            lambda u, keep: u if keep else optax.MaskedNode(), updates, selected
        )
        return updates, state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)


def _leaf_mask(mask: chex.ArrayTree, tree: chex.ArrayTree) -> chex.ArrayTree:
    """Checks a mask and spreads it over the leaves of `tree`."""
    for path, entry in jax.tree.leaves_with_path(mask):
        if not isinstance(entry, bool | np.bool_):
            raise TypeError(
                f"perturb_only: mask{jax.tree_util.keystr(path)} must be a Python "
                f"bool, known when the step is traced; got {type(entry).__name__}. "
                "Make the mask outside jit, of True and False."
            )
    try:
        return jax.tree.broadcast(mask, tree, is_leaf=_tree.is_absent)
    except ValueError as error:
        raise ValueError(
            f"perturb_only: the mask does not fit the parameters: {error} Pass a tree "
            "of bools like the parameters, or a callable that makes one from them."
        ) from None
