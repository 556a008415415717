"""Sparse SAM with masks from dynamic sparse training, SSAM-D (arXiv 2210.05177)."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_sam._ascents.sam import scale_to_radius
from optax_sam._base import random, trees
from optax_sam._base.checks import called, calling
from optax_sam._base.devices import place_like
from optax_sam._base.hyperparameters import (
    KeyLike,
    ScalarOrSchedule,
    as_key,
    as_schedule,
    check_choice,
    check_integer,
    key_at,
    key_data,
)
from optax_sam._engine import protocol
from optax_sam._engine.sharpness_aware import sharpness_aware
from optax_sam._masks import masking, top_k
from optax_sam._masks.patterns import check_sparsity, num_kept


def dynamic_sparse_sam(
    base: optax.GradientTransformation,
    rho: ScalarOrSchedule,
    sparsity: float,
    *,
    refresh_every: int,
    decay_steps: int,
    drop_fraction: ScalarOrSchedule = 0.5,
    drop_by: Literal["gradient", "weight"] = "gradient",
    grow_by: Literal["random", "gradient"] = "random",
    key: KeyLike = 0,
    rescale: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Sparse SAM, SSAM-D: SAM on a set of weights that drops some and grows others.

    .. math::
      \varepsilon_t = \rho \, \frac{g_t}{\|g_t\|} \odot m_t, \qquad
      w_{t+1} = w_t + \text{base}(\nabla f(w_t + \varepsilon_t))

    A step costs two gradients, as in SAM, and a change of the mask next to nothing.

    Args:
      base: The optimizer that moves the parameters.
      rho: The radius :math:`\rho \ge 0`, in units of the parameters' norm; 0 is the
        base itself. A scalar, or a schedule of the count of steps.
      sparsity: Share of the weights to leave out, in [0, 1]; a Python number.
      refresh_every: Steps between changes of the mask, at least 1.
      decay_steps: Steps until the mask stays, at least 1: the length of the training.
      drop_fraction: Share of the kept weights to drop at the start, in [0, 1]. A
        scalar, or a schedule.
      drop_by: `"gradient"` or `"weight"`, see :func:`sparsify_dynamically`.
      grow_by: `"random"` or `"gradient"`.
      key: An int or JAX PRNG key.
      rescale: Whether the masked :math:`\varepsilon` is brought back to the length
        :math:`\rho`. The papers leave it shorter.

    Returns:
      The corresponding :func:`optax_sam.sharpness_aware` transformation; see there for
      the arguments of its update, their shapes and what they raise.

    Raises:
      TypeError: If `base` is no transformation, `rho` or `drop_fraction` no real scalar
        or schedule, `sparsity` no number, a count no integer, or `key` no key.
      ValueError: If `rho` is negative, not finite or no scalar, `sparsity` or
        `drop_fraction` outside [0, 1], a count less than 1, or `drop_by` or `grow_by`
        unknown.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> tx = optax_sam.dynamic_sparse_sam(
      ...     optax.sgd(0.1), 0.5, 0.75, refresh_every=1, decay_steps=3
      ... )
      >>> loss_fn = lambda w, batch: jnp.sum((batch - w[None]) ** 2, -1)
      >>> step = jax.jit(optax_sam.value_and_update(loss_fn, tx))
      >>> params, batch = jnp.zeros(8), jnp.ones((4, 8))
      >>> opt_state = tx.init(params)
      >>> for _ in range(3):
      ...     value, updates, opt_state = step(params, opt_state, batch)
      ...     params = optax.apply_updates(params, updates)
      >>> print(optax.tree.get(opt_state, "mask").sum())
      2

    References:
      Mi et al., `Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation
      Approach <https://arxiv.org/abs/2210.05177>`_, 2022
    """
    with calling("dynamic_sparse_sam"):
        sparsify = sparsify_dynamically(
            sparsity,
            refresh_every=refresh_every,
            decay_steps=decay_steps,
            drop_fraction=drop_fraction,
            drop_by=drop_by,
            grow_by=grow_by,
            key=key,
        )
        radius = scale_to_radius(rho)
        ascent = optax.chain(radius, sparsify, *([radius] if rescale else []))
        return sharpness_aware(base, ascent)


