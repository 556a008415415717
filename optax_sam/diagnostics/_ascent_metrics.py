"""What an ascent does in one step: its perturbation and what that does to the loss."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_sam._ascents.rw_sam import ReweightBySharpnessState
from optax_sam._ascents.sparse_dynamic import SparsifyDynamicallyState
from optax_sam._base import batching, trees
from optax_sam._engine import protocol
from optax_sam.diagnostics import _vector
from optax_sam.diagnostics._ascent_step import Ascent, ascent_step


class AscentMetrics(NamedTuple):
    r"""What an ascent does in one step, float32 scalars.

    Attributes:
      clean_loss: The mean loss :math:`f(w)`.
      perturbed_loss: The mean loss :math:`f(w + \varepsilon)`.
      gap: :math:`f(w + \varepsilon) - f(w)`, the sharpness that the ascent sees.
      perturbation_norm: :math:`\|\varepsilon\|`.
      mask_density: The share of all parameters that masks let through, in [0, 1].
      effective_sample_size: :math:`1 / \sum_i p_i^2` of RW-SAM's weights, otherwise the
        number of examples whose gradient the ascent reads; NaN where the loss is one
        number and the batch does not say how many there are.
    """

    clean_loss: jax.Array
    perturbed_loss: jax.Array
    gap: jax.Array
    perturbation_norm: jax.Array
    mask_density: jax.Array
    effective_sample_size: jax.Array


def ascent_metrics(
    loss_fn: Callable[..., Any],
    ascent: optax.GradientTransformation,
    *,
    has_aux: bool = False,
    ascent_loss_fn: Callable[..., Any] | None = None,
    scoring_loss_fn: Callable[..., Any] | None = None,
) -> Callable[..., AscentMetrics]:
    r"""Makes a function that measures what an ascent does at given parameters.

    .. math:: \varepsilon = \text{ascent}(\nabla f(w)), \qquad f(w + \varepsilon) - f(w)

    The perturbation is that of the next step of :func:`optax_sam.sharpness_aware` from
    this state with the whole batch ascending together: zero where the clean gradient is
    not finite. Neither parameters nor state change. The cost is a gradient and a loss,
    one loss more with `ascent_loss_fn`, and what the ascent computes of its own, such
    as a mask that is due.

    Args:
      loss_fn: `loss_fn(params, *args)` returns the losses of the examples, shape `[B]`,
        or their mean as a scalar; with `has_aux`, a pair of that and any pytree. The
        first of `args` is the batch; the others are the same in both passes.
      ascent: The ascent, as given to :func:`optax_sam.sharpness_aware`.
      has_aux: Whether `loss_fn` returns auxiliary data, which are dropped.
      ascent_loss_fn: As for :func:`optax_sam.value_and_update`: the losses whose
        gradient the ascent reads in place of that of `loss_fn`. Both losses that are
        reported are those of `loss_fn`.
      scoring_loss_fn: As for :func:`optax_sam.value_and_update`.

    Returns:
      A function `measure(params, ascent_state, *args) -> AscentMetrics`, where
      `ascent_state` is `opt_state.ascent_state` of `sharpness_aware`, or
      `ascent.init(params)`. `mask_density` counts the masks that bring about this
      perturbation: leaves that :func:`optax_sam.perturb_only` drops count nothing,
      and masks of bools that states keep under the name `mask` their True share,
      several of them what all let through.

    Raises:
      TypeError: If `loss_fn` is no function or `ascent` no transformation; in the
        function, if `ascent_state` is the state of all of the optimizer, or of another
        ascent.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_sam
      >>> from optax_sam import diagnostics
      >>> loss_fn = lambda w, batch: 0.5 * batch @ w**2
      >>> ascent = optax_sam.scale_to_radius(rho=0.5)
      >>> measure = jax.jit(diagnostics.ascent_metrics(loss_fn, ascent))
      >>> params = jnp.array([3.0, 4.0])
      >>> metrics = measure(params, ascent.init(params), jnp.ones((1, 2)))
      >>> print(metrics.clean_loss, metrics.gap, metrics.perturbation_norm)
      12.5 2.625 0.5
    """
    losses_of = _losses_only(loss_fn, has_aux)
    ascend = ascent_step(loss_fn, ascent, has_aux, ascent_loss_fn, scoring_loss_fn)

    def measure(
        params: optax.Params, ascent_state: optax.OptState, *args: Any
    ) -> AscentMetrics:
        step = ascend(params, ascent_state, *args)
        clean = step.losses
        if ascent_loss_fn is not None:
            clean = losses_of(params, *args)
        perturbed = losses_of(_vector.point(params, step.epsilon), *args)
        # The mean of differences: less is lost than in a difference of means.
        gap = jnp.mean(_vector.widen(perturbed) - _vector.widen(clean))
        metrics = AscentMetrics(
            clean_loss=protocol.mean_loss(clean),
            perturbed_loss=protocol.mean_loss(perturbed),
            gap=gap,
            perturbation_norm=_vector.norm(step.epsilon),
            mask_density=_density(params, ascent_state, step),
            effective_sample_size=_effective_sample_size(step, args),
        )
        return AscentMetrics(*(jnp.asarray(x, jnp.float32) for x in metrics))

    return measure


def _losses_only(loss_fn: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
    def losses(*args: Any) -> jax.Array:
        out = loss_fn(*args)
        return protocol.check_losses(out[0] if has_aux else out)

    return losses


def _density(params: optax.Params, before: optax.OptState, step: Ascent) -> Any:
    """The share of the parameters that all masks let through."""
    structure = jax.tree.structure(params)
    masks = [m for m in _masks(before, step.state) if _is_mask(m, structure)]
    marks = jax.tree.map(
        lambda e, p, *m: _share(e, p, m),
        step.epsilon,
        params,
        *masks,
        is_leaf=trees.is_absent,
    )
    shares = jnp.sum(trees.stack(marks))
    return shares / _vector.size(params)


def _share(epsilon: Any, p: Any, masks: tuple[jax.Array, ...]) -> jax.Array:
    """How many entries of a leaf are perturbed, in float32, which is not exact."""
    through = jnp.full(jnp.shape(p), not trees.is_absent(epsilon))
    for mask in masks:
        through &= mask
    return jnp.sum(through, dtype=jnp.float32)


def _masks(before: optax.OptState, after: optax.OptState) -> list[Any]:
    """The masks of the step between two states."""

    def has_mask(node: Any) -> bool:
        return isinstance(node, tuple) and "mask" in getattr(node, "_fields", ())

    pairs = zip(
        jax.tree.leaves(before, is_leaf=has_mask),
        jax.tree.leaves(after, is_leaf=has_mask),
        strict=True,
    )
    # Sparse SAM's dynamic masks are replaced after use, the others before.
    return [
        (old if isinstance(old, SparsifyDynamicallyState) else new).mask
        for old, new in pairs
        if has_mask(old)
    ]


def _is_mask(mask: Any, structure: Any) -> bool:
    dtypes = {jnp.result_type(m) for m in jax.tree.leaves(mask)}
    same: bool = jax.tree.structure(mask) == structure
    return same and dtypes == {jnp.dtype(bool)}


def _effective_sample_size(step: Ascent, args: tuple[Any, ...]) -> Any:
    def is_reweighting(node: Any) -> bool:
        return isinstance(node, ReweightBySharpnessState)

    for node in jax.tree.leaves(step.state, is_leaf=is_reweighting):
        if is_reweighting(node):
            return node.effective_sample_size
    if step.losses.ndim:
        return float(step.losses.size)
    try:
        return float(batching.count("ascent_metrics", args[0] if args else ()))
    except ValueError:  # A loss of one number may be of anything.
        return float("nan")
