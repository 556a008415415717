"""Test accuracy against the measured time of a step, with rho tuned for each way."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

if not __package__:  # Run as a script, which leaves examples/ off the path.
    sys.path.insert(0, str(Path(__file__).parents[1]))

from sam_examples.benchmarking import trade_off
from sam_examples.benchmarking.configurations import CONFIGURATIONS

NAMES = tuple(CONFIGURATIONS)


@dataclasses.dataclass(frozen=True)
class Options(trade_off.Options):
    """Measures what SAM along parts of a network gains, and what its steps take.

    A small ResNet learns the digits with label noise, as in compare.py. Every
    configuration gets the rho that does best on the validation split, and is then
    trained with other seeds, whose test accuracy counts. Its steps are timed in turns
    with those of all others. Every training is added to runs.jsonl in --out as it
    ends, and not repeated if found there. Prints a table; writes results.json and, for
    each width that is timed, a plot.
    """

    configurations: Annotated[
        tuple[str, ...], tyro.conf.arg(help=f"Out of: {'; '.join(NAMES)}.")
    ] = NAMES


def main(args: Sequence[str] | None = None) -> None:
    """Runs the study that the command line asks for."""
    options = tyro.cli(Options, args=args)
    title = "SAM along parts of a network"
    trade_off.run(options, CONFIGURATIONS, name="sparse-accuracy", title=title)


if __name__ == "__main__":
    main()
