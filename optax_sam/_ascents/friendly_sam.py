"""Friendly SAM, ascents without what all gradients share (arXiv 2403.12350)."""

from __future__ import annotations

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_sam._ascents.sam import scale_to_radius
from optax_sam._base import trees
from optax_sam._base.checks import called, calling
from optax_sam._base.hyperparameters import ScalarOrSchedule, as_schedule
from optax_sam._engine.sharpness_aware import sharpness_aware


def friendly_sam(
    base: optax.GradientTransformation,
    rho: ScalarOrSchedule,
    sigma: ScalarOrSchedule = 1.0,
    decay: ScalarOrSchedule = 0.9,
) -> optax.GradientTransformationExtraArgs:
    r"""Friendly SAM: SAM that ascends along what is particular to a batch.

    .. math::
      d_t = g_t - \sigma \, m_{t-1}, \quad
      m_t = \beta \, m_{t-1} + (1 - \beta) \, g_t, \quad
      \varepsilon_t = \rho \, \frac{d_t}{\|d_t\|}, \qquad
      w_{t+1} = w_t + \text{base}(\nabla f(w_t + \varepsilon_t))

    A step costs two gradients, and the state holds one more copy of the parameters.

    Args:
      base: The optimizer that moves the parameters.
      rho: The radius :math:`\rho \ge 0`, in units of the parameters' norm; 0 is the
        base itself. A scalar, or a schedule of the count of steps.
      sigma: How much of the average is removed, at least 0; 0 is SAM. A scalar, or a
        schedule.
      decay: Weight :math:`\beta` of the average before, in [0, 1]; 0.6 to 0.95 in the
        paper. A scalar, or a schedule.

    Returns:
      The corresponding :func:`optax_sam.sharpness_aware` transformation; see there for
      the arguments of its update, their shapes and what they raise.

    Raises:
      TypeError: If `base` is no transformation, or `rho`, `sigma` or `decay` no real
        scalar or schedule.
      ValueError: If `rho` or `sigma` is negative or not finite, `decay` outside [0, 1],
        or one of them no scalar.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> tx = optax_sam.friendly_sam(optax.sgd(0.1, momentum=0.9), rho=0.2)
      >>> loss_fn = lambda w, batch: jnp.sum((batch - w[None]) ** 2, -1)
      >>> step = jax.jit(optax_sam.value_and_update(loss_fn, tx))
      >>> params = jnp.zeros(2)
      >>> opt_state = tx.init(params)
      >>> for batch in (jnp.ones((4, 2)), jnp.eye(2), -jnp.eye(2)):
      ...     value, updates, opt_state = step(params, opt_state, batch)
      ...     params = optax.apply_updates(params, updates)
      ...     print(f"{value:.3f}")
      2.000
      0.648
      2.342

    References:
      Li et al., `Friendly Sharpness-Aware Minimization
      <https://arxiv.org/abs/2403.12350>`_, 2024
    """
    with calling("friendly_sam"):
        ascent = optax.chain(
            remove_common_direction(sigma, decay), scale_to_radius(rho)
        )
        return sharpness_aware(base, ascent)


def remove_common_direction(
    sigma: ScalarOrSchedule = 1.0, decay: ScalarOrSchedule = 0.9
) -> optax.GradientTransformationExtraArgs:
    r"""Takes the average of earlier gradients away: the direction of Friendly SAM.

    .. math::
      d_t = g_t - \sigma \, m_{t-1}, \qquad
      m_t = \beta \, m_{t-1} + (1 - \beta) \, g_t, \quad m_0 = g_0

    :math:`g_t` is the clean gradient, and nothing is taken from the first. Followed by
    :func:`scale_to_radius` this is Friendly SAM; with :math:`\sigma = 0` it is SAM.

    Args:
      sigma: How much of the average is removed, at least 0. A scalar, or a schedule of
        the count of steps.
      decay: Weight :math:`\beta` of the average before, in [0, 1]. A scalar, or a
        schedule.

    Returns:
      A link of an ascent for :func:`optax_sam.sharpness_aware`. It maps a tree of
      arrays of any shapes to one of the same shapes, in float32 or wider.

    Raises:
      TypeError: If `sigma` or `decay` is neither a real scalar nor callable.
      ValueError: If `sigma` is negative or not finite, `decay` outside [0, 1], or one
        of them no scalar.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> link = optax_sam.remove_common_direction(sigma=0.5, decay=0.75)
      >>> state = link.init(jnp.zeros(2))
      >>> d, state = link.update(jnp.array([4.0, 0.0]), state)
      >>> d, state = link.update(jnp.array([4.0, 4.0]), state)
      >>> print(d, state.common)
      [2. 4.] [4. 1.]

    References:
      Li et al., `Friendly Sharpness-Aware Minimization
      <https://arxiv.org/abs/2403.12350>`_, 2024
    """
    owner = called("remove_common_direction")
    sigma_at = as_schedule(owner, "sigma", sigma)
    decay_at = as_schedule(owner, "decay", decay, high=1.0)

    def init_fn(params: optax.Params) -> RemoveCommonDirectionState:
        count = jnp.zeros([], jnp.int32)
        return RemoveCommonDirectionState(count, common=trees.accumulators(params))

    def update_fn(
        updates: optax.Updates,
        state: RemoveCommonDirectionState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, RemoveCommonDirectionState]:
        del params, extra_args
        newest = jnp.where(state.count == 0, 1, 1 - decay_at(state.count))
        removed = sigma_at(state.count)

        def particular(g: Any, m: jax.Array) -> jax.Array:
            return jnp.asarray(g, m.dtype) - removed.astype(m.dtype) * m

        def average(g: Any, m: jax.Array) -> jax.Array:
            w = newest.astype(m.dtype)
            return m + w * (jnp.asarray(g, m.dtype) - m)

        direction = trees.map_present(particular, updates, state.common)
        common = trees.map_present(average, updates, state.common)
        return direction, RemoveCommonDirectionState(
            optax.safe_increment(state.count), trees.fill(common, state.common)
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class RemoveCommonDirectionState(NamedTuple):
    """State of :func:`remove_common_direction`.

    Attributes:
      count: Number of steps taken, an int32 scalar.
      common: The average :math:`m_t`, a tree like the parameters, in float32 or wider.
    """

    count: jax.Array  # type: ignore[assignment]
    common: chex.ArrayTree
