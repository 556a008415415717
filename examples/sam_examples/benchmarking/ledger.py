"""The runs of a ledger: which there are, in order of worth, and what they came to.

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

from sam_examples.benchmarking.fast_cifar import Recipe, Run
from sam_examples.settings.command_line import require, write_json

NOISES = (0.0, 0.4)
LEARNING_RATE = 1.0  # Where SGD does best on the held-out split, with noise or without.


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A configuration, and the hyperparameters that it is tried with.

    Attributes:
      label: what it is called.
      method: out of `METHODS`, or several joined by +.
      grid: the hyperparameters of each trial, the likeliest first.
      epochs: passes over the training images.
    """

    label: str
    method: str
    grid: tuple[Mapping[str, Any], ...]
    epochs: int = 10

    def run(self, trial: Mapping[str, Any], noise: float, seed: int) -> Run:
        """The run of one trial."""
        values = tuple({"learning_rate": LEARNING_RATE, **trial}.items())
        return Run(self.label, self.method, values, noise, self.epochs, seed)


def _grid(*rhos: float, **others: Any) -> tuple[Mapping[str, Any], ...]:
    return tuple({"rho": rho, **others} for rho in rhos)


_RATES = tuple({"learning_rate": rate} for rate in (1.0, 0.5, 0.25, 2.0))
_RHOS = (0.05, 0.1, 0.025)
_LAST_BLOCK = ("Conv_4", "Conv_5", "BatchNorm_4", "BatchNorm_5", "Dense_0")
# In order of worth: each group first on one seed, all of its grids, then on others.
GROUPS: Sequence[Sequence[Contestant]] = (
    (
        Contestant("SGD", "sgd", _RATES),
        Contestant(
            "SAM",
            "sam",
            (
                *_grid(*_RHOS, 0.2),
                *_grid(0.05, 0.1, 0.2, 0.4, 0.8, learning_rate=0.5),
            ),
        ),
        # As many gradients as SAM takes.
        Contestant("SGD, twice as long", "sgd", _RATES, epochs=20),
    ),
    (
        Contestant(
            "VaSSO", "vasso", (*_grid(*_RHOS, theta=0.9), *_grid(*_RHOS, theta=0.4))
        ),
        Contestant(
            "RW-SAM",
            "rw_sam",
            # Slopes over their mean, so that a strength means the same at any scale.
            _grid(*_RHOS, strength=1.0, estimator="jvp", normalize=True),
        ),
        Contestant(
            "m-SAM, m = 128", "m_sam", _grid(0.05, 0.025, 0.0125, micro_batch_size=128)
        ),
    ),
    (
        Contestant(
            "SSAM-F, half",
            "sparse_sam",
            _grid(*_RHOS, sparsity=0.5, fisher_estimator="probes"),
        ),
        Contestant("SSAM-D, half", "dynamic_sparse_sam", _grid(*_RHOS, sparsity=0.5)),
        Contestant("static: last block", "sam", _grid(*_RHOS, perturb=_LAST_BLOCK)),
        Contestant("ASAM", "asam", _grid(0.5, 1.0, 0.25)),
    ),
    (
        Contestant("SGD, four times as long", "sgd", _RATES[:2], epochs=40),
        Contestant("SAM, four times as long", "sam", _grid(0.05, 0.1, 0.2), epochs=40),
    ),
)
MORE_SEEDS = (1, 2)

# Accuracy on the held-out split, of the runs that are there.
Scores = Mapping[Run, float]


def in_order(scores: Scores) -> Iterator[Run]:
    """All runs in order of worth.

    Other seeds than the first come for the trial that did best on the held-out split,
    as far as `scores` knows, of each contestant and share of noise.
    """
    for group in GROUPS:
        pairs = [(contestant, noise) for noise in NOISES for contestant in group]
        for contestant, noise in pairs:
            for trial in contestant.grid:
                yield contestant.run(trial, noise, seed=0)
        for seed in MORE_SEEDS:
            for contestant, noise in pairs:
                best = best_trial(contestant, noise, scores)
                if best is not None:
                    yield contestant.run(best, noise, seed)


def best_trial(
    contestant: Contestant, noise: float, scores: Scores
) -> Mapping[str, Any] | None:
    """The trial that did best on the held-out split with the first seed, if any ran."""
    known = {
        i: scores[run]
        for i, trial in enumerate(contestant.grid)
        if (run := contestant.run(trial, noise, seed=0)) in scores
    }
    if not known:
        return None
    return contestant.grid[max(known, key=lambda i: known[i])]


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

    def __init__(self, directory: Path, recipe: Recipe) -> None:
        """Reads what is there.

        Raises:
          ValueError: if a file is of another recipe, or of none.
        """
        self._directory = directory
        self._recipe = _plain(dataclasses.asdict(recipe))
        self.results: dict[Run, Mapping[str, Any]] = {}
        for path in sorted(directory.glob("*.json")):
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            result = json.loads(path.read_text())
            settings = dict(result["run"])
            pairs = settings.pop("hyperparameters").items()
            run = Run(**settings, hyperparameters=tuple(map(_hashable, pairs)))
            recipe = result["recipe"]
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
        """Accuracy on the held-out split of all runs."""
        return {run: result["valid"] for run, result in self.results.items()}

    def missing(self) -> Iterator[Run]:
        """The runs that are not there, in order of worth."""
        return (run for run in in_order(self.scores) if run not in self.results)

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
        self.results[run] = result

    def summary(self) -> list[dict[str, Any]]:
        """A row for each share of noise and contestant that has runs.

        Figures are those of the trial that did best on the held-out split.
        """
        rows = []
        for noise in NOISES:
            for contestant in (c for group in GROUPS for c in group):
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
        figures = {
            name: [result[name] for result in results]
            for name in ("valid", "test", "step_seconds")
        }
        return {
            "noise": f"{noise:g}",
            "configuration": contestant.label,
            "epochs": contestant.epochs,
            "best of": sum(tried),
            "chosen": ", ".join(
                f"{name} {value:g}"
                for name, value in trial.items()
                if isinstance(value, float) and (name != "sparsity")
            ),
            "seeds": len(results),
            "held out": _mean_and_spread(figures["valid"]),
            "test": _mean_and_spread(figures["test"]),
            "ms a step": f"{1000 * np.median(figures['step_seconds']):.2f}",
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


def _mean_and_spread(shares: Sequence[float]) -> str:
    """In per cent; the standard deviation over seeds where there are several."""
    percents = 100 * np.asarray(shares)
    if len(percents) == 1:
        return f"{percents[0]:.2f}"
    return f"{percents.mean():.2f} ± {percents.std(ddof=1):.2f}"


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(value))


def _hashable(pair: tuple[str, Any]) -> tuple[str, Any]:
    name, value = pair
    return name, tuple(value) if isinstance(value, list) else value
