"""The training of a study: the noisy digits, the results in a file, the best rho."""

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_sam
from sam_examples.benchmarking.configurations import Configuration
from sam_examples.command_line import require
from sam_examples.data import Dataset, Split, load_digits
from sam_examples.evaluation import Evaluate, make_evaluate
from sam_examples.layers import make_score
from sam_examples.models.convolution import PatchConv
from sam_examples.models.resnet import ResNet
from sam_examples.optimizers import momentum_sgd
from sam_examples.training import (
    TrainState,
    make_init,
    make_train_steps,
    shuffled_batches,
)

Train = Callable[[TrainState, Split, jax.Array, Any], TrainState]


class Runs:
    """Results in a file, a line of JSON each, so that none is computed twice."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Reads the file, if there is one.

        Raises:
          ValueError: if it has results of other settings.
        """
        self._path = path
        self._settings = dict(settings)
        self._results: dict[str, Any] = {}
        for line in path.read_text().splitlines() if path.exists() else []:
            record = json.loads(line)
            require(
                record["settings"] == self._settings,
                f"{path} is of {record['settings']}; give these options or another "
                "--out",
                self._settings,
            )
            self._results[json.dumps(record["key"])] = record["result"]

    def once(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """The result of this key, out of the file or made and added to it."""
        if json.dumps(key) not in self._results:
            record = {"key": key, "result": make(), "settings": self._settings}
            with self._path.open("a") as file:
                file.write(json.dumps(record) + "\n")
            self._results[json.dumps(key)] = record["result"]
        return self._results[json.dumps(key)]


class Digits:
    """The training of compare.py: its data, its base optimizer and its batches.

    Attributes:
      epoch_steps: steps of an epoch.
    """

    def __init__(self, options: Any) -> None:
        """Loads the digits."""
        self._options = options
        self.dataset: Callable[[int], Dataset] = cache(
            lambda seed: load_digits(options.noise, seed)
        )
        num_examples = len(self.dataset(0).train.labels)
        self.epoch_steps = num_examples // options.batch_size
        self._num_steps = options.epochs * self.epoch_steps
        self._base = momentum_sgd(
            options.learning_rate, self._num_steps, options.weight_decay
        )

    @staticmethod
    @cache
    def model(width: int) -> ResNet:
        """A network of three stages of a block each, fast in a loop on the CPU."""
        return ResNet((1, 1, 1), 10, width=width, conv=PatchConv)

    def make_tx(
        self, configuration: Configuration, rho: Any
    ) -> optax.GradientTransformation:
        """The optimizer of a configuration."""
        return configuration.make_tx(self._base, rho, self._num_steps, self.epoch_steps)

    @cache  # noqa: B019
    def make_train(self, configuration: Configuration, width: int) -> Train:
        """Makes `train(state, split, indices, rho) -> state`, which donates."""
        model = self.model(width)
        ascent_loss_fn = configuration.make_ascent_loss_fn(model)

        def train(
            state: TrainState, split: Split, indices: jax.Array, rho: Any
        ) -> TrainState:
            train_steps = make_train_steps(
                model,
                self.make_tx(configuration, rho),
                self.dataset(0),
                ascent_loss_fn=ascent_loss_fn,
            )
            # Nothing is drawn with the key, as there is no dropout.
            state, _ = train_steps(state, split, indices, jax.random.key(0))
            return state

        return jax.jit(train, donate_argnums=0)

    def start(
        self, configuration: Configuration, width: int, seed: int
    ) -> tuple[TrainState, Split]:
        """The first state of a training, and the split that it trains on."""
        tx = self.make_tx(configuration, 1.0)
        state = self._init(width)(seed, tx)
        return state, jax.tree.map(jnp.asarray, self.dataset(seed).train)

    def batches(self, seed: int, epochs: int) -> jax.Array:
        """Indices `[steps, batch_size]` of the examples of each step."""
        num_examples = len(self.dataset(seed).train.labels)
        key = jax.random.key(seed)
        return jnp.concatenate(
            [
                shuffled_batches(
                    jax.random.fold_in(key, epoch),
                    num_examples,
                    self._options.batch_size,
                )
                for epoch in range(epochs)
            ]
        )

    def accuracies(self, state: TrainState, width: int, seed: int) -> dict[str, float]:
        """Accuracy on the validation and the test split."""
        dataset = self.dataset(seed)
        splits = {"valid": dataset.valid, "test": dataset.test}
        evaluate = self._evaluate(width)
        return {
            name: float(evaluate(state, split).accuracy)
            for name, split in splits.items()
        }

    def layers_of_large_score(
        self, state: TrainState, width: int, seed: int, sparsity: float
    ) -> Any:
        """A mask of the layers whose weights have the most Fisher information."""
        score = make_score(self.model(width), self.dataset(seed), num_examples=128)
        return optax_sam.choose_layers(score(state), sparsity)

    @cache  # noqa: B019
    def _init(self, width: int) -> Any:
        return make_init(self.model(width), self.dataset(0))

    @cache  # noqa: B019
    def _evaluate(self, width: int) -> Evaluate:
        return make_evaluate(self.model(width), self.dataset(0))


def best_rho(
    score: Callable[[float], float], low: int = -6, high: int = 14
) -> tuple[float, dict[float, float]]:
    """Looks for the rho of the largest score.

    From 0.25 on rho doubles, until the score falls below 0.6 of the best one, as it
    does where training collapses. It is halved while the smallest is the best. Then
    comes what is halfway to the neighbours of the best.

    Args:
      score: the function to maximise.
      low: the smallest rho to try is 0.5 * 2 ** (low / 2), for an even number.
      high: and the largest is 0.5 * 2 ** (high / 2).

    Returns:
      The best rho, and all scores by rho.
    """
    scores: dict[int, float] = {}

    def rho(place: int) -> float:
        return round(0.5 * 2 ** (place / 2), 3)

    def look(place: int) -> int:
        if place not in scores and low <= place <= high:
            scores[place] = score(rho(place))
        return max(scores, key=lambda place: scores[place])

    place, best = -2, look(-2)
    while place < high and scores[place] >= 0.6 * scores[best]:
        place += 2
        best = look(place)
    while best == min(scores) and best > low:
        best = look(best - 2)
    for neighbour in (best - 1, best + 1):
        look(neighbour)
    best = look(best)
    return rho(best), {rho(place): scores[place] for place in sorted(scores)}
