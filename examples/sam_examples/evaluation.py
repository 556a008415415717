"""How good a model is on the examples of a split, in evaluation mode."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from sam_examples.data import Dataset, Split, normalize
from sam_examples.training import Metrics, TrainState

Evaluate = Callable[[TrainState, Split], Metrics]


def make_evaluate_batch(model: nn.Module, dataset: Dataset) -> Any:
    """Makes `evaluate(params, batch_stats, batch, weights) -> Metrics`, compiled.

    The model is in evaluation mode, and the metrics are sums over the examples, each
    times its weight, of which there is one each, `[B]`.
    """

    def evaluate(
        params: Any, batch_stats: Any, batch: Split, weights: jax.Array
    ) -> Metrics:
        logits: Any = model.apply(
            {"params": params, "batch_stats": batch_stats},
            normalize(batch.images, dataset.mean, dataset.std),
            train=False,
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        correct = jnp.argmax(logits, axis=-1) == batch.labels
        return Metrics(jnp.sum(weights * losses), jnp.sum(weights * correct))

    return jax.jit(evaluate)


def make_evaluate(
    model: nn.Module, dataset: Dataset, *, chunk_size: int = 500
) -> Evaluate:
    """Makes `evaluate(state, split) -> Metrics` over the whole split, compiled.

    The model is in evaluation mode, and sees `chunk_size` images at a time.
    """

    def evaluate(params: Any, batch_stats: Any, split: Split) -> Metrics:
        def evaluate_example(example: Split) -> Metrics:
            logits = model.apply(
                {"params": params, "batch_stats": batch_stats},
                normalize(example.images[None], dataset.mean, dataset.std),
                train=False,
            )[0]
            loss = optax.softmax_cross_entropy_with_integer_labels(
                logits, example.labels
            )
            return Metrics(loss, jnp.argmax(logits) == example.labels)

        # What does not fill a chunk is evaluated as well, as a chunk of its own.
        metrics = jax.lax.map(evaluate_example, split, batch_size=chunk_size)
        return Metrics(*map(jnp.mean, metrics))

    compiled = jax.jit(evaluate)
    return lambda state, split: compiled(state.params, state.batch_stats, split)
