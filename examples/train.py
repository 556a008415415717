"""Trains a model with one method on one data set, and reports held-out accuracy."""

import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from sam_examples.data import label_record
from sam_examples.reporting.metrics import MetricsWriter
from sam_examples.settings.command_line import (
    check_training,
    make_run_directory,
    one_line_errors,
    versions,
    write_json,
)
from sam_examples.settings.config import (
    Config,
    as_json,
    check_without_data,
    default_hyperparameters,
    load,
    num_devices,
)
from sam_examples.settings.config_file import parse
from sam_examples.settings.methods import check_batch, hyperparameters
from sam_examples.training.build import Optimizer, check_layers, make_network
from sam_examples.training.checkpoints import Checkpoints, Progress
from sam_examples.training.interrupts import Interrupt, interruptible
from sam_examples.training.run import Run, training_settings
from tqdm import tqdm


def find_progress(
    checkpoints: Checkpoints, settings: Mapping[str, Any], *, resume: bool
) -> Progress | None:
    """What to go on from, None to begin.

    Raises:
      ValueError: if there are checkpoints and no --resume, or --resume cannot.
    """
    if resume:
        return checkpoints.latest(settings, may_grow=("epochs",))
    if checkpoints.steps():
        raise ValueError(
            f"{checkpoints.directory} has checkpoints of an earlier run; give --resume "
            "to go on from the last one, or another --out."
        )
    return None


def describe_extension(
    progress: Progress, config: Config, chosen: Mapping[str, Any], steps_per_epoch: int
) -> str:
    """What more epochs than a checkpoint was made for change, in a line.

    Args:
      progress: that of the checkpoint.
      config: what is asked for now.
      chosen: the method's hyperparameters.
      steps_per_epoch: for schedules.
    """
    before, now = progress.settings["epochs"], config.epochs

    def rate(epochs: int) -> str:
        optimizer = Optimizer(replace(config, epochs=epochs), chosen, steps_per_epoch)
        return f"{float(optimizer.learning_rate(progress.steps)):.3g}"

    return (
        f"{now} epochs in place of {before}: from step {progress.steps:,} on schedules "
        f"are those of {now}, with a learning rate of {rate(now)} where that of "
        f"{before} was {rate(before)}"
    )


def train(
    run: Run,
    config: Config,
    save: Callable[[], None],
    writer: MetricsWriter,
    interrupt: Interrupt,
) -> None:
    """Trains what is left or until interrupted; saves every few epochs and at last."""
    total = run.num_steps
    with tqdm(total=total, initial=run.steps, unit="step", mininterval=0.5) as bar:
        try:
            while run.steps < total and not interrupt:
                epoch = f"epoch {run.epoch + 1} of {config.epochs}"
                bar.set_description(epoch if run.compiled else f"{epoch}, compiling")
                run.advance(bar, writer)
                bar.set_description(epoch)
                if run.at_end_of_epoch:
                    run.collect(bar, writer)
                    if not run.evaluation_compiled:
                        bar.set_description(f"{epoch}, compiling")
                        run.compile_evaluation()
                    bar.set_description(f"{epoch}, evaluating")
                    run.end_epoch()
                    writer.write_epoch(run.curves)
                    if run.epoch % config.checkpoint_every == 0:
                        save()
        except SystemExit:  # An image that cannot be read; what was done counts.
            run.collect(bar, writer)
            save()
            raise
        run.collect(bar, writer)
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
        "test_accuracy": run.test_accuracy(),
        "valid_accuracy": run.curves["valid_accuracy"][-1],  # None without images.
        "step_seconds": seconds,
    }
    path = directory / "results.json"
    write_json(path, {**settings, **figures, "epochs": run.curves})
    valid, speed = "", ""
    if figures["valid_accuracy"] is not None:
        valid = f" (validation {100 * figures['valid_accuracy']:.2f} %)"
    if seconds is not None:
        speed = (
            f", {run.images_per_second:,.0f} images/s, {1e3 * seconds:.1f} ms a step"
        )
    print(
        f"{header}: test accuracy {100 * figures['test_accuracy']:.2f} % after epoch "
        f"{run.epoch}{valid}{speed}; {path}"
    )


def main(args: Sequence[str] | None = None) -> None:
    """Runs the training that the command line asks for."""
    try:
        _main(args)
    except KeyboardInterrupt:  # Before or after the training, or a second one in it.
        print("stopped; --resume goes on from the last checkpoint, if there is one")
        raise SystemExit(128 + signal.SIGINT) from None


def _main(args: Sequence[str] | None) -> None:
    with one_line_errors():
        config = parse(sys.argv[1:] if args is None else args)
        check_without_data(config)
        dataset = load(config)
        num_examples = len(dataset.train.labels)
        check_training(config, num_examples)
        method, steps = config.method, num_examples // config.batch_size
        chosen = hyperparameters(
            [method], config.hyperparameters, default_hyperparameters(config, steps)
        )[method]
        check_batch({method: chosen}, config.batch_size)
        devices = num_devices(config)
        optimizer = Optimizer(config, chosen, steps)
        directory = make_run_directory(config.out, f"{config.dataset}-{method}")
        checkpoints = Checkpoints(directory / "checkpoints", config.keep)
        settings = training_settings(config, chosen, dataset)
        progress = find_progress(checkpoints, settings, resume=config.resume)
        model = make_network(config, dataset)
        check_layers(config, dataset, model)
        run = Run(config, dataset, model, optimizer, devices)
        if progress is not None:
            run.resume(checkpoints, progress)
            if progress.settings["epochs"] < config.epochs:
                print(describe_extension(progress, config, chosen, steps))
    write_json(directory / "config.json", as_json(config))
    save = partial(run.save, checkpoints, settings)
    with (
        interruptible() as interrupt,
        MetricsWriter(directory, settings, run.steps) as writer,
    ):
        train(run, config, save, writer, interrupt)
    if run.steps < run.num_steps:
        print(
            f"stopped after step {run.steps:,} of {run.num_steps:,}, in epoch "
            f"{run.epoch + 1}; --out {directory} --resume goes on from there"
        )
        raise SystemExit(128 + (interrupt.signal or 0))
    report(
        run,
        directory,
        f"{method} on {dataset.name}, {config.model}",
        {
            "settings": as_json(config) | {"devices": devices},
            "hyperparameters": chosen,
            "labels": label_record(dataset),
            "versions": versions(),
        },
    )


if __name__ == "__main__":
    main()
