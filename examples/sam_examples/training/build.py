"""From a configuration to a model, an optimizer and the loss of its ascent."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import optax_sam
from optax_sam import implicit
from sam_examples.data import Dataset, Split
from sam_examples.models import make
from sam_examples.models.convolution import fastest_convolution
from sam_examples.settings.command_line import NoisyDigits, require
from sam_examples.settings.config import Config
from sam_examples.settings.methods import make_ascent, sharpen
from sam_examples.settings.optimizers import make_base, make_schedule
from sam_examples.settings.run_options import RunOptions
from sam_examples.training.step import LossFn, make_loss_fn
from sam_examples.training.task import Task


def make_network(
    config: Config | NoisyDigits,
    dataset: Dataset,
    *,
    backward: implicit.Channels | None = None,
) -> nn.Module:
    """The model of a training, with convolutions that are fast here.

    Args:
      config: names the model.
      dataset: says the number of classes and the size of the images.
      backward: the backward rule of the products of all layers, the usual by default.
    """
    dense: Any = nn.Dense
    if backward is not None:
        dense = partial(dense, dot_general=backward.dot_general)
    model: nn.Module = make(
        config.model,
        dataset.num_classes,
        image_size=dataset.train.image_shape[0],
        norm=config.norm,
        dtype=jnp.dtype(config.dtype),
        conv=fastest_convolution(jax.default_backend(), backward),
        dense=dense,
        dropout=config.dropout,
        width=config.width,
        stages=config.stages,
        shared_names=config.shared_names,
    )
    return model


def check_layers(config: RunOptions, task: Task) -> None:
    """Raises a ValueError if the model has none of the layers to perturb."""
    if config.perturb:
        init = partial(task.init, config.seed, optax.identity())
        optax_sam.select_layers(*config.perturb)(jax.eval_shape(init).params)


class Optimizer:
    """The optimizer of a configuration.

    Attributes:
      tx: the transformation.
      ascent: its ascent, None for the base alone.
      micro_batch_size: how many examples ascend together, None for all of a batch.
      learning_rate: a schedule of the count of steps.
    """

    def __init__(
        self, config: RunOptions, values: Mapping[str, Any], steps_per_epoch: int
    ) -> None:
        """Makes it.

        Args:
          config: names the method and the base.
          values: the method's hyperparameters.
          steps_per_epoch: for schedules.

        Raises:
          TypeError: if an argument of the base has a wrong type or is missing.
          ValueError: if a hyperparameter is out of range.
        """
        num_steps = config.epochs * steps_per_epoch
        warmup = round(config.warmup_epochs * steps_per_epoch)
        require(
            warmup < num_steps,
            f"--warmup-epochs must leave steps of the {num_steps:,} of the training",
            config.warmup_epochs,
        )
        self.learning_rate = make_schedule(
            config.schedule, config.learning_rate, num_steps, warmup
        )
        varies = config.schedule != "constant" or warmup
        base = make_base(
            config.base,
            # Some of Optax's optimizers take numbers only.
            self.learning_rate if varies else config.learning_rate,
            config.weight_decay,
            config.base_hyperparameters,
        )
        self.ascent = make_ascent(
            config.method, values, num_steps, key=config.seed, perturb=config.perturb
        )
        self.micro_batch_size = values.get("micro_batch_size")
        self.tx = sharpen(config.method, base, self.ascent, values)


def make_ascent_loss_fn(config: Config, dataset: Dataset) -> LossFn | None:
    """The loss of the clean pass, None where it is that of the perturbed one."""
    if config.implicit is None and config.ascent_part == 1:
        return None
    backward = None
    if config.implicit is not None:
        backward = implicit.Channels(config.implicit)
    loss_fn = make_loss_fn(make_network(config, dataset, backward=backward))

    def ascent_loss_fn(
        params: Any, batch: Split, batch_stats: Any, key: jax.Array
    ) -> tuple[jax.Array, tuple[Any, jax.Array]]:
        # One in so many, and not the first: every device has some of them.
        part = jax.tree.map(lambda x: x[:: config.ascent_part], batch)
        return loss_fn(params, part, batch_stats, key)

    return ascent_loss_fn
