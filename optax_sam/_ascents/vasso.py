"""VaSSO, variance-suppressed sharpness-aware optimization (arXiv 2309.15639)."""

from __future__ import annotations

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_sam._ascents.sam import scale_to_radius
from optax_sam._base import trees
from optax_sam._base.checks import called, calling, refuse
from optax_sam._base.hyperparameters import ScalarOrSchedule, as_schedule
from optax_sam._engine import protocol
from optax_sam._engine.sharpness_aware import sharpness_aware


def vasso(
    base: optax.GradientTransformation,
    rho: ScalarOrSchedule,
    theta: ScalarOrSchedule,
    *,
    accumulator_dtype: chex.ArrayDType | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""VaSSO: SAM that ascends along a moving average of the gradients.

    .. math::
      d_0 = g_0, \quad d_t = (1 - \theta) \, d_{t-1} + \theta \, g_t, \quad
      \varepsilon_t = \rho \, \frac{d_t}{\|d_t\|}, \qquad
      w_{t+1} = w_t + \text{base}(\nabla f(w_t + \varepsilon_t))

    A step costs two gradients, and the state holds one more copy of the parameters.

    Args:
      base: The optimizer that moves the parameters.
      rho: The radius :math:`\rho \ge 0`, in units of the parameters' norm; 0 is the
        base itself. A scalar, or a schedule of the count of steps.
      theta: Weight of the newest gradient, in [0, 1]; 1 is SAM. The paper's studies
        use 0.2, 0.4 and 0.9. A scalar, or a schedule.
      accumulator_dtype: Floating-point dtype of the average; None means float32 or
        wider.

    Returns:
      The corresponding :func:`optax_sam.sharpness_aware` transformation; see there for
      the arguments of its update, their shapes and what they raise.

    Raises:
      TypeError: If `base` is no transformation, `rho` or `theta` no real scalar or
        schedule, or `accumulator_dtype` no floating-point dtype.
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
        ascent = optax.chain(
            suppress_variance(theta, accumulator_dtype), scale_to_radius(rho)
        )
        return sharpness_aware(base, ascent)


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
        def zeros(p: Any) -> jax.Array:
            dtype = accumulator_dtype
            if dtype is None:
                dtype = trees.accumulator_dtype(jnp.result_type(p))
            return jnp.zeros_like(p, dtype=dtype)

        return SuppressVarianceState(
            count=jnp.zeros([], jnp.int32), direction=jax.tree.map(zeros, params)
        )

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
