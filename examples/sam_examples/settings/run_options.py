"""What any run is asked for: a method, its base, and how to go about it."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, ClassVar

import jax
import tyro

from sam_examples.settings.command_line import (
    CommonOptions,
    Int,
    require,
    require_at_least_one,
)
from sam_examples.settings.methods import METHODS
from sam_examples.settings.optimizers import Schedule


@dataclasses.dataclass(frozen=True)
class RunOptions(CommonOptions):
    """The options of a run that can be stopped and resumed."""

    # What does not change the outcome of a training, but for rounding.
    of_the_machine: ClassVar[tuple[str, ...]] = (
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

    base: str = "sgd"
    """Optimizer that moves the parameters: any of Optax, such as adamw."""
    base_hyperparameters: tuple[str, ...] = ()
    """Further arguments of the base, such as momentum=0.95 nesterov=True."""
    schedule: Schedule = "cosine"
    """Whether the learning rate falls to 0 along half a cosine, or like one over the
    root of the step after --warmup-epochs, or not."""
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


def check_run(options: RunOptions) -> None:
    """Raises a ValueError if an option of any run is out of range."""
    check_seed("seed", options.seed)
    require_at_least_one(options, "checkpoint_every", "keep")
    require(
        options.measure_every >= 0,
        "--measure-every must be at least 0",
        options.measure_every,
    )
    require(
        options.warmup_epochs >= 0,
        "--warmup-epochs must be at least 0",
        options.warmup_epochs,
    )
    if options.resume and options.out is None:
        raise ValueError("--resume needs --out, the directory of the run.")


def check_seed(flag: str, seed: int) -> None:
    """Raises a ValueError unless this is a seed."""
    require(0 <= seed < 2**32, f"--{flag} must be from 0 to 2**32 - 1", seed)


def as_json(options: RunOptions) -> dict[str, Any]:
    """The settings as they are in JSON, by name."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(options).items()
    }


def num_devices(options: RunOptions, batch_size: int | None = None) -> int:
    """How many devices are to share each batch.

    Args:
      options: say how many, if at all.
      batch_size: what they have to divide, if it is given.

    Raises:
      ValueError: if there are not so many, or they cannot share it evenly.
    """
    available, size = jax.local_device_count(), batch_size or 0
    if options.devices is None:
        return max(n for n in range(1, available + 1) if size % n == 0)
    require(
        1 <= options.devices <= available,
        f"--devices must be from 1 to {available}, the number of devices here",
        options.devices,
    )
    require(
        size % options.devices == 0,
        f"--devices must divide --batch-size {size}",
        options.devices,
    )
    return options.devices
