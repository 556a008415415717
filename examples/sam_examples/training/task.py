"""What a training is of: an objective, and the batches to train and evaluate on."""

from collections.abc import Callable
from typing import Any, NamedTuple

import grain

from sam_examples.training.step import InitState, Metrics, Objective


class Evaluation(NamedTuple):
    """Examples to evaluate on.

    Attributes:
      batches: pairs of a batch and the weights of its examples `[B]`.
      total: what sums over all of them are divided by.
    """

    batches: grain.MapDataset
    total: float


class Task(NamedTuple):
    """What a training is of.

    Attributes:
      objective: what its steps minimise.
      init: `init(seed, tx) -> TrainState`.
      evaluate: `evaluate(params, batch_stats, batch, weights) -> Metrics`, sums over a
        batch in evaluation mode, of which each example counts by its weight.
      batches: those of all steps, in order.
      steps_per_epoch: how many of them are an epoch.
      steps_per_call: how many each call of the compiled function has; they are of one
        shape.
      unit: what speeds are counted in, such as images.
      units_per_step: how many of them a step has, on average.
      valid: held-out examples, None without any.
      sample: some of them, in batches of all shapes, to compile for.
    """

    objective: Objective
    init: InitState
    evaluate: Callable[..., Metrics]
    batches: grain.MapDataset
    steps_per_epoch: int
    steps_per_call: int
    unit: str
    units_per_step: float
    valid: Evaluation | None
    sample: Evaluation | None

    @property
    def num_steps(self) -> int:
        """How many steps the whole training has."""
        return len(self.batches)


def num_examples(batch: Any) -> int:
    """The length of the first axis of a batch, or of stacked ones."""
    leaf: Any = batch[0]
    return len(leaf)
