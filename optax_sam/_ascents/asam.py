"""ASAM, adaptive sharpness-aware minimization (arXiv 2102.11600)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_sam._base import trees
from optax_sam._base.checks import called, calling
from optax_sam._base.hyperparameters import ScalarOrSchedule, as_schedule
from optax_sam._engine.sharpness_aware import sharpness_aware


def asam(
    base: optax.GradientTransformation,
    rho: ScalarOrSchedule,
    *,
    eta: ScalarOrSchedule = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""ASAM: SAM whose ball is measured relative to the size of each weight.

    .. math::
      \varepsilon_t = \rho \, \frac{T^2 g_t}{\|T g_t\|}, \quad T = |w_t| + \eta, \qquad
      w_{t+1} = w_t + \text{base}(\nabla f(w_t + \varepsilon_t))

    A step costs two gradients.

    Args:
      base: The optimizer that moves the parameters.
      rho: The radius :math:`\rho \ge 0`, without unit; 0 is the base itself. 0.5 to 2
        is usual for image classification from scratch. A scalar, or a schedule of the
        count of steps.
      eta: Added to the size of each weight, in units of the parameters. A scalar, or a
        schedule.

    Returns:
      The corresponding :func:`optax_sam.sharpness_aware` transformation; see there for
      the arguments of its update, their shapes and what they raise.

    Raises:
      TypeError: If `base` is no transformation, or `rho` or `eta` no real scalar or
        schedule.
      ValueError: If `rho` or `eta` is negative, not finite or no scalar.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> tx = optax_sam.asam(optax.sgd(0.1, momentum=0.9), rho=0.5)
      >>> loss_fn = lambda w, batch: jnp.sum((batch - w[None]) ** 2, -1)
      >>> step = jax.jit(optax_sam.value_and_update(loss_fn, tx))
      >>> params, batch = 2 * jnp.ones(2), jnp.ones((4, 2))
      >>> opt_state = tx.init(params)
      >>> for _ in range(3):
      ...     value, updates, opt_state = step(params, opt_state, batch)
      ...     params = optax.apply_updates(params, updates)
      ...     print(f"{value:.3f}")
      2.000
      0.867
      0.021

    References:
      Kwon et al., `ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant
      Learning of Deep Neural Networks <https://arxiv.org/abs/2102.11600>`_, 2021
    """
    with calling("asam"):
        return sharpness_aware(base, adapt_to_scale(rho, eta=eta))


def adapt_to_scale(
    rho: ScalarOrSchedule, *, eta: ScalarOrSchedule = 0.0
) -> optax.GradientTransformationExtraArgs:
    r"""Scales the gradient to the length `rho` relative to each weight: ASAM's ascent.

    .. math:: \varepsilon = \rho \, \frac{T^2 g}{\|T g\|}, \qquad T = |w| + \eta

    Entry by entry, so that a perturbation is measured against the size of its weight
    and rescaling layers does not change the neighbourhood that it explores. With
    :math:`\eta = 0` a weight at exactly zero is not perturbed. Values of `rho` are
    about ten times those of :func:`scale_to_radius`.

    Args:
      rho: The radius :math:`\rho \ge 0`, without unit. A scalar, or a schedule of the
        count of steps.
      eta: Added to the size of each weight, :math:`\eta \ge 0`, in units of the
        parameters; the paper uses 0.01. A scalar, or a schedule.

    Returns:
      An ascent for :func:`optax_sam.sharpness_aware`. Its update needs `params`, a tree
      of arrays of any shapes, and gives one of the same shapes and dtypes.

    Raises:
      TypeError: If `rho` or `eta` is neither a real scalar nor callable.
      ValueError: If one of them is negative, not finite or no scalar; in update, if
        `params` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> ascent = optax_sam.adapt_to_scale(rho=0.5)
      >>> params = jnp.array([1.0, 2.0, 0.0])
      >>> grads = jnp.array([3.0, 2.0, 1.0])
      >>> epsilon, state = ascent.update(grads, ascent.init(params), params)
      >>> print(epsilon)
      [0.3 0.8 0. ]

    References:
      Kwon et al., `ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant
      Learning of Deep Neural Networks <https://arxiv.org/abs/2102.11600>`_, 2021
    """
    owner = called("adapt_to_scale")
    radius = as_schedule(owner, "rho", rho)
    offset = as_schedule(owner, "eta", eta)

    def init_fn(params: optax.Params) -> AdaptToScaleState:
        del params
        return AdaptToScaleState(count=jnp.zeros([], jnp.int32))

    def update_fn(
        updates: optax.Updates,
        state: AdaptToScaleState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AdaptToScaleState]:
        del extra_args
        if params is None:
            raise ValueError(
                f"{owner}: params is None, but epsilon is relative to the size "
                "of each weight; call update(grads, state, params)."
            )
        added = offset(state.count)

        def size(p: Any) -> jax.Array:
            """A weight pushed away from zero: signed, since only squares matter."""
            return jnp.where(p < 0, p - added, p + added)

        sizes = jax.tree.map(size, params)
        epsilon = trees.scale_to_norm(updates, radius(state.count), sizes)
        epsilon = trees.map_present(lambda e, t: t * (t * e), epsilon, sizes)
        epsilon = trees.cast_like(epsilon, params)
        return epsilon, AdaptToScaleState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class AdaptToScaleState(NamedTuple):
    """State of :func:`adapt_to_scale`.

    Attributes:
      count: Number of steps taken, an int32 scalar, for schedules of `rho` and `eta`.
    """

    count: jax.Array  # type: ignore[assignment]

    @property
    def sets_length(self) -> bool:
        """Says that the link gives the perturbation a length."""
        return True
