"""Test accuracy against the measured time of a step, for methods of different cost."""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # Run as a script, which leaves examples/ off the path.
    sys.path.insert(0, str(Path(__file__).parents[1]))

from sam_examples.benchmarking import trade_off
from sam_examples.benchmarking.prices import PRICES


def main(args: Sequence[str] | None = None) -> None:
    """Runs the study that the command line asks for."""
    trade_off.run(
        args,
        PRICES,
        purpose="Measures what methods gain that make fewer second passes, or none.",
        name="time-accuracy",
        title="SAM and what costs less, a network",
    )


if __name__ == "__main__":
    main()
