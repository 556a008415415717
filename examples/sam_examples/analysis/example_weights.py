"""How RW-SAM weights the examples as a training goes on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import optax_sam
from sam_examples.data import Dataset, Split, load_digits, normalized
from sam_examples.reporting.figures import plot_weights
from sam_examples.training.epochs import shuffled_batches
from sam_examples.training.step import TrainState, make_loss_fn


class WeightsOverTime:
    """RW-SAM's weights of all training images, epoch by epoch.

    Attributes:
      weights: `[N]` for each epoch, relative to equal weights; always in batches of the
        same images, with other signs in each epoch.
    """

    def __init__(
        self, model: nn.Module, dataset: Dataset, batch_size: int, values: Any
    ) -> None:
        """Cuts the training images into batches."""
        key = jax.random.key(0)
        self.index = shuffled_batches(key, len(dataset.train.labels), batch_size)
        self._batches = normalized(dataset.train, dataset).take(self.index)
        self._weigh = make_weigh(model, values)
        self.weights: list[np.ndarray] = []

    def __call__(self, method: str, state: TrainState) -> None:
        """Adds those of the parameters as they are, if they are RW-SAM's."""
        if method == "rw_sam":
            key = jax.random.fold_in(jax.random.key(1), len(self.weights))
            self.weights.append(np.asarray(self._weigh(state, self._batches, key)))


def make_weigh(model: nn.Module, values: Any) -> Callable[..., jax.Array]:
    """Makes `weigh(state, batches, key) -> weights[batches, batch_size]`, compiled."""
    loss_fn = make_loss_fn(model)
    known = {name: values[name] for name in ("strength", "num_probes", "estimator")}

    def weigh(state: TrainState, batches: Split, key: jax.Array) -> jax.Array:
        def of_batch(inputs: tuple[jax.Array, Split]) -> jax.Array:
            number, batch = inputs
            link = optax_sam.reweight_by_sharpness(
                **known, key=jax.random.fold_in(key, number)
            )
            seen = []

            def pullback(weights: jax.Array) -> Any:  # Which is handed the weights.
                seen.append(weights)
                return state.params

            def losses(params: Any, batch: Split) -> jax.Array:
                return loss_fn(params, batch, state.batch_stats, key)[0]

            link.update(
                state.params,
                link.init(state.params),
                state.params,
                loss_fn=losses,
                batch=batch,
                losses=losses(state.params, batch),
                pullback=pullback,
            )
            return seen[0] * len(batch.labels)

        numbers = jnp.arange(len(batches.labels))
        weights: jax.Array = jax.lax.map(of_batch, (numbers, batches))
        return weights

    return jax.jit(weigh)


def draw_weights(
    history: WeightsOverTime, noise: float, dataset: Dataset, seed: int, path: Path
) -> None:
    """Draws RW-SAM's weights of examples with right and with wrong labels."""
    clean = load_digits(0.0, seed).train.labels[history.index]
    right = clean == dataset.train.labels[history.index]
    weights = np.stack(history.weights)  # [epochs, batches, batch_size]
    groups = {"right label": weights[:, right], "wrong label": weights[:, ~right]}
    size = weights.shape[-1]
    effective = np.mean(size / np.sum(weights**2, axis=-1), axis=-1)
    plot_weights(
        {name: group for name, group in groups.items() if group.size},
        effective,
        f"RW-SAM's weights, {100 * noise:g} % wrong labels",
        path,
    )
