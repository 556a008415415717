"""What train.py is asked for: its options, and what follows from them."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from checkpoints import checksum
from command_line import require
from data import Dataset, load_cifar10, load_digits
from methods import METHODS

Directory = Annotated[Path | None, tyro.conf.arg(metavar="DIR")]
Int = Annotated[int | None, tyro.conf.arg(metavar="INT")]
Float = Annotated[float | None, tyro.conf.arg(metavar="FLOAT")]


@dataclasses.dataclass(frozen=True)
class Options:
    """Trains a ResNet with one method, and reports its accuracy on held-out images.

    The accuracy is that after the last epoch, on images that nothing was chosen on.
    Where the default is None, it is what suits the data set. On CIFAR-10 that is the
    protocol of the papers: ResNet-18 (stages 2 2 2 2, width 64), 200 epochs, batches of
    128, learning rate 0.05, weight decay 5e-4 with SGD and 1e-3 with any other method,
    rho 0.1 (ASAM 0.5), with random crops, flips and Cutout.

    Checkpoints are in checkpoints/ in the directory of the results. A run goes on from
    one bit for bit on as many devices as before, and with the same settings; only the
    number of devices and those of the checkpoints may change.
    """

    method: Annotated[str, tyro.conf.arg(help=f"One of {', '.join(METHODS)}.")] = "sam"
    dataset: Literal["digits", "cifar10"] = "digits"
    """The digits come with scikit-learn; CIFAR-10 is read from --data-dir."""
    data_dir: Directory = None
    """Where cifar-10-batches-py or cifar-10-batches-bin is."""
    noise: float = 0.0
    """Share of the training labels that are replaced by another class."""
    epochs: Int = None
    """Passes over the training images."""
    batch_size: Int = None
    """Images of a step."""
    learning_rate: Float = None
    """At the start; it falls to 0 along a cosine."""
    weight_decay: Float = None
    """L2 penalty of all parameters."""
    stages: Annotated[tuple[int, ...] | None, tyro.conf.arg(metavar="INT ...")] = None
    """Blocks in each stage of the ResNet."""
    width: Int = None
    """Channels of the first stage, which double in each stage; 8 suits a CPU."""
    norm: Annotated[
        Literal["batch", "group"] | None, tyro.conf.arg(metavar="batch|group")
    ] = None
    """Normalisation: over the batch, or over groups of channels of each image."""
    dropout: Float = None
    """Dropout rate on the features before the last layer."""
    seed: int = 0
    """Draws label noise, parameters, batches and augmentation."""
    hyperparameters: tuple[str, ...] = ()
    """Changes of the method's hyperparameters, such as rho=0.05 theta=0.2."""
    devices: Int = None
    """Devices that share each batch. By default all; on a CPU, which simulates, one."""
    out: Directory = None
    """Directory of the results. By default a new one in runs/."""
    checkpoint_every: Annotated[int, tyro.conf.arg(metavar="EPOCHS")] = 1
    """Epochs from a checkpoint to the next; the last epoch always makes one."""
    keep: int = 3
    """How many checkpoints stay."""
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """Goes on from the last checkpoint in --out; begins if there is none."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a run is trained with, see `Options`; by default what suits the digits."""

    epochs: int = 40
    batch_size: int = 64
    learning_rate: float = 0.1
    weight_decay: float = 3e-3
    stages: tuple[int, ...] = (1, 1, 1)
    width: int = 8
    norm: str = "batch"
    dropout: float = 0.0
    augmented: bool = False


def make_recipe(options: Options) -> Recipe:
    """What suits the data set, and the options that were given instead."""
    recipe = Recipe()
    if options.dataset == "cifar10":
        recipe = Recipe(
            epochs=200,
            batch_size=128,
            learning_rate=0.05,
            weight_decay=5e-4 if options.method == "sgd" else 1e-3,
            stages=(2, 2, 2, 2),
            width=64,
            augmented=True,
        )
    given = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(recipe)
        if getattr(options, field.name, None) is not None
    }
    return dataclasses.replace(recipe, **given)


def load(options: Options) -> Dataset:
    """Loads the data set.

    Raises:
      FileNotFoundError: if a file of CIFAR-10 is missing.
      ValueError: if a file is truncated or wrong, or an option does not fit.
    """
    if options.dataset == "digits":
        return load_digits(options.noise, options.seed)
    if options.data_dir is None:
        raise ValueError(
            "--dataset cifar10 needs --data-dir, the directory that has "
            "cifar-10-batches-py or cifar-10-batches-bin in it; nothing is downloaded."
        )
    return load_cifar10(options.data_dir, options.noise, options.seed)


def check_checkpointing(options: Options) -> None:
    """Raises a ValueError if an option on checkpoints is out of range or missing."""
    require(
        options.checkpoint_every >= 1,
        "--checkpoint-every must be at least 1",
        options.checkpoint_every,
    )
    require(options.keep >= 1, "--keep must be at least 1", options.keep)
    if options.resume and options.out is None:
        raise ValueError("--resume needs --out, the directory of the run.")


def training_settings(
    options: Options,
    recipe: Recipe,
    chosen: Mapping[str, Any],
    dataset: Dataset,
) -> dict[str, Any]:
    """All that the outcome of a training depends on, as it is in JSON.

    The images and labels count, and not where they were read from.
    """
    return {
        "method": options.method,
        **chosen,
        "dataset": options.dataset,
        "noise": options.noise,
        "seed": options.seed,
        **dataclasses.asdict(recipe),
        "stages": list(recipe.stages),
        "checksum of the data": checksum((dataset.train, dataset.valid, dataset.test)),
    }
