"""A ledger of CIFAR-10 runs, which grows by as many as the minutes allow."""

import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

if not __package__:  # Run as a script, which leaves examples/ off the path.
    sys.path.insert(0, str(Path(__file__).parents[1]))

from sam_examples.benchmarking.fast_cifar import Recipe, Trainer
from sam_examples.benchmarking.growth import Watch, grow
from sam_examples.benchmarking.ledger import (
    Ledger,
    as_markdown,
    file_name,
    print_summary,
)
from sam_examples.benchmarking.plans import PLANS
from sam_examples.data import load_cifar10
from sam_examples.settings.command_line import one_line_errors, require

_RESULTS = Path(__file__).parent / "results"
RESULTS = {
    "gpu": _RESULTS / "cifar10",
    "cpu": _RESULTS / "cifar10-cpu",
    "look_sam": _RESULTS / "cifar10-look-sam",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Trains a small network on CIFAR-10, run after run, for some minutes.

    The runs that are missing are done in order of worth, each recorded in a JSON file
    of its own as it ends. Prints a table of all that is there.
    """

    minutes: float = 8.0
    """How long; no run is started that would not end. 0 for the table alone."""
    at_most: int | None = None
    """Number of runs to do; without it, as many as there is time for."""
    data_dir: Path | None = None
    """Where cifar-10-batches-py or cifar-10-batches-bin is, or lies in."""
    out: Path | None = None
    """Directory of the runs; without it, that of the plan."""
    plan: Literal["gpu", "cpu", "look_sam"] = "gpu"
    """Which runs: of all methods; of those that cost less than SAM, in less time; or of
    LookSAM over its alpha."""
    recipe: Recipe = dataclasses.field(default_factory=Recipe)
    """What all runs have in common."""
    num_valid: int = 5_000
    """Training images that are held out; hyperparameters are chosen on them."""
    images_per_file: int = 10_000
    """Images in each file of the data set."""
    markdown: bool = False
    """Print the table in Markdown."""


def main(args: Sequence[str] | None = None) -> None:
    """Does the runs that the command line asks for."""
    options = tyro.cli(Options, args=args)
    watch = Watch(options.minutes)
    with one_line_errors():
        require(options.minutes >= 0, "--minutes must be at least 0", options.minutes)
        ledger = Ledger(
            options.out or RESULTS[options.plan], options.recipe, PLANS[options.plan]
        )
        if options.minutes:
            require(
                options.data_dir is not None,
                "--data-dir must name the directory of CIFAR-10",
                options.data_dir,
            )
            dataset = load_cifar10(
                options.data_dir or "",
                num_valid=options.num_valid,
                images_per_file=options.images_per_file,
            )
            trainer = Trainer(dataset, options.recipe)
            runs = grow(ledger, trainer, watch)
            for run in itertools.islice(runs, options.at_most):
                result = ledger.results[run]
                print(
                    f"{file_name(run)}: {100 * result['valid']:.2f} % held out, "
                    f"{100 * result['test']:.2f} % test, {result['seconds']:.1f} s",
                    flush=True,
                )
    rows = ledger.summary()
    if options.markdown and rows:
        print(as_markdown(rows))
    else:
        print_summary(rows, "CIFAR-10, accuracy after the last epoch (%)")


if __name__ == "__main__":
    main()
