"""What an ascent does: its perturbation, the loss there, and how stable it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_sam._base import batching, trees
from optax_sam._base.losses import check_losses, mean_loss
from optax_sam._engine import protocol
from optax_sam._engine.ascend import ascend
from optax_sam._engine.states import SharpnessAwareState
from optax_sam._engine.value_and_update import value_and_update
from optax_sam.diagnostics import _loop, _vector


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
      `ascent.init(params)`; or it is all of `opt_state`, which an ascent along what the
      base keeps needs. `mask_density` counts the masks that bring about this
      perturbation: leaves that :func:`optax_sam.perturb_only` drops count nothing, and
      masks of bools that states keep under the name `mask` their True share, several of
      them what all let through.

    Raises:
      TypeError: If `loss_fn` is no function or `ascent` no transformation; in the
        function, if `ascent_state` is that of another ascent.
      ValueError: In the function, if the ascent is one along what the base keeps, and
        `ascent_state` is not the state of `sharpness_aware`.

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
    take = _ascent_step(loss_fn, ascent, has_aux, ascent_loss_fn, scoring_loss_fn)

    def measure(
        params: optax.Params, ascent_state: optax.OptState, *args: Any
    ) -> AscentMetrics:
        step = take(params, ascent_state, *args)
        clean = step.losses
        if ascent_loss_fn is not None:
            clean = losses_of(params, *args)
        perturbed = losses_of(trees.displace(params, step.epsilon), *args)
        # The mean of differences: less is lost than in a difference of means.
        gap = jnp.mean(_vector.widen(perturbed) - _vector.widen(clean))
        metrics = AscentMetrics(
            clean_loss=mean_loss(clean),
            perturbed_loss=mean_loss(perturbed),
            gap=gap,
            perturbation_norm=_vector.norm(step.epsilon),
            mask_density=_density(params, _parts(ascent_state)[0], step),
            effective_sample_size=_effective_sample_size(step, args),
        )
        return AscentMetrics(*(jnp.asarray(x, jnp.float32) for x in metrics))

    return measure


class AscentStability(NamedTuple):
    r"""How the direction of an ascent varies between batches, scalars.

    Attributes:
      variance: :math:`\frac{1}{K - 1} \sum_k \|d_k - \bar d\|^2`.
      relative_variance: The same over :math:`\|\bar d\|^2`; 0 where both are zero,
        infinite where only the mean is.
      mean_cosine: The mean cosine of the angle between the directions of two batches,
        over all pairs; that with a direction of zero is 0.
      mean_norm: The mean of :math:`\|d_k\|`.
    """

    variance: jax.Array
    relative_variance: jax.Array
    mean_cosine: jax.Array
    mean_norm: jax.Array


def ascent_stability(
    loss_fn: Callable[..., Any],
    ascent: optax.GradientTransformation,
    params: optax.Params,
    ascent_state: optax.OptState,
    batches: Any,
    *args: Any,
    has_aux: bool = False,
    ascent_loss_fn: Callable[..., Any] | None = None,
    scoring_loss_fn: Callable[..., Any] | None = None,
) -> AscentStability:
    r"""How much the direction of an ascent depends on the batch.

    .. math:: d_k = \text{ascent}(\nabla f_{I_k}(w)), \qquad k = 1, \dots, K

    All from the same parameters and the same state, one batch after the other: it takes
    `K` gradients, and the memory of one and of two sums. With
    :func:`optax_sam.suppress_variance` alone as the ascent, after its first step, the
    variance is :math:`\theta^2` of that of the gradient. Random numbers of an ascent
    are the same for all batches.

    Args:
      loss_fn: `loss_fn(params, batch, *args)` returns losses, as for
        :func:`ascent_metrics`.
      ascent: Any gradient transformation; its output is :math:`d_k`.
        `optax.identity()` is the gradient itself.
      params: Pytree of floating-point arrays of any shapes.
      ascent_state: State of the ascent, such as `opt_state.ascent_state`, or all of
        `opt_state`.
      batches: The batches along the first axis of every array: `[K, B, ...]`, of at
        least two.
      *args: What else `loss_fn` takes.
      has_aux: Whether `loss_fn` returns auxiliary data, which are dropped.
      ascent_loss_fn: As for :func:`optax_sam.value_and_update`.
      scoring_loss_fn: As for :func:`optax_sam.value_and_update`.

    Returns:
      :class:`AscentStability`, scalars in float32 or wider. A batch whose gradient is
      not finite has the direction zero.

    Raises:
      TypeError: As for :func:`ascent_metrics`.
      ValueError: If there are fewer than two batches, or as there.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> from optax_sam import diagnostics
      >>> loss_fn = lambda w, batch: batch @ w  # The gradient is the mean of the batch.
      >>> ascent = optax_sam.scale_to_radius(rho=1.0)
      >>> params, batches = jnp.zeros(2), jnp.array([[[2.0, 0.0]], [[0.0, 3.0]]])
      >>> stability = diagnostics.ascent_stability(
      ...     loss_fn, ascent, params, ascent.init(params), batches
      ... )
      >>> print(stability.variance, stability.mean_cosine, stability.mean_norm)
      1.0 0.0 1.0
    """
    owner = "ascent_stability"
    k = batching.count(owner, batches)
    if k < 2:
        raise ValueError(
            f"{owner}: got {k} batch, and one direction does not vary; pass several "
            "along the first axis of the arrays, [K, B, ...]."
        )
    take = _ascent_step(loss_fn, ascent, has_aux, ascent_loss_fn, scoring_loss_fn)

    def direction(batch: Any) -> chex.ArrayTree:
        return _vector.widen(take(params, ascent_state, batch, *args).epsilon)

    def add(carry: Any, batch: Any) -> Any:
        count, mean, units, squares = carry
        d = direction(batch)
        unit = _vector.unit(d)
        change = _vector.add(d, mean, -1.0)
        squares += _vector.dot(change, change) * (count / (count + 1))
        mean = _vector.add(mean, change, 1 / (count + 1))
        carry = count + 1, mean, _vector.add(units, unit), squares
        return carry, (_vector.norm(d), _vector.dot(unit, unit))

    first = jax.tree.map(lambda x: x[0], batches)
    present = jax.eval_shape(direction, first)
    moved = trees.map_present(lambda _, p: p, present, params)
    zeros = _loop.compiled(lambda: _vector.zeros_like(moved))()
    zero = jnp.zeros_like(_vector.dot(zeros, zeros))
    carry = zero, zeros, zeros, zero
    (_, mean, units, squares), (norms, ones) = _loop.scan(add)(carry, batches)
    variance, square = squares / (k - 1), _vector.dot(mean, mean)
    # 0 / 1 where nothing moves; infinite where only the mean vanishes.
    relative = variance / jnp.where((square == 0) & (variance == 0), 1, square)
    pairs = _vector.dot(units, units) - jnp.sum(ones)
    return AscentStability(variance, relative, pairs / (k * (k - 1)), jnp.mean(norms))


class Ascent(NamedTuple):
    """A step of an ascent: its perturbation, new state, and the losses that it read."""

    epsilon: optax.Updates
    state: optax.OptState
    losses: jax.Array


def _ascent_step(
    loss_fn: Any, ascent: Any, has_aux: Any, ascent_loss_fn: Any, scoring_loss_fn: Any
) -> Callable[..., Ascent]:
    """The step of an ascent, `(params, state, *args)`, as the engine takes it."""
    ascent = protocol.as_transformation("diagnostics", "ascent", ascent)

    def make_step(base_state: optax.OptState) -> Callable[..., Any]:
        def update(
            gradient: optax.Updates,
            state: optax.OptState,
            params: Any,
            **extra_args: Any,
        ) -> tuple[optax.Updates, Any]:
            given = extra_args | {"base_state": base_state}
            epsilon, new, _ = ascend(ascent, gradient, state, params, given)
            return epsilon, (new, extra_args["losses"])

        return value_and_update(
            loss_fn,
            optax.GradientTransformationExtraArgs(ascent.init, update),
            has_aux=has_aux,
            ascent_loss_fn=ascent_loss_fn,
            scoring_loss_fn=scoring_loss_fn,
        )

    make_step(None)  # Refuses at once what no step can be made of.

    def take(params: optax.Params, state: optax.OptState, *args: Any) -> Ascent:
        state, base_state = _parts(state)
        expected = jax.eval_shape(ascent.init, params)
        sizes = [len(jax.tree.leaves(tree)) for tree in (state, expected)]
        if type(state) is not type(expected) or sizes[0] != sizes[1]:
            raise TypeError(
                f"ascent_state is not of this ascent: a {type(state).__name__} of "
                f"{sizes[0]} arrays, where it has a {type(expected).__name__} of "
                f"{sizes[1]}; pass the ascent that the optimizer was made with."
            )
        _, epsilon, (new, losses) = make_step(base_state)(params, state, *args)
        return Ascent(epsilon, new, losses)

    return take


def _parts(state: optax.OptState) -> tuple[Any, Any]:
    """The states of the ascent and, if there is more than that, of the base."""
    if isinstance(state, SharpnessAwareState):
        return state.ascent_state, state.base_state
    return state, None


def _losses_only(loss_fn: Callable[..., Any], has_aux: bool) -> Callable[..., Any]:
    def losses(*args: Any) -> jax.Array:
        out = loss_fn(*args)
        return check_losses("ascent_metrics", "loss_fn", out[0] if has_aux else out)

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
    return shares / trees.size(params)


def _share(epsilon: Any, p: Any, masks: tuple[jax.Array, ...]) -> jax.Array:
    """How many entries of a leaf are perturbed, in float32, which is not exact."""
    through = jnp.full(jnp.shape(p), not trees.is_absent(epsilon))
    for mask in masks:
        through &= mask
    return jnp.sum(through, dtype=jnp.float32)


def _masks(before: optax.OptState, after: optax.OptState) -> list[Any]:
    """The masks of the step between two states, which keep them under this name."""

    def has_mask(node: Any) -> bool:
        return isinstance(node, tuple) and hasattr(node, "mask")

    pairs = zip(
        jax.tree.leaves(before, is_leaf=has_mask),
        jax.tree.leaves(after, is_leaf=has_mask),
        strict=True,
    )
    return [_mask_in_use(old, new) for old, new in pairs if has_mask(old)]


def _mask_in_use(before: Any, after: Any) -> Any:
    """The new mask, unless it says that it is for the steps that follow."""
    if not (hasattr(after, "since") and hasattr(before, "count")):
        return after.mask
    is_new = after.since <= before.count
    return jax.tree.map(
        lambda new, old: jnp.where(is_new, new, old), after.mask, before.mask
    )


def _is_mask(mask: Any, structure: Any) -> bool:
    dtypes = {jnp.result_type(m) for m in jax.tree.leaves(mask)}
    same: bool = jax.tree.structure(mask) == structure
    return same and dtypes == {jnp.dtype(bool)}


def _effective_sample_size(step: Ascent, args: tuple[Any, ...]) -> Any:
    found = optax.tree.get_all_with_path(step.state, "effective_sample_size")
    if found:
        return found[0][1]
    if step.losses.ndim:
        return float(step.losses.size)
    try:
        return float(batching.count("ascent_metrics", args[0] if args else ()))
    except ValueError:  # A loss of one number may be of anything.
        return float("nan")
