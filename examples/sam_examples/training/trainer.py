"""A model in training on the devices of a mesh, and the figures of its epochs."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_sam import diagnostics
from sam_examples.data import prefetched
from sam_examples.devices.sharding import (
    AXIS,
    by_examples,
    make_mesh,
    of_opt_state,
    of_params,
    on_mesh,
    replicated,
)
from sam_examples.settings.command_line import one_line_errors
from sam_examples.settings.run_options import RunOptions
from sam_examples.training.build import Optimizer
from sam_examples.training.step import (
    Metrics,
    Objective,
    TrainState,
    make_step_of,
    make_train_steps,
)
from sam_examples.training.task import Evaluation, Task, num_examples

_fold_in_each: Any = jax.jit(jax.vmap(jax.random.fold_in, (None, 0)))


class Trainer:
    """A model in training.

    Attributes:
      state: parameters, running statistics and the optimizer's state.
      count: steps done.
    """

    def __init__(
        self,
        config: RunOptions,
        task: Task,
        optimizer: Optimizer,
        num_devices: int,
    ) -> None:
        """Draws the parameters, and puts them where they are to be."""
        self._mesh = make_mesh(num_devices)
        self._key = jax.random.key(config.seed)
        self._optimizer = optimizer
        self.state = self._init(config, task)
        self.count = 0
        step = make_step_of(task.objective, optimizer.tx, by_examples(self._mesh))
        shardings = jax.tree.map(lambda x: x.sharding, self.state)
        self._train = make_train_steps(
            step, out_shardings=(shardings, replicated(self._mesh))
        )
        self._evaluate: Any = jax.jit(task.evaluate)
        self._measure = None
        if optimizer.ascent is not None:
            self._measure = make_measure(task.objective, optimizer)

    def _init(self, config: RunOptions, task: Task) -> TrainState:
        everywhere = replicated(self._mesh)
        drawn = task.init(config.seed, optax.identity())
        params = of_params(self._mesh, drawn.params, config.fully_sharded)
        drawn = TrainState(
            jax.device_put(drawn.params, params),
            jax.device_put(drawn.batch_stats, everywhere),
            (),
        )
        init = make_opt_init(config, self._optimizer.tx, drawn.params, params)
        return drawn._replace(opt_state=init(drawn.params))

    def train(self, batches: Any) -> Metrics:
        """Takes a step on each of `batches[steps, batch_size, ...]`.

        The metrics are means over the steps; they may not be computed yet.
        """
        batches = self._place(batches, None, AXIS)
        keys = self._step_keys(num_examples(batches))
        self.state, metrics = self._train(self.state, batches, keys)
        self.count += len(keys)
        self._latest = batches, keys
        means: Metrics = metrics
        return means

    def measure(self) -> dict[str, float]:
        """Metrics of the ascent on the latest batch, by name; none without ascent."""
        if self._measure is None:
            return {}
        measured = self._measure(self.state, *self._latest)
        return {name: float(value) for name, value in measured._asdict().items()}

    def evaluate(self, evaluation: Evaluation) -> tuple[float, float]:
        """Mean loss and accuracy of the parameters as they are."""
        total = [0.0, 0.0]
        state = self.state
        batches = prefetched(evaluation.batches)
        while (stacked := next_batches(batches)) is not None:
            batch = jax.tree.map(lambda x: x[0], stacked)  # One batch in each call.
            inputs = self._place(batch, AXIS)
            sums = self._evaluate(state.params, state.batch_stats, *inputs)
            total = [total[0] + float(sums.loss), total[1] + float(sums.accuracy)]
        batches.close()
        loss, accuracy = (x / evaluation.total for x in total)
        return loss, accuracy

    def _step_keys(self, steps: int) -> jax.Array:
        """What a step draws depends on its number and the seed alone."""
        keys: jax.Array = _fold_in_each(self._key, self.count + np.arange(steps))
        return keys

    def _place(self, batch: Any, *axes: str | None) -> Any:
        return jax.device_put(batch, on_mesh(self._mesh, *axes))


def next_batches(batches: Iterator[Any]) -> Any:
    """The next of some batches, None after the last.

    A file that cannot be read ends the program with one line.
    """
    with one_line_errors():
        return next(batches, None)


def make_opt_init(
    config: RunOptions, tx: optax.GradientTransformation, params: Any, shardings: Any
) -> Any:
    """Makes `init(params) -> opt_state`, compiled; places lie as their parameters do.

    Raises:
      ValueError: if the base is an optimizer that cannot be used here.
    """
    try:
        state = of_opt_state(tx, jax.eval_shape(tx.init, params), params, shardings)
    except Exception as error:  # Optimizers raise what they like.
        raise ValueError(
            f"--base {config.base} does not work in this training ({error!r}); try "
            "--schedule constant, if it takes a number for learning rate only, or "
            "another base, such as sgd or adamw."
        ) from error
    return jax.jit(tx.init, out_shardings=state)


def make_measure(objective: Objective, optimizer: Optimizer) -> Any:
    """Makes `measure(state, batches, keys) -> AscentMetrics`, compiled.

    It is that of the last of the batches, as its step sees it: of all its examples
    together, or the mean over those that ascend together.
    """
    of_batch = diagnostics.ascent_metrics(
        objective.loss_fn,
        optimizer.ascent,
        has_aux=True,
        ascent_loss_fn=objective.ascent_loss_fn,
        scoring_loss_fn=objective.scoring_loss_fn,
    )

    def measure(state: TrainState, batches: Any, keys: jax.Array) -> Any:
        last = jax.tree.map(lambda x: x[-1], batches)
        batch, dropout_key = objective.prepare(last, keys[-1])
        size = optimizer.micro_batch_size

        def of_part(part: Any) -> Any:
            return of_batch(
                state.params, state.opt_state, part, state.batch_stats, dropout_key
            )

        if size is None:
            return of_part(batch)
        parts = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), batch)
        return jax.tree.map(jnp.mean, jax.lax.map(of_part, parts))

    return jax.jit(measure)
