"""A ledger of runs that learn to translate, by AdamW and sharpness-aware methods."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

if not __package__:  # Run as a script, which leaves examples/ off the path.
    sys.path.insert(0, str(Path(__file__).parents[1]))

from sam_examples.data.parallel_text import load_parallel_text
from sam_examples.settings.command_line import one_line_errors, require
from sam_examples.study.growth import Watch, report
from sam_examples.study.ledger import print_summary, times_path
from sam_examples.study.step_times import time_steps
from sam_examples.study.translation import Recipe, Trainer, TranslationLedger
from sam_examples.study.translation_runs import GROUPS

RESULTS = Path(__file__).parent / "results" / "multi30k"


@dataclasses.dataclass(frozen=True)
class Options:
    """Trains a small Transformer to translate, run after run, for some minutes.

    The runs that are missing are done in order of worth, each recorded in a JSON file
    of its own as it ends. Prints a table of all that is there.
    """

    minutes: float = 60.0
    """How long; no run is started that would not end. 0 for the table alone."""
    at_most: int | None = None
    """Number of runs to do; without it, as many as there is time for."""
    backwards: bool = False
    """Begins with the last row of the table: for a second program that adds to the same
    directory."""
    time_rounds: int = 0
    """Times the steps of all methods, in so many turns, in place of training."""
    data_dir: Path | None = None
    """Where train.*, val.* or valid.* and test*.* are, as for translate.py."""
    out: Path = RESULTS
    """Directory of the runs; times of steps are beside it."""
    recipe: Recipe = dataclasses.field(default_factory=Recipe)
    """What all runs have in common."""


def main(args: Sequence[str] | None = None) -> None:
    """Does the runs that the command line asks for."""
    options = tyro.cli(Options, args=args)
    watch = Watch(options.minutes)
    with one_line_errors():
        require(options.minutes >= 0, "--minutes must be at least 0", options.minutes)
        require(
            options.time_rounds >= 0,
            "--time-rounds must be at least 0",
            options.time_rounds,
        )
        if options.minutes or options.time_rounds:
            train(options, watch)
        ledger = TranslationLedger(options.out, options.recipe, GROUPS)
    print_summary(ledger.summary(), "Translation, figures after the last epoch")


def train(options: Options, watch: Watch) -> None:
    """Does the runs that are missing, or times steps.

    Raises:
      ValueError: if there is no text.
    """
    recipe = options.recipe
    if options.data_dir is None:
        raise ValueError(
            "--data-dir must name the directory of parallel text, got None."
        )
    text = load_parallel_text(options.data_dir, recipe.source, recipe.target)
    trainer = Trainer(text, recipe)
    if options.time_rounds:
        path = times_path(options.out)
        time_steps(trainer, GROUPS, options.time_rounds, recipe, path)
        return
    groups = GROUPS[::-1] if options.backwards else GROUPS
    ledger = TranslationLedger(options.out, recipe, groups)
    report(ledger, trainer, watch, options.at_most)


if __name__ == "__main__":
    main()
