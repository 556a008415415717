"""How long the steps of a study's configurations take, over those of the base."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sam_examples.benchmarking.measure import in_turns, time_ratio
from sam_examples.settings.command_line import versions, write_json
from sam_examples.study.contestants import Contestant, Group, Run, distinct


class Trainer(Protocol):
    """What carries out runs."""

    def program(self, run: Run, /) -> Any:
        """What the time of a run's steps depends on. Hashable."""

    def turn(self, run: Run, /) -> Callable[[], float]:
        """A function that takes the next steps, and returns the seconds of one."""


def time_steps(
    trainer: Trainer, groups: Sequence[Group], rounds: int, recipe: Any, path: Path
) -> None:
    """Has all configurations take steps in turns, and records their times.

    Those whose steps are the same are timed once. A ratio is the median, over the
    rounds, of that within a round.

    Args:
      trainer: carries them out.
      groups: of the configurations; the first of all is the base.
      rounds: those that count.
      recipe: a dataclass, recorded.
      path: the file.
    """
    contestants = distinct(c for group in groups for c, _ in group.pairs)
    timed: dict[Any, tuple[Contestant, Run]] = {}
    for contestant in contestants:
        run = contestant.run(contestant.grid[0], 0.0, seed=0)
        timed.setdefault(trainer.program(run), (contestant, run))
    turns = {c.label: trainer.turn(run) for c, run in timed.values()}
    seconds = in_turns(turns, rounds, warm_up=rounds // 4 + 2)
    base = next(iter(turns))
    ratios = {label: time_ratio(seconds, label, base) for label in turns}

    def label_of(contestant: Contestant) -> str:
        run = contestant.run(contestant.grid[0], 0.0, seed=0)
        return timed[trainer.program(run)][0].label

    figures = {
        "recipe": dataclasses.asdict(recipe),
        "rounds": rounds,
        "processor_seconds": {k: float(np.mean(v)) for k, v in seconds.items()},
        "over_base": {c.label: ratios[label_of(c)] for c in contestants},
        "load": os.getloadavg()[0],
        "versions": versions(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, figures)
