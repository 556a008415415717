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
from sam_examples.analysis.layers import make_score
from sam_examples.data import Dataset, load_digits
from sam_examples.models.convolution import PatchConv
from sam_examples.models.resnet import ResNet
from sam_examples.settings.command_line import require
from sam_examples.study.configurations import Configuration
from sam_examples.training.epochs import Epoch, draw_epoch, prepare_digits
from sam_examples.training.evaluation import Evaluate, make_evaluate
from sam_examples.training.step import (
    TrainState,
    make_init,
    make_prepare,
    make_step,
    make_train_steps,
)

Train = Callable[[TrainState, Epoch, Any], TrainState]


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
        _, self._num_steps, self._base = prepare_digits(options, 0)
        self.epoch_steps = self._num_steps // options.epochs
        self.dataset: Callable[[int], Dataset] = cache(
            lambda seed: load_digits(options.noise, seed)
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
        """Makes `train(state, epoch, rho) -> state`, which donates the state."""
        model = self.model(width)
        ascent_loss_fn = configuration.make_ascent_loss_fn(model)

        def train(state: TrainState, epoch: Epoch, rho: Any) -> TrainState:
            step = make_step(
                model,
                self.make_tx(configuration, rho),
                make_prepare(self.dataset(0)),
                ascent_loss_fn=ascent_loss_fn,
            )
            state, _ = make_train_steps(step)(state, *epoch)
            return state

        return jax.jit(train, donate_argnums=0)

    def start(self, configuration: Configuration, width: int, seed: int) -> TrainState:
        """The first state of a training."""
        state: TrainState = self._init(width)(seed, self.make_tx(configuration, 1.0))
        return state

    def epochs(self, seed: int, number: int) -> Epoch:
        """So many epochs, as one."""
        split, size = self.dataset(seed).train, self._options.batch_size
        epochs = [draw_epoch(split, size, seed, i) for i in range(number)]
        together: Epoch = jax.tree.map(lambda *x: jnp.concatenate(x), *epochs)
        return together

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
