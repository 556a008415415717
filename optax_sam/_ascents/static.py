"""Sparse SAM with static masks: whole leaves, chosen before the step is traced."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import numpy as np
import optax

from optax_sam._base import trees
from optax_sam._base.checks import shown
from optax_sam._masks.patterns import check_sparsity


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
    gradients on, to be added to the parameters, which is refused.

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
        which also fits where Flax NNX passes plain arrays for its Variables;
        :func:`select_layers` makes one from names, :func:`choose_layers` a tree from
        scores.

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
        updates = trees.map_present(
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
        return jax.tree.broadcast(mask, tree, is_leaf=trees.is_absent)
    except ValueError as error:
        raise ValueError(
            f"perturb_only: the mask does not fit the parameters: {error} Pass a tree "
            "of bools like the parameters, or a callable that makes one from them."
        ) from None


def select_layers(
    *layers: str | Callable[[str], bool],
) -> Callable[[optax.Params], chex.ArrayTree]:
    """Makes a mask for :func:`perturb_only` that selects layers by their path.

    The path of a leaf has its keys between slashes, such as
    `"BasicBlock_7/Conv_0/kernel"`; it is the same for the Variables of Flax NNX and the
    arrays in them.

    Args:
      *layers: Names, each of one or more successive keys of a path, such as `"Dense_0"`
        or `"BasicBlock_7/Conv_0"` or `"bias"`; or functions from the path of a leaf to
        whether it is perturbed. A leaf is selected if any of them does.

    Returns:
      A function from the parameters to a tree of bools of the same structure. It raises
      a ValueError if a name is in no path.

    Raises:
      TypeError: If an argument is neither a string nor callable.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> mask = optax_sam.select_layers("head", lambda path: "norm" in path)
      >>> params = {"stem": {"w": 1.0}, "norm1": {"scale": 1.0}, "head": {"w": 1.0}}
      >>> print(mask(params))
      {'head': {'w': True}, 'norm1': {'scale': True}, 'stem': {'w': False}}
    """
    for layer in layers:
        if not (isinstance(layer, str) or callable(layer)):
            raise TypeError(
                f"select_layers: got {shown(layer)}; pass names such as 'Dense_0', or "
                "functions from the path of a leaf to a bool."
            )

    def selects(layer: Any, path: str) -> bool:
        if callable(layer):
            return bool(layer(path))
        return f"/{layer.strip('/')}/" in f"/{path}/"

    def mask(params: optax.Params) -> chex.ArrayTree:
        paths = [_path_name(p) for p, _ in jax.tree.leaves_with_path(params)]
        for layer in layers:
            if isinstance(layer, str) and not any(selects(layer, p) for p in paths):
                names = sorted({p.rpartition("/")[0] or p for p in paths})
                raise ValueError(
                    f"select_layers: no parameter is in a layer {layer!r}; there are "
                    f"{', '.join(names) or 'no parameters'}."
                )
        return jax.tree.map_with_path(
            lambda p, _: any(selects(layer, _path_name(p)) for layer in layers), params
        )

    return mask


def choose_layers(
    scores: chex.ArrayTree, sparsity: float, *, cost: chex.ArrayTree | None = None
) -> chex.ArrayTree:
    r"""Makes a mask for :func:`perturb_only` that selects layers of large score.

    Layers are taken in the order of their score per cost, that is, by default, of their
    mean score, and each one that the budget :math:`(1 - \text{sparsity}) \sum_l c_l`
    still has room for. So at least the share `sparsity` of the cost is left out, where
    :func:`structured` keeps at least the rest of the weights.

    The mask is made of Python bools, for which a step is compiled: call this between
    steps, at the end of an epoch say, and keep the compiled step of each mask (of
    `tuple(jax.tree.leaves(mask))`) in case the mask returns.

    Args:
      scores: Tree like the parameters of scores of any shapes, such as that of
        :func:`fisher_diagonal`.
      sparsity: Share of the cost to leave out, in [0, 1].
      cost: Prefix of the tree of scores with the cost of perturbing each layer, a
        number :math:`c_l \ge 0` in any unit. What an entry covers is one layer. By
        default the leaves that have a parent in common are a layer, and the cost is the
        number of their weights.

    Returns:
      A tree of bools with the structure of the scores.

    Raises:
      TypeError: If scores are traced, or `sparsity` is no number.
      ValueError: If `sparsity` is outside [0, 1], a score is NaN or infinite or a cost
        negative, if `cost` is no prefix of the scores, or if the budget has room for no
        layer although `sparsity` is below 1.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> scores = {"a": {"w": jnp.ones(6)}, "b": {"w": jnp.full(4, 2.0)}}
      >>> print(optax_sam.choose_layers(scores, 0.5))
      {'a': {'w': False}, 'b': {'w': True}}
      >>> print(optax_sam.choose_layers(scores, 0.5, cost={"a": 1.0, "b": 9.0}))
      {'a': {'w': True}, 'b': {'w': False}}
    """
    sparsity = check_sparsity("choose_layers", sparsity)
    layers, totals, costs = _layers(scores, cost)
    room = (1 - sparsity) * sum(costs)
    chosen: set[int] = set()
    value = [t / c if c else math.inf for t, c in zip(totals, costs, strict=True)]
    for i in sorted(range(len(costs)), key=lambda i: -value[i]):
        if costs[i] <= room * (1 + 1e-9):  # For rounding in the sums of costs.
            chosen.add(i)
            room -= costs[i]
    if costs and not chosen and sparsity < 1:
        raise ValueError(
            f"choose_layers: sparsity = {sparsity:g} leaves room for a cost of "
            f"{room:g}, and the cheapest layer costs {min(costs):g}; lower the "
            "sparsity, or pass a cost tree of finer layers."
        )
    return jax.tree.map(lambda layer: layer in chosen, layers)


def _layers(
    scores: chex.ArrayTree, cost: chex.ArrayTree | None
) -> tuple[chex.ArrayTree, list[float], list[float]]:
    """The layer of each leaf, and each layer's sum of scores and cost."""
    leaves = jax.tree.leaves_with_path(scores)
    for path, x in leaves:
        where = f"choose_layers: scores{jax.tree_util.keystr(path)}"
        if isinstance(x, jax.core.Tracer):
            raise TypeError(f"{where} is traced; make the mask between steps, not jit.")
        if not np.all(np.isfinite(np.asarray(x, np.float64))):
            raise ValueError(f"{where} has a NaN or an infinity; score anew.")
    if cost is None:
        parents = [path[:-1] or path for path, _ in leaves]
        numbers = list(dict.fromkeys(parents))
        of_leaf = [numbers.index(parent) for parent in parents]
        costs = [0.0] * len(numbers)
        for i, (_, x) in zip(of_leaf, leaves, strict=True):
            costs[i] += np.size(x)
    else:
        costs = [float(c) for c in jax.tree.leaves(cost)]
        if not all(0 <= c < math.inf for c in costs):
            raise ValueError(
                f"choose_layers: costs must be finite and >= 0, got {costs}."
            )
        numbered = jax.tree.unflatten(jax.tree.structure(cost), range(len(costs)))
        try:
            of_leaf = jax.tree.leaves(jax.tree.broadcast(numbered, scores))
        except ValueError as error:
            raise ValueError(
                f"choose_layers: cost does not fit the scores: {error} Pass a tree of "
                "numbers like the scores, or a prefix of it."
            ) from None
    totals = [0.0] * len(costs)
    for i, (_, x) in zip(of_leaf, leaves, strict=True):
        totals[i] += float(np.sum(np.asarray(x, np.float64)))
    return jax.tree.unflatten(jax.tree.structure(scores), of_leaf), totals, costs


def _path_name(path: Any) -> str:
    if path and getattr(path[-1], "name", None) == "value":
        path = path[:-1]  # Of a Variable of NNX, which holds the array.
    return jax.tree_util.keystr(path, simple=True, separator="/")
