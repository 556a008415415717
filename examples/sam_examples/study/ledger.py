"""The runs of a ledger, and what they came to.

Every run is a JSON file of its own, so that a ledger grows whenever a GPU is at hand,
and whoever has other runs of the same recipe can add them.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from sam_examples.settings.command_line import require, write_json
from sam_examples.study.contestants import (
    Contestant,
    Group,
    Run,
    best_trial,
    distinct,
    in_order,
)


def file_name(run: Run) -> str:
    """The file of a run, such as `sam-lr0.5-rho0.1-noise0-epochs10-seed0.json`."""
    label = re.sub(r"[^a-z0-9]+", "-", run.label.lower()).strip("-")
    numbers = (
        f"{name.replace('learning_rate', 'lr')}{value:g}"
        for name, value in run.hyperparameters
        if isinstance(value, float)
    )
    rest = (f"noise{run.noise:g}", f"epochs{run.epochs}", f"seed{run.seed}")
    return "-".join((label, *numbers, *rest)) + ".json"


class Entry(NamedTuple):
    """What is known of a contestant at a share of noise.

    Attributes:
      contestant: see there.
      noise: share of wrong labels.
      trial: the hyperparameters that did best on the held-out split.
      tried: how many trials they are the best of.
      results: what is recorded of the runs of this trial, by seed.
    """

    contestant: Contestant
    noise: float
    trial: Mapping[str, Any]
    tried: int
    results: Sequence[Mapping[str, Any]]

    @property
    def chosen(self) -> str:
        """The hyperparameters of the trial that are numbers."""
        return ", ".join(
            f"{name} {value:g}"
            for name, value in self.trial.items()
            if isinstance(value, float) and (name != "sparsity")
        )

    def figures(self, name: str) -> Any:
        """One figure of all seeds, an array."""
        return np.asarray([result[name] for result in self.results])


def best_of(entries: Sequence[Entry]) -> Entry:
    """The one that did best on the held-out split with the first seed."""
    return max(entries, key=lambda entry: float(entry.figures("valid")[0]))


class Ledger:
    """A directory of runs of one recipe, and the times of their steps beside it.

    Attributes:
      results: what is recorded of each run.
      ratios: times of a step over those of the base by label, as far as they are known.
    """

    def __init__(self, directory: Path, recipe: Any, groups: Sequence[Group]) -> None:
        """Reads what is there.

        Args:
          directory: of the runs, which need not exist.
          recipe: what all runs have in common, a dataclass that has defaults.
          groups: the runs that are wanted.

        Raises:
          ValueError: if a file is of another recipe, or of none.
        """
        self._directory = directory
        self._recipe = _plain(dataclasses.asdict(recipe))
        self._defaults = _plain(dataclasses.asdict(type(recipe)()))
        self._groups = groups
        self._seen: set[Path] = set()
        self.results: dict[Run, Mapping[str, Any]] = {}
        self.ratios = time_ratios(directory)
        self.read()

    def read(self) -> None:
        """Reads what is new, as of another program that adds to the same directory."""
        for path in sorted(set(self._directory.glob("*.json")) - self._seen):
            self._read(path)
            self._seen.add(path)

    def _read(self, path: Path) -> None:
        try:
            result = json.loads(path.read_text())
            settings = dict(result["run"])
            pairs = settings.pop("hyperparameters").items()
            run = Run(**settings, hyperparameters=tuple(map(_hashable, pairs)))
            # What a recipe did not say when a run was recorded was as by default.
            recipe = self._defaults | result["recipe"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is no run of a ledger ({type(error).__name__}: {error}); move "
                "it elsewhere."
            ) from error
        require(
            recipe == self._recipe,
            f"{path} is of the recipe {recipe}; give another directory, or these "
            "options",
            self._recipe,
        )
        self.results[run] = result

    @property
    def scores(self) -> dict[Run, float]:
        """Scores on held-out data of all runs."""
        return {run: self.score(result) for run, result in self.results.items()}

    def score(self, result: Mapping[str, Any]) -> float:
        """What hyperparameters are chosen by: accuracy on the held-out split."""
        return float(result["valid"])

    def line(self, result: Mapping[str, Any]) -> str:
        """What a run came to, in a few words."""
        return (
            f"{100 * result['valid']:.2f} % held out, {100 * result['test']:.2f} % test"
        )

    def missing(self) -> Iterator[Run]:
        """The runs that are not there, in order of worth."""
        self.read()
        return (r for r in in_order(self._groups, self.scores) if r not in self.results)

    def add(self, run: Run, figures: Mapping[str, Any]) -> None:
        """Records a run, in a file that is whole or not there."""
        settings = dataclasses.asdict(run)
        settings["hyperparameters"] = dict(run.hyperparameters)
        result = _plain({"run": settings, "recipe": self._recipe, **figures})
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / file_name(run)
        part = path.with_suffix(".part")
        write_json(part, result)
        part.replace(path)
        self._seen.add(path)
        self.results[run] = result

    def entries(self, question: str | None = None) -> list[Entry]:
        """What is known of each contestant at each share of noise, by noise.

        Args:
          question: the one whose contestants are wanted; without it, all.
        """
        pairs = distinct(
            pair
            for group in self._groups
            if question in (None, group.question)
            for pair in group.pairs
        )
        scores = self.scores
        entries = []
        for contestant, noise in sorted(pairs, key=lambda pair: pair[1]):
            trial = best_trial(contestant, noise, scores)
            if trial is not None:
                entries.append(self._entry(contestant, trial, noise))
        return entries

    def _entry(
        self, contestant: Contestant, trial: Mapping[str, Any], noise: float
    ) -> Entry:
        tried = [contestant.run(other, noise, 0) for other in contestant.grid]
        seeds = range(max(group.seeds for group in self._groups))
        runs = [contestant.run(trial, noise, seed) for seed in seeds]
        return Entry(
            contestant,
            noise,
            trial,
            sum(run in self.results for run in tried),
            [self.results[run] for run in runs if run in self.results],
        )

    def summary(self, question: str | None = None) -> list[dict[str, str]]:
        """A row for each entry, with the figures of its chosen trial."""
        entries = self.entries(question)
        # Columns that say the same in every row are left out.
        noisy = any(entry.noise for entry in entries)
        return [
            {
                **({"noise": f"{entry.noise:g}"} if noisy else {}),
                "configuration": entry.contestant.label,
                "epochs": str(entry.contestant.epochs),
                "best of": str(entry.tried),
                "chosen": entry.chosen,
                "seeds": str(len(entry.results)),
                **self.columns(entry),
            }
            for entry in entries
        ]

    def columns(self, entry: Entry) -> dict[str, str]:
        """The figures of a row."""
        seconds = entry.figures("step_seconds")
        return {
            "held out": mean_and_spread(100 * entry.figures("valid")),
            "test": mean_and_spread(100 * entry.figures("test")),
            "ms a step": f"{1000 * np.median(seconds):.2f}",
        }


def times_path(directory: Path) -> Path:
    """The file of the times of steps, of the runs of a directory."""
    return directory.with_name(f"{directory.name}-steps.json")


def time_ratios(directory: Path) -> Mapping[str, float]:
    """Times of a step over those of the base by label, none if none were measured."""
    path = times_path(directory)
    if not path.is_file():
        return {}
    ratios: Mapping[str, float] = json.loads(path.read_text())["over_base"]
    return ratios


def print_summary(rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Prints the rows of `Ledger.summary` as a table."""
    names = list(rows[0]) if rows else ["no runs yet"]
    table = Table(title=title, title_justify="left")
    for name in names:
        table.add_column(name, justify="left" if name in _WORDS else "right")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(highlight=False).print(table)


_WORDS = ("configuration", "chosen", "method", "in one line", "gradients")


def as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `Ledger.summary` as a table in Markdown."""
    names = list(rows[0])
    rules = ("---" if name in _WORDS else "---:" for name in names)
    lines = [names, list(rules), *([str(x) for x in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mean_and_spread(figures: Any, digits: int = 2) -> str:
    """The mean, and the standard deviation over seeds where there are several."""
    mean = f"{np.mean(figures):.{digits}f}"
    if len(figures) == 1:
        return mean
    return f"{mean} ± {np.std(figures, ddof=1):.{digits}f}"


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(value))


def _hashable(pair: tuple[str, Any]) -> tuple[str, Any]:
    name, value = pair
    return name, tuple(value) if isinstance(value, list) else value
