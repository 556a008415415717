"""How a ledger grows: by the runs that it lacks, as many as the time allows."""

import functools
import itertools
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, Protocol

import jax

from sam_examples.benchmarking.together import together
from sam_examples.settings.command_line import versions
from sam_examples.study.contestants import Run
from sam_examples.study.ledger import Ledger, file_name

AT_ONCE = 8  # Programs compiled side by side.


class Outcome(Protocol):
    """What a run came to, a named tuple."""

    @property
    def seconds(self) -> float:
        """Wall time of all of it."""

    def _asdict(self) -> dict[str, Any]: ...


class Trainer(Protocol):
    """What carries out runs."""

    def program(self, run: Run, /) -> Any:
        """What the compiled program of a run depends on. Hashable."""

    def is_compiled(self, run: Run, /) -> bool:
        """Whether `train` would start at once."""

    def compile(self, run: Run, /) -> None:
        """Compiles the program of a run."""

    def train(self, run: Run, /) -> Outcome:
        """Trains and evaluates."""


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


def report(
    ledger: Ledger, trainer: Trainer, watch: Watch, at_most: int | None = None
) -> None:
    """Adds runs, at most so many if that is given, and prints a line of each."""
    for run in itertools.islice(grow(ledger, trainer, watch), at_most):
        result = ledger.results[run]
        line = f"{file_name(run)}: {ledger.line(result)}, {result['seconds']:.0f} s"
        print(line, flush=True)


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
        "cores": os.cpu_count(),
        "versions": versions(),
    }
