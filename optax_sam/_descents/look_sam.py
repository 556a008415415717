"""LookSAM, ascents that are used again in the steps after (arXiv 2203.02714)."""

from __future__ import annotations

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_sam._ascents.sam import scale_to_radius
from optax_sam._base import trees
from optax_sam._base.checks import called, calling
from optax_sam._base.hyperparameters import (
    ScalarOrSchedule,
    as_schedule,
    check_integer,
)
from optax_sam._engine import protocol, when
from optax_sam._engine.sharpness_aware import sharpness_aware


def look_sam(
    base: optax.GradientTransformation,
    rho: ScalarOrSchedule,
    every: chex.Numeric = 5,
    alpha: ScalarOrSchedule = 0.7,
) -> optax.GradientTransformationExtraArgs:
    r"""LookSAM: SAM in every k-th step, and what it has changed in the steps between.

    .. math::
      t \bmod k = 0: &\quad
        p_t = \nabla f\Big(w_t + \rho \frac{g_t}{\|g_t\|}\Big), \quad
        v = p_t - \frac{\langle p_t, g_t \rangle}{\|g_t\|^2} \, g_t, \quad
        w_{t+1} = w_t + \text{base}(p_t) \\
      \text{otherwise}: &\quad
        w_{t+1} = w_t + \text{base}\Big(g_t + \alpha \frac{\|g_t\|}{\|v\|} \, v\Big)

    A step costs :math:`1 + 1/k` gradients on average, and the state holds one more copy
    of the parameters.

    Args:
      base: The optimizer that moves the parameters.
      rho: The radius :math:`\rho \ge 0`, in units of the parameters' norm. A scalar, or
        a schedule of the count of steps.
      every: The number :math:`k` of steps from one ascent to the next, an integer of at
        least 1; 1 is SAM.
      alpha: Length of the part that is used again, in that of the gradient, at least 0;
        with 0 the steps between are those of the base. 0.7 in the paper, which did
        well on digits with a `rho` that is the smaller the larger `every`. It does not
        scale with `rho`: on a small network for CIFAR-10 0.1 was the best, and 0.7
        stalled the training. A scalar, or a schedule.

    Returns:
      The corresponding :func:`optax_sam.sharpness_aware` transformation; see there for
      the arguments of its update, their shapes and what they raise.

    Raises:
      TypeError: If `base` is no transformation, `rho` or `alpha` no real scalar or
        schedule, or `every` no integer.
      ValueError: If `rho` or `alpha` is negative, not finite or no scalar, or `every`
        less than 1.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> tx = optax_sam.look_sam(optax.sgd(0.1, momentum=0.9), rho=0.2, every=3)
      >>> loss_fn = lambda w, batch: (batch @ w - 1) ** 2
      >>> step = jax.jit(optax_sam.value_and_update(loss_fn, tx))
      >>> params, batch = jnp.zeros(2), jnp.array([[1.0, 0.0], [0.0, 2.0]])
      >>> opt_state = tx.init(params)
      >>> for _ in range(3):
      ...     value, updates, opt_state = step(params, opt_state, batch)
      ...     params = optax.apply_updates(params, updates)
      ...     print(f"{value:.3f}")
      1.000
      0.501
      0.351

    References:
      Liu et al., `Towards Efficient and Scalable Sharpness-Aware Minimization
      <https://arxiv.org/abs/2203.02714>`_, 2022
    """
    with calling("look_sam"):
        base = protocol.as_transformation("look_sam", "base", base)
        every = check_integer("look_sam", "every", every, low=1)
        return sharpness_aware(
            optax.chain(reuse_ascent(alpha), base),
            scale_to_radius(rho),
            ascend_when=when.every(every),
        )


