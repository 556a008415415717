"""The methods by name: an ascent from its parts, around a base optimizer."""

import chex
import optax

from optax_sam._adaptive import adapt_to_scale
from optax_sam._engine import sharpness_aware
from optax_sam._hyperparameter import ScalarOrSchedule
from optax_sam._radius import scale_to_radius
from optax_sam._variance import suppress_variance


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
    return sharpness_aware(base, scale_to_radius(rho))


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
    return sharpness_aware(base, adapt_to_scale(rho, eta=eta))


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
    ascent = optax.chain(
        suppress_variance(theta, accumulator_dtype), scale_to_radius(rho)
    )
    return sharpness_aware(base, ascent)
