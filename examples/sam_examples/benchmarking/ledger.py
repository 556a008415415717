"""The runs of a ledger, and what they came to.

Every run is a JSON file of its own, so that a ledger grows whenever a GPU is at hand,
and whoever has other runs of the same recipe can add them.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from sam_examples.benchmarking.fast_cifar import Run
from sam_examples.benchmarking.plans import (
    MORE_SEEDS,
    Contestant,
    Group,
    best_trial,
    in_order,
)
from sam_examples.settings.command_line import require, write_json


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


class Ledger:
    """A directory of runs of one recipe.

    Attributes:
      results: what is recorded of each run.
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

    def summary(self) -> list[dict[str, Any]]:
        """A row for each share of noise and contestant that has runs.

        Figures are those of the trial that did best on the held-out split.
        """
        rows = []
        pairs = [pair for group in self._groups for pair in group.pairs]
        for contestant, noise in sorted(pairs, key=lambda pair: pair[1]):
            trial = best_trial(contestant, noise, self.scores)
            if trial is not None:
                rows.append(self._row(contestant, trial, noise))
        return rows

    def _row(
        self, contestant: Contestant, trial: Mapping[str, Any], noise: float
    ) -> dict[str, Any]:
        runs = (contestant.run(trial, noise, seed) for seed in (0, *MORE_SEEDS))
        results = [self.results[run] for run in runs if run in self.results]
        tried = [
            contestant.run(other, noise, 0) in self.results for other in contestant.grid
        ]
        noisy = any(any(group.noises) for group in self._groups)
        return {
            **({"noise": f"{noise:g}"} if noisy else {}),
            "configuration": contestant.label,
            "epochs": contestant.epochs,
            "best of": sum(tried),
            "chosen": ", ".join(
                f"{name} {value:g}"
                for name, value in trial.items()
                if isinstance(value, float) and (name != "sparsity")
            ),
            "seeds": len(results),
            **self.columns(contestant, results),
        }

    def columns(
        self, contestant: Contestant, results: Sequence[Mapping[str, Any]]
    ) -> dict[str, str]:
        """The figures of a row, from the runs of all its seeds."""
        del contestant
        valid, test, seconds = (
            [result[name] for result in results]
            for name in ("valid", "test", "step_seconds")
        )
        return {
            "held out": mean_and_spread(100 * np.asarray(valid)),
            "test": mean_and_spread(100 * np.asarray(test)),
            "ms a step": f"{1000 * np.median(seconds):.2f}",
        }


def print_summary(rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Prints the rows of `Ledger.summary` as a table."""
    names = list(rows[0]) if rows else ["no runs yet"]
    table = Table(title=title, title_justify="left")
    for name in names:
        table.add_column(name, justify="left" if name in _WORDS else "right")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(highlight=False).print(table)


_WORDS = ("configuration", "chosen")


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
