"""RW-SAM, sharpness-aware minimization with reweighted examples (arXiv 2509.18001)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from optax_sam._ascents.sam import scale_to_radius
from optax_sam._base import precision, random, trees
from optax_sam._base.checks import called, calling
from optax_sam._base.devices import AxisName, Devices, vary_like
from optax_sam._base.hyperparameters import (
    KeyLike,
    ScalarOrSchedule,
    as_key,
    as_schedule,
    check_bool,
    check_choice,
    check_integer,
    key_at,
    key_data,
)
from optax_sam._base.losses import linearise, per_example, uniform_weights
from optax_sam._engine import protocol
from optax_sam._engine.sharpness_aware import sharpness_aware

_Losses: TypeAlias = Callable[[list[jax.Array]], jax.Array]


_FIRST = "reweight_by_sharpness(...), suppress_variance(...), scale_to_radius(...)"


def rw_sam(
    base: optax.GradientTransformation,
    rho: ScalarOrSchedule,
    strength: ScalarOrSchedule,
    *,
    key: KeyLike = 0,
    delta: ScalarOrSchedule = 1e-4,
    num_probes: int = 1,
    estimator: Literal["auto", "finite_difference", "jvp"] = "auto",
    normalize: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""RW-SAM: SAM that ascends along the gradients of the steepest examples.

    .. math::
      \varepsilon_t = \rho \, \frac{\tilde g_t}{\|\tilde g_t\|}, \quad
      \tilde g_t = \sum_i p_i \nabla \ell_i(w_t), \quad
      p = \text{softmax}(\lambda s), \qquad
      w_{t+1} = w_t + \text{base}(\nabla f(w_t + \varepsilon_t))

    :math:`s_i` measures the slope of the loss of an example along a random direction. A
    step costs two gradients and one forward pass: 7/6 of SAM. Update needs `loss_fn`
    and `batch`, with losses per example.

    Args:
      base: The optimizer that moves the parameters.
      rho: The radius :math:`\rho \ge 0`, in units of the parameters' norm; 0 is the
        base itself. A scalar, or a schedule of the count of steps.
      strength: :math:`\lambda \ge 0`, in units of :math:`1 / s_i`; 0 is SAM. The larger
        it is, the larger a :math:`\rho` it wants. A scalar, or a schedule.
      key: An int or JAX PRNG key.
      delta: Step of the finite difference; see :func:`reweight_by_sharpness`.
      num_probes: Number of random directions.
      estimator: `"finite_difference"`, or `"jvp"`, which is exact, at a third of a base
        step more; `"auto"` takes the first where the loss is computed in float32. Below
        that differences are rounding noise.
      normalize: Whether to divide the slopes by their mean, so that `strength` has no
        unit.

    Returns:
      The corresponding :func:`optax_sam.sharpness_aware` transformation; see there for
      the arguments of its update, their shapes and what they raise.

    Raises:
      TypeError: If `base` is no transformation, `rho`, `strength` or `delta` no real
        scalar or schedule, `key` no key, or another argument of the wrong type.
      ValueError: If one of them is out of range or `estimator` unknown.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> tx = optax_sam.rw_sam(optax.sgd(0.1), rho=0.5, strength=0.1)
      >>> loss_fn = lambda w, batch: jnp.sum((batch - w[None]) ** 2, -1)
      >>> step = jax.jit(optax_sam.value_and_update(loss_fn, tx))
      >>> params, batch = jnp.zeros(2), jnp.array([[1.0, 1.0], [3.0, 0.0]])
      >>> value, updates, opt_state = step(params, tx.init(params), batch)
      >>> effective = optax.tree.get(opt_state, "effective_sample_size")
      >>> print(1 < effective < 2)
      True

    References:
      Luo et al., `Unveiling m-Sharpness Through the Structure of Stochastic Gradient
      Noise <https://arxiv.org/abs/2509.18001>`_, 2025
    """
    with calling("rw_sam"):
        reweight = reweight_by_sharpness(
            strength,
            key=key,
            delta=delta,
            num_probes=num_probes,
            estimator=estimator,
            normalize=normalize,
        )
        return sharpness_aware(base, optax.chain(reweight, scale_to_radius(rho)))


