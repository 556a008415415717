"""Test accuracy and the time of a step on noisy digits, with rho tuned for each way."""

import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

if not __package__:  # Run as a script, which leaves examples/ off the path.
    sys.path.insert(0, str(Path(__file__).parents[1]))

from sam_examples.study import trade_off
from sam_examples.study.configurations import CONFIGURATIONS
from sam_examples.study.prices import PRICES
from sam_examples.study.reweighted import REWEIGHTING

QUESTIONS = {
    "sparse": ("SAM along parts of a network", CONFIGURATIONS),
    "price": ("SAM and what costs less", PRICES),
    "reweight": ("RW-SAM and m-SAM", REWEIGHTING),
}


def main(args: Sequence[str] | None = None) -> None:
    """Runs the study that the command line asks for."""
    defaults = {
        name: (title, trade_off.Options(question=name, configurations=tuple(rows)))
        for name, (title, rows) in QUESTIONS.items()
    }
    options = tyro.extras.overridable_config_cli(defaults, args=args)
    title, rows = QUESTIONS[options.question]
    trade_off.run(options, rows, title)


if __name__ == "__main__":
    main()
