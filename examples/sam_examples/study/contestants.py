"""What is compared: runs, and in which order of worth they are done."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

Values = Mapping[str, Any]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Run:
    """What is trained: one entry of a ledger.

    Attributes:
      label: what the configuration is called.
      method: out of `METHODS`, or several joined by +.
      hyperparameters: pairs of name and value, in place of the method's defaults, and
        what the trainer of the data takes.
      noise: share of the training labels that are replaced by another class.
      epochs: passes over the training examples.
      seed: draws label noise, parameters, batches and what the method draws.
    """

    label: str
    method: str
    hyperparameters: tuple[tuple[str, Any], ...]
    noise: float
    epochs: int
    seed: int


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A configuration, and the hyperparameters that it is tried with.

    Attributes:
      label: what it is called.
      method: out of `METHODS`, or several joined by +.
      grid: the hyperparameters of each trial, the likeliest first, those that every
        trial has included.
      epochs: passes over the training examples.
    """

    label: str
    method: str
    grid: tuple[Values, ...]
    epochs: int = 10

    def run(self, trial: Values, noise: float, seed: int) -> Run:
        """The run of one trial."""
        values = tuple(trial.items())
        return Run(self.label, self.method, values, noise, self.epochs, seed)


class Group(NamedTuple):
    """Contestants whose runs are of the same worth.

    Attributes:
      question: the one that they answer, whose table has a row of each.
      contestants: first on one seed, all of their grids, then on others.
      noises: shares of wrong labels.
      seeds: from 0 on; hyperparameters are chosen with the first.
    """

    question: str
    contestants: tuple[Contestant, ...]
    noises: tuple[float, ...] = (0.0,)
    seeds: int = 3

    @property
    def pairs(self) -> list[tuple[Contestant, float]]:
        """Each contestant with each share of noise."""
        return [(c, noise) for noise in self.noises for c in self.contestants]


# Score on the held-out split, of the runs that are there; more is better.
Scores = Mapping[Run, float]


def grid(*rhos: float, **others: Any) -> tuple[Values, ...]:
    """A trial for each rho; all other hyperparameters are the same."""
    return tuple({"rho": rho, **others} for rho in rhos)


def distinct(items: Iterable[T]) -> list[T]:
    """The items, each once, in order; they need not be hashable."""
    found: list[T] = []
    for item in items:
        if item not in found:
            found.append(item)
    return found


def in_order(groups: Sequence[Group], scores: Scores) -> Iterator[Run]:
    """All runs in order of worth.

    Other seeds than the first come for the trial that did best on the held-out split,
    as far as `scores` knows, of each contestant and share of noise.
    """
    for group in groups:
        for contestant, noise in group.pairs:
            for trial in contestant.grid:
                yield contestant.run(trial, noise, seed=0)
        for seed in range(1, group.seeds):
            for contestant, noise in group.pairs:
                best = best_trial(contestant, noise, scores)
                if best is not None:
                    yield contestant.run(best, noise, seed)


def best_trial(contestant: Contestant, noise: float, scores: Scores) -> Values | None:
    """The trial that did best on the held-out split with the first seed, if any ran."""
    known = {
        i: scores[run]
        for i, trial in enumerate(contestant.grid)
        if (run := contestant.run(trial, noise, seed=0)) in scores
    }
    if not known:
        return None
    return contestant.grid[max(known, key=lambda i: known[i])]
