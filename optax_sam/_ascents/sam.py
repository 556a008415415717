"""SAM, sharpness-aware minimization (arXiv 2010.01412)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_sam._base import trees
from optax_sam._base.hyperparameters import ScalarOrSchedule, as_schedule


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
    radius = as_schedule("scale_to_radius", "rho", rho)

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
