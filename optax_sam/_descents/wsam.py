"""WSAM, weighted sharpness as a regularisation term (arXiv 2305.15817)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_sam._ascents.sam import scale_to_radius
from optax_sam._base.checks import called, calling
from optax_sam._base.hyperparameters import ScalarOrSchedule, as_schedule
from optax_sam._engine import protocol
from optax_sam._engine.sharpness_aware import sharpness_aware

_LARGEST_GAMMA = 0.999  # The weight of the sharpness grows without bound towards 1.


def wsam(
    base: optax.GradientTransformation,
    rho: ScalarOrSchedule,
    gamma: ScalarOrSchedule,
    *,
    learning_rate: ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""WSAM: SAM in which the sharpness has a weight of its own.

    .. math::
      \min_w f(w) + \frac{\gamma}{1 - \gamma} \big(f(w + \varepsilon) - f(w)\big),
      \qquad \varepsilon_t = \rho \, \frac{g_t}{\|g_t\|}

    A step costs two gradients.

    Args:
      base: The optimizer that moves the parameters.
      rho: The radius :math:`\rho \ge 0`, in units of the parameters' norm. A scalar, or
        a schedule of the count of steps.
      gamma: The weight :math:`\gamma` in [0, 0.999]: 0 is the base alone, 1/2 is SAM,
        more weighs sharpness above the loss. A scalar, or a schedule.
      learning_rate: None lets the base descend along the gradient of the sum. A
        learning rate, that of the base, decouples the sharpness as the paper does: the
        base, its momentum included, sees the clean gradient :math:`g_t` alone, and
        :math:`-\eta \frac{\gamma}{1 - \gamma} (\nabla f(w_t + \varepsilon_t) - g_t)` is
        added to its update. A scalar, or a schedule.

    Returns:
      The corresponding :func:`optax_sam.sharpness_aware` transformation; see there for
      the arguments of its update, their shapes and what they raise.

    Raises:
      TypeError: If `base` is no transformation, or `rho`, `gamma` or `learning_rate` no
        real scalar or schedule.
      ValueError: If `rho` or `learning_rate` is negative or not finite, `gamma` outside
        [0, 0.999], or one of them no scalar.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> tx = optax_sam.wsam(optax.sgd(0.1, momentum=0.9), rho=0.2, gamma=0.9)
      >>> loss_fn = lambda w, batch: jnp.sum((batch - w[None]) ** 2, -1)
      >>> step = jax.jit(optax_sam.value_and_update(loss_fn, tx))
      >>> params, batch = jnp.zeros(2), jnp.ones((4, 2))
      >>> opt_state = tx.init(params)
      >>> for _ in range(3):
      ...     value, updates, opt_state = step(params, opt_state, batch)
      ...     params = optax.apply_updates(params, updates)
      ...     print(f"{value:.3f}")
      2.000
      0.595
      0.103

    References:
      Yue et al., `Sharpness-Aware Minimization Revisited: Weighted Sharpness as a
      Regularization Term <https://arxiv.org/abs/2305.15817>`_, 2023
    """
    with calling("wsam"):
        base = protocol.as_transformation("wsam", "base", base)
        if learning_rate is None:
            base = optax.chain(weighted_descent(gamma), base)
        else:
            base = _decoupled(base, gamma, learning_rate)
        return sharpness_aware(base, scale_to_radius(rho))


