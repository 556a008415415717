"""Trainings of a model that classifies images."""

from typing import Any

import flax.linen as nn
import numpy as np

from sam_examples.data import (
    Dataset,
    ImageFolder,
    Split,
    evaluation_batches,
    training_batches,
)
from sam_examples.settings.config import Config
from sam_examples.settings.methods import is_functional
from sam_examples.training.build import make_ascent_loss_fn
from sam_examples.training.evaluation import make_evaluate_batch
from sam_examples.training.step import (
    Objective,
    make_init,
    make_loss_fn,
    make_prepare,
    make_scoring_loss_fn,
)
from sam_examples.training.task import Evaluation, Task

EVALUATION_BATCH = 512
# Bounds what a call's batches take, on the host and on the device.
BYTES_PER_CALL = 2**26


def make_image_task(
    config: Config, dataset: Dataset, model: nn.Module, num_devices: int
) -> Task:
    """What a training is of that classifies images."""
    batches = training_batches(
        dataset.train,
        batch_size=config.batch_size,
        epochs=config.epochs,
        seed=config.seed,
    )
    steps = len(batches) // config.epochs
    size = config.batch_size * 4 * int(np.prod(dataset.train.image_shape))
    held_out = len(dataset.valid.labels) > 0
    image = np.arange(1)
    return Task(
        Objective(
            make_loss_fn(model, functional=is_functional(config.method)),
            make_scoring_loss_fn(model),
            make_prepare(dataset, config.augment),
            make_ascent_loss_fn(config, dataset),
        ),
        make_init(model, dataset),
        make_evaluate_batch(model, dataset),
        batches,
        steps_per_epoch=steps,
        steps_per_call=steps_per_call(
            steps, at_most=min(16, max(1, BYTES_PER_CALL // size))
        ),
        unit="images",
        units_per_step=config.batch_size,
        valid=evaluation_of(dataset.valid, num_devices) if held_out else None,
        sample=(
            evaluation_of(dataset.valid.take(image), num_devices) if held_out else None
        ),
    )


def evaluation_of(split: Any, num_devices: int) -> Evaluation:
    """All images of a split, in batches that the devices share evenly."""
    size = -(-EVALUATION_BATCH // num_devices) * num_devices
    return Evaluation(evaluation_batches(split, batch_size=size), len(split.labels))


def steps_per_call(num_steps: int, at_most: int = 16) -> int:
    """The most steps of one call that divide an epoch evenly: one shape, one compile.

    Args:
      num_steps: steps of an epoch.
      at_most: bounds how long nothing is heard of a call.
    """
    return max(d for d in range(1, at_most + 1) if num_steps % d == 0)


def content_of(split: Split | ImageFolder) -> Any:
    """What tells the images and labels of a split apart, wherever they are from."""
    if isinstance(split, Split):
        return split
    # Of images on the disk, which may be many gigabytes, their names stand for them.
    return split.labels, "\n".join(split.files)
