"""What train.py is asked for: one configuration, its defaults, and its checks."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import jax
import tyro

from sam_examples.data import (
    Dataset,
    load_cifar10,
    load_cifar100,
    load_digits,
    load_image_folders,
)
from sam_examples.models import MODELS
from sam_examples.settings.command_line import (
    Directory,
    Float,
    Int,
    TrainingOptions,
    require,
    require_at_least_one,
)
from sam_examples.settings.methods import (
    CIFAR10_HYPERPARAMETERS,
    METHODS,
    Hyperparameters,
    parts,
    takes_gradient,
)


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Which images to train on."""

    dataset: Literal["digits", "cifar10", "cifar100", "imagenet"] = "digits"
    """The digits come with scikit-learn; the others are read from --data-dir."""
    data_dir: Directory = None
    """Where the unpacked archive of CIFAR is, or ImageNet's train/ and val/."""
    noise_seed: int = 0
    """Draws which labels are replaced, and by what."""
    train_on_all: bool = False
    """Holds no training images out to validate on, as papers do that report CIFAR."""
    augment: bool = False
    """Whether to crop, flip and cut out CIFAR's images at random."""


@dataclasses.dataclass(frozen=True)
class Config(TrainingOptions, DataOptions):
    """Trains a model with one method, and reports its accuracy on held-out images.

    The accuracy is that after the last epoch, on images that nothing was chosen on.
    The defaults are those of the data set and method that the command line names; for
    CIFAR and ImageNet they are the protocol of the papers. Metrics go to metrics.csv
    and to TensorBoard, settings to config.json, results to results.json, checkpoints to
    checkpoints/, all in one directory. Ctrl-C saves a checkpoint and stops; --resume
    goes on from it bit for bit, on as many devices as before.
    """

    shared_names: ClassVar[bool] = True

    model: Annotated[str, tyro.conf.arg(help=f"Out of {', '.join(MODELS)}.")] = (
        "resnet8"
    )
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; parameters, losses and states are in float32."""

    method: Annotated[
        str,
        tyro.conf.arg(
            help=f"Out of {', '.join(METHODS)}, or several joined by +; sgd, or base, "
            "is the base alone."
        ),
    ] = "sam"
    hyperparameters: tuple[str, ...] = ()
    """Changes of the method's hyperparameters, such as rho=0.05 theta=0.2."""
    perturb: tuple[str, ...] = ()
    """Layers to perturb, alone, by a static mask; such as BasicBlock_0 Dense_0/bias."""
    ascent_part: int = 1
    """Ascends along the gradient of one in so many images of a batch."""
    implicit: Float = None
    """Share of the channels that the backward pass of the ascent leaves out."""

    base: str = "sgd"
    """Optimizer that moves the parameters: any of Optax, such as adamw."""
    base_hyperparameters: tuple[str, ...] = ()
    """Further arguments of the base, such as momentum=0.95 nesterov=True."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Whether the learning rate falls to 0 along half a cosine."""
    warmup_epochs: float = 0.0
    """Epochs in which the learning rate rises from 0 at first."""
    seed: int = 0
    """Draws parameters, batches, augmentation, dropout and the method's numbers."""

    devices: Int = None
    """Devices that share each batch; by default as many as can share it evenly."""
    fully_sharded: bool = False
    """Devices share parameters and optimizer state too, in place of copies."""
    checkpoint_every: Annotated[int, tyro.conf.arg(metavar="EPOCHS")] = 1
    """Epochs from a checkpoint to the next; the last epoch always makes one."""
    keep: int = 3
    """How many checkpoints stay."""
    resume: bool = False
    """Goes on from the last checkpoint in --out, and begins if there is none. With more
    --epochs than before schedules are from there on those of so many."""
    measure_every: Annotated[int, tyro.conf.arg(metavar="EPOCHS")] = 1
    """Epochs from a measurement of the ascent to the next; 0 for none."""
    config: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """JSON or TOML file of settings, named as here; config.json of a run is one."""


# What does not change the outcome of a training, but for rounding.
OF_THE_MACHINE = (
    "data_dir",
    "devices",
    "fully_sharded",
    "out",
    "checkpoint_every",
    "keep",
    "resume",
    "measure_every",
    "config",
)

_CIFAR = {
    "model": "resnet18",
    "width": None,
    "epochs": 200,
    "batch_size": 128,
    "learning_rate": 0.05,
    "weight_decay": 1e-3,
    "augment": True,
}
_OF_DATASETS: Mapping[str, Mapping[str, Any]] = {
    "digits": {},
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "imagenet": {
        **_CIFAR,
        "model": "resnet50",
        "epochs": 90,
        "batch_size": 256,
        "learning_rate": 0.1,
        "weight_decay": 1e-4,
        "augment": False,  # The pipeline does it, before images are of one size.
    },
}


