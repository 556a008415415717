"""Trainings on the noisy digits, an epoch in each call."""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sam_examples.data import Dataset, Split, load_digits
from sam_examples.settings.command_line import NoisyDigits, check_training
from sam_examples.settings.optimizers import momentum_sgd
from sam_examples.training.step import Metrics, TrainState


class Digits(NamedTuple):
    """What a training on the digits begins with.

    Attributes:
      dataset: the digits, some of whose training labels are wrong.
      num_steps: steps of the whole training.
      base: the optimizer beneath every method.
    """

    dataset: Dataset
    num_steps: int
    base: optax.GradientTransformation


class Epoch(NamedTuple):
    """What `train_steps` takes besides the state, see `make_train_steps`."""

    batches: Split
    keys: jax.Array


def prepare_digits(options: NoisyDigits, seed: int) -> Digits:
    """Loads the digits, whose label noise the seed draws, and makes the base.

    Raises:
      ValueError: if an option is out of range.
    """
    dataset = load_digits(options.noise, seed)
    num_examples = len(dataset.train.labels)
    check_training(options, num_examples)
    num_steps = options.epochs * (num_examples // options.batch_size)
    base = momentum_sgd(options.learning_rate, num_steps, options.weight_decay)
    return Digits(dataset, num_steps, base)


def draw_epoch(split: Split, batch_size: int, seed: int, epoch: int) -> Epoch:
    """The batches of an epoch in an order of its own, and a key for each step."""
    key = jax.random.fold_in(jax.random.key(seed), epoch)
    indices = shuffled_batches(key, len(split.labels), batch_size)
    batches = jax.tree.map(jnp.asarray, split.take(indices))
    return Epoch(batches, jax.random.split(key, len(indices)))


def shuffled_batches(key: jax.Array, num_examples: int, batch_size: int) -> np.ndarray:
    """Indices `[steps, batch_size]` of an epoch, without an incomplete last batch."""
    steps = num_examples // batch_size
    order = np.asarray(jax.random.permutation(key, num_examples))
    return order[: steps * batch_size].reshape(steps, batch_size)


def timed_epoch(
    train_steps: Any, state: TrainState, epoch: Epoch
) -> tuple[TrainState, Metrics, float]:
    """Trains for an epoch; the new state, the metrics and the seconds of a step."""
    start = time.perf_counter()
    state, metrics = train_steps(state, *epoch)
    metrics.loss.block_until_ready()
    return state, metrics, (time.perf_counter() - start) / len(epoch.keys)
