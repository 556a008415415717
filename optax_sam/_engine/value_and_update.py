"""The training step of any Optax optimizer, sharpness-aware or not.

It makes the call that `tx.update` wants: one clean pass, linearised once, and every
argument of the step protocol.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import optax

from optax_sam._base.checks import called, calling, check_parameters, shown
from optax_sam._base.devices import AxisName, Devices, axes_of, vary_like
from optax_sam._base.losses import clean_pass, mean_loss
from optax_sam._engine import protocol
from optax_sam._engine.batch_loss import BatchLoss, LossOfOutputs
from optax_sam._engine.states import SharpnessAwareState, explain

LossesAndAux: TypeAlias = Callable[..., tuple[Any, Any]]

# By the state: the wrapper, and what it does around a sharpness-aware step.
_WRAPPERS = {
    optax.LookaheadState: ("optax.lookahead", "hands no loss on to it"),
    optax.MultiStepsState: (
        "optax.MultiSteps",
        "descends along the gradient of the last batch alone",
    ),
    optax.ApplyIfFiniteState: (
        "optax.apply_if_finite",
        "does not see the gradient that moves the parameters",
    ),
}


def value_and_update(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    has_aux: bool = False,
    ascent_loss_fn: Callable[..., Any] | None = None,
    scoring_loss_fn: Callable[..., Any] | None = None,
    axis_name: AxisName | None = None,
) -> Callable[..., tuple[Any, optax.Updates, optax.OptState]]:
    r"""Makes the training step of any Optax optimizer, sharpness-aware or not.

    .. math::
      \text{value} = \frac{1}{B} \sum_{i=1}^{B} \ell_i(w), \qquad
      \text{updates} = \text{tx}(\nabla\,\text{value})

    The clean pass is linearised once, and whatever weighting of the examples a method
    needs is pulled back through that one linearisation. Beside the step protocol (see
    :func:`sharpness_aware`) `tx` gets `value`, `grad`, `value_fn` and `obj_fn` of the
    clean mean loss, so that line searches and Sophia work as well.

    Args:
      loss_fn: `loss_fn(params, *args)` returns the losses of the examples, shape `[B]`,
        or their mean as a scalar; with `has_aux`, a pair of that and any pytree. The
        first of `args` is the batch; the others (a PRNG key, batch statistics) are the
        same in both passes, so dropout draws are too. Micro-batches draw each for
        itself, by keys of `jax.random.key`, see :func:`sharpness_aware`.
      tx: The optimizer.
      has_aux: Whether `loss_fn` returns auxiliary data. It comes from the clean pass
        only, so batch statistics never see perturbed parameters; with
        `micro_batch_size` from those of the micro-batches, as their means. In a step of
        one gradient, as of :func:`momentum_sam`, it comes from the perturbed pass.
      ascent_loss_fn: Takes the place of `loss_fn` in the clean pass, so that the ascent
        may read a cheaper gradient: that of layers from :mod:`optax_sam.implicit`, or
        of a part of the batch. The perturbed pass remains that of `loss_fn`. It is
        called as `loss_fn`, with `micro_batch_size` also on every micro-batch, and
        returns the same kind of values, which are what the step reports. An optimizer
        that is not sharpness-aware descends along its gradient.
      scoring_loss_fn: Called as `loss_fn`, and returns losses `[B]` without auxiliary
        data: what :func:`sparsify_by_fisher` scores parameters by in place of
        `loss_fn`, such as those in evaluation mode.
      axis_name: The axis, or axes, of `jax.shard_map` or `jax.pmap` over which devices
        share the batch, where the step is called inside of one. Parameters and state
        are the same on all devices, and the step is that of one device with all of the
        examples: `value` and updates are means over devices. Auxiliary data remain
        those of each device.

    Returns:
      A function `step(params, opt_state, *args) -> (value, updates, opt_state)`.
      `value` is the mean loss of the same pass, a scalar in float32 or wider, or the
      pair of it and the auxiliary data. Pass `updates` to `optax.apply_updates`.

    Raises:
      TypeError: If `loss_fn` is no function or `tx` no transformation; in the step, if
        a parameter is not real floating point, the loss no array, or `opt_state` not
        that of these parameters and this optimizer.
      ValueError: In the step, if the losses have more than one axis or none in number,
        if parameters are missing, if `axis_name` is no axis, or if losses differ
        between devices of `jax.shard_map` that it does not name.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> def loss_fn(params, batch):
      ...     x, y = batch
      ...     return (x @ params - y) ** 2
      >>> tx = optax_sam.sam(optax.sgd(0.1), rho=0.05)
      >>> step = jax.jit(optax_sam.value_and_update(loss_fn, tx))
      >>> params = jnp.zeros(2)
      >>> batch = (jnp.eye(2), jnp.ones(2))
      >>> value, updates, opt_state = step(params, tx.init(params), batch)
      >>> params = optax.apply_updates(params, updates)
      >>> print(value, params.round(3))
      1.0 [0.104 0.104]

    References:
      Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
      Generalization <https://arxiv.org/abs/2010.01412>`_, 2021
    """
    owner = called("value_and_update")
    tx = protocol.as_transformation(owner, "tx", tx)
    devices = Devices(axis_name)
    functions = {"loss_fn": _parts("loss_fn", loss_fn, has_aux)}
    if ascent_loss_fn is not None:
        name = "ascent_loss_fn"
        functions[name] = _parts(name, ascent_loss_fn, has_aux)
    if scoring_loss_fn is not None:
        name = "scoring_loss_fn"
        functions[name] = _parts(name, scoring_loss_fn, has_aux=False)

    @calling(owner)
    def step(
        params: optax.Params, opt_state: optax.OptState, *args: Any
    ) -> tuple[Any, optax.Updates, optax.OptState]:
        _check_wrappers(opt_state)
        point = protocol.evaluated(params)
        check_parameters(owner, point)
        devices.check(owner)
        own_params = devices.vary(point)
        batch = args[0] if args else ()
        of_batch = {
            name: BatchLoss(name, fn, args, of_outputs=of_outputs)
            for name, (fn, of_outputs) in functions.items()
        }
        clean_fn = of_batch.get("ascent_loss_fn", of_batch["loss_fn"])
        losses, pullback, aux, derivative = clean_fn.linearise(own_params, batch)
        if clean_fn is of_batch["loss_fn"]:
            of_batch["loss_fn"] = clean_fn.taking(derivative)
        _check_axes(losses, own_params)
        clean = clean_pass(losses, pullback)
        value, gradient = devices.mean((clean.value, clean.grad))
        report = protocol.Report(losses, value, aux)

        extra_args = protocol.given(
            batch,
            **of_batch,
            losses=losses,
            pullback=pullback,
            axis_name=axis_name,
            report=report,
        )
        value_fn = _value_function(extra_args, devices)
        extra_args |= {"value": value, "grad": gradient}
        extra_args |= {"value_fn": value_fn, "obj_fn": value_fn}
        updates, opt_state = tx.update(
            gradient, opt_state, params, **protocol.accepted(tx.update, extra_args)
        )
        found = (report.value, report.aux) if has_aux else report.value
        return found, updates, opt_state

    def explained_step(
        params: optax.Params, opt_state: optax.OptState, *args: Any
    ) -> tuple[Any, optax.Updates, optax.OptState]:
        try:
            return step(params, opt_state, *args)
        except Exception as error:
            explain(owner, tx, params, opt_state, error, *args)
            raise

    return explained_step


def _check_wrappers(opt_state: optax.OptState) -> None:
    """Says which wrappers do around a sharpness-aware step what nobody expects."""

    def found(kind: Any, tree: Any) -> list[Any]:
        nodes = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, kind))
        return [x for x in nodes if isinstance(x, kind)]

    for kind, (name, what) in _WRAPPERS.items():
        if any(found(SharpnessAwareState, state) for state in found(kind, opt_state)):
            message = (
                f"{called('value_and_update')}: {name} around a sharpness-aware "
                f"optimizer {what}; put it around the base, sam({name}(sgd, ...), rho)."
            )
            if kind is optax.LookaheadState:
                raise ValueError(message)
            warnings.warn(message, stacklevel=2)


def _parts(
    name: str, fn: Any, has_aux: bool
) -> tuple[LossesAndAux, Callable[..., Any] | None]:
    """A loss as a function with auxiliary data, and that of its outputs, if any."""
    if isinstance(fn, LossOfOutputs):
        fn.check_aux(f"{called('value_and_update')}: {name}", has_aux)
        return fn.outputs, fn.of_outputs
    return _losses_and_aux(name, fn, has_aux), None


def _losses_and_aux(name: str, fn: Any, has_aux: bool) -> LossesAndAux:
    """Makes a function that returns a pair of losses and auxiliary data, or None."""
    owner = called("value_and_update")
    if not callable(fn):
        raise TypeError(
            f"{owner}: {name} must be a function, called as {name}(params, *args); "
            f"got {shown(fn)}."
        )

    def losses_and_aux(params: optax.Params, *args: Any) -> tuple[Any, Any]:
        out = fn(params, *args)
        if not has_aux:
            return out, None
        if not (isinstance(out, tuple) and len(out) == 2):
            raise TypeError(
                f"{owner}: with has_aux=True {name} must return a pair (losses, aux), "
                f"got {type(out).__name__}; return the pair or drop has_aux."
            )
        return out

    return losses_and_aux


def _check_axes(losses: jax.Array, params: optax.Params) -> None:
    """Refuses losses whose gradients JAX would add up over devices."""
    axes = axes_of(losses) - axes_of(params)
    if axes:
        raise ValueError(
            f"{called('value_and_update')}: losses differ along the axes "
            f"{sorted(map(str, axes))} of jax.shard_map and parameters do not, so "
            "that JAX would add up the devices' gradients; pass axis_name=..., for the "
            "mean over these devices, or let loss_fn return it by jax.lax.pmean."
        )


def _value_function(
    arguments: dict[str, Any], devices: Devices
) -> Callable[..., jax.Array]:
    """The clean mean loss as a function of params alone, for line searches."""
    loss_fn, batch = arguments["loss_fn"], arguments["batch"]

    def own_loss(params: optax.Params) -> jax.Array:
        loss: jax.Array = vary_like(mean_loss(loss_fn(params, batch)), params)
        return loss

    alone = devices.axis_name is None
    over_all = own_loss if alone else _over_devices(own_loss, devices)

    def value_fn(params: optax.Params, **arguments: Any) -> jax.Array:
        del arguments
        return over_all(params)

    # A line search hands its value_fn the extra arguments that it names, and fails on
    # those that nobody names.
    names = ["params", *arguments, "ascended", "obj_fn"]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature([inspect.Parameter(name, kind) for name in names])
    value_fn.__signature__ = signature  # type: ignore[attr-defined]
    return value_fn


def _over_devices(
    value_fn: Callable[[optax.Params], jax.Array], devices: Devices
) -> Callable[[optax.Params], jax.Array]:
    """The mean over devices of a value, whose gradient is the mean of theirs.

    By a rule of its own: plain differentiation of a mean over devices gives this or
    the gradient of one device, depending on `check_vma`.
    """

    def forward(params: optax.Params) -> tuple[jax.Array, optax.Updates]:
        value, gradient = jax.value_and_grad(value_fn)(devices.vary(params))
        mean: tuple[jax.Array, optax.Updates] = devices.mean((value, gradient))
        return mean

    def backward(gradient: optax.Updates, g: jax.Array) -> tuple[optax.Updates]:
        return (jax.tree.map(lambda x: (g * x).astype(x.dtype), gradient),)

    mean_value: Any = jax.custom_vjp(
        lambda params: devices.mean(value_fn(devices.vary(params)))
    )
    mean_value.defvjp(forward, backward)
    of_all: Callable[[optax.Params], jax.Array] = mean_value
    return of_all
