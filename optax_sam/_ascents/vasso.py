"""VaSSO, variance-suppressed sharpness-aware optimization (arXiv 2309.15639)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_sam._ascents.sam import scale_to_radius
from optax_sam._base import trees
from optax_sam._base.checks import called, calling, refuse
from optax_sam._base.hyperparameters import ScalarOrSchedule, as_schedule, check_bool
from optax_sam._engine import protocol
from optax_sam._engine.kept import Tried, check_keeps_gradients, kept_by_base
from optax_sam._engine.sharpness_aware import sharpness_aware

_FIRST = "follow_average(), scale_to_radius(...)"
_KEPT = ("average",)
_KEEP = "pass optax.chain(optax_sam.keep_average(theta), sgd) as base, in this order"


def vasso(
    base: optax.GradientTransformation,
    rho: ScalarOrSchedule,
    theta: ScalarOrSchedule,
    *,
    accumulator_dtype: chex.ArrayDType | None = None,
    one_pass: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""VaSSO: SAM that ascends along a moving average of the gradients.

    .. math::
      d_0 = g_0, \quad d_t = (1 - \theta) \, d_{t-1} + \theta \, g_t, \quad
      \varepsilon_t = \rho \, \frac{d_t}{\|d_t\|}, \qquad
      w_{t+1} = w_t + \text{base}(\nabla f(w_t + \varepsilon_t))

    A step costs two gradients, and the state holds one more copy of the parameters.
    With `one_pass` it costs one: :math:`d` is then the average of the gradients that
    the steps before descended along, :math:`\nabla f(w_s + \varepsilon_s), s < t`, zero
    before the first.

    Args:
      base: The optimizer that moves the parameters.
      rho: The radius :math:`\rho \ge 0`, in units of the parameters' norm; 0 is the
        base itself. A scalar, or a schedule of the count of steps.
      theta: Weight of the newest gradient, in [0, 1]; 1 is SAM. The paper's studies
        use 0.2, 0.4 and 0.9. A scalar, or a schedule.
      accumulator_dtype: Floating-point dtype of the average; None means float32 or
        wider.
      one_pass: Whether to ascend along what earlier steps have found, so that a step
        needs one gradient only. Not in the paper.

    Returns:
      The corresponding :func:`optax_sam.sharpness_aware` transformation; see there for
      the arguments of its update, their shapes and what they raise. With `one_pass`,
      value and auxiliary data of :func:`value_and_update` are those at
      :math:`w + \varepsilon`.

    Raises:
      TypeError: If `base` is no transformation, `rho` or `theta` no real scalar or
        schedule, `accumulator_dtype` no floating-point dtype, or `one_pass` no bool.
      ValueError: If `rho` is negative or not finite, `theta` outside [0, 1], or one of
        them no scalar.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> tx = optax_sam.vasso(optax.sgd(0.1, momentum=0.9), rho=0.5, theta=0.4)
      >>> loss_fn = lambda w, batch: jnp.sum((batch - w[None]) ** 2, -1)
      >>> step = jax.jit(optax_sam.value_and_update(loss_fn, tx))
      >>> params = jnp.zeros(2)
      >>> opt_state = tx.init(params)
      >>> for batch in (jnp.ones((4, 2)), jnp.eye(2), -jnp.eye(2)):
      ...     value, updates, opt_state = step(params, opt_state, batch)
      ...     params = optax.apply_updates(params, updates)
      ...     print(f"{value:.3f}")
      2.000
      0.605
      3.058

    References:
      Li and Giannakis, `Enhancing Sharpness-Aware Optimization Through Variance
      Suppression <https://arxiv.org/abs/2309.15639>`_, 2023
    """
    with calling("vasso"):
        average = suppress_variance(theta, accumulator_dtype)
        if check_bool("vasso", "one_pass", one_pass):
            base = protocol.as_transformation("vasso", "base", base)
            base = optax.chain(keep_average(theta, accumulator_dtype), base)
            average = follow_average()
        return sharpness_aware(base, optax.chain(average, scale_to_radius(rho)))


