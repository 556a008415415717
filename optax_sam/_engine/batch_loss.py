"""The loss of a batch, as a sharpness-aware step calls it."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_sam._base.checks import called, checked, refuse
from optax_sam._base.losses import (
    Pullback,
    check_losses,
    check_per_example,
    differentiate,
    linearise,
)

_NAMES = ("loss_fn", "ascent_loss_fn", "scoring_loss_fn")


@dataclasses.dataclass(frozen=True)
class LossOfOutputs:
    """`loss_fn(params, *args)` in two parts: outputs, and the losses of outputs.

    In the perturbed pass of a sharpness-aware step, the derivative of the losses by the
    outputs is that of the clean pass. Elsewhere it is a function like any other.

    Attributes:
      output_fn: `output_fn(params, *args)` returns outputs, with `has_aux` a pair of
        them and auxiliary data.
      of_outputs: `of_outputs(outputs, *args)` returns the losses.
      has_aux: Whether there are auxiliary data.
    """

    output_fn: Callable[..., Any]
    of_outputs: Callable[..., Any]
    has_aux: bool = False

    def __call__(self, params: optax.Params, *args: Any) -> Any:
        """The losses, with `has_aux` a pair of them and auxiliary data."""
        outputs, aux = self.outputs(params, *args)
        losses = self.of_outputs(outputs, *args)
        return (losses, aux) if self.has_aux else losses

    def outputs(self, params: optax.Params, *args: Any) -> tuple[Any, Any]:
        """The outputs, and auxiliary data or None."""
        found = self.output_fn(params, *args)
        if not self.has_aux:
            return found, None
        if not (isinstance(found, tuple) and len(found) == 2):
            raise TypeError(
                f"{called('functional_loss')}: with has_aux=True output_fn must return "
                f"a pair (outputs, aux), got {type(found).__name__}; return the pair "
                "or drop has_aux."
            )
        return found

    def check_aux(self, owner: str, has_aux: bool) -> None:
        """Refuses to be asked for auxiliary data without any, or not to be."""
        if has_aux != self.has_aux:
            refuse(
                owner,
                f"has_aux must be that which the loss was made with, {self.has_aux}",
                has_aux,
                "pass the same in both places",
            )


class Linearised(NamedTuple):
    """The losses of a batch at some parameters, and how they depend on those.

    Attributes:
      losses: The losses.
      pullback: `weights -> gradient of sum(weights * losses)`.
      aux: Auxiliary data.
      derivative: `weights -> derivative of sum(weights * losses) by the outputs`, of
        losses of outputs.
    """

    losses: jax.Array
    pullback: Pullback
    aux: Any
    derivative: Pullback | None = None


@dataclasses.dataclass(frozen=True)
class BatchLoss:
    """`loss_fn(params, batch) -> losses`, and what a group of examples asks it for.

    Attributes:
      name: What the user calls it, for messages.
      fn: `fn(params, *args)` returns losses, or what they are of, and auxiliary data.
      args: The arguments of the step, the batch first.
      size: The number of losses that there have to be, if it matters.
      of_outputs: `of_outputs(outputs, *args)` returns the losses of what `fn` returns,
        where that is outputs.
      derivative: That of these losses by the outputs at the clean parameters, for the
        perturbed pass.
    """

    name: str
    fn: Callable[..., tuple[Any, Any]]
    args: tuple[Any, ...]
    size: int | None = None
    of_outputs: Callable[..., Any] | None = None
    derivative: Pullback | None = None

    @classmethod
    def of(cls, name: str, loss_fn: Any, batch: Any) -> "BatchLoss":
        """The same of any `loss_fn(params, batch)`."""
        if isinstance(loss_fn, cls):
            return loss_fn
        if isinstance(loss_fn, LossOfOutputs):
            of_outputs = loss_fn.of_outputs
            return cls(name, loss_fn.outputs, (batch,), of_outputs=of_outputs)
        loss_fn = checked(called("sharpness_aware"), name, loss_fn, "params", "batch")
        return cls(name, lambda params, batch: (loss_fn(params, batch), None), (batch,))

    def __call__(self, params: optax.Params, batch: Any) -> jax.Array:
        """The losses of a batch."""
        return self.with_aux(params, batch)[0]

    def with_aux(self, params: optax.Params, batch: Any) -> tuple[jax.Array, Any]:
        """The losses of a batch, and auxiliary data."""
        found, aux = self._call(self.fn, params, batch)
        return self._losses(found, batch), aux

    def linearise(self, params: optax.Params, batch: Any) -> Linearised:
        """The losses of a batch, and how they depend on parameters.

        If a derivative by the outputs was taken elsewhere, by that one.
        """
        if self.of_outputs is None:
            found = linearise(lambda p: self.with_aux(p, batch), params, has_aux=True)
            return Linearised(*found)
        outputs, vjp, aux = differentiate(
            lambda p: self._call(self.fn, p, batch), params, has_aux=True
        )
        losses, own = linearise(lambda x: self._losses(x, batch), outputs)
        derivative = self.derivative or own
        return Linearised(losses, lambda w: vjp(derivative(w))[0], aux, derivative)

    def after_clean(self, params: optax.Params, batch: Any) -> "BatchLoss":
        """That of a perturbed pass, where `params` are the clean parameters."""
        if self.of_outputs is None or self.derivative is not None:
            return self
        return self.taking(self.linearise(params, batch).derivative)

    def taking(self, derivative: Pullback | None) -> "BatchLoss":
        """The same with a derivative of the losses by the outputs."""
        return dataclasses.replace(self, derivative=derivative)

    def _call(self, fn: Callable[..., Any], first: Any, batch: Any) -> Any:
        args = (batch, *self.args[1:])[: len(self.args)]
        try:
            return fn(first, *args)
        except Exception as error:
            self._explain(called("sharpness_aware"), first, batch, error)
            raise

    def _losses(self, found: Any, batch: Any) -> jax.Array:
        """The losses of what `fn` has found."""
        if self.of_outputs is not None:
            found = self._call(self.of_outputs, found, batch)
        owner = called("sharpness_aware")
        if self.size is None:
            return check_losses(owner, self.name, found)
        return check_per_example(owner, self.name, found, self.size)

    def _explain(self, owner: str, params: Any, batch: Any, error: Exception) -> None:
        """Adds to an error what the function may not have been made for."""
        size, total = _num_examples(batch), _num_examples(self.args[:1])
        if size < total:
            error.add_note(
                f"{owner}: {self.name} was called with {size} of the {total} examples; "
                "only its first argument after params is cut. Pass all that belongs to "
                "the examples in it, as one batch such as (x, y)."
            )
        # Python's own words for a call with too few arguments.
        if not jax.tree.leaves(batch) and "required positional arg" in str(error):
            error.add_note(
                f"{owner}: the step got no batch, or one without arrays, for "
                f"{self.name}; call step(params, opt_state, batch), or step(model, "
                "optimizer, batch) with NNX."
            )
        kind = type(params)
        if kind.__module__.startswith("flax.nnx") and kind.__name__ in str(error):
            error.add_note(
                f"{owner}: {self.name} is called with params, the {kind.__name__} of "
                "the model, and not with the model; for losses of an NNX model there "
                "is optax_sam.flax.nnx_value_and_update."
            )

    @property
    def draws(self) -> bool:
        """Whether there is a PRNG key to draw with after the batch."""
        return any(map(_is_key, jax.tree.leaves(self.args[1:])))

    def of_group(self, number: Any, size: int | None = None) -> "BatchLoss":
        """That of one of many groups, with draws of its own, or None for the only one.

        Raw key data are left alone: they cannot be told from other integers.
        """

        def own(x: Any) -> Any:
            return _fold_in(x, number) if _is_key(x) else x

        args = self.args
        if number is not None:
            args = (*args[:1], *jax.tree.map(own, args[1:]))
        return dataclasses.replace(self, args=args, size=size, derivative=None)


def of_step(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a step, with its losses as those of its batch."""
    batch = arguments.get("batch")
    return arguments | {
        name: BatchLoss.of(name, arguments[name], batch)
        for name in _NAMES
        if arguments.get(name) is not None
    }


def _num_examples(batch: Any) -> int:
    """The length of the longest first axis, 0 if there is none."""
    shapes = filter(None, map(np.shape, jax.tree.leaves(batch)))
    return max((shape[0] for shape in shapes), default=0)


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _fold_in(keys: jax.Array, number: jax.Array) -> jax.Array:
    """Folds a number into each of an array of keys."""
    fold_in: Callable[..., jax.Array] = jax.random.fold_in
    for _ in range(keys.ndim):
        fold_in = jax.vmap(fold_in, (0, None))
    return fold_in(keys, number)
