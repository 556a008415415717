"""Momentum-SAM, the ascent of an earlier step for nothing (arXiv 2401.12033)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_sam._base import trees
from optax_sam._base.checks import called, calling
from optax_sam._base.hyperparameters import ScalarOrSchedule, as_schedule
from optax_sam._engine import protocol
from optax_sam._engine.kept import Tried, check_keeps_gradients, kept_by_base
from optax_sam._engine.sharpness_aware import sharpness_aware

# What Optax's optimizers name their accumulated gradients: SGD; Adam and most others;
# Momo, Prodigy and D-Adaptation; Adan.
_NAMES = ("trace", "mu", "exp_avg", "m")
_FIRST = "follow_momentum(...), sparsify_by_fisher(...)"
_ORDER = (
    "put the trace before what scales them, optax.chain(optax.scale_by_rms(), "
    "optax.trace(0.9), optax.scale(-0.1)), and not after, as optax.lars and "
    "optax.rmsprop do"
)
_REMEDY = (
    "pass a base with momentum, such as optax.sgd(0.1, momentum=0.9) or "
    "optax.adam(1e-3)"
)


def momentum_sam(
    base: optax.GradientTransformation, rho: ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    r"""Momentum-SAM: looks along the momentum, which costs no gradient.

    .. math::
      \varepsilon_t = -\rho \, \frac{v_{t-1}}{\|v_{t-1}\|}, \qquad
      w_{t+1} = w_t + \text{base}(\nabla f(w_t + \varepsilon_t))

    :math:`v` is what the base has accumulated of the gradients, its momentum or first
    moment, and zero before there is any. A step costs one gradient. The parameters are
    the unperturbed ones, so that nothing has to be changed back for evaluation.

    Args:
      base: The optimizer that moves the parameters, with momentum:
        `optax.sgd(..., momentum=0.9)`, `optax.adam` or others with a first moment. What
        has none in `optax.partition` is not perturbed.
      rho: The radius :math:`\rho \ge 0`, in units of the parameters' norm; 0 is the
        base itself. It is larger than that of SAM: the paper uses 0.3 to 3 with SGD
        and 1 and more with AdamW, and a schedule that is 0 while the learning rate
        warms up. A scalar, or a schedule of the count of steps.

    Returns:
      The corresponding :func:`optax_sam.sharpness_aware` transformation; see there for
      the arguments of its update, their shapes and what they raise. The value and
      auxiliary data of :func:`value_and_update` are those at :math:`w + \varepsilon`.

    Raises:
      TypeError: If `base` is no transformation or `rho` no real scalar or schedule.
      ValueError: If `rho` is negative, not finite or no scalar; in init, if `base`
        keeps no momentum, or one of its own updates, as `optax.lars` does.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> tx = optax_sam.momentum_sam(optax.sgd(0.1, momentum=0.9), rho=0.3)
      >>> loss_fn = lambda w, batch: jnp.sum((batch - w[None]) ** 2, -1)
      >>> step = jax.jit(optax_sam.value_and_update(loss_fn, tx))
      >>> params, batch = jnp.zeros(2), jnp.ones((4, 2))
      >>> opt_state = tx.init(params)
      >>> for _ in range(3):
      ...     value, updates, opt_state = step(params, opt_state, batch)
      ...     params = optax.apply_updates(params, updates)
      ...     print(f"{value:.3f}")
      2.000
      0.691
      0.169

    References:
      Becker et al., `Momentum-SAM: Sharpness Aware Minimization without Computational
      Overhead <https://arxiv.org/abs/2401.12033>`_, 2024
    """
    with calling("momentum_sam"):
        return sharpness_aware(base, follow_momentum(rho))


def follow_momentum(rho: ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    r"""Steps ahead along the base's momentum: the ascent of Momentum-SAM.

    .. math:: \varepsilon = -\rho \, v / \|v\|

    :math:`v` is the gradient that the base has accumulated, and the norm that of the
    whole tree. The gradient of the clean pass is not read.

    Args:
      rho: The radius :math:`\rho \ge 0`, in units of the parameters' norm. A scalar, or
        a schedule of the count of steps.

    Returns:
      An ascent for :func:`optax_sam.sharpness_aware`, the first link of it or after
      :func:`perturb_only`. It gives a tree like that it maps, in the dtypes of the
      parameters if they are given, with `optax.MaskedNode` for those of which the base
      keeps no momentum.

    Raises:
      TypeError: If `rho` is neither a real scalar nor callable.
      ValueError: If `rho` is negative, not finite or no scalar; when a state is made,
        and in update, if the base keeps no momentum; when a state is made, if that is
        one of its own updates; in update, if a link before it has changed the gradient.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> ascent = optax_sam.follow_momentum(rho=0.5)
      >>> base, params = optax.sgd(0.1, momentum=0.9), jnp.zeros(2)
      >>> _, base_state = base.update(jnp.array([3.0, 4.0]), base.init(params))
      >>> epsilon, state = ascent.update(
      ...     jnp.zeros(2), ascent.init(params), base_state=base_state
      ... )
      >>> print(epsilon)
      [-0.3 -0.4]

    References:
      Becker et al., `Momentum-SAM: Sharpness Aware Minimization without Computational
      Overhead <https://arxiv.org/abs/2401.12033>`_, 2024
    """
    owner = called("follow_momentum")
    radius = as_schedule(owner, "rho", rho)

    def init_fn(params: optax.Params) -> FollowMomentumState:
        del params
        return FollowMomentumState(count=jnp.zeros([], jnp.int32))

    def update_fn(
        updates: optax.Updates,
        state: FollowMomentumState,
        params: optax.Params | None = None,
        *,
        base_state: optax.OptState = None,
        is_gradient: Callable[[optax.Updates], bool] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, FollowMomentumState]:
        del extra_args
        protocol.require_gradient(owner, updates, is_gradient, _FIRST)
        momentum = kept_by_base(owner, _NAMES, base_state, updates, _REMEDY)
        like = updates if params is None else params
        behind = trees.scale_to_norm(momentum, radius(state.count), kept=True)
        # Not the momentum, of which there would be a copy for the norm.
        epsilon = trees.cast_like(trees.map_present(jnp.negative, behind), like)
        return epsilon, FollowMomentumState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class FollowMomentumState(NamedTuple):
    """State of :func:`follow_momentum`.

    Attributes:
      count: Number of steps taken, an int32 scalar, for schedules of `rho`.
    """

    count: jax.Array  # type: ignore[assignment]

    @property
    def sets_length(self) -> bool:
        """Says that the link gives the perturbation a length."""
        return True

    def check_base(
        self, owner: str, base_state: Any, params: optax.Params, tried: Tried
    ) -> None:
        """Refuses a base without momentum, or with one of updates in its place."""
        remedies = _REMEDY, _ORDER
        check_keeps_gradients(owner, _NAMES, base_state, params, tried, remedies)
