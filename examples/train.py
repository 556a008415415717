"""Trains a ResNet with one method on one data set, and reports held-out accuracy."""

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from checkpoints import Checkpoints, Progress
from command_line import (
    check_training,
    choose_num_devices,
    make_run_directory,
    one_line_errors,
    versions,
    write_json,
)
from data import Dataset
from methods import (
    CIFAR10_HYPERPARAMETERS,
    check_batch,
    hyperparameters,
    make_tx,
    momentum_sgd,
)
from recipe import (
    Options,
    Recipe,
    check_checkpointing,
    load,
    make_recipe,
    training_settings,
)
from sharding import by_examples, make_mesh, replicated
from tqdm import tqdm
from training import (
    make_evaluate,
    make_init,
    make_model,
    make_train_steps,
    shuffled_batches,
    steps_per_call,
)


class Run:
    """A model in training, and the figures of its epochs so far.

    Attributes:
      curves: means of each epoch, lists by name.
      step_seconds: wall time of a step, in each call of the compiled function but those
        that compiled it.
    """

    def __init__(
        self,
        recipe: Recipe,
        dataset: Dataset,
        tx: Any,
        seed: int,
        num_devices: int,
    ) -> None:
        """Draws the parameters of the ResNet, and copies all to all devices."""
        model = make_model(recipe, dataset.num_classes)
        mesh = make_mesh(num_devices)
        self._dataset = dataset
        self._train_split = jax.device_put(dataset.train, replicated(mesh))
        self._train_steps = make_train_steps(
            model,
            tx,
            dataset,
            augmented=recipe.augmented,
            batch_sharding=by_examples(mesh),
        )
        self._evaluate = make_evaluate(model, dataset)
        state = make_init(model, dataset)(seed, tx)
        self._state = jax.device_put(state, replicated(mesh))
        self._compiled = False
        self.curves: dict[str, list[float]] = defaultdict(list)
        self.step_seconds: list[float] = []

    @property
    def epochs(self) -> int:
        """How many are done."""
        return len(self.curves["valid_accuracy"])

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
            if self._compiled:
                self.step_seconds.append((time.perf_counter() - start) / size)
            self._compiled = True
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

    def save(self, checkpoints: Checkpoints, settings: Mapping[str, Any]) -> None:
        """Writes a checkpoint of what was done so far."""
        progress = Progress(
            self.epochs, dict(settings), dict(self.curves), self.step_seconds
        )
        checkpoints.save(self._state, progress)

    def resume(self, checkpoints: Checkpoints, progress: Progress) -> None:
        """Goes on from a checkpoint, on the devices of this run."""
        self._state = checkpoints.restore(progress, self._state)
        self.curves.update(progress.curves)
        self.step_seconds = progress.step_seconds


def find_progress(
    checkpoints: Checkpoints, settings: Mapping[str, Any], *, resume: bool
) -> Progress | None:
    """What to go on from, None to begin.

    Raises:
      ValueError: if there are checkpoints and no --resume, or --resume cannot.
    """
    if resume:
        return checkpoints.latest(settings)
    if checkpoints.epochs():
        raise ValueError(
            f"{checkpoints.directory} has checkpoints of an earlier run; give --resume "
            "to go on from the last one, or another --out."
        )
    return None


def train(
    run: Run,
    options: Options,
    recipe: Recipe,
    num_examples: int,
    save: Callable[[], None],
) -> None:
    """Trains the epochs that are left, and saves every few and the last."""
    steps = num_examples // recipe.batch_size
    total, done = recipe.epochs * steps, run.epochs * steps
    with tqdm(total=total, initial=done, unit="step", mininterval=0.5) as bar:
        for epoch in range(run.epochs, recipe.epochs):
            bar.set_description(f"epoch {epoch + 1} of {recipe.epochs}")
            key = jax.random.fold_in(jax.random.key(options.seed), epoch)
            indices = shuffled_batches(key, num_examples, recipe.batch_size)
            run.train_epoch(indices, key, bar)
            is_last = run.epochs == recipe.epochs
            if is_last or run.epochs % options.checkpoint_every == 0:
                save()


def report(run: Run, directory: Path, header: str, settings: Mapping[str, Any]) -> None:
    """Evaluates on the test split, writes results.json and prints a line.

    Args:
      run: a finished one.
      directory: where results.json goes.
      header: begins the line.
      settings: what results.json begins with.
    """
    # A call compiled; where it was the only one, there is no figure.
    seconds = float(np.median(run.step_seconds)) if run.step_seconds else None
    figures: dict[str, Any] = {
        "test_accuracy": run.accuracy("test"),
        "valid_accuracy": run.curves["valid_accuracy"][-1],
        "step_seconds": seconds,
    }
    path = directory / "results.json"
    write_json(path, {**settings, **figures, "epochs": run.curves})
    speed = "" if seconds is None else f", {1e3 * seconds:.1f} ms a step"
    print(
        f"{header}: test accuracy {100 * figures['test_accuracy']:.2f} % after epoch "
        f"{run.epochs} (validation {100 * figures['valid_accuracy']:.2f} %){speed}; "
        f"{path}"
    )


def main(args: Sequence[str] | None = None) -> None:
    """Runs the training that the command line asks for."""
    options = tyro.cli(Options, args=args)
    method = options.method
    recipe = make_recipe(options)
    with one_line_errors():
        check_checkpointing(options)
        defaults = CIFAR10_HYPERPARAMETERS if options.dataset == "cifar10" else {}
        chosen = hyperparameters([method], options.hyperparameters, defaults)[method]
        dataset = load(options)
        num_examples = len(dataset.train.labels)
        check_training(recipe, num_examples)
        check_batch({method: chosen}, recipe.batch_size)
        num_devices = choose_num_devices(options.devices, recipe.batch_size)
        num_steps = recipe.epochs * (num_examples // recipe.batch_size)
        base = momentum_sgd(recipe.learning_rate, num_steps, recipe.weight_decay)
        tx = make_tx(method, base, chosen, num_steps)
        directory = make_run_directory(options.out, f"{options.dataset}-{method}")
        checkpoints = Checkpoints(directory / "checkpoints", options.keep)
        settings = training_settings(options, recipe, chosen, dataset)
        progress = find_progress(checkpoints, settings, resume=options.resume)
    run = Run(recipe, dataset, tx, options.seed, num_devices)
    if progress is not None:
        with one_line_errors():
            run.resume(checkpoints, progress)
    save = partial(run.save, checkpoints, settings)
    train(run, options, recipe, num_examples, save)
    report(
        run,
        directory,
        f"{method} on {dataset.name}",
        {
            "settings": dataclasses.asdict(options)
            | dataclasses.asdict(recipe)
            | {"devices": num_devices},
            "hyperparameters": chosen,
            "versions": versions(),
        },
    )


if __name__ == "__main__":
    main()
