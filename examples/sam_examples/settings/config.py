"""What train.py is asked for: one configuration, its defaults, and its checks."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, get_args, get_type_hints

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
from sam_examples.settings.run_options import RunOptions, check_run, check_seed


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
class Config(TrainingOptions, RunOptions, DataOptions):
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

    ascent_part: int = 1
    """Ascends along the gradient of one in so many images of a batch."""
    implicit: Float = None
    """Share of the channels that the backward pass of the ascent leaves out."""


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


def suitable(**names: str | None) -> Config:
    """What suits a data set, a method and a base, where nothing else is asked for.

    That of other bases than sgd is a choice of this library, and not the papers'. A
    width is that of the data set's own model.

    Args:
      **names: dataset, method, base and model, None for the default.

    Raises:
      ValueError: if there is no such data set.
    """
    model = names.pop("model")
    config = Config(**{n: v for n, v in names.items() if v})  # type: ignore[arg-type]
    dataset, method, base = config.dataset, config.method, config.base
    known = get_args(get_type_hints(Config)["dataset"])
    require(dataset in known, f"--dataset must be one of {', '.join(known)}", dataset)
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
    steps = steps_per_epoch
    if config.dataset == "digits":
        return {"between": {"first": config.epochs * steps // 2}}
    rho = {"cifar10": 1.0, "cifar100": 2.0, "imagenet": 0.5}[config.dataset]
    return scaled_hyperparameters(rho, config.epochs, steps)


def scaled_hyperparameters(
    rho: float, epochs: int, steps_per_epoch: int
) -> Hyperparameters:
    """Those for CIFAR-10, with radii so many times as large, for such a training."""
    scaled: dict[str, dict[str, Any]] = {}
    for method, values in CIFAR10_HYPERPARAMETERS.items():
        scaled[method] = {**values, "rho": rho * values["rho"]}
        if "refresh_every" in METHODS[method]:
            scaled[method]["refresh_every"] = steps_per_epoch
    scaled["between"]["first"] = epochs * steps_per_epoch // 2
    return scaled


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
    check_run(config)
    require(0 <= config.noise <= 1, "--noise must be from 0 to 1", config.noise)
    check_seed("noise-seed", config.noise_seed)
    require_at_least_one(config, "ascent_part")
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
