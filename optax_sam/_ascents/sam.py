"""SAM, sharpness-aware minimization (arXiv 2010.01412)."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_sam._base import trees
from optax_sam._base.checks import called, calling
from optax_sam._base.hyperparameters import ScalarOrSchedule, as_schedule, check_integer
from optax_sam._engine.sharpness_aware import sharpness_aware


def sam(
    base: optax.GradientTransformation, rho: ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    r"""SAM: descends along the gradient at the top of a ball of radius `rho`.

    .. math::
      \varepsilon_t = \rho \, \frac{g_t}{\|g_t\|}, \qquad
      w_{t+1} = w_t + \text{base}(\nabla f(w_t + \varepsilon_t))

    A step costs two gradients.

    Args:
      base: The optimizer that moves the parameters.
      rho: The radius :math:`\rho \ge 0`, in units of the parameters' norm; 0 is the
        base itself. 0.05 to 0.2 is usual for image classification from scratch. A
        scalar, or a schedule of the count of steps.

    Returns:
      The corresponding :func:`optax_sam.sharpness_aware` transformation; see there for
      the arguments of its update, their shapes and what they raise.

    Raises:
      TypeError: If `base` is no transformation or `rho` no real scalar or schedule.
      ValueError: If `rho` is negative, not finite or no scalar.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> tx = optax_sam.sam(optax.sgd(0.1, momentum=0.9), rho=0.05)
      >>> loss_fn = lambda w, batch: jnp.sum((batch - w[None]) ** 2, -1)
      >>> step = jax.jit(optax_sam.value_and_update(loss_fn, tx))
      >>> params, batch = jnp.zeros(2), jnp.ones((4, 2))
      >>> opt_state = tx.init(params)
      >>> for _ in range(3):
      ...     value, updates, opt_state = step(params, opt_state, batch)
      ...     params = optax.apply_updates(params, updates)
      ...     print(f"{value:.3f}")
      2.000
      1.257
      0.389

    References:
      Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
      Generalization <https://arxiv.org/abs/2010.01412>`_, 2021
    """
    with calling("sam"):
        return sharpness_aware(base, scale_to_radius(rho))


def m_sam(
    base: optax.GradientTransformation,
    rho: ScalarOrSchedule,
    micro_batch_size: int,
    *,
    micro_batches_at_once: int | None = 1,
) -> optax.GradientTransformationExtraArgs:
    r"""m-SAM: SAM in which every micro-batch of :math:`m` examples ascends for itself.

    .. math::
      \varepsilon_j = \rho \, \frac{\nabla f_{I_j}(w_t)}{\|\nabla f_{I_j}(w_t)\|},
      \qquad w_{t+1} = w_t + \text{base}\Big(
        \frac{1}{k} \sum_{j=1}^{k} \nabla f_{I_j}(w_t + \varepsilon_j)\Big)

    Under `jit` the result does not depend on how many devices hold the batch; it is SAM
    for :math:`m = B`.
    A step costs two gradients. Value and auxiliary data of :func:`value_and_update` are
    those of the micro-batches, and each draws for itself, see :func:`sharpness_aware`.

    Args:
      base: The optimizer that moves the parameters.
      rho: The radius :math:`\rho \ge 0`, in units of the parameters' norm; 0 is the
        base itself. Smaller micro-batches want a smaller one, in our trials SAM's times
        the root of :math:`m / B`. A scalar, or a schedule of the count of steps.
      micro_batch_size: The number :math:`m` of examples, which must divide the batch.
      micro_batches_at_once: How many micro-batches are computed side by side; the
        others wait. None for all. More take more memory, each the size of the
        parameters a few times; the result is the same, up to rounding.

    Returns:
      The corresponding :func:`optax_sam.sharpness_aware` transformation; see there for
      the arguments of its update, their shapes and what they raise. Update needs
      `batch` and a `loss_fn` that returns the losses of the examples, no mean.

    Raises:
      TypeError: If `base` is no transformation, `rho` no real scalar or schedule, or
        a size or number no integer.
      ValueError: If `rho` is negative, not finite or no scalar, or a size or number
        less than 1.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> tx = optax_sam.m_sam(optax.sgd(0.1), rho=0.5, micro_batch_size=2)
      >>> loss_fn = lambda w, batch: jnp.sum((batch - w[None]) ** 2, -1)
      >>> step = jax.jit(optax_sam.value_and_update(loss_fn, tx))
      >>> params, batch = jnp.zeros(2), jnp.ones((4, 2))
      >>> opt_state = tx.init(params)
      >>> for _ in range(3):
      ...     value, updates, opt_state = step(params, opt_state, batch)
      ...     params = optax.apply_updates(params, updates)
      ...     print(f"{value:.3f}")
      2.000
      1.064
      0.526

    References:
      Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
      Generalization <https://arxiv.org/abs/2010.01412>`_, 2021
    """
    with calling("m_sam"):
        return sharpness_aware(
            base,
            scale_to_radius(rho),
            micro_batch_size=check_integer(
                "m_sam", "micro_batch_size", micro_batch_size, low=1, static=True
            ),
            micro_batches_at_once=micro_batches_at_once,
        )


def scale_to_radius(rho: ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    r"""Scales the gradient to the length `rho`: the ascent of SAM.

    .. math:: \varepsilon = \rho \, g / \|g\|

    The norm is that of the whole tree, accumulated in float32 or wider whatever the
    dtype of the gradient. The scale of the loss has no influence, and a zero gradient
    gives :math:`\varepsilon = 0`.

    Args:
      rho: The radius :math:`\rho \ge 0`, in units of the parameters' norm. A scalar, or
        a schedule of the count of steps.

    Returns:
      An ascent for :func:`optax_sam.sharpness_aware`. It maps a tree of arrays of any
      shapes to one of the same shapes, in the dtypes of the parameters if they are
      given, else of the gradient.

    Raises:
      TypeError: If `rho` is neither a real scalar nor callable.
      ValueError: If `rho` is negative, not finite or no scalar.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> ascent = optax_sam.scale_to_radius(rho=0.5)
      >>> grads = {"w": jnp.array([3.0]), "b": jnp.array([4.0])}
      >>> epsilon, state = ascent.update(grads, ascent.init(grads))
      >>> print(epsilon["w"], epsilon["b"])
      [0.3] [0.4]

    References:
      Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
      Generalization <https://arxiv.org/abs/2010.01412>`_, 2021
    """
    radius = as_schedule(called("scale_to_radius"), "rho", rho)

    def init_fn(params: optax.Params) -> ScaleToRadiusState:
        del params
        return ScaleToRadiusState(count=jnp.zeros([], jnp.int32))

    def update_fn(
        updates: optax.Updates,
        state: ScaleToRadiusState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleToRadiusState]:
        del extra_args
        epsilon = trees.scale_to_norm(updates, radius(state.count))
        epsilon = trees.cast_like(epsilon, updates if params is None else params)
        return epsilon, ScaleToRadiusState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class ScaleToRadiusState(NamedTuple):
    """State of :func:`scale_to_radius`.

    Attributes:
      count: Number of steps taken, an int32 scalar, for schedules of `rho`.
    """

    count: jax.Array  # type: ignore[assignment]

    @property
    def sets_length(self) -> bool:
        """Says that the link gives the perturbation a length."""
        return True
