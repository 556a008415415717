"""A training from its first step to its last: calls, epochs, checkpoints."""

import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from optax_sam import diagnostics
from sam_examples.data import prefetched
from sam_examples.reporting.metrics import MetricsWriter
from sam_examples.settings.run_options import RunOptions, as_json
from sam_examples.training.build import Optimizer
from sam_examples.training.checkpoints import Checkpoints, Progress, checksum
from sam_examples.training.step import Metrics
from sam_examples.training.task import Task, num_examples
from sam_examples.training.trainer import Trainer, next_batches

# Speeds are medians over so many calls, the latest.
MOST_TIMES = 1000


class Run:
    """A training: the model, its data, and the figures so far.

    Attributes:
      curves: figures of each epoch, lists by name; None where one was not measured.
      step_seconds: wall time of a step, in each of the latest calls of the compiled
        function but those that compiled it.
      num_steps: steps of the whole training.
      compiled: whether a step was made, and so compiled.
      evaluation_compiled: whether what an epoch ends with is.
    """

    def __init__(
        self,
        config: RunOptions,
        task: Task,
        optimizer: Optimizer,
        devices: int,
    ) -> None:
        """Draws the parameters, and opens the data."""
        self._config, self._task = config, task
        self._optimizer = optimizer
        self.trainer = Trainer(config, task, optimizer, devices)
        self.num_steps = task.num_steps
        self._batches = prefetched(task.batches, steps_per_call=task.steps_per_call)
        self._data = self._batches.get_state()
        self._calls: list[list[float]] = []
        self._pending: tuple[Metrics, int, int] | None = None
        self._clock: float | None = None
        self.compiled, self.evaluation_compiled = False, False
        self.curves: dict[str, list[float | None]] = defaultdict(list)
        self.step_seconds: list[float] = []

    @property
    def steps(self) -> int:
        """How many are done."""
        return self.trainer.count

    @property
    def epoch(self) -> int:
        """How many epochs are done."""
        return self.steps // self._task.steps_per_epoch

    @property
    def at_end_of_epoch(self) -> bool:
        """Whether the last step was that of an epoch."""
        return self.steps % self._task.steps_per_epoch == 0

    def advance(self, bar: Any, writer: MetricsWriter) -> None:
        """Makes a call of the compiled function, and reports the one before it.

        So the devices have work while the next batches are handed to them.
        """
        if self._pending is None:
            self._clock = time.perf_counter() if self.compiled else None
        batches = next_batches(self._batches)
        # An iterator that has raised has lost its place.
        self._data = self._batches.get_state()
        metrics = self.trainer.train(batches)
        self.collect(bar, writer)
        self._pending = metrics, self.steps, num_examples(batches)
        self.compiled = True

    def collect(self, bar: Any, writer: MetricsWriter) -> None:
        """Waits for the last call, and reports it."""
        if self._pending is None:
            return
        metrics, step, size = self._pending
        self._pending = None
        self._calls.append([float(x) for x in metrics if x is not None])
        now = time.perf_counter()
        if self._clock is not None:
            self.step_seconds.append((now - self._clock) / size)
            del self.step_seconds[:-MOST_TIMES]
        self._clock = now
        means = call_means(self._calls[-1:])
        figures = {name: f"{mean:.3f}" for name, mean in means.items()}
        if self.step_seconds:
            figures[f"{self._task.unit}/s"] = f"{self.units_per_second:,.0f}"
        bar.set_postfix(figures, refresh=False)
        bar.update(size)
        writer.write_steps(step, means)

    @property
    def units_per_second(self) -> float:
        """How many images or the like are trained on; by the median over calls."""
        return self._task.units_per_step / float(np.median(self.step_seconds))

    def compile_evaluation(self) -> None:
        """Compiles what `end_epoch` calls, by calling it for a few examples."""
        if self._task.sample is not None:
            self.trainer.evaluate(self._task.sample)
        if self._measures:
            self.trainer.measure()
        self.evaluation_compiled = True

    @property
    def _measures(self) -> bool:
        every = self._config.measure_every
        return every > 0 and self._optimizer.ascent is not None

    def end_epoch(self) -> None:
        """Evaluates, measures the ascent if it is time to, and adds to the curves."""
        means = call_means(self._calls)
        valid_loss, valid_accuracy = None, None
        if self._task.valid is not None:
            valid_loss, valid_accuracy = self.trainer.evaluate(self._task.valid)
        row: dict[str, float | None] = {
            "step": self.steps,
            "learning_rate": float(self._optimizer.learning_rate(self.steps - 1)),
            **{f"train_{name}": mean for name, mean in means.items()},
            "valid_loss": valid_loss,
            "valid_accuracy": valid_accuracy,
        }
        if self._measures:
            every = self._config.measure_every
            due = self.epoch % every == 0 or self.steps == self.num_steps
            names = diagnostics.AscentMetrics._fields
            row |= self.trainer.measure() if due else dict.fromkeys(names)
        # A run that is resumed may measure what it did not before, or no longer.
        epochs = len(self.curves["step"])
        for name in {**self.curves, **row}:
            self.curves.setdefault(name, [None] * epochs).append(row.get(name))
        self._calls = []

    def save(self, checkpoints: Checkpoints, settings: Mapping[str, Any]) -> None:
        """Writes a checkpoint of what was done so far, unless there is one."""
        if checkpoints.steps()[-1:] == [self.steps]:
            return
        progress = Progress(
            self.steps,
            dict(settings),
            dict(self.curves),
            self._calls,
            self.step_seconds,
            self._data,
        )
        checkpoints.save(self.trainer.state, progress)

    def resume(self, checkpoints: Checkpoints, progress: Progress) -> None:
        """Goes on from a checkpoint, on the devices of this run."""
        self.trainer.state = checkpoints.restore(progress, self.trainer.state)
        self.trainer.count = progress.steps
        self.curves.update(progress.curves)
        self._calls = progress.calls
        self.step_seconds = progress.step_seconds
        self._data = progress.data
        self._batches.set_state(progress.data)


def call_means(calls: list[list[float]]) -> dict[str, float]:
    """The figures of some calls by name; the gap only over those that have one."""
    loss, accuracy, *gap = np.array(calls).T
    means = {"loss": np.mean(loss), "accuracy": np.mean(accuracy)}
    if gap and not np.isnan(gap).all():
        means["gap"] = np.nanmean(gap)
    return {name: float(mean) for name, mean in means.items()}


def training_settings(
    config: RunOptions, chosen: Mapping[str, Any], content: Any
) -> dict[str, Any]:
    """All that the outcome of a training depends on, as it is in JSON.

    Args:
      config: all settings.
      chosen: the method's hyperparameters.
      content: the data, a tree of arrays and strings, wherever it was read from.
    """
    settings = {**as_json(config), **chosen}
    for name in (*config.of_the_machine, "hyperparameters"):
        del settings[name]
    settings["checksum of the data"] = checksum(content)
    return settings
