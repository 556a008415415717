"""Makes all tables and figures of the study from the runs that are recorded."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

if not __package__:  # Run as a script, which leaves examples/ off the path.
    sys.path.insert(0, str(Path(__file__).parents[1]))

from sam_examples.settings.command_line import one_line_errors
from sam_examples.study.plots import PLOTS
from sam_examples.study.report import Book, render

HERE = Path(__file__).parent
# What has tables or figures of the study.
PAGES = (HERE.parents[1] / "README.md", HERE / "README.md")


@dataclasses.dataclass(frozen=True)
class Options:
    """Writes the tables into the pages that have a place for them, and the figures."""

    results: Path = HERE / "results"
    """Directory that has one of each setting."""
    pages: tuple[Path, ...] = PAGES
    """Pages to write the tables into."""
    figures: Path = HERE / "figures"
    """Directory of the figures."""


def main(args: Sequence[str] | None = None) -> None:
    """Makes what the command line asks for."""
    options = tyro.cli(Options, args=args)
    book = Book(options.results)
    with one_line_errors():
        for page in options.pages:
            page.write_text(render(page.read_text(), book))
        options.figures.mkdir(parents=True, exist_ok=True)
        for name, plot in PLOTS.items():
            plot(book, options.figures / f"{name}.png")
            print(options.figures / f"{name}.png")


if __name__ == "__main__":
    main()
