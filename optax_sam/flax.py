"""Training steps as Flax's users write them, for any optimizer, sharpness-aware or not.

* NNX: :func:`nnx_value_and_update` in place of `nnx.value_and_grad` and the optimizer's
  update.
* Linen: :class:`TrainState`, Flax's own with `apply_loss` in place of
  `jax.value_and_grad` and `apply_gradients`.

This module needs Flax, and the rest of the package does not.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx
from flax.training import train_state

from optax_sam._base.checks import calling, refuse
from optax_sam._base.devices import AxisName
from optax_sam._engine import protocol
from optax_sam._engine.batch_loss import LossOfOutputs
from optax_sam._engine.value_and_update import value_and_update

__all__ = ["TrainState", "nnx_value_and_update"]

_OWNER = "nnx_value_and_update"


def nnx_value_and_update(
    loss_fn: Callable[..., Any],
    *,
    has_aux: bool = False,
    ascent_loss_fn: Callable[..., Any] | None = None,
    scoring_loss_fn: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    r"""Makes the training step of an NNX model by any `nnx.Optimizer`.

    .. math::
      \text{value} = \frac{1}{B} \sum_{i=1}^{B} \ell_i(w), \qquad
      w \leftarrow w + \text{tx}(\nabla\,\text{value})

    It takes the place of `nnx.value_and_grad` and of the optimizer's update, which for
    an optimizer that is not sharpness-aware it equals. For others it is
    :func:`optax_sam.value_and_update`, of the parameters that the optimizer's `wrt`
    selects: all passes of a step start from what else the model and the arguments hold
    as it was before the step, so that they drop the same features. What the clean pass
    makes of that is kept (or the only one, of methods of one gradient): batch
    statistics never see perturbed parameters, and random streams advance once.

    Args:
      loss_fn: `loss_fn(model, *args)` returns the losses of the examples, shape `[B]`,
        or their mean as a scalar; with `has_aux`, a pair of that and any pytree. The
        first of `args` without NNX objects in it is the batch; others, such as
        `nnx.Rngs`, may come before it. It may assign to the variables of the model and
        of the arguments that are not `wrt`, but must leave their structure as it is.
        Of a loss in two parts, :func:`optax_sam.functional_loss`, the first may.
      has_aux: Whether `loss_fn` returns auxiliary data, which are those of the clean
        pass.
      ascent_loss_fn: Takes the place of `loss_fn` in the clean pass, as for
        :func:`optax_sam.value_and_update`.
      scoring_loss_fn: Called as `loss_fn`, and returns losses `[B]` without auxiliary
        data to score parameters by, as for :func:`optax_sam.value_and_update`. It gets
        a copy of the model, which it may set to evaluation mode.

    Returns:
      A function `step(model, optimizer, *args) -> value`, to be called under `nnx.jit`;
      under `jax.jit`, as in Flax's own loops, model and optimizer stay as they were.
      It updates model, optimizer and arguments in place. `value` is the clean mean
      loss, a scalar in float32 or wider, or the pair of it and the auxiliary data.

    Raises:
      TypeError: If `loss_fn` is no function; in the step, if `optimizer` is no
        `nnx.Optimizer`, if a parameter is not real floating point or the loss no array.
      ValueError: In the step, if the model has no parameters, or others than the
        optimizer was made for, if `loss_fn` changes the model's structure or its
        parameters, or if losses have a shape that the method has no use for.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> from flax import nnx
      >>> from optax_sam.flax import nnx_value_and_update
      >>> model = nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0))
      >>> tx = optax_sam.sam(optax.sgd(0.1), rho=0.05)
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> def loss_fn(model, batch):
      ...     x, y = batch
      ...     return (model(x)[:, 0] - y) ** 2
      >>> step = nnx.jit(nnx_value_and_update(loss_fn))
      >>> values = [
      ...     step(model, optimizer, (jnp.eye(2), jnp.ones(2))) for _ in range(50)
      ... ]
      >>> print(bool(values[-1] < 0.01))
      True

    References:
      Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
      Generalization <https://arxiv.org/abs/2010.01412>`_, 2021
    """

    @calling(_OWNER)
    def step(model: Any, optimizer: Any, *args: Any) -> Any:
        _check_optimizer(optimizer)
        call = _Call(model, optimizer, args)

        def update(
            gradient: Any, opt_state: Any, params: Any, **extra_args: Any
        ) -> tuple[Any, Any]:
            del params
            extra_args = protocol.accepted(optimizer.tx.update, extra_args)
            optimizer.update(model, call.as_variables(gradient), **extra_args)
            return None, opt_state

        (value, (aux, changed)), _, _ = value_and_update(
            call.losses_and_changes(loss_fn, has_aux),
            optax.GradientTransformationExtraArgs(optimizer.tx.init, update),
            has_aux=True,
            ascent_loss_fn=call.losses_and_changes(ascent_loss_fn, has_aux),
            scoring_loss_fn=call.losses(scoring_loss_fn),
        )(call.params, nnx.as_pure(optimizer.opt_state), call.batch, call.rest)
        nnx.update(call.objects, changed)
        return (value, aux) if has_aux else value

    return step


class TrainState(train_state.TrainState):  # type: ignore[no-untyped-call]
    """Flax linen's `TrainState`, with the step of any optimizer.

    `apply_loss` takes the place of `jax.value_and_grad` and `apply_gradients`; all else
    is Flax's, whose class subclasses of one's own have as their base otherwise.

    Attributes:
      step: The number of steps made.
      apply_fn: Usually `model.apply`.
      params: The parameters.
      tx: The optimizer, sharpness-aware or not.
      opt_state: Its state.

    Examples:
      >>> import flax.linen as nn
      >>> import jax, jax.numpy as jnp, optax, optax_sam
      >>> from optax_sam.flax import TrainState
      >>> model = nn.Dense(1)
      >>> x, y = jnp.eye(2), jnp.ones(2)
      >>> state = TrainState.create(
      ...     apply_fn=model.apply,
      ...     params=model.init(jax.random.key(0), x)["params"],
      ...     tx=optax_sam.sam(optax.sgd(0.1), rho=0.05),
      ... )
      >>> @jax.jit
      ... def train_step(state, batch):
      ...     def loss_fn(params, batch):
      ...         x, y = batch
      ...         return (state.apply_fn({"params": params}, x)[:, 0] - y) ** 2
      ...
      ...     return state.apply_loss(loss_fn, batch)
      >>> for _ in range(50):
      ...     value, state = train_step(state, (x, y))
      >>> print(bool(value < 0.01), state.step)
      True 50
    """

    def apply_loss(
        self,
        loss_fn: Callable[..., Any],
        *args: Any,
        has_aux: bool = False,
        ascent_loss_fn: Callable[..., Any] | None = None,
        scoring_loss_fn: Callable[..., Any] | None = None,
        axis_name: AxisName | None = None,
    ) -> tuple[Any, "TrainState"]:
        r"""Makes a step, that of :func:`optax_sam.value_and_update`.

        .. math::
          \text{value} = \frac{1}{B} \sum_{i=1}^{B} \ell_i(w), \qquad
          w \leftarrow w + \text{tx}(\nabla\,\text{value})

        Args:
          loss_fn: `loss_fn(params, *args)` returns the losses of the examples, shape
            `[B]`, or their mean as a scalar; with `has_aux`, a pair of that and any
            pytree.
          *args: What `loss_fn` takes, the batch first. Methods that look at parts of a
            batch need it here; others do as well if `loss_fn` has it of itself.
          has_aux: Whether `loss_fn` returns auxiliary data, which are those of the
            clean pass.
          ascent_loss_fn: Takes the place of `loss_fn` in the clean pass.
          scoring_loss_fn: Called as `loss_fn`, and returns losses `[B]` without
            auxiliary data to score parameters by.
          axis_name: The axis of `jax.pmap` or `jax.shard_map` over which devices share
            the batch, where the step is called inside of one. Value and state are then
            those of one device with all examples; auxiliary data remain a device's own.

        Returns:
          The clean mean loss, or the pair of it and the auxiliary data; and the state
          after the step.

        Raises:
          TypeError: If `loss_fn` is no function or returns no array, or if a parameter
            is not real floating point.
          ValueError: If losses have a shape that the method has no use for, or if
            `axis_name` is no axis.
        """
        with calling("TrainState.apply_loss"):
            step = value_and_update(
                loss_fn,
                self.tx,
                has_aux=has_aux,
                ascent_loss_fn=ascent_loss_fn,
                scoring_loss_fn=scoring_loss_fn,
                axis_name=axis_name,
            )
        value, updates, opt_state = step(self.params, self.opt_state, *args)
        params = optax.apply_updates(self.params, updates)
        return value, self.replace(
            step=self.step + 1, params=params, opt_state=opt_state
        )


class _Call:
    """A call of losses of a model, as functions of arrays.

    Attributes:
      objects: The model, and the arguments but for the batch.
      params: The parameters that the optimizer moves.
      rest: All else that `objects` hold.
      batch: The first argument without NNX objects, `()` if there is none.
    """

    def __init__(self, model: Any, optimizer: Any, args: tuple[Any, ...]) -> None:
        i = next((i for i, x in enumerate(args) if not _has_objects(x)), len(args))
        self._before, self._num_batches = i, len(args[i : i + 1])
        self.batch = args[i] if self._num_batches else ()
        self.objects = (model, (*args[:i], *args[i + 1 :]))
        self._optimizer = optimizer
        self._graph, params, rest = self._split(self.objects)
        if not params:
            refuse(
                _OWNER,
                "the model must have parameters that the optimizer moves, those of wrt",
                optimizer.wrt,
                "make the optimizer as nnx.Optimizer(model, tx, wrt=nnx.Param), of a "
                "model that is complete",
            )
        self._variables = jax.tree.structure(params[0])
        # Arrays, of which every pass makes variables of its own.
        self.params, self.rest = nnx.as_pure((params[0], rest))

    def losses(self, fn: Any) -> Any:
        """`losses_fn(params, batch, rest)` for losses of a model and its arguments."""
        if not callable(fn):
            return fn  # None, or for value_and_update to refuse.
        return lambda params, batch, rest: self._apply(
            fn, self._merge(params, rest), batch
        )

    def losses_and_changes(self, fn: Any, has_aux: bool) -> Any:
        """The same with auxiliary data: those of `fn`, and what it has assigned to.

        Nothing else: frozen parameters are not to be averaged over micro-batches.
        """
        if not callable(fn):
            return fn
        if isinstance(fn, LossOfOutputs):
            fn.check_aux(_OWNER, has_aux)
            outputs_fn = self.losses_and_changes(fn.output_fn, has_aux)
            return LossOfOutputs(outputs_fn, self._of_outputs(fn.of_outputs), True)

        def losses_fn(params: Any, batch: Any, rest: Any) -> Any:
            objects = self._merge(params, rest)
            before = [_identities(x) for x in self._split(objects)[1:]]
            out = self._apply(fn, objects, batch)
            pair = out if has_aux else (out, None)
            if not (isinstance(pair, tuple) and len(pair) == 2):
                return pair  # For value_and_update to refuse.
            return pair[0], (pair[1], self._changed(objects, before))

        return losses_fn

    def _of_outputs(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn(outputs, *args)` as a function of arrays, which keeps no changes."""

        def of_outputs(outputs: Any, batch: Any, rest: Any) -> Any:
            objects = self._merge(self.params, rest)
            before = [_identities(x) for x in self._split(objects)[1:]]
            losses = self._apply(fn, (outputs, objects[1]), batch)
            if jax.tree.leaves(self._changed(objects, before)):
                raise ValueError(
                    f"{_OWNER}: the second part of loss_fn assigns to variables of an "
                    "argument, and the step keeps only what the first part, output_fn, "
                    "assigns to; do it there."
                )
            return losses

        return of_outputs

    def as_variables(self, gradient: Any) -> Any:
        """A gradient as the optimizer wants it, whose `wrt` may be a type."""
        return jax.tree.unflatten(self._variables, jax.tree.leaves(gradient))

    def _split(self, objects: Any) -> Any:
        is_parameter = nnx.filterlib.to_predicate(self._optimizer.wrt)

        def is_of_model(path: Any, x: Any) -> bool:
            return path[0] == 0 and bool(is_parameter(path[1:], x))

        # All at once, for what the model and the arguments share.
        return nnx.split(objects, is_of_model, ..., graph=self._optimizer.graph)

    def _merge(self, params: Any, rest: Any) -> Any:
        return nnx.merge(self._graph, nnx.State({0: params}), rest)

    def _apply(self, fn: Callable[..., Any], objects: Any, batch: Any) -> Any:
        model, others = objects
        batches = (batch,)[: self._num_batches]
        return fn(model, *others[: self._before], *batches, *others[self._before :])

    def _changed(self, objects: Any, before: Any) -> Any:
        """The variables that a loss has assigned to, none of them parameters."""
        graph, params, rest = self._split(objects)
        if graph != self._graph or _identities(params) != before[0]:
            raise ValueError(
                f"{_OWNER}: loss_fn changes parameters or the structure of the model "
                "or of an argument, and the step keeps neither; call model.train() or "
                "model.eval() and add variables before the step, and return "
                "intermediate results as auxiliary data, with has_aux=True."
            )
        after, variables = _identities(rest), nnx.to_flat_state(rest)
        changed = [(path, x) for path, x in variables if after[path] != before[1][path]]
        return nnx.from_flat_state(changed)


def _check_optimizer(optimizer: Any) -> None:
    # ModelAndOptimizer, which Flax is to remove, has an update of its own.
    if not isinstance(optimizer, nnx.Optimizer) or "model" in vars(optimizer):
        raise TypeError(
            f"{_OWNER}: the step is called as step(model, optimizer, *args) with an "
            f"nnx.Optimizer, got {type(optimizer).__name__}; make it as "
            "nnx.Optimizer(model, tx, wrt=nnx.Param)."
        )


def _has_objects(x: Any) -> bool:
    """Whether there are NNX objects in an argument, which hold state."""

    def is_object(x: Any) -> bool:
        return isinstance(x, nnx.Pytree | nnx.Variable)

    return any(map(is_object, jax.tree.leaves(x, is_leaf=is_object)))


def _identities(state: Any) -> dict[Any, list[int]]:
    """Which arrays the variables of a state hold, by path."""
    return {
        path: list(map(id, jax.tree.leaves(x))) for path, x in nnx.to_flat_state(state)
    }
