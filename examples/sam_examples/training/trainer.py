"""A model in training on the devices of a mesh, and the figures of its epochs."""

from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_sam import diagnostics
from sam_examples.data import Dataset, Split, evaluation_batches, prefetched
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
from sam_examples.settings.config import Config
from sam_examples.training.build import Optimizer, make_ascent_loss_fn
from sam_examples.training.evaluation import make_evaluate_batch
from sam_examples.training.step import (
    LossFn,
    Metrics,
    Prepare,
    TrainState,
    make_init,
    make_loss_fn,
    make_prepare,
    make_scoring_loss_fn,
    make_step,
    make_train_steps,
)

EVALUATION_BATCH = 512
_fold_in_each: Any = jax.jit(jax.vmap(jax.random.fold_in, (None, 0)))


class Trainer:
    """A model in training.

    Attributes:
      state: parameters, running statistics and the optimizer's state.
      count: steps done.
    """

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        model: nn.Module,
        optimizer: Optimizer,
        num_devices: int,
    ) -> None:
        """Draws the parameters, and puts them where they are to be."""
        self._mesh = make_mesh(num_devices)
        self._key = jax.random.key(config.seed)
        self._optimizer = optimizer
        self.state = self._init(config, dataset, model)
        self.count = 0
        ascent_loss_fn = make_ascent_loss_fn(config, dataset)
        prepare = make_prepare(dataset, config.augment)
        step = make_step(
            model,
            optimizer.tx,
            prepare,
            ascent_loss_fn=ascent_loss_fn,
            batch_sharding=by_examples(self._mesh),
        )
        shardings = jax.tree.map(lambda x: x.sharding, self.state)
        self._train = make_train_steps(
            step, out_shardings=(shardings, replicated(self._mesh))
        )
        self._evaluate = jax.jit(make_evaluate_batch(model, dataset))
        self._measure = None
        if optimizer.ascent is not None:
            self._measure = make_measure(model, optimizer, prepare, ascent_loss_fn)

    def _init(self, config: Config, dataset: Dataset, model: nn.Module) -> TrainState:
        everywhere = replicated(self._mesh)
        drawn = make_init(model, dataset)(config.seed, optax.identity())
        params = of_params(self._mesh, drawn.params, config.fully_sharded)
        drawn = TrainState(
            jax.device_put(drawn.params, params),
            jax.device_put(drawn.batch_stats, everywhere),
            (),
        )
        init = make_opt_init(config, self._optimizer.tx, drawn.params, params)
        return drawn._replace(opt_state=init(drawn.params))

    def train(self, batches: Split) -> Metrics:
        """Takes a step on each of `batches[steps, batch_size, ...]`.

        The metrics are means over the steps; they may not be computed yet.
        """
        batches = self._place(batches, None, AXIS)
        keys = self._step_keys(len(batches.labels))
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

    def evaluate(self, split: Any) -> tuple[float, float]:
        """Mean loss and accuracy on a split, of the parameters as they are."""
        size = -(-EVALUATION_BATCH // self._mesh.size) * self._mesh.size
        total = [0.0, 0.0]
        state = self.state
        batches = prefetched(evaluation_batches(split, batch_size=size))
        while (stacked := next_batches(batches)) is not None:
            batch = jax.tree.map(lambda x: x[0], stacked)  # One batch in each call.
            inputs = self._place(batch, AXIS)
            sums = self._evaluate(state.params, state.batch_stats, *inputs)
            total = [total[0] + float(sums.loss), total[1] + float(sums.accuracy)]
        batches.close()
        loss, accuracy = (x / len(split.labels) for x in total)
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
    config: Config, tx: optax.GradientTransformation, params: Any, shardings: Any
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


def make_measure(
    model: nn.Module,
    optimizer: Optimizer,
    prepare: Prepare,
    ascent_loss_fn: LossFn | None,
) -> Any:
    """Makes `measure(state, batches, keys) -> AscentMetrics`, compiled.

    It is that of the last of the batches, as its step sees it: of all its images
    together, or the mean over those that ascend together.
    """
    of_batch = diagnostics.ascent_metrics(
        make_loss_fn(model),
        optimizer.ascent,
        has_aux=True,
        ascent_loss_fn=ascent_loss_fn,
        scoring_loss_fn=make_scoring_loss_fn(model),
    )

    def measure(state: TrainState, batches: Split, keys: jax.Array) -> Any:
        batch, dropout_key = prepare(batches.take(-1), keys[-1])
        size = optimizer.micro_batch_size

        def of_part(part: Split) -> Any:
            return of_batch(
                state.params, state.opt_state, part, state.batch_stats, dropout_key
            )

        if size is None:
            return of_part(batch)
        parts = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), batch)
        return jax.tree.map(jnp.mean, jax.lax.map(of_part, parts))

    return jax.jit(measure)
