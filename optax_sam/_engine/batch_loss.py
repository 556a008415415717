"""The loss of a batch, as a sharpness-aware step calls it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_sam._base.checks import called, checked
from optax_sam._base.losses import check_losses, check_per_example

_NAMES = ("loss_fn", "ascent_loss_fn", "scoring_loss_fn")


@dataclasses.dataclass(frozen=True)
class BatchLoss:
    """`loss_fn(params, batch) -> losses`, and what a group of examples asks it for.

    Attributes:
      name: What the user calls it, for messages.
      fn: `fn(params, *args)` returns losses and auxiliary data.
      args: The arguments of the step, the batch first.
      size: The number of losses that there have to be, if it matters.
    """

    name: str
    fn: Callable[..., tuple[Any, Any]]
    args: tuple[Any, ...]
    size: int | None = None

    @classmethod
    def of(cls, name: str, loss_fn: Any, batch: Any) -> "BatchLoss":
        """The same of any `loss_fn(params, batch)`; its auxiliary data are None."""
        if isinstance(loss_fn, cls):
            return loss_fn
        loss_fn = checked(called("sharpness_aware"), name, loss_fn, "params", "batch")
        return cls(name, lambda params, batch: (loss_fn(params, batch), None), (batch,))

    def __call__(self, params: optax.Params, batch: Any) -> jax.Array:
        """The losses of a batch."""
        return self.with_aux(params, batch)[0]

    def with_aux(self, params: optax.Params, batch: Any) -> tuple[jax.Array, Any]:
        """The losses of a batch, and auxiliary data."""
        args = (batch, *self.args[1:])[: len(self.args)]
        owner = called("sharpness_aware")
        try:
            losses, aux = self.fn(params, *args)
        except Exception as error:
            self._explain(owner, params, batch, error)
            raise
        if self.size is None:
            return check_losses(owner, self.name, losses), aux
        return check_per_example(owner, self.name, losses, self.size), aux

    def _explain(self, owner: str, params: Any, batch: Any, error: Exception) -> None:
        """Adds to an error what the function may not have been made for."""
        size, total = _num_examples(batch), _num_examples(self.args[:1])
        if size < total:
            error.add_note(
                f"{owner}: {self.name} was called with {size} of the {total} examples; "
                "only its first argument after params is cut. Pass all that belongs to "
                "the examples in it, as one batch such as (x, y)."
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
        return dataclasses.replace(self, args=args, size=size)


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
