"""Functional SAM, sharpness of the function and not of the loss (arXiv 2502.02407)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from optax_sam._base.checks import called, refuse
from optax_sam._base.hyperparameters import check_bool
from optax_sam._engine.batch_loss import LossOfOutputs


def functional_loss(
    output_fn: Callable[..., Any],
    loss_fn: Callable[..., Any],
    *,
    has_aux: bool = False,
) -> Callable[..., Any]:
    r"""Makes the loss of Functional SAM, of a model's outputs and a loss of those.

    .. math::
      f(w) = L(F(w)), \qquad
      p_t = \partial F(w_t + \varepsilon_t)^\top \, \nabla L(F(w_t))

    A sharpness-aware step descends along :math:`p_t`, which has the Jacobian of the
    outputs at the perturbed parameters, in place of :math:`\nabla f(w_t +
    \varepsilon_t) = \partial F(w_t + \varepsilon_t)^\top \, \nabla L(F(w_t +
    \varepsilon_t))`: the loss is that of the clean outputs, and what a perturbation
    does to outputs that the loss is steep in, such as the size of logits, does not
    count. Where the loss is linear in the outputs, that is the same.

    What ascends, and how far, is up to the optimizer: with `sam(base, rho)` this is the
    method of the paper, and any other ascent, of micro-batches too, goes with it. Value
    and auxiliary data are those of the clean pass. A step costs what it does with
    another loss, and a forward pass more in three cases: where `ascent_loss_fn` takes
    the clean pass, where the ascent reads nothing of it and would have made do with one
    gradient, and where `update` is called by hand. `grad_fn`, which gives no derivative
    by outputs, is refused.

    Everywhere else this is a function like any other, `loss(params, *args)`. A function
    around it, of `jax.checkpoint` or `jax.jit` say, hides the two parts, and the step
    is then that of SAM: put it around `output_fn`.

    Args:
      output_fn: `output_fn(params, *args)` returns the outputs :math:`F`, any pytree of
        arrays, such as logits `[B, ...]`; with `has_aux`, a pair of that and any
        pytree. `args` are those of the step, the batch first.
      loss_fn: `loss_fn(outputs, *args)` returns the losses of the examples, shape
        `[B]`, or their mean as a scalar.
      has_aux: Whether `output_fn` returns auxiliary data. Pass it to
        :func:`value_and_update` as well.

    Returns:
      The loss, for :func:`value_and_update`, for the steps of :mod:`optax_sam.flax`, or
      for `update` of a sharpness-aware optimizer: `loss(params, *args)` returns
      losses, or, with `has_aux`, a pair of them and auxiliary data.

    Raises:
      TypeError: If one of the parts is no function or `has_aux` no bool; in the step,
        if `output_fn` returns no pair with `has_aux`.
      ValueError: In the step, if `has_aux` there is another.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> tx = optax_sam.sam(optax.sgd(0.1), rho=0.05)
      >>> loss_fn = optax_sam.functional_loss(
      ...     lambda w, batch: jnp.tanh(batch["x"] @ w),
      ...     lambda outputs, batch: (outputs - batch["y"]) ** 2,
      ... )
      >>> step = jax.jit(optax_sam.value_and_update(loss_fn, tx))
      >>> params, batch = jnp.ones(2), {"x": jnp.eye(2), "y": jnp.array([0.0, 0.5])}
      >>> opt_state = tx.init(params)
      >>> for _ in range(3):
      ...     value, updates, opt_state = step(params, opt_state, batch)
      ...     params = optax.apply_updates(params, updates)
      ...     print(f"{value:.3f}")
      0.324
      0.313
      0.302

    References:
      Singh et al., `Avoiding spurious sharpness minimization broadens applicability of
      SAM <https://arxiv.org/abs/2502.02407>`_, 2025
    """
    owner = called("functional_loss")
    for name, fn in {"output_fn": output_fn, "loss_fn": loss_fn}.items():
        if not callable(fn):
            remedy = "pass output_fn(params, *args) and loss_fn(outputs, *args)"
            refuse(owner, f"{name} must be a function", fn, remedy, TypeError)
    check_bool(owner, "has_aux", has_aux)
    return LossOfOutputs(output_fn, loss_fn, has_aux)
