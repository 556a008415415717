"""Test accuracy against the measured time of a step, with rho tuned for each way."""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # Run as a script, which leaves examples/ off the path.
    sys.path.insert(0, str(Path(__file__).parents[1]))

from sam_examples.benchmarking import trade_off
from sam_examples.benchmarking.configurations import CONFIGURATIONS


def main(args: Sequence[str] | None = None) -> None:
    """Runs the study that the command line asks for."""
    trade_off.run(
        args,
        CONFIGURATIONS,
        purpose="Measures what SAM along parts of a network gains, and its steps take.",
        name="sparse-accuracy",
        title="SAM along parts of a network",
    )


if __name__ == "__main__":
    main()
