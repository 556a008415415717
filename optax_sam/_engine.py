r"""The sharpness-aware step, :math:`\text{ascent} \times \text{base}`.

1. Clean pass: losses and gradient at :math:`w`.
2. The ascent turns the clean gradient into a displacement :math:`\varepsilon`.
3. Perturbed pass: the gradient at :math:`w + \varepsilon`.
4. The base optimizer turns that gradient into the update of :math:`w`.

Nothing here knows a method: each is an ascent, an ordinary gradient transformation.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_sam import _protocol, _tree


def sharpness_aware(
    base: optax.GradientTransformation, ascent: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    r"""Descends along the gradient at the point that an ascent leads to.

    .. math::
      \varepsilon_t = \text{ascent}(\nabla f(w_t)), \qquad
      w_{t+1} = w_t + \text{base}(\nabla f(w_t + \varepsilon_t))

    The ascent's output points uphill: it is added to the parameters as it is. Leaves
    that the ascent gives back as `optax.MaskedNode` are not perturbed. Ascents combine
    with :func:`optax.chain`.

    A clean gradient that is not finite gives :math:`\varepsilon = 0` and leaves the
    ascent's state as it was. What the base then does with the gradient at :math:`w` is
    up to the base: wrap it in `optax.apply_if_finite` to skip the step. Schedules in
    the ascent count the ascents that were made.

    Where wrappers go: what acts on the gradient that moves the parameters
    (`optax.MultiSteps`, clipping, `optax.masked`, `optax.partition`) belongs *around
    the base*. `optax.chain(clip, sharpness_aware(...))` clips the ascent only,
    `optax.MultiSteps(sharpness_aware(...), k)` descends along the last of `k`
    gradients, and inside `optax.masked` the step is refused.

    Args:
      base: The optimizer that moves the parameters, any Optax transformation.
      ascent: The transformation of the clean gradient into :math:`\varepsilon`, such as
        :func:`optax_sam.scale_to_radius`.

    Returns:
      A transformation whose update is called as
      `update(grads, state, params, *, loss_fn, batch, grad_fn, losses, pullback)`:

      * `grads`: the clean gradient of the mean loss, a tree like `params`.
      * `params`: pytree of floating-point arrays of any shapes. They are not modified.
      * `loss_fn` and `batch`: `loss_fn(params, batch)` returns the losses of the
        examples, shape `[B]`, or their mean as a scalar.
      * `grad_fn`: optional, `grad_fn(params)` replaces the gradient of the mean of
        `loss_fn` in the perturbed pass; then `loss_fn` is not needed.
      * `losses`, `pullback`: optional, the clean losses `[B]` and the function
        `weights[B] -> gradient of sum(weights * losses)`, for ascents that weight
        examples.

      All of these reach the ascent. The base gets every other extra argument, and of
      these only what its update spells out by name (its own update, not one inside a
      chain). :func:`value_and_update` makes the call with all of them. Updates have
      the dtypes that the base gives them.

    Raises:
      TypeError: If `base` or `ascent` is no transformation; in init and update, if a
        parameter is not real floating point or `loss_fn` cannot be called or returns
        no array.
      ValueError: In update, if `params`, or `loss_fn` and `batch` as well as `grad_fn`,
        are missing, or if losses or gradients have the wrong shape.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> tx = optax_sam.sharpness_aware(
      ...     optax.sgd(1.0), optax_sam.scale_to_radius(rho=0.5)
      ... )
      >>> params = jnp.array([3.0, 4.0])
      >>> grad_fn = jax.grad(lambda w: 0.5 * jnp.sum(w**2))
      >>> updates, state = tx.update(
      ...     grad_fn(params), tx.init(params), params, grad_fn=grad_fn
      ... )
      >>> print(updates)  # minus the gradient at (3.3, 4.4)
      [-3.3 -4.4]

    References:
      Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
      Generalization <https://arxiv.org/abs/2010.01412>`_, 2021
    """
    base = _protocol.as_transformation("base", base)
    ascent = _protocol.as_transformation("ascent", ascent)

    def init_fn(params: optax.Params) -> SharpnessAwareState:
        _protocol.check_parameters(params)
        return SharpnessAwareState(ascent.init(params), base.init(params))

    def update_fn(
        updates: optax.Updates,
        state: SharpnessAwareState,
        params: optax.Params | None = None,
        *,
        loss_fn: Callable[..., jax.Array] | None = None,
        batch: Any = _protocol.MISSING,
        grad_fn: Callable[[optax.Params], optax.Updates] | None = None,
        losses: jax.Array | None = None,
        pullback: Callable[[jax.Array], optax.Updates] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SharpnessAwareState]:
        _protocol.check_parameters(params)
        _protocol.check_gradient("grads", updates, params)
        if not isinstance(state, SharpnessAwareState):
            raise TypeError(
                "sharpness_aware: state must be a SharpnessAwareState, got "
                f"{type(state).__name__}; start from tx.init(params) of this very "
                "transformation."
            )
        gradient_at = _protocol.gradient_function(loss_fn, batch, grad_fn)
        extra_args |= _protocol.given(
            batch, loss_fn=loss_fn, grad_fn=grad_fn, losses=losses, pullback=pullback
        )

        def ascend(gradient: optax.Updates) -> tuple[optax.Updates, optax.OptState]:
            new: tuple[optax.Updates, optax.OptState] = ascent.update(
                gradient, state.ascent_state, params, **extra_args
            )
            return new

        epsilon, ascent_state = _ascend_if_finite(ascend, updates, state.ascent_state)
        gradient = gradient_at(_perturb(params, epsilon))
        _protocol.check_gradient("grad_fn(params)", gradient, params)
        updates, base_state = base.update(
            gradient,
            state.base_state,
            params,
            **_protocol.accepted(base.update, extra_args, withhold=_protocol.ARGUMENTS),
        )
        return updates, SharpnessAwareState(ascent_state, base_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class SharpnessAwareState(NamedTuple):
    """State of :func:`sharpness_aware`.

    Attributes:
      ascent_state: State of the ascent.
      base_state: State of the base optimizer.
    """

    ascent_state: optax.OptState
    base_state: optax.OptState


def _perturb(params: optax.Params, epsilon: optax.Updates) -> optax.Params:
    """Adds the leaves of `epsilon` that are present, in the parameters' dtypes."""

    def add(e: Any, p: Any) -> Any:
        return p if _tree.is_absent(e) else p + jnp.asarray(e, jnp.result_type(p))

    return jax.tree.map(add, epsilon, params, is_leaf=_tree.is_absent)


