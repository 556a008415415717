"""A ledger of CIFAR-10 runs, which grows by as many as the minutes allow."""

import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import tyro

if not __package__:  # Run as a script, which leaves examples/ off the path.
    sys.path.insert(0, str(Path(__file__).parents[1]))

from sam_examples.benchmarking.fast_cifar import Outcome, Recipe, Run, Trainer
from sam_examples.benchmarking.ledger import (
    Ledger,
    as_markdown,
    file_name,
    print_summary,
)
from sam_examples.benchmarking.plans import PLANS
from sam_examples.benchmarking.together import together
from sam_examples.data import load_cifar10
from sam_examples.settings.command_line import one_line_errors, require, versions

AT_ONCE = 8  # Programs compiled side by side.
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


class Watch:
    """Says whether there is time for something, from what it took before."""

    def __init__(self, minutes: float) -> None:
        """Starts it."""
        self._end = time.monotonic() + 60 * minutes
        self._longest: dict[Any, float] = {}

    def allows(self, kind: Any, epochs: int = 1) -> bool:
        """Whether so many epochs of a kind fit; any do that were never noted."""
        left = self._end - time.monotonic()
        return left > epochs * self._longest.get(kind, 0.0)

    def note(self, kind: Any, seconds: float, epochs: int = 1) -> None:
        """Remembers how long so many epochs took."""
        self._longest[kind] = max(self._longest.get(kind, 0.0), seconds / epochs)


def grow(ledger: Ledger, trainer: Trainer, watch: Watch) -> Iterator[Run]:
    """Adds the runs that are missing, until the time is over; yields each."""
    failed = set[Any]()
    while True:
        missing = (r for r in ledger.missing() if trainer.program(r) not in failed)
        run = next(missing, None)
        if run is None:
            return
        if not trainer.is_compiled(run):
            if not watch.allows("compilation"):
                return
            start = time.monotonic()
            failed |= compile_next(ledger, trainer, failed)
            watch.note("compilation", time.monotonic() - start)
            continue
        kind = trainer.program(run)
        if not watch.allows(kind, run.epochs):
            return
        outcome = trainer.train(run)
        watch.note(kind, outcome.seconds, run.epochs)
        ledger.add(run, figures(outcome))
        yield run


def compile_next(ledger: Ledger, trainer: Trainer, failed: set[Any]) -> set[Any]:
    """Compiles what the next runs need, side by side; returns what cannot be."""
    wanted: dict[Any, Run] = {}
    for run in ledger.missing():
        kind = trainer.program(run)
        if not trainer.is_compiled(run) and kind not in failed:
            wanted.setdefault(kind, run)
        if len(wanted) == AT_ONCE:
            break

    def attempt(kind: Any, run: Run) -> Any:
        try:
            trainer.compile(run)
        except Exception as error:
            # One method must not cost the others their minutes.
            print(f"{run.label} cannot be compiled: {error}", file=sys.stderr)
            return kind
        return None

    attempts = [functools.partial(attempt, *pair) for pair in wanted.items()]
    return set(together(attempts)) - {None}


def figures(outcome: Outcome) -> dict[str, Any]:
    """What is recorded of a run, beside its settings."""
    return {
        **outcome._asdict(),
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
    }


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
