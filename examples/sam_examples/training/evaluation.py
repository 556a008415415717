"""How good a model is on the examples of a split, in evaluation mode."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from sam_examples.data import Dataset, Split, normalized
from sam_examples.training.step import Metrics, TrainState

Evaluate = Callable[[TrainState, Split], Metrics]


def make_evaluate_batch(model: nn.Module, dataset: Dataset) -> Any:
    """Makes `evaluate(params, batch_stats, batch, weights) -> Metrics`, to be compiled.

    The model is in evaluation mode, and the metrics are sums over the examples, each
    times its weight, of which there is one each, `[B]`.
    """

    def evaluate(
        params: Any, batch_stats: Any, batch: Split, weights: jax.Array
    ) -> Metrics:
        variables = {"params": params, "batch_stats": batch_stats}
        images, labels = normalized(batch, dataset)
        logits: Any = model.apply(variables, images, train=False)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        correct = jnp.argmax(logits, axis=-1) == labels
        return Metrics(jnp.sum(weights * losses), jnp.sum(weights * correct))

    return evaluate


def make_evaluate(
    model: nn.Module, dataset: Dataset, *, chunk_size: int = 500
) -> Evaluate:
    """Makes `evaluate(state, split) -> Metrics` over the whole split, compiled.

    The model is in evaluation mode, and sees `chunk_size` images at a time.
    """
    evaluate_batch = make_evaluate_batch(model, dataset)

    def evaluate(params: Any, batch_stats: Any, split: Split) -> Metrics:
        num_examples = len(split.labels)
        size = min(chunk_size, num_examples)
        chunks = -(-num_examples // size)
        # Examples of no weight fill the last chunk up.
        index = jnp.arange(chunks * size).reshape(chunks, size)
        weights = jnp.where(index < num_examples, 1.0, 0.0)
        sums = jax.lax.map(
            lambda chunk: evaluate_batch(params, batch_stats, *chunk),
            (split.take(jnp.minimum(index, num_examples - 1)), weights),
        )
        means: Metrics = jax.tree.map(lambda x: jnp.sum(x) / num_examples, sums)
        return means

    compiled: Any = jax.jit(evaluate)
    return lambda state, split: compiled(state.params, state.batch_stats, split)