def suppress_variance(
    theta: ScalarOrSchedule, accumulator_dtype: chex.ArrayDType | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces the gradient by its moving average: the direction of VaSSO.

    .. math::
      d_0 = g_0, \qquad d_t = (1 - \theta) \, d_{t-1} + \theta \, g_t

    :math:`g_t` is the clean gradient. Followed by :func:`scale_to_radius` this is
    VaSSO, :math:`\varepsilon = \rho \, d_t / \|d_t\|`; with :math:`\theta = 1` it is
    SAM. At a fixed point the average has, in the long run,
    :math:`\theta / (2 - \theta)` of the variance of a single gradient.

    Args:
      theta: Weight of the newest gradient, in [0, 1]. A scalar, or a schedule of the
        count of steps.
      accumulator_dtype: Floating-point dtype of the average. None means float32 or
        wider, since in bfloat16 an average with a small `theta` never moves. Entries
        beyond its range are clipped.

    Returns:
      A link of an ascent for :func:`optax_sam.sharpness_aware`. It maps a tree of
      arrays of any shapes to one of the same shapes, in the accumulator's dtype.

    Raises:
      TypeError: If `theta` is neither a real scalar nor callable, or
        `accumulator_dtype` no floating-point dtype.
      ValueError: If `theta` is outside [0, 1] or no scalar.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> link = optax_sam.suppress_variance(theta=0.25)
      >>> state = link.init(jnp.zeros(2))
      >>> d, state = link.update(jnp.array([4.0, 0.0]), state)
      >>> d, state = link.update(jnp.array([0.0, 4.0]), state)
      >>> print(d)
      [3. 1.]

    References:
      Li and Giannakis, `Enhancing Sharpness-Aware Optimization Through Variance
      Suppression <https://arxiv.org/abs/2309.15639>`_, 2023
    """
    owner = called("suppress_variance")
    newest = as_schedule(owner, "theta", theta, high=1.0, harmless=1.0)
    if accumulator_dtype is not None:
        accumulator_dtype = _floating_dtype(owner, accumulator_dtype)

    def init_fn(params: optax.Params) -> SuppressVarianceState:
        count = jnp.zeros([], jnp.int32)
        direction = trees.accumulators(params, accumulator_dtype)
        return SuppressVarianceState(count, direction)

    def update_fn(
        updates: optax.Updates,
        state: SuppressVarianceState,
        params: optax.Params | None = None,
        *,
        advance: protocol.Advance = protocol.take_new,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SuppressVarianceState]:
        del params, extra_args
        # The first direction is the first gradient: there is nothing to average yet.
        weight = jnp.where(state.count == 0, 1, newest(state.count))

        def average(g: Any, d: jax.Array) -> jax.Array:
            wide = trees.accumulator_dtype(d.dtype)
            w = weight.astype(wide)
            g, before = jnp.asarray(g, wide), d.astype(wide)
            # With one product there is one way to round it: compilers fuse either of
            # two with their sum, and which one depends on what else is in the chain.
            mean = jnp.where(w == 1, g, before + w * (g - before))
            if d.dtype == wide:
                return mean
            limit: Any = jnp.finfo(d.dtype)  # type: ignore[no-untyped-call]
            return jnp.clip(mean, limit.min, limit.max).astype(d.dtype)

        mean = trees.map_present(average, updates, state.direction)
        filled = trees.fill(mean, state.direction)
        # Before anything reads it, so that it takes the place of the one before.
        direction = advance(filled, state.direction)
        updates = trees.map_present(lambda _, d: d, updates, direction)
        count = optax.safe_increment(state.count)
        return updates, SuppressVarianceState(count, direction)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class SuppressVarianceState(NamedTuple):
    """State of :func:`suppress_variance`.

    Attributes:
      count: Number of steps taken, an int32 scalar.
      direction: The average :math:`d_t`, a tree like the parameters.
    """

    count: jax.Array  # type: ignore[assignment]
    direction: chex.ArrayTree


def keep_average(
    theta: ScalarOrSchedule, accumulator_dtype: chex.ArrayDType | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Keeps a moving average of the gradients that the base descends along.

    .. math::
      d_1 = p_0, \qquad d_{t+1} = (1 - \theta) \, d_t + \theta \, p_t

    :math:`p_t` is the gradient at the perturbed parameters, which is handed on as it
    is; one that is not finite is left out. :func:`follow_average` is the ascent along
    :math:`d_t`, and with it a step of VaSSO costs one gradient.

    Args:
      theta: Weight of the newest gradient, in [0, 1]. A scalar, or a schedule of the
        count of steps.
      accumulator_dtype: Floating-point dtype of the average, as for
        :func:`suppress_variance`.

    Returns:
      A first link of the base of :func:`optax_sam.sharpness_aware`. It maps a tree of
      arrays to itself.

    Raises:
      TypeError: If `theta` is neither a real scalar nor callable, or
        `accumulator_dtype` no floating-point dtype.
      ValueError: If `theta` is outside [0, 1] or no scalar.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> tx = optax_sam.sharpness_aware(
      ...     optax.chain(optax_sam.keep_average(theta=0.4), optax.sgd(0.1)),
      ...     optax.chain(optax_sam.follow_average(), optax_sam.scale_to_radius(0.5)),
      ... )
      >>> params, grad_fn = jnp.zeros(2), lambda w: w - jnp.array([3.0, 4.0])
      >>> _, state = tx.update(jnp.zeros(2), tx.init(params), params, grad_fn=grad_fn)
      >>> print(state.base_state[0].average)
      [-3. -4.]

    References:
      Li and Giannakis, `Enhancing Sharpness-Aware Optimization Through Variance
      Suppression <https://arxiv.org/abs/2309.15639>`_, 2023
    """
    with calling(called("keep_average")):
        link = suppress_variance(theta, accumulator_dtype)

    def init_fn(params: optax.Params) -> KeepAverageState:
        return KeepAverageState(*link.init(params))

    def update_fn(
        updates: optax.Updates,
        state: KeepAverageState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, KeepAverageState]:
        del params, extra_args
        finite = trees.all_finite(updates)

        def advance(new: chex.ArrayTree, old: chex.ArrayTree) -> chex.ArrayTree:
            return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

        before = SuppressVarianceState(*state)
        _, after = link.update(updates, before, advance=advance)
        count = advance(after.count, state.count)
        return updates, KeepAverageState(count, after.direction)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class KeepAverageState(NamedTuple):
    """State of :func:`keep_average`.

    Attributes:
      count: Number of gradients in the average, an int32 scalar.
      average: The average :math:`d`, a tree like the parameters.
    """

    count: jax.Array  # type: ignore[assignment]
    average: chex.ArrayTree

    @property
    def descends(self) -> bool:
        """Says that the link is a part of the base."""
        return True


def follow_average() -> optax.GradientTransformationExtraArgs:
    r"""Replaces the gradient by the average that the base keeps: VaSSO of one pass.

    .. math::
      d_{t+1} = (1 - \theta) \, d_t + \theta \, \nabla f(w_t + \varepsilon_t)

    The base must begin with :func:`keep_average`, and :func:`scale_to_radius` follows.
    The gradient of the clean pass is not read, so that a step costs one gradient.

    Returns:
      A link of an ascent for :func:`optax_sam.sharpness_aware`, the first of it or
      after :func:`perturb_only`. It gives a tree like that it maps, in the average's
      dtype.

    Raises:
      ValueError: When a state is made, and in update, if the base keeps no average; in
        update, if a link before it has changed the gradient.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> kept, link = optax_sam.keep_average(theta=0.25), optax_sam.follow_average()
      >>> grads = jnp.array([3.0, 4.0])
      >>> _, base_state = kept.update(grads, kept.init(grads))
      >>> d, _ = link.update(jnp.zeros(2), link.init(grads), base_state=base_state)
      >>> print(d)
      [3. 4.]

    References:
      Li and Giannakis, `Enhancing Sharpness-Aware Optimization Through Variance
      Suppression <https://arxiv.org/abs/2309.15639>`_, 2023
    """
    owner = called("follow_average")

    def init_fn(params: optax.Params) -> FollowAverageState:
        del params
        return FollowAverageState()

    def update_fn(
        updates: optax.Updates,
        state: FollowAverageState,
        params: optax.Params | None = None,
        *,
        base_state: optax.OptState = None,
        is_gradient: Callable[[optax.Updates], bool] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, FollowAverageState]:
        del params, extra_args
        protocol.require_gradient(owner, updates, is_gradient, _FIRST)
        return kept_by_base(owner, _KEPT, base_state, updates, _KEEP), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class FollowAverageState(NamedTuple):
    """State of :func:`follow_average`, which is empty."""

    def check_base(
        self, owner: str, base_state: Any, params: optax.Params, tried: Tried
    ) -> None:
        """Refuses a base that keeps no average, or one of updates."""
        remedies = _KEEP, _KEEP
        check_keeps_gradients(owner, _KEPT, base_state, params, tried, remedies)


def _floating_dtype(owner: str, dtype: Any) -> Any:
    try:
        # inject_hyperparams takes a dtype for a schedule and hands on an array.
        resolved = None if isinstance(dtype, jax.Array) else jnp.dtype(dtype)
    except TypeError:
        resolved = None
    if resolved is None or not jnp.issubdtype(resolved, jnp.floating):
        what = "accumulator_dtype must be a floating-point dtype"
        remedy = (
            "pass for example jnp.float32, or None for float32 or wider, and name it "
            "in static_args under optax.inject_hyperparams"
        )
        refuse(owner, what, dtype, remedy, TypeError)
    return resolved