def sparsify_dynamically(
    sparsity: float,
    *,
    refresh_every: int,
    decay_steps: int,
    drop_fraction: ScalarOrSchedule = 0.5,
    drop_by: Literal["gradient", "weight"] = "gradient",
    grow_by: Literal["random", "gradient"] = "random",
    key: KeyLike,
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps a set of entries that drops some and grows others: Sparse SAM, SSAM-D.

    .. math:: u \mapsto u \odot m_t, \qquad
      \alpha_t = \tfrac{1}{2} \alpha_0 \left(1 + \cos(\pi t / T)\right)

    The first mask is drawn at random. In each step whose count `refresh_every` divides,
    the first included, and after the mask has been used, the share :math:`\alpha_t` of
    the kept entries whose score is smallest is dropped, and as many of those that were
    not kept are grown. Exactly :math:`\lfloor N (1 - \text{sparsity}) \rfloor` of the
    :math:`N` entries are kept in every step, whatever the sparsity. After :math:`T`
    steps, and as long as all updates are zero, the mask stays.

    After :func:`scale_to_radius` this is the papers'
    :math:`\varepsilon = \rho \, g / \|g\| \odot m`; a second :func:`scale_to_radius`
    behind it brings :math:`\|\varepsilon\|` back to :math:`\rho`.

    Args:
      sparsity: Share of the entries to leave out, in [0, 1]; a Python number.
      refresh_every: Steps between changes of the mask, at least 1.
      decay_steps: The number :math:`T` of steps until the mask stays, at least 1.
      drop_fraction: The share :math:`\alpha_0` of the kept entries to drop at the
        start, in [0, 1]. A scalar, or a schedule of the count of steps.
      drop_by: The score of kept entries. `"gradient"`: the size of the incoming update.
        `"weight"`: the size of the perturbed weight, parameter plus masked update,
        which is what the papers' code ranks; this wants :func:`scale_to_radius` before.
      grow_by: The score of the others: `"random"`, or `"gradient"` as above.
      key: An int or JAX PRNG key, for the first mask and for random growth.

    Returns:
      A link of an ascent for :func:`optax_sam.sharpness_aware`. It maps a tree of
      arrays of any shapes to one of the same shapes and dtypes. Leaves that are absent
      (:func:`perturb_only`) take no part in refreshes.

    Raises:
      TypeError: If `sparsity` is no number, a count no integer, `drop_fraction` neither
        a real scalar nor callable, or `key` no key.
      ValueError: If `sparsity` or `drop_fraction` is outside [0, 1], a count less than
        1, or `drop_by` or `grow_by` unknown; in update, if `params` is missing where
        weights are ranked, or if the state's mask does not fit.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> link = optax_sam.sparsify_dynamically(
      ...     0.75, refresh_every=390, decay_steps=10_000, key=0
      ... )
      >>> updates, state = link.update(jnp.ones(8), link.init(jnp.zeros(8)))
      >>> print(updates.sum(), state.mask.sum())
      2.0 2

    References:
      Mi et al., `Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation
      Approach <https://arxiv.org/abs/2210.05177>`_, 2022
    """
    owner = called("sparsify_dynamically")
    sparsity = check_sparsity(owner, sparsity)
    refresh_every = check_integer(owner, "refresh_every", refresh_every, low=1)
    decay_steps = check_integer(owner, "decay_steps", decay_steps, low=1)
    initial = as_schedule(owner, "drop_fraction", drop_fraction, high=1.0)
    check_choice(owner, "drop_by", drop_by, ("gradient", "weight"))
    check_choice(owner, "grow_by", grow_by, ("random", "gradient"))
    seed = as_key(owner, key)

    first = jax.random.fold_in(seed, 2**32 - 1)  # No count of steps gets there.

    @jax.jit  # One compilation, not one for each operation and shape.
    def draw(params: optax.Params) -> chex.ArrayTree:
        ranks = _random_ranks(first, params)
        mask = top_k.largest(ranks, num_kept(params, sparsity))
        return place_like(mask, params)  # The engine's turn is too late outside of jit.

    def init_fn(params: optax.Params) -> SparsifyDynamicallyState:
        return SparsifyDynamicallyState(
            count=jnp.zeros([], jnp.int32),
            mask=draw(params),
            since=jnp.zeros([], jnp.int32),
            key=key_data(seed),
        )

    def update_fn(
        updates: optax.Updates,
        state: SparsifyDynamicallyState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SparsifyDynamicallyState]:
        del extra_args
        if drop_by == "weight":
            protocol.require(owner, params=params)
        masking.check(
            f"{owner}: state.mask", masking.present(state.mask, updates), updates
        )

        def new_mask() -> chex.ArrayTree:
            mask = masking.present(state.mask, updates)
            by_gradient = _ranks(updates)
            dropping = growing = by_gradient
            if drop_by == "weight":
                masked = masking.apply(state.mask, updates)
                dropping = _ranks(trees.map_present(jnp.add, masked, params))
            if grow_by == "random":
                draws = key_at(seed, state.key, state.count)
                growing = _random_ranks(draws, updates)
            share = _cosine(initial(state.count), state.count / decay_steps)
            # Nothing can be told from updates that are all zero, as with rho = 0.
            share = jnp.where(_any_nonzero(updates), share, 0)
            return _exchange(mask, share, dropping, growing)

        def use_old(mask: chex.ArrayTree) -> tuple[optax.Updates, chex.ArrayTree]:
            return masking.apply(state.mask, updates), mask

        due = state.count % refresh_every == 0
        # The mask is used in the branch too. Else XLA may put the refresh off until the
        # perturbed pass wants most of the memory, and keep the updates for it.
        masked, mask = masking.refresh_if(due, new_mask, state.mask, updates, use_old)
        count = optax.safe_increment(state.count)
        since = jnp.where(due, count, state.since)
        return masked, SparsifyDynamicallyState(count, mask, since, state.key)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class SparsifyDynamicallyState(NamedTuple):
    """State of :func:`sparsify_dynamically`.

    Attributes:
      count: Number of steps taken, an int32 scalar.
      mask: The mask of the next step, bools of the shapes of the parameters.
      since: Count of the first step of this mask, an int32 scalar.
      key: Data of the PRNG key that random growth is drawn with.
    """

    count: jax.Array  # type: ignore[assignment]
    mask: chex.ArrayTree
    since: jax.Array
    key: jax.Array


def _cosine(initial: jax.Array, progress: jax.Array) -> jax.Array:
    return initial / 2 * (1 + jnp.cos(jnp.pi * jnp.minimum(progress, 1)))


def _exchange(
    mask: chex.ArrayTree,
    share: jax.Array,
    dropping: chex.ArrayTree,
    growing: chex.ArrayTree,
) -> chex.ArrayTree:
    """Drops a share of the entries kept, those of lowest rank, and grows as many."""
    kept = top_k.count_true(mask)
    free = top_k.count_true(jax.tree.map(jnp.logical_not, mask))
    num_stay, num_grown = _counts(kept, free, share)
    # Entries of rank 0 are never selected.
    dropping = jax.tree.map(lambda m, r: jnp.where(m, r, 0), mask, dropping)
    stay = top_k.largest(dropping, num_stay)
    # Only now are ranks for growing made: those for dropping are done with.
    stay, mask = trees.opaque((stay, mask))
    growing = jax.tree.map(lambda m, r: jnp.where(m, 0, r), mask, growing)
    return jax.tree.map(jnp.logical_or, stay, top_k.largest(growing, num_grown))


def _counts(
    kept: jax.Array, free: jax.Array, share: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """How many kept entries stay and how many others are grown.

    The authors' code rounds the two apart, so that its density drifts by an entry or
    so, and by many if it finds fewer to grow than it dropped. Here one number is both.
    """
    # A product of more than 24 bits may be rounded above what is kept.
    num = jnp.minimum((share * kept).astype(kept.dtype), jnp.minimum(kept, free))
    return kept - num, num


def _ranks(updates: optax.Updates) -> chex.ArrayTree:
    leaves, structure = jax.tree.flatten(updates)
    return jax.tree.unflatten(structure, top_k.sort_keys([jnp.abs(x) for x in leaves]))


def _random_ranks(key: jax.Array, tree: chex.ArrayTree) -> chex.ArrayTree:
    leaves, structure = jax.tree.flatten(tree, is_leaf=trees.is_absent)
    words = random.words(key, len(leaves))
    # All above 0, and few are equal. On a mesh of explicit axes they are placed as the
    # leaf is.
    ranks = [
        x
        if trees.is_absent(x)
        else random.bits(words[i], jnp.shape(x)) | jnp.ones_like(x, dtype=jnp.uint32)
        for i, x in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, ranks)


def _any_nonzero(tree: chex.ArrayTree) -> jax.Array:
    return jnp.any(trees.stack([jnp.any(x != 0) for x in jax.tree.leaves(tree)]))
