"""What the scripts share: options, their checks, one-line errors, where results go."""

import dataclasses
import json
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import jax
import tyro

import optax_sam

Directory = Annotated[Path | None, tyro.conf.arg(metavar="DIR")]
Int = Annotated[int | None, tyro.conf.arg(metavar="INT")]
Float = Annotated[float | None, tyro.conf.arg(metavar="FLOAT")]


@dataclasses.dataclass(frozen=True)
class CommonOptions:
    """The options of any training."""

    epochs: int = 40
    """Passes over the training examples."""
    learning_rate: float = 0.1
    """The largest one; it falls as --schedule says, by default along a cosine."""
    weight_decay: float = 3e-3
    """An L2 penalty of all parameters, or the base's own if it has one."""
    dropout: float = 0.0
    """Dropout rate, where the model has dropout."""
    out: Directory = None
    """Directory of the results. By default a new one in runs/."""


@dataclasses.dataclass(frozen=True)
class TrainingOptions(CommonOptions):
    """The options of any training on images."""

    noise: float = 0.0
    """Share of the training labels that are replaced by another class."""
    batch_size: int = 64
    """Images of a step."""
    stages: Annotated[tuple[int, ...] | None, tyro.conf.arg(metavar="INT ...")] = None
    """Blocks in each stage, in place of the model's."""
    width: Int = 8
    """Channels of the first stage, or their factor, see models; narrow suits a CPU."""
    norm: Literal["batch", "group"] = "batch"
    """Normalisation: over the batch, or over groups of channels of each image."""


@dataclasses.dataclass(frozen=True)
class NoisyDigits(TrainingOptions):
    """The options of a training on the digits with label noise."""

    # What is no option here, and is one of train.py. Its layers have names of their
    # own; here they have those of their classes.
    model: ClassVar[str] = "resnet8"
    dtype: ClassVar[str] = "float32"
    shared_names: ClassVar[bool] = False

    noise: float = 0.6
    """Share of the training labels that are replaced by another class."""
    stages: tuple[int, ...] = (1, 1, 1)
    """Blocks in each stage of the ResNet."""
    width: int = 8
    """Channels of the first stage, which double in each stage."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the program with one line and status 2 if what the user gave is wrong."""
    try:
        yield
    except (OSError, TypeError, ValueError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None


def require(condition: bool, requirement: str, value: object) -> None:
    """Raises a ValueError, which says what is required, unless the condition holds."""
    if not condition:
        raise ValueError(f"{requirement}, got {value}.")


def require_at_least_one(options: Any, *names: str) -> None:
    """Raises a ValueError unless these options, where given, are at least 1."""
    for name in names:
        value, flag = getattr(options, name), name.replace("_", "-")
        require(value is None or value >= 1, f"--{flag} must be at least 1", value)


def check_training(options: TrainingOptions, num_examples: int) -> None:
    """Checks the options of a training on images, given how many there are.

    Raises:
      ValueError: if one is out of range; the message says which range.
    """
    check_common(options)
    require_at_least_one(options, "width", "batch_size")
    if options.stages is not None:
        check_stages("stages", options.stages)
    require(
        options.norm != "group" or (options.width or 4) % 4 == 0,
        "--width must be a multiple of 4 for groups of channels",
        options.width,
    )
    require(
        options.batch_size <= num_examples,
        f"--batch-size must be at most {num_examples:,}, the number of training images",
        options.batch_size,
    )


def check_common(options: CommonOptions) -> None:
    """Raises a ValueError if an option of any training is out of range."""
    require_at_least_one(options, "epochs")
    require(
        0 < options.learning_rate < float("inf"),
        "--learning-rate must be positive and finite",
        options.learning_rate,
    )
    require(
        0 <= options.weight_decay < float("inf"),
        "--weight-decay must be at least 0 and finite",
        options.weight_decay,
    )
    require(
        0 <= options.dropout < 1,
        "--dropout must be at least 0 and below 1",
        options.dropout,
    )


def check_stages(name: str, stages: Sequence[int]) -> None:
    """Raises a ValueError unless these are numbers of blocks."""
    require(
        min(stages, default=0) >= 1,
        f"--{name} must be numbers of blocks, each at least 1, such as 1 1 1",
        " ".join(map(str, stages)) or "none",
    )


def make_run_directory(out: Path | None, name: str) -> Path:
    """Makes the directory of the results, by default `runs/<name>-<time>`."""
    directory = out or Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def versions() -> dict[str, str]:
    """Versions of all that can change the figures, and the kind of device."""
    packages = ("jax", "jaxlib", "flax", "optax", "scikit-learn")
    return {
        "python": platform.python_version(),
        "optax_sam": optax_sam.__version__,
        **{package: version(package) for package in packages},
        "backend": jax.default_backend(),
    }


def write_results(path: Path, options: Any, **figures: Any) -> None:
    """Writes figures, and what they depend on, as JSON."""
    about = {"settings": dataclasses.asdict(options), "versions": versions()}
    write_json(path, about | figures)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes numbers, strings and paths as JSON, anything else by its name."""

    def encode(value: Any) -> Any:
        return str(value) if isinstance(value, Path) else getattr(value, "__name__", "")

    path.write_text(json.dumps(content, indent=1, default=encode) + "\n")
