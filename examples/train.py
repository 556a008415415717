"""Trains a model with one method on one data set, and reports held-out accuracy."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sam_examples.data import label_record
from sam_examples.settings.command_line import (
    check_training,
    make_run_directory,
    one_line_errors,
    versions,
    write_json,
)
from sam_examples.settings.config import (
    check_without_data,
    default_hyperparameters,
    load,
)
from sam_examples.settings.config_file import parse
from sam_examples.settings.methods import check_batch, hyperparameters
from sam_examples.settings.run_options import as_json, num_devices
from sam_examples.training.build import Optimizer, check_layers, make_network
from sam_examples.training.checkpoints import Checkpoints
from sam_examples.training.images import content_of, evaluation_of, make_image_task
from sam_examples.training.loop import (
    carry_out,
    describe_extension,
    find_progress,
    stopped_in_a_line,
)
from sam_examples.training.run import Run, training_settings
from sam_examples.training.task import Evaluation


def report(
    run: Run,
    test: Evaluation,
    directory: Path,
    header: str,
    settings: Mapping[str, Any],
) -> None:
    """Evaluates on the test split, writes results.json and prints a line.

    Args:
      run: a finished one.
      test: the test split.
      directory: where results.json goes.
      header: begins the line.
      settings: what results.json begins with.
    """
    # A call compiled; where it was the only one, there is no figure.
    seconds = float(np.median(run.step_seconds)) if run.step_seconds else None
    figures: dict[str, Any] = {
        "test_accuracy": run.trainer.evaluate(test)[1],
        "valid_accuracy": run.curves["valid_accuracy"][-1],  # None without images.
        "step_seconds": seconds,
    }
    path = directory / "results.json"
    write_json(path, {**settings, **figures, "epochs": run.curves})
    valid, speed = "", ""
    if figures["valid_accuracy"] is not None:
        valid = f" (validation {100 * figures['valid_accuracy']:.2f} %)"
    if seconds is not None:
        speed = f", {run.units_per_second:,.0f} images/s, {1e3 * seconds:.1f} ms a step"
    print(
        f"{header}: test accuracy {100 * figures['test_accuracy']:.2f} % after epoch "
        f"{run.epoch}{valid}{speed}; {path}"
    )


def main(args: Sequence[str] | None = None) -> None:
    """Runs the training that the command line asks for."""
    with stopped_in_a_line():
        _main(args)


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
        devices = num_devices(config, config.batch_size)
        optimizer = Optimizer(config, chosen, steps)
        directory = make_run_directory(config.out, f"{config.dataset}-{method}")
        checkpoints = Checkpoints(directory / "checkpoints", config.keep)
        splits = dataset.train, dataset.valid, dataset.test
        settings = training_settings(config, chosen, [content_of(s) for s in splits])
        progress = find_progress(checkpoints, settings, resume=config.resume)
        model = make_network(config, dataset)
        task = make_image_task(config, dataset, model, devices)
        check_layers(config, task)
        run = Run(config, task, optimizer, devices)
        if progress is not None:
            run.resume(checkpoints, progress)
            if progress.settings["epochs"] < config.epochs:
                print(describe_extension(progress, config, chosen, steps))
    carry_out(run, config, directory, checkpoints, settings)
    report(
        run,
        evaluation_of(dataset.test, devices),
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