def reweight_by_sharpness(
    strength: ScalarOrSchedule,
    *,
    key: KeyLike,
    delta: ScalarOrSchedule = 1e-4,
    num_probes: int = 1,
    estimator: Literal["auto", "finite_difference", "jvp"] = "auto",
    normalize: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Weights the examples by how steep their losses are: the direction of RW-SAM.

    .. math::
      \tilde g = \sum_{i=1}^{B} p_i \nabla f_i(x), \quad
      p = \text{softmax}(\lambda s), \quad
      s_i = \frac{|f_i(x + \delta z) - f_i(x)|}{\delta} \approx |z^\top \nabla f_i(x)|

    :math:`z` is a vector of random signs, new in every step and shared by the batch;
    :math:`s_i^2` is :math:`\|\nabla f_i\|^2` on average. Followed by
    :func:`scale_to_radius` this is RW-SAM. :math:`\lambda = 0` and equal :math:`s_i`
    give SAM, a large :math:`\lambda` the gradient of the steepest example. If only some
    :math:`s_i` are finite, the others get no weight; if none is, weights are equal.

    :math:`\tilde g` takes the place of the gradient that comes in, so in a chain only
    :func:`perturb_only` belongs before: leaves that are absent there are neither probed
    nor returned. A probe costs a third of a base step; with "jvp", two thirds.

    Differences of losses that were rounded to bfloat16 on the way are noise. By default
    the loss is therefore looked at, in its jaxpr: where it computes below float32,
    slopes are exact. On TPUs and GPUs they also are where it has products of float32 in
    JAX's default precision, which rounds the factors there; with
    `jax.default_matmul_precision("highest")` differences do.

    Args:
      strength: :math:`\lambda \ge 0`, in units of :math:`1 / s_i`. A scalar, or a
        schedule of the count of steps.
      key: An int or a JAX PRNG key. Signs depend on it and the count of steps alone.
      delta: Step :math:`\delta > 0` of each parameter, in its units and its dtype, for
        differences. A scalar, or a schedule.
      num_probes: Number of :math:`z`; :math:`s_i` is the root mean square over them.
      estimator: "finite_difference", "jvp" for :math:`z^\top \nabla f_i(x)` itself, or
        "auto" for the former where the loss is computed in float32 or wider. To ask for
        "finite_difference" below that is to ask for noise.
      normalize: Whether to divide :math:`s` by its mean; no scale of the loss matters.

    Returns:
      A link of an ascent for :func:`optax_sam.sharpness_aware`. Its update needs
      `params`, a tree of arrays of any shapes, and `loss_fn` and `batch`, which give
      losses [B]; the result has the parameters' shapes and dtypes. Without `losses` and
      `pullback` the clean forward pass is run again, a third of a base step. Functions
      with a `jax.custom_vjp`, as in :mod:`optax_sam.implicit`, have no exact slopes.

    Raises:
      TypeError: If `strength` or `delta` is neither a real scalar nor callable, `key`
        no key, `num_probes` no integer or `normalize` no bool.
      ValueError: If one of them is out of range or `estimator` unknown; in update, if
        `params`, `loss_fn` or `batch` is missing, the loss is a scalar, a link before
        has changed the gradient, or "auto" wants exact slopes that are not to be had.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> link = optax_sam.reweight_by_sharpness(strength=1e6, key=0)
      >>> params, batch = jnp.zeros(1), jnp.array([1.0, 3.0])
      >>> loss_fn = lambda w, x: x * w
      >>> g, state = link.update(
      ...     jnp.array([2.0]), link.init(params), params, loss_fn=loss_fn, batch=batch
      ... )
      >>> print(g)  # of the second example
      [3.]

    References:
      Luo et al., `Unveiling m-Sharpness Through the Structure of Stochastic Gradient
      Noise <https://arxiv.org/abs/2509.18001>`_, 2025
    """
    owner = called("reweight_by_sharpness")
    strength_at = as_schedule(owner, "strength", strength)
    delta_at = as_schedule(owner, "delta", delta, low=1e-37, harmless=1e-4)
    num_probes = check_integer(owner, "num_probes", num_probes, low=1, static=True)
    check_bool(owner, "normalize", normalize)
    check_choice(owner, "estimator", estimator, ("auto", "finite_difference", "jvp"))
    seed = as_key(owner, key)

    def init_fn(params: optax.Params) -> ReweightBySharpnessState:
        del params
        return ReweightBySharpnessState(
            key=key_data(seed),
            count=jnp.zeros([], jnp.int32),
            effective_sample_size=jnp.zeros([], jnp.float32),
            largest_weight=jnp.zeros([], jnp.float32),
            mean_directional_norm=jnp.zeros([], jnp.float32),
        )

    def update_fn(
        updates: optax.Updates,
        state: ReweightBySharpnessState,
        params: optax.Params | None = None,
        *,
        loss_fn: Callable[..., jax.Array] | None = None,
        batch: Any = protocol.MISSING,
        losses: jax.Array | None = None,
        pullback: Callable[[jax.Array], optax.Updates] | None = None,
        ascent_loss_fn: Callable[..., jax.Array] | None = None,
        axis_name: AxisName | None = None,
        is_gradient: Callable[[optax.Updates], bool] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ReweightBySharpnessState]:
        del extra_args
        protocol.require_gradient(owner, updates, is_gradient, _FIRST)
        devices = Devices(axis_name)
        # The losses to compare with are those of the clean pass.
        name = "loss_fn"
        if ascent_loss_fn is not None:
            name, loss_fn = "ascent_loss_fn", ascent_loss_fn
        protocol.require(owner, params=params, loss_fn=loss_fn, batch=batch)
        losses_of = per_example(owner, name, loss_fn)

        def losses_at(params: optax.Params) -> jax.Array:
            return losses_of(params, batch)

        if losses is None or pullback is None:
            losses, pullback = linearise(losses_at, devices.vary(params))
        slopes = _slopes(
            losses_at,
            devices.vary(params),
            losses,
            updates,
            key_at(seed, state.key, state.count),
            estimator,
            delta_at(state.count),
            num_probes,
        )
        uniform = uniform_weights(losses).astype(slopes.dtype)
        strength = strength_at(state.count).astype(slopes.dtype)
        weights, mean = _gibbs(slopes, strength, uniform, normalize, devices)
        # Weights of a device's examples, relative to its share of the batch: hence the
        # mean over devices, and the same rounding as on one.
        gradient = pullback(weights.astype(losses.dtype))
        gradient = devices.mean(devices.own("pullback(weights)", gradient))
        gradient = trees.map_present(lambda _, g: g, updates, gradient)
        weights = weights / devices.size()
        return gradient, ReweightBySharpnessState(
            key=state.key,
            count=optax.safe_increment(state.count),
            effective_sample_size=_float32(1 / devices.sum(jnp.sum(weights**2))),
            largest_weight=_float32(devices.max(jnp.max(weights))),
            mean_directional_norm=_float32(mean),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class ReweightBySharpnessState(NamedTuple):
    r"""State of :func:`reweight_by_sharpness`.

    The last three are float32 scalars of the latest step, zero before the first.

    Attributes:
      key: Raw data of the PRNG key, uint32; it never changes.
      count: Number of steps taken, an int32 scalar.
      effective_sample_size: :math:`1 / \sum_i p_i^2`, from 1 to the batch size.
      largest_weight: :math:`\max_i p_i`.
      mean_directional_norm: Mean of the finite :math:`s_i`, before `normalize`.
    """

    key: jax.Array
    count: jax.Array  # type: ignore[assignment]
    effective_sample_size: jax.Array
    largest_weight: jax.Array
    mean_directional_norm: jax.Array


def _slopes(
    losses_at: Callable[[optax.Params], jax.Array],
    params: optax.Params,
    clean: jax.Array,
    updates: optax.Updates,
    key: jax.Array,
    estimator: str,
    delta: jax.Array,
    num_probes: int,
) -> jax.Array:
    """Derivatives of the losses along random signs, [probes, B].

    Only the leaves that are present in `updates` are moved.
    """
    wide = trees.accumulator_dtype(clean.dtype)
    leaves, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, params))
    marks = map(trees.is_absent, jax.tree.leaves(updates, is_leaf=trees.is_absent))
    probed = [i for i, absent in enumerate(marks) if not absent]
    x = [leaves[i] for i in probed]

    def merged_losses(x: list[jax.Array]) -> jax.Array:
        merged = dict(enumerate(leaves)) | dict(zip(probed, x, strict=True))
        return losses_at(jax.tree.unflatten(structure, merged.values()))

    losses_of: _Losses = merged_losses
    if estimator == "auto":
        losses_of, estimator = _suited(merged_losses, x)

    def difference(z: list[jax.Array]) -> Any:
        near = jax.tree.map(lambda a, b: a + b * delta.astype(b.dtype), x, z)
        change = losses_of(near).astype(wide) - clean.astype(wide)
        return change / delta.astype(wide)

    def along_signs(derivative: Callable[[list[jax.Array]], Any]) -> jax.Array:
        def slopes(probe: jax.Array | int) -> Any:
            # Words for all leaves: those that are absent change no other's signs.
            words = random.words(jax.random.fold_in(key, probe), len(leaves))
            signs = [_signs(words[i], like) for i, like in zip(probed, x, strict=True)]
            return derivative(vary_like(signs, x)).astype(wide)

        if num_probes == 1:  # Not in a loop: XLA on the CPU is slow at those.
            return jnp.expand_dims(slopes(0), 0)
        return jnp.asarray(jax.lax.map(slopes, jnp.arange(num_probes)))

    def differences() -> jax.Array:
        return along_signs(difference)

    def exact() -> jax.Array:
        # The primal part is the clean pass: XLA shares it.
        return along_signs(jax.linearize(losses_of, x)[1])

    estimators = {"finite_difference": differences, "jvp": exact}
    if estimator in estimators:
        return estimators[estimator]()
    of_platform: Any = jax.lax.platform_dependent
    return jnp.asarray(of_platform(cpu=differences, default=exact))


def _suited(losses_of: _Losses, x: list[jax.Array]) -> tuple[_Losses, str]:
    """The losses, traced once, and the estimator for the precision they have.

    That is "auto" where it is for the platform to say.
    """
    closed: Any = jax.make_jaxpr(losses_of)(x)
    evaluate: Any = jax.core.eval_jaxpr

    def traced(x: list[jax.Array]) -> jax.Array:
        losses: jax.Array = evaluate(closed.jaxpr, closed.consts, *x)[0]
        return losses

    low = precision.is_below_float32(closed.jaxpr)
    by_platform = precision.has_platforms_precision(closed.jaxpr)
    only_backward = precision.without_forward_mode(closed.jaxpr)
    if only_backward and (low or (by_platform and jax.default_backend() != "cpu")):
        raise ValueError(
            "reweight_by_sharpness: loss_fn computes in less than float32, where "
            "differences of losses are rounding noise, and the exact slopes are not to "
            f"be had, since {only_backward[0]} has a jax.custom_vjp; give it a "
            "jax.custom_jvp, compute in float32 (with jax.default_matmul_precision("
            "'highest'), unless on a CPU), or pass estimator='finite_difference' and a "
            "delta that you have tried."
        )
    if low:
        return traced, "jvp"
    return traced, "auto" if by_platform and not only_backward else "finite_difference"


def _gibbs(
    slopes: jax.Array,
    strength: jax.Array,
    uniform: jax.Array,
    normalize: bool,
    devices: Devices,
) -> tuple[jax.Array, jax.Array]:
    """The weights of the examples by their slopes [probes, B], and the mean s.

    On one device of several, weights are relative to its share of the batch.
    """
    # Relative to the largest, no square or sum overflows.
    largest = jnp.max(jnp.abs(slopes), axis=0, keepdims=True)
    relative = trees.ratio(slopes, largest)
    s = largest[0] * jnp.sqrt(jnp.mean(relative**2, axis=0))
    finite = jnp.isfinite(s)
    s = jnp.where(finite, s, 0)
    largest = devices.max(jnp.max(s))
    relative = trees.ratio(s, largest)
    num_finite = devices.sum(jnp.sum(finite))
    relative_mean = devices.sum(jnp.sum(relative)) / jnp.maximum(num_finite, 1)
    if normalize:
        s = trees.ratio(relative, relative_mean)
    # The differences first: strength * s may overflow, and infinity - infinity is NaN.
    gaps = jnp.where(finite, s - devices.max(jnp.max(s)), 0)
    # A strength beyond float32 is infinite, and 0 * infinity is NaN.
    logits = jnp.where(gaps == 0, 0, strength * gaps)
    weights = jnp.where(finite, jnp.exp(logits), 0)
    # Fires where no slope is finite; otherwise a logit is 0.
    total = jnp.maximum(devices.mean(jnp.sum(weights)), 1 / devices.size())
    # What is SAM is so to the last bit, whatever the quotient is rounded to.
    equal = devices.all(jnp.all(finite & (logits == 0)))
    is_sam = (strength == 0) | equal | (num_finite == 0)
    return jnp.where(is_sam, uniform, weights / total), largest * relative_mean


def _signs(words: jax.Array, like: jax.Array) -> jax.Array:
    """Random signs of the shape and dtype of a leaf."""
    positive = random.bits(words, like.shape) >> 31 == 1
    return jnp.where(positive, 1, -1).astype(like.dtype)


def _float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)
