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
    trainer: Trainer,
    groups: Sequence[Group],
    rounds: int,
    recipe: Any,
    path: Path,
    only: Sequence[str] = (),
) -> None:
    """Has configurations take steps in turns, and records their times.

    Those whose steps are the same are timed once, and all have the time. A ratio is the
    median, over the rounds, of that within a round.

    Args:
      trainer: carries them out.
      groups: of the configurations; the first of all is the base, and always timed.
      rounds: those that count.
      only: names of those to time, by default all.
      recipe: a dataclass, recorded.
      path: the file.
    """
    contestants = distinct(c for group in groups for c, _ in group.pairs)
    base = contestants[0]
    timed: dict[Any, tuple[Contestant, Run]] = {}
    for contestant in contestants:
        if not only or contestant.label in (base.label, *only):
            run = _first_run(contestant)
            timed.setdefault(trainer.program(run), (contestant, run))
    turns = {c.label: trainer.turn(run) for c, run in timed.values()}
    seconds = in_turns(turns, rounds, warm_up=rounds // 4 + 2)
    ratios = {
        program: time_ratio(seconds, c.label, base.label)
        for program, (c, _) in timed.items()
    }
    programs = {c.label: trainer.program(_first_run(c)) for c in contestants}
    figures = {
        "recipe": dataclasses.asdict(recipe),
        "rounds": rounds,
        "processor_seconds": {k: float(np.mean(v)) for k, v in seconds.items()},
        "over_base": {k: ratios[p] for k, p in programs.items() if p in ratios},
        "load": os.getloadavg()[0],
        "versions": versions(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, figures)


def _first_run(contestant: Contestant) -> Run:
    return contestant.run(contestant.grid[0], 0.0, seed=0)
