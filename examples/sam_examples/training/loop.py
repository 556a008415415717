"""The loop of a training that can be stopped, and goes on where it was."""

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sam_examples.reporting.metrics import MetricsWriter
from sam_examples.settings.command_line import write_json
from sam_examples.settings.run_options import RunOptions, as_json
from sam_examples.training.build import Optimizer
from sam_examples.training.checkpoints import Checkpoints, Progress
from sam_examples.training.interrupts import Interrupt, interruptible
from sam_examples.training.run import Run


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
    progress: Progress,
    config: RunOptions,
    chosen: Mapping[str, Any],
    steps_per_epoch: int,
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
    config: RunOptions,
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
        except SystemExit:  # A batch that cannot be read; what was done counts.
            run.collect(bar, writer)
            save()
            raise
        run.collect(bar, writer)
    save()


def carry_out(
    run: Run,
    config: RunOptions,
    directory: Path,
    checkpoints: Checkpoints,
    settings: Mapping[str, Any],
) -> None:
    """Trains what is left, with all that a run writes down on the way.

    Args:
      run: the training.
      config: its configuration.
      directory: that of the results.
      checkpoints: those of the run.
      settings: what they are of.

    Raises:
      SystemExit: if it is interrupted, once there is a checkpoint.
    """
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


@contextmanager
def stopped_in_a_line() -> Iterator[None]:
    """Ends the program with a line if Ctrl-C comes where no training is under way."""
    try:
        yield
    except KeyboardInterrupt:  # Before or after the training, or a second one in it.
        print("stopped; --resume goes on from the last checkpoint, if there is one")
        raise SystemExit(128 + signal.SIGINT) from None
