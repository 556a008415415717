"""The runs on CIFAR-10, which grow by as many as the minutes allow."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

if not __package__:  # Run as a script, which leaves examples/ off the path.
    sys.path.insert(0, str(Path(__file__).parents[1]))

from sam_examples.data import load_cifar10
from sam_examples.settings.command_line import one_line_errors, require
from sam_examples.study.cifar10 import Recipe
from sam_examples.study.cifar10_runs import QUESTIONS, SETTINGS
from sam_examples.study.contestants import Group, distinct
from sam_examples.study.growth import Watch, report
from sam_examples.study.ledger import Ledger, print_summary, times_path
from sam_examples.study.step_times import time_steps

RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass(frozen=True)
class Options:
    """Trains a network on CIFAR-10, run after run, for some minutes.

    The runs that are missing are done in order of worth, each recorded in a JSON file
    of its own as it ends. Prints a table of all that is there.
    """

    setting: tyro.conf.Suppress[str] = "full"
    minutes: float = 8.0
    """How long; no run is started that would not end. 0 for the table alone."""
    at_most: int | None = None
    """Number of runs to do; without it, as many as there is time for."""
    questions: tuple[str, ...] = ()
    """Those to do runs for, such as noise or theta; by default all."""
    only: tuple[str, ...] = ()
    """Configurations to do runs of, by name; by default all."""
    time_rounds: int = 0
    """Times the steps of all configurations, in so many turns, in place of training."""
    data_dir: Path | None = None
    """Where cifar-10-batches-py or cifar-10-batches-bin is, or lies in."""
    out: Path | None = None
    """Directory of the runs; without it, that of the setting."""
    recipe: Recipe = dataclasses.field(default_factory=Recipe)
    """What all runs have in common."""
    num_valid: int = 5_000
    """Training images that are held out; hyperparameters are chosen on them."""
    images_per_file: int = 10_000
    """Images in each file of the data set."""


def wanted(options: Options) -> list[Group]:
    """The groups of the setting that the options ask for.

    Raises:
      ValueError: if there is no such question or configuration.
    """
    groups = SETTINGS[options.setting].groups
    questions = {group.question for group in groups}
    labels = {c.label for group in groups for c in group.contestants}
    for flag, asked, known in (
        ("questions", options.questions, questions),
        ("only", options.only, labels),
    ):
        for name in asked:
            names = ", ".join(sorted(known))
            require(name in known, f"--{flag} must be out of {names}", name)
    return [
        group._replace(
            contestants=tuple(
                c for c in group.contestants if c.label in (options.only or labels)
            )
        )
        for group in groups
        if group.question in (options.questions or questions)
    ]


def work(options: Options, out: Path, watch: Watch) -> None:
    """Does the runs that are missing, or times steps.

    Raises:
      ValueError: if there are no data.
    """
    groups, recipe = wanted(options), options.recipe
    if options.data_dir is None:
        raise ValueError("--data-dir must name the directory of CIFAR-10, got None.")
    ledger = Ledger(out, recipe, groups)
    dataset = load_cifar10(
        options.data_dir,
        num_valid=options.num_valid,
        images_per_file=options.images_per_file,
    )
    trainer = SETTINGS[options.setting].trainer(dataset, recipe)
    if options.time_rounds:
        everything = SETTINGS[options.setting].groups
        labels = distinct(c.label for group in groups for c in group.contestants)
        path = times_path(out)
        time_steps(trainer, everything, options.time_rounds, recipe, path, labels)
        return
    report(ledger, trainer, watch, options.at_most)


def main(args: Sequence[str] | None = None) -> None:
    """Does the runs that the command line asks for."""
    settings = {
        name: (setting.title, Options(setting=name, recipe=setting.recipe))
        for name, setting in SETTINGS.items()
    }
    options = tyro.extras.overridable_config_cli(settings, args=args)
    watch = Watch(options.minutes)
    with one_line_errors():
        require(options.minutes >= 0, "--minutes must be at least 0", options.minutes)
        require(
            options.time_rounds >= 0,
            "--time-rounds must be at least 0",
            options.time_rounds,
        )
        groups = wanted(options)
        out = options.out or RESULTS / options.setting
        if options.minutes or options.time_rounds:
            work(options, out, watch)
        ledger = Ledger(out, options.recipe, groups)
    for question in dict.fromkeys(group.question for group in groups):
        print_summary(ledger.summary(question), QUESTIONS[question])


if __name__ == "__main__":
    main()