def weighted_descent(gamma: ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    r"""Weighs sharpness against the loss: WSAM's descent.

    .. math:: g + \frac{\gamma}{1 - \gamma} \, (p - g)

    :math:`p` is the perturbed gradient, which comes in, and :math:`g` the clean one.
    :math:`\gamma = 1/2` is SAM and :math:`\gamma = 0` the base alone.

    Args:
      gamma: The weight, in [0, 0.999]. A scalar, or a schedule of the count of steps.

    Returns:
      A first link of the base of :func:`optax_sam.sharpness_aware`, whose update needs
      `grad`, the clean gradient. It maps a tree of arrays of any shapes to one of the
      same shapes and dtypes.

    Raises:
      TypeError: If `gamma` is neither a real scalar nor callable.
      ValueError: If `gamma` is outside [0, 0.999] or no scalar; in update, if `grad` is
        missing.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> link = optax_sam.weighted_descent(gamma=0.75)
      >>> p, g = jnp.array([2.0, 0.0]), jnp.array([1.0, 1.0])
      >>> descent, state = link.update(p, link.init(p), grad=g)
      >>> print(descent)
      [ 4. -2.]

    References:
      Yue et al., `Sharpness-Aware Minimization Revisited: Weighted Sharpness as a
      Regularization Term <https://arxiv.org/abs/2305.15817>`_, 2023
    """
    owner = called("weighted_descent")
    gamma_at = _schedule_of_gamma(owner, gamma)

    def init_fn(params: optax.Params) -> WeightedDescentState:
        del params
        return WeightedDescentState(count=jnp.zeros([], jnp.int32))

    def update_fn(
        updates: optax.Updates,
        state: WeightedDescentState,
        params: optax.Params | None = None,
        *,
        grad: optax.Updates | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, WeightedDescentState]:
        del params, extra_args
        protocol.require_of_base(owner, grad=grad)
        weight = _weight(gamma_at(state.count))

        def descend(p: Any, g: Any) -> jax.Array:
            # What is SAM is so to the last bit.
            descent = jnp.where(weight == 1, p, g + weight * (p - g))
            return descent.astype(jnp.result_type(p))

        descent = jax.tree.map(descend, updates, grad)
        return descent, WeightedDescentState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class WeightedDescentState(NamedTuple):
    """State of :func:`weighted_descent`, or of :func:`wsam` with a learning rate.

    Attributes:
      count: Number of steps taken, an int32 scalar, for schedules.
      base_state: With a learning rate, the state of the base that it goes with.
    """

    count: jax.Array  # type: ignore[assignment]
    base_state: optax.OptState = ()

    @property
    def descends(self) -> bool:
        """Says that the link is a part of the base."""
        return True


def _decoupled(
    base: optax.GradientTransformationExtraArgs,
    gamma: ScalarOrSchedule,
    learning_rate: ScalarOrSchedule,
) -> optax.GradientTransformationExtraArgs:
    """The base along the clean gradient, and beside it a step against sharpness."""
    owner = called("wsam")
    gamma_at = _schedule_of_gamma(owner, gamma)
    rate_at = as_schedule(owner, "learning_rate", learning_rate)

    def init_fn(params: optax.Params) -> WeightedDescentState:
        return WeightedDescentState(jnp.zeros([], jnp.int32), base.init(params))

    def update_fn(
        updates: optax.Updates,
        state: WeightedDescentState,
        params: optax.Params | None = None,
        *,
        grad: optax.Updates | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, WeightedDescentState]:
        protocol.require_of_base(owner, grad=grad)
        step = rate_at(state.count) * _weight(gamma_at(state.count))
        moved, base_state = base.update(
            grad, state.base_state, params, grad=grad, **extra_args
        )
        moved = jax.tree.map(
            lambda u, p, g: (u - step * (p - g)).astype(jnp.result_type(u)),
            moved,
            updates,
            grad,
        )
        count = optax.safe_increment(state.count)
        return moved, WeightedDescentState(count, base_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _schedule_of_gamma(owner: str, gamma: Any) -> Callable[[Any], jax.Array]:
    """From the count of steps to gamma, that of SAM in place of NaN."""
    return as_schedule(owner, "gamma", gamma, high=_LARGEST_GAMMA, harmless=0.5)


def _weight(gamma: jax.Array) -> jax.Array:
    """Of the sharpness, where the loss has one."""
    return gamma / (1 - gamma)
