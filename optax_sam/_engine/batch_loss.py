"""The loss of a batch, as `value_and_update` hands it to the optimizer."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_sam._base.checks import checked
from optax_sam._base.losses import check_losses


@dataclasses.dataclass(frozen=True)
class BatchLoss:
    """`loss_fn(params, batch) -> losses`, and what a group of examples asks it for.

    Attributes:
      fn: `fn(params, *args)` returns losses and auxiliary data.
      args: The arguments of the step, the batch first.
      size: The number of losses that there have to be, if it matters.
    """

    fn: Callable[..., tuple[Any, Any]]
    args: tuple[Any, ...]
    size: int | None = None

    @classmethod
    def of(cls, loss_fn: Any) -> "BatchLoss":
        """The same of any `loss_fn(params, batch)`; its auxiliary data are None."""
        if isinstance(loss_fn, cls):
            return loss_fn
        loss_fn = checked("loss_fn", loss_fn, "params", "batch")
        return cls(lambda params, batch: (loss_fn(params, batch), None), (None,))

    def __call__(self, params: optax.Params, batch: Any) -> jax.Array:
        """The losses of a batch."""
        return self.with_aux(params, batch)[0]

    def with_aux(self, params: optax.Params, batch: Any) -> tuple[jax.Array, Any]:
        """The losses of a batch, and auxiliary data."""
        args = (batch, *self.args[1:])[: len(self.args)]
        losses, aux = self.fn(params, *args)
        shape = losses.shape if isinstance(losses, jax.Array) else None
        if shape is not None and self.size is not None and shape != (self.size,):
            raise ValueError(
                f"sharpness_aware: micro_batch_size = {self.size}, and loss_fn "
                f"returned losses of shape {list(shape)} for a micro-batch; they must "
                f"be those of its examples, shape [{self.size}]. Only the first "
                "argument after params is cut into micro-batches: pass all that "
                "belongs to the examples in it, as one pytree such as (x, y), and "
                "leave the mean over the batch out of loss_fn."
            )
        return check_losses(losses), aux

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


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _fold_in(keys: jax.Array, number: jax.Array) -> jax.Array:
    """Folds a number into each of an array of keys."""
    fold_in: Callable[..., jax.Array] = jax.random.fold_in
    for _ in range(keys.ndim):
        fold_in = jax.vmap(fold_in, (0, None))
    return fold_in(keys, number)