def _ascend_if_finite(
    ascend: Callable[[optax.Updates], tuple[optax.Updates, optax.OptState]],
    gradient: optax.Updates,
    old_state: optax.OptState,
) -> tuple[optax.Updates, optax.OptState]:
    """Ascends; where the gradient is not finite, by zero and with the old state."""
    epsilon, new_state = ascend(gradient)
    finite = _tree.all_finite(_read(ascend, gradient, epsilon))
    epsilon = _tree.map_present(lambda e: _zero_unless(finite, e), epsilon)
    state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), new_state, old_state
    )
    return epsilon, state


def _zero_unless(condition: jax.Array, e: Any) -> jax.Array:
    """Zeros unless a scalar condition holds.

    By a mask of bits: where a float is selected, XLA may fuse the product that scales
    it with the addition to the parameters, rounding once for two. Whether it does
    depends on what else is in the chain, and a mask of ones would not be SAM exactly.
    """
    e = jnp.asarray(e)
    unsigned = jnp.dtype(f"uint{8 * e.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(e, unsigned) & -condition.astype(unsigned)
    return jax.lax.bitcast_convert_type(bits, e.dtype)


def _read(
    ascend: Callable[[optax.Updates], Any],
    gradient: optax.Updates,
    epsilon: optax.Updates,
) -> list[jax.Array]:
    """The leaves of the gradient that the ascent reads, and of epsilon for the others.

    To look at a leaf that the ascent leaves unread, since a static mask drops it or a
    gradient of its own replaces it, would make XLA compute it; one that is dropped
    after an average or a norm has read it must be looked at.
    """
    leaves, structure = jax.tree.flatten(gradient)
    jaxpr = jax.make_jaxpr(lambda *g: ascend(jax.tree.unflatten(structure, g)))(
        *leaves
    ).jaxpr
    used = {id(v) for eqn in jaxpr.eqns for v in eqn.invars} | set(
        map(id, jaxpr.outvars)
    )
    replaced = jax.tree.leaves(epsilon, is_leaf=_tree.is_absent)
    return [
        g if id(v) in used else e
        for g, e, v in zip(leaves, replaced, jaxpr.invars, strict=True)
        if id(v) in used or not _tree.is_absent(e)
    ]
