"""GSAM, surrogate gap guided sharpness-aware minimization (arXiv 2203.08065)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_sam._ascents.sam import scale_to_radius
from optax_sam._base import trees
from optax_sam._base.checks import called, calling
from optax_sam._base.hyperparameters import ScalarOrSchedule, as_schedule
from optax_sam._engine import protocol
from optax_sam._engine.sharpness_aware import sharpness_aware


def gsam(
    base: optax.GradientTransformation, rho: ScalarOrSchedule, alpha: ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    r"""GSAM: SAM that also narrows the gap between perturbed and clean loss.

    .. math::
      \varepsilon_t = \rho \, \frac{g_t}{\|g_t\|}, \quad
      p_t = \nabla f(w_t + \varepsilon_t), \qquad
      w_{t+1} = w_t + \text{base}\Big(p_t - \alpha \Big(
        g_t - \frac{\langle g_t, p_t \rangle}{\|p_t\|^2} \, p_t \Big)\Big)

    A step costs two gradients.

    Args:
      base: The optimizer that moves the parameters.
      rho: The radius :math:`\rho \ge 0`, in units of the parameters' norm. A scalar, or
        a schedule of the count of steps.
      alpha: Weight of the clean gradient's part across the perturbed one, at least 0; 0
        is SAM. A scalar, or a schedule.

    Returns:
      The corresponding :func:`optax_sam.sharpness_aware` transformation; see there for
      the arguments of its update, their shapes and what they raise.

    Raises:
      TypeError: If `base` is no transformation, or `rho` or `alpha` no real scalar or
        schedule.
      ValueError: If `rho` or `alpha` is negative, not finite or no scalar.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> tx = optax_sam.gsam(optax.sgd(0.1, momentum=0.9), rho=0.2, alpha=0.4)
      >>> loss_fn = lambda w, batch: jnp.sum((batch - w[None]) ** 2, -1)
      >>> step = jax.jit(optax_sam.value_and_update(loss_fn, tx))
      >>> params, batch = jnp.zeros(2), jnp.array([[1.0, 1.0], [3.0, 0.0]])
      >>> opt_state = tx.init(params)
      >>> for _ in range(3):
      ...     value, updates, opt_state = step(params, opt_state, batch)
      ...     params = optax.apply_updates(params, updates)
      ...     print(f"{value:.3f}")
      5.500
      3.840
      1.956

    References:
      Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
      <https://arxiv.org/abs/2203.08065>`_, 2022
    """
    with calling("gsam"):
        base = protocol.as_transformation("gsam", "base", base)
        return sharpness_aware(
            optax.chain(gap_descent(alpha), base), scale_to_radius(rho)
        )


def gap_descent(alpha: ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    r"""Takes away the clean gradient's part across the perturbed one: GSAM's descent.

    .. math::
      p - \alpha \, g_\perp, \qquad
      g_\perp = g - \frac{\langle g, p \rangle}{\|p\|^2} \, p

    :math:`p` is the perturbed gradient, which comes in, and :math:`g` the clean one.
    Along :math:`p` nothing changes, so that the perturbed loss falls as in SAM to first
    order, and the clean loss rises towards it. Products and norms are of the whole
    tree.

    Args:
      alpha: The weight :math:`\alpha \ge 0`; 0 is SAM. A scalar, or a schedule of the
        count of steps.

    Returns:
      A first link of the base of :func:`optax_sam.sharpness_aware`, whose update needs
      `grad`, the clean gradient. It maps a tree of arrays of any shapes to one of the
      same shapes and dtypes.

    Raises:
      TypeError: If `alpha` is neither a real scalar nor callable.
      ValueError: If `alpha` is negative, not finite or no scalar; in update, if `grad`
        is missing.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> link = optax_sam.gap_descent(alpha=0.5)
      >>> p, g = jnp.array([2.0, 0.0]), jnp.array([3.0, 4.0])
      >>> descent, state = link.update(p, link.init(p), grad=g)
      >>> print(descent)
      [ 2. -2.]

    References:
      Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
      <https://arxiv.org/abs/2203.08065>`_, 2022
    """
    owner = called("gap_descent")
    alpha_at = as_schedule(owner, "alpha", alpha)

    def init_fn(params: optax.Params) -> GapDescentState:
        del params
        return GapDescentState(count=jnp.zeros([], jnp.int32))

    def update_fn(
        updates: optax.Updates,
        state: GapDescentState,
        params: optax.Params | None = None,
        *,
        grad: optax.Updates | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GapDescentState]:
        del params, extra_args
        protocol.require_of_base(owner, grad=grad)
        weight = alpha_at(state.count)
        along = trees.scale_to_norm(updates, 1.0)
        length = trees.inner(grad, along)

        def descend(p: Any, g: Any, unit: jax.Array) -> jax.Array:
            across = jnp.asarray(g, unit.dtype) - length * unit
            descent: jax.Array = p - weight * across
            return descent.astype(jnp.result_type(p))

        descent = jax.tree.map(descend, updates, grad, along)
        return descent, GapDescentState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class GapDescentState(NamedTuple):
    """State of :func:`gap_descent`.

    Attributes:
      count: Number of steps taken, an int32 scalar, for schedules of `alpha`.
    """

    count: jax.Array  # type: ignore[assignment]

    @property
    def descends(self) -> bool:
        """Says that the link is a part of the base."""
        return True