def suitable(dataset: str, method: str, base: str, model: str | None) -> Config:
    """What suits a data set, a method and a base, where nothing else is asked for.

    That of other bases than sgd is a choice of this library, and not the papers'. A
    width is that of the data set's own model.
    """
    config = Config(dataset=dataset, method=method, base=base)  # type: ignore[arg-type]
    config = dataclasses.replace(config, **_OF_DATASETS.get(dataset, {}))
    if dataset in ("cifar10", "cifar100") and method == "sgd":
        config = dataclasses.replace(config, weight_decay=5e-4)
    if model not in (None, config.model):
        config = dataclasses.replace(config, model=model, width=None)
    if base != "sgd":
        config = dataclasses.replace(config, learning_rate=1e-3, weight_decay=1e-2)
    return config


def default_hyperparameters(config: Config, steps_per_epoch: int) -> Hyperparameters:
    """What replaces the defaults of `METHODS`, which are those for the digits."""
    of_dataset: dict[str, dict[str, Any]] = {"between": {}}
    if config.dataset != "digits":
        rho = {"cifar10": 1.0, "cifar100": 2.0, "imagenet": 0.5}[config.dataset]
        for method, values in CIFAR10_HYPERPARAMETERS.items():
            of_dataset[method] = {**values, "rho": rho * values["rho"]}
            if "refresh_every" in METHODS[method]:
                of_dataset[method]["refresh_every"] = steps_per_epoch
    of_dataset["between"]["first"] = config.epochs * steps_per_epoch // 2
    return of_dataset


def load(config: Config) -> Dataset:
    """Loads the data set.

    Raises:
      FileNotFoundError: if a file of it is missing.
      ValueError: if a file is truncated or wrong, or an option does not fit.
    """
    noise = (config.noise, config.noise_seed)
    if config.dataset == "digits":
        require(
            not config.train_on_all,
            "--train-on-all is for CIFAR and ImageNet; the digits come in fixed splits",
            config.dataset,
        )
        return load_digits(*noise)
    require(
        config.data_dir is not None,
        f"--dataset {config.dataset} needs --data-dir, the directory with the files as "
        "they are published, since nothing is downloaded",
        "none",
    )
    loaders: Mapping[str, Any] = {
        "cifar10": load_cifar10,
        "cifar100": load_cifar100,
        "imagenet": load_image_folders,
    }
    held_out: dict[str, Any] = {}
    if config.train_on_all:
        folders = config.dataset == "imagenet"
        held_out = {"valid_share": 0.0} if folders else {"num_valid": 0}
    dataset: Dataset = loaders[config.dataset](config.data_dir, *noise, **held_out)
    return dataset


def check_without_data(config: Config) -> None:
    """Raises a ValueError if a setting is wrong that can be checked without the data.

    The message says which; `check_training` checks the others.
    """
    require(0 <= config.noise <= 1, "--noise must be from 0 to 1", config.noise)
    for name in ("seed", "noise_seed"):
        value, flag = getattr(config, name), name.replace("_", "-")
        require(0 <= value < 2**32, f"--{flag} must be from 0 to 2**32 - 1", value)
    require_at_least_one(config, "ascent_part", "checkpoint_every", "keep")
    require(
        config.measure_every >= 0,
        "--measure-every must be at least 0",
        config.measure_every,
    )
    require(
        config.batch_size % config.ascent_part == 0,
        f"--ascent-part must divide --batch-size {config.batch_size}",
        config.ascent_part,
    )
    require(
        config.implicit is None or 0 <= config.implicit < 1,
        "--implicit must be at least 0 and below 1",
        config.implicit,
    )
    require(
        config.warmup_epochs >= 0,
        "--warmup-epochs must be at least 0",
        config.warmup_epochs,
    )
    if config.resume and config.out is None:
        raise ValueError("--resume needs --out, the directory of the run.")
    if parts(config.method) == ["sgd"]:
        require(not config.perturb, "--perturb needs an ascent", config.method)
    if not takes_gradient(config.method):
        require(
            config.implicit is None and config.ascent_part == 1,
            "--implicit and --ascent-part need an ascent that takes a gradient",
            config.method,
        )
    require(
        not config.augment or config.dataset in ("cifar10", "cifar100"),
        "--augment is for CIFAR: it would cut out all of a digit, and images of "
        "ImageNet are cropped and flipped as they are read",
        config.dataset,
    )


def as_json(config: Config) -> dict[str, Any]:
    """The settings as they are in JSON, by name."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(config).items()
    }


def num_devices(config: Config) -> int:
    """How many devices are to share each batch.

    Raises:
      ValueError: if there are not so many, or they cannot share it evenly.
    """
    available, size = jax.local_device_count(), config.batch_size
    if config.devices is None:
        return max(n for n in range(1, available + 1) if size % n == 0)
    require(
        1 <= config.devices <= available,
        f"--devices must be from 1 to {available}, the number of devices here",
        config.devices,
    )
    require(
        size % config.devices == 0,
        f"--devices must divide --batch-size {size}",
        config.devices,
    )
    return config.devices