def reuse_ascent(alpha: ScalarOrSchedule) -> optax.GradientTransformationExtraArgs:
    r"""Uses what an ascent has changed until the next one: LookSAM's descent.

    .. math::
      v = p - \langle p, \hat g \rangle \, \hat g, \qquad
      g + \alpha \, \frac{\|g\|}{\|v\|} \, v, \qquad \hat g = \frac{g}{\|g\|}

    Where a step has ascended, :math:`v` is made of the perturbed gradient :math:`p`,
    which is handed on, and the clean one :math:`g`; in other steps :math:`p` is
    :math:`g`, and gets a part along the last :math:`v`. Products and norms are of the
    whole tree. An ascent from or to a gradient that is not finite leaves :math:`v` as
    it was.

    Args:
      alpha: The weight :math:`\alpha \ge 0`; with 0 other steps are those of the base.
        A scalar, or a schedule of the count of steps.

    Returns:
      A first link of the base of :func:`optax_sam.sharpness_aware` with `ascend_when`,
      whose update needs `grad`, the clean gradient, and `ascended`, a bool scalar. It
      maps a tree of arrays of any shapes to one of the same shapes and dtypes.

    Raises:
      TypeError: If `alpha` is neither a real scalar nor callable.
      ValueError: If `alpha` is negative, not finite or no scalar; in update, if `grad`
        or `ascended` is missing.

    Examples:
      >>> import jax.numpy as jnp, optax_sam
      >>> link = optax_sam.reuse_ascent(alpha=0.5)
      >>> p, g = jnp.array([3.0, 1.0]), jnp.array([4.0, 0.0])
      >>> descent, state = link.update(p, link.init(p), grad=g, ascended=True)
      >>> descent, state = link.update(g, state, grad=g, ascended=False)
      >>> print(descent)
      [4. 2.]

    References:
      Liu et al., `Towards Efficient and Scalable Sharpness-Aware Minimization
      <https://arxiv.org/abs/2203.02714>`_, 2022
    """
    owner = called("reuse_ascent")
    alpha_at = as_schedule(owner, "alpha", alpha)

    def init_fn(params: optax.Params) -> ReuseAscentState:
        count = jnp.zeros([], jnp.int32)
        return ReuseAscentState(count, direction=trees.accumulators(params))

    def update_fn(
        updates: optax.Updates,
        state: ReuseAscentState,
        params: optax.Params | None = None,
        *,
        grad: optax.Updates | None = None,
        ascended: jax.Array | bool | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ReuseAscentState]:
        del params, extra_args
        protocol.require_of_base(owner, grad=grad, ascended=ascended)

        as_unit, length = trees.scaling_to_norm(grad, 1.0)
        # Numbers come first, in a step that has ascended: a branch hands out no arrays.
        nothing = jnp.full([], jnp.nan)
        along, size = when.either(
            ascended,
            lambda: _measured(updates, as_unit(grad)),
            lambda: (nothing, nothing),
        )
        # Not finite if the perturbed gradient is not, and where there is none.
        renewed = jnp.isfinite(along)
        across = _scaled_across(updates, as_unit(grad), along, size)
        direction = jax.tree.map(
            lambda new, d: jnp.where(renewed, new.astype(d.dtype), d),
            across,
            state.direction,
        )
        length = jnp.where(jnp.asarray(ascended), 0, alpha_at(state.count) * length)

        def descend(p: Any, d: jax.Array) -> jax.Array:
            moved: jax.Array = p + length * d
            return moved.astype(jnp.result_type(p))

        descent = jax.tree.map(descend, updates, direction)
        return descent, ReuseAscentState(optax.safe_increment(state.count), direction)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class ReuseAscentState(NamedTuple):
    r"""State of :func:`reuse_ascent`.

    Attributes:
      count: Number of steps taken, an int32 scalar, for schedules of `alpha`.
      direction: The direction :math:`v / \|v\|` of the last ascent, a tree like the
        parameters, in float32 or wider; zeros before the first.
    """

    count: jax.Array  # type: ignore[assignment]
    direction: chex.ArrayTree

    @property
    def descends(self) -> bool:
        """Says that the link is a part of the base."""
        return True


def _across(p: optax.Updates, unit: optax.Updates, along: jax.Array) -> chex.ArrayTree:
    """The part of `p` across a direction, along which it has this share."""
    return jax.tree.map(lambda x, u: jnp.asarray(x, u.dtype) - along * u, p, unit)


def _measured(p: optax.Updates, unit: optax.Updates) -> tuple[jax.Array, jax.Array]:
    """The share of `p` along a direction, and the norm of the part across it.

    The norm is 0 if that is as small as the rounding of `p` and of sums: its direction
    would be noise.
    """
    along = jnp.asarray(trees.inner(p, unit), float)
    _, size = trees.scaling_to_norm(_across(p, unit, along), 1.0)
    finfo: Any = jnp.finfo  # Its constructor is not typed.
    dtypes = map(jnp.result_type, jax.tree.leaves(p))
    of_p = max((float(finfo(dtype).eps) for dtype in dtypes), default=0.0)
    rounding = of_p + 8 * float(finfo(along.dtype).eps)
    return along, jnp.where(size > rounding * jnp.abs(along), size, 0)


def _scaled_across(
    p: optax.Updates, unit: optax.Updates, along: jax.Array, size: jax.Array
) -> chex.ArrayTree:
    """The direction of that part, of this norm; zeros if that is 0."""
    is_part = size > 0
    return jax.tree.map(
        lambda x: jnp.where(is_part, trees.ratio(x, size), 0), _across(p, unit, along)
    )
