"""How fast the input pipeline is alone, against the training step that it feeds."""

import dataclasses
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import numpy as np
import tyro
from PIL import Image
from rich.progress import track

import optax_sam

if not __package__:  # Run as a script, which leaves examples/ off the path.
    sys.path.insert(0, str(Path(__file__).parents[1]))

from sam_examples import models
from sam_examples.benchmarking import measure
from sam_examples.data import (
    CIFAR10_MEAN,
    CIFAR10_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    ImageFolder,
    Split,
    augment,
    load_image_folders,
    normalize,
    training_batches,
)
from sam_examples.settings.command_line import check_stages, one_line_errors
from sam_examples.training.step import make_loss_fn

PIPELINE = "pipeline"
STEPS = {"SGD": measure.BASE, "SAM": optax_sam.sam(measure.BASE, measure.RHO)}
NUM_CLASSES = 10
PHOTOGRAPH = (500, 375)  # Pixels, as are usual in ImageNet.

Int = Annotated[int | None, tyro.conf.arg(metavar="INT")]


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures the input pipeline alone, and the training steps that it feeds.

    "arrays" are synthetic images of 32x32 pixels in memory, which a ResNet-18 with the
    CIFAR stem crops, flips and cuts out on the device. "folders" are synthetic JPEGs of
    500x375 pixels in a folder for each class, which the pipeline decodes, crops and
    resizes for a ResNet-18 with the ImageNet stem. The networks are narrow, as on a
    CPU: steps of the published width take longer, and leave the pipeline more time.

    In each round the pipeline makes some batches and each step is taken once, one
    after the other. Ratios are medians, over the rounds, of the ratio within a round.
    """

    cases: tuple[Literal["arrays", "folders"], ...] = ("arrays", "folders")
    """Which images to measure with."""
    stages: tuple[int, ...] = (2, 2, 2, 2)
    """Blocks of each stage; the default is ResNet-18."""
    width: int = 8
    """Channels of the first stage on arrays; the published ResNet-18 has 64."""
    batch_size: int = 128
    """Images of a step on arrays."""
    folder_width: int = 8
    """Channels of the first stage on folders."""
    folder_batch_size: int = 32
    """Images of a step on folders."""
    image_size: int = 224
    """Height and width of the images of folders, as the network sees them."""
    num_files: int = 128
    """JPEGs to write."""
    threads: Int = None
    """Threads of the pipeline; by default one for each core."""
    batches: int = 16
    """Batches that the pipeline makes in a round."""
    rounds: int = 10
    """Timed rounds."""
    json: Path | None = None
    """File for all figures."""


class Case(NamedTuple):
    """Images, and the network they are for."""

    split: Split | ImageFolder
    batch_size: int
    width: int
    mean: np.ndarray
    std: np.ndarray
    augmented: bool


def check(options: Options) -> None:
    """Raises a ValueError if an option is out of range."""
    counts = (f.name for f in dataclasses.fields(options) if f.type is int)
    measure.check(options, *counts, *["threads"] * (options.threads is not None))
    check_stages("stages", options.stages)


@contextmanager
def make_case(name: str, options: Options) -> Iterator[Case]:
    """Makes the images of a case, in memory or in a temporary directory."""
    rng = np.random.default_rng(0)
    if name == "arrays":
        size, stats = options.batch_size, (CIFAR10_MEAN, CIFAR10_STD)
        images = rng.integers(0, 256, (10 * size, 32, 32, 3), np.uint8)
        labels = rng.integers(NUM_CLASSES, size=10 * size).astype(np.int32)
        split = Split(images, labels)
        yield Case(split, size, options.width, *stats, augmented=True)
        return
    with tempfile.TemporaryDirectory() as directory:
        size, stats = options.folder_batch_size, (IMAGENET_MEAN, IMAGENET_STD)
        # One is held out to validate, and one is to test.
        for part, number in (("train", max(options.num_files, size) + 1), ("val", 1)):
            folder = Path(directory) / part / "class"
            folder.mkdir(parents=True)
            for i in range(number):
                photograph(rng).save(folder / f"{i}.JPEG", quality=90)
        train = load_image_folders(directory, image_size=options.image_size).train
        width = options.folder_width
        yield Case(train, size, width, *stats, augmented=False)


def photograph(rng: np.random.Generator) -> Image.Image:
    """Smooth colours, and detail of two pixels that makes the file of usual size."""
    width, height = PHOTOGRAPH
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
    smooth = np.asarray(coarse.resize(PHOTOGRAPH, Image.Resampling.BICUBIC), np.float32)
    detail = rng.normal(0, 16, (height // 2 + 1, width // 2 + 1, 1))
    detail = detail.repeat(2, axis=0).repeat(2, axis=1)[:height, :width]
    return Image.fromarray(np.clip(smooth + detail, 0, 255).astype(np.uint8))


def make_problem(case: Case, stages: tuple[int, ...], batch: Split) -> measure.Problem:
    """The network for a batch as the pipeline makes it."""
    side, width = case.split.image_shape[0], case.width
    model: Any = models.make(
        "resnet18", NUM_CLASSES, image_size=side, width=width, stages=stages
    )
    images = np.zeros((1, *case.split.image_shape), np.float32)
    init = jax.jit(lambda: model.init(jax.random.key(0), images, train=False))
    return measure.Problem(model, init, batch, make_loss_fn(model))


def prepared(case: Case, row: measure.Row) -> measure.Row:
    """The step with all that is left to do on the device."""

    def prepared_row(problem: measure.Problem) -> tuple[Any, measure.Update]:
        tx, update = row(problem)

        def prepared_update(
            params: Any, opt_state: Any, batch: Split, stats: Any, key: jax.Array
        ) -> tuple[Any, Any, Any]:
            images = normalize(batch.images, case.mean, case.std)
            if case.augmented:
                images = augment(key, images)
            batch = Split(images, batch.labels)
            return update(params, opt_state, batch, stats, key)

        return tx, prepared_update

    return prepared_row


def training(case: Case, epochs: int) -> Any:
    """The batches of so many epochs."""
    size = case.batch_size
    return training_batches(case.split, batch_size=size, epochs=epochs, seed=0)


def measure_case(name: str, options: Options) -> dict[str, dict[str, float]]:
    """A row for each step."""
    with make_case(name, options) as case:
        epoch = training(case, epochs=1)
        problem = make_problem(case, options.stages, epoch[0])
        turns = {}
        for method, tx in track(STEPS.items(), f"compiling, {name}"):
            row = prepared(case, measure.engine(tx))
            compiled = measure.compile_step(row, problem)
            turns[method] = compiled.turn(problem.batch)
        first_seconds: list[float] = []
        size = options.batches
        calls = options.rounds + measure.WARM_UP
        dataset = training(case, epochs=-(-calls * size // len(epoch)))
        turns[PIPELINE] = measure.making_batches(
            dataset, size, first_seconds, num_threads=options.threads
        )
        seconds = measure.in_turns(turns, options.rounds)
    return {
        f"{name}, {method}": _figures(
            seconds, method, case.batch_size, first_seconds[-options.rounds :]
        )
        for method in STEPS
    }


def _figures(
    seconds: Mapping[str, Any], method: str, images: int, first: Sequence[float]
) -> dict[str, float]:
    return {
        "pipeline_images_per_second": images / float(np.median(seconds[PIPELINE])),
        "step_images_per_second": images / float(np.median(seconds[method])),
        "pipeline_over_step": measure.time_ratio(seconds, method, PIPELINE),
        "ms_per_first_batch": 1e3 * float(np.median(first)),
    }


def main(args: Sequence[str] | None = None) -> None:
    """Runs the measurement that the command line asks for."""
    options = tyro.cli(Options, args=args)
    with one_line_errors():
        check(options)
    rows: dict[str, dict[str, float]] = {}
    for name in options.cases:
        rows |= measure_case(name, options)
    title = f"Input pipeline, {os.cpu_count()} cores"
    measure.print_table(rows, title, first="images, step", digits=1)
    measure.save(options, rows=rows)


if __name__ == "__main__":
    main()
