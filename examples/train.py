"""Trains a ResNet with one method on one data set, and reports held-out accuracy."""

import dataclasses
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from command_line import (
    check_training,
    make_run_directory,
    one_line_errors,
    versions,
    write_json,
)
from data import Dataset, load_cifar10, load_digits
from methods import (
    CIFAR10_HYPERPARAMETERS,
    METHODS,
    check_batch,
    hyperparameters,
    make_tx,
    momentum_sgd,
)
from tqdm import tqdm
from training import (
    make_evaluate,
    make_init,
    make_model,
    make_train_steps,
    shuffled_batches,
    steps_per_call,
)

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
    out: Directory = None
    """Directory of the results. By default a new one in runs/."""


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


class Run:
    """A model in training, and the figures of its epochs so far.

    Attributes:
      curves: means of each epoch, lists by name.
      step_seconds: wall time of a step, in each call of the compiled function.
    """

    def __init__(self, recipe: Recipe, dataset: Dataset, tx: Any, seed: int) -> None:
        """Draws the parameters of the ResNet."""
        model = make_model(recipe, dataset.num_classes)
        self._dataset = dataset
        self._train_split = jax.tree.map(jnp.asarray, dataset.train)
        self._train_steps = make_train_steps(
            model, tx, dataset, augmented=recipe.augmented
        )
        self._evaluate = make_evaluate(model, dataset)
        self._state = make_init(model, dataset)(seed, tx)
        self.curves: dict[str, list[float]] = defaultdict(list)
        self.step_seconds: list[float] = []

    def train_epoch(self, indices: jax.Array, key: jax.Array, bar: Any) -> None:
        """Trains on `indices[steps, batch_size]`, then evaluates for the curves."""
        calls = []
        size = steps_per_call(len(indices))
        for part in jnp.split(indices, len(indices) // size):
            key, part_key = jax.random.split(key)
            start = time.perf_counter()
            self._state, metrics = self._train_steps(
                self._state, self._train_split, part, part_key
            )
            metrics.loss.block_until_ready()
            self.step_seconds.append((time.perf_counter() - start) / size)
            calls.append([float(metrics.loss), float(metrics.accuracy)])
            loss, accuracy = (f"{value:.3f}" for value in calls[-1])
            bar.set_postfix(loss=loss, accuracy=accuracy, refresh=False)
            bar.update(size)
        loss, accuracy = np.mean(calls, axis=0).tolist()
        self.curves["train_loss"].append(loss)
        self.curves["train_accuracy"].append(accuracy)
        self.curves["valid_accuracy"].append(self.accuracy("valid"))

    def accuracy(self, split: Literal["valid", "test"]) -> float:
        """Accuracy of the parameters as they are, on all images of a split."""
        return float(
            self._evaluate(self._state, getattr(self._dataset, split)).accuracy
        )


def main(args: Sequence[str] | None = None) -> None:
    """Runs the training that the command line asks for."""
    options = tyro.cli(Options, args=args)
    method = options.method
    recipe = make_recipe(options)
    with one_line_errors():
        defaults = CIFAR10_HYPERPARAMETERS if options.dataset == "cifar10" else {}
        chosen = hyperparameters([method], options.hyperparameters, defaults)[method]
        dataset = load(options)
        num_examples = len(dataset.train.labels)
        check_training(recipe, num_examples)
        check_batch({method: chosen}, recipe.batch_size)
        epoch_steps = num_examples // recipe.batch_size
        num_steps = recipe.epochs * epoch_steps
        base = momentum_sgd(recipe.learning_rate, num_steps, recipe.weight_decay)
        tx = make_tx(method, base, chosen, num_steps)
        directory = make_run_directory(options.out, f"{options.dataset}-{method}")
    run = Run(recipe, dataset, tx, options.seed)
    with tqdm(total=num_steps, unit="step", mininterval=0.5) as bar:
        for epoch in range(recipe.epochs):
            bar.set_description(f"epoch {epoch + 1} of {recipe.epochs}")
            key = jax.random.fold_in(jax.random.key(options.seed), epoch)
            indices = shuffled_batches(key, num_examples, recipe.batch_size)
            run.train_epoch(indices, key, bar)
    figures: dict[str, Any] = {
        "test_accuracy": run.accuracy("test"),
        "valid_accuracy": run.curves["valid_accuracy"][-1],
        # The first call compiled; where it was the only one, there is no figure.
        "step_seconds": (
            float(np.median(run.step_seconds[1:])) if run.step_seconds[1:] else None
        ),
    }
    write_json(
        directory / "results.json",
        {
            "settings": dataclasses.asdict(options) | dataclasses.asdict(recipe),
            "hyperparameters": chosen,
            "versions": versions(),
            **figures,
            "epochs": run.curves,
        },
    )
    seconds = figures["step_seconds"]
    speed = "" if seconds is None else f", {1e3 * seconds:.1f} ms a step"
    print(
        f"{method} on {dataset.name}: test accuracy "
        f"{100 * figures['test_accuracy']:.2f} % after epoch {recipe.epochs} "
        f"(validation {100 * figures['valid_accuracy']:.2f} %){speed}; "
        f"{directory / 'results.json'}"
    )


if __name__ == "__main__":
    main()
