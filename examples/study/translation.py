"""A ledger of runs that learn to translate, by AdamW and sharpness-aware methods."""

import dataclasses
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import tyro

if not __package__:  # Run as a script, which leaves examples/ off the path.
    sys.path.insert(0, str(Path(__file__).parents[1]))

from sam_examples.benchmarking.brief_translation import (
    Recipe,
    Trainer,
    TranslationLedger,
)
from sam_examples.benchmarking.growth import Watch, grow
from sam_examples.benchmarking.ledger import as_markdown, file_name, print_summary
from sam_examples.benchmarking.measure import in_turns, time_ratio
from sam_examples.benchmarking.plans import TRANSLATION
from sam_examples.data.parallel_text import load_parallel_text
from sam_examples.settings.command_line import (
    one_line_errors,
    require,
    versions,
    write_json,
)

RESULTS = Path(__file__).parent / "results" / "multi30k"


@dataclasses.dataclass(frozen=True)
class Options:
    """Trains a small Transformer to translate, run after run, for some minutes.

    The runs that are missing are done in order of worth, each recorded in a JSON file
    of its own as it ends. Prints a table of all that is there.
    """

    minutes: float = 60.0
    """How long; no run is started that would not end. 0 for the table alone."""
    at_most: int | None = None
    """Number of runs to do; without it, as many as there is time for."""
    backwards: bool = False
    """Begins with the last row of the table: for a second program that adds to the same
    directory."""
    time_steps: int = 0
    """Times so many steps of all methods, in turns, in place of training."""
    data_dir: Path | None = None
    """Where train.*, val.* or valid.* and test*.* are, as for translate.py."""
    out: Path = RESULTS
    """Directory of the runs; times of steps are beside it."""
    recipe: Recipe = dataclasses.field(default_factory=Recipe)
    """What all runs have in common."""
    markdown: bool = False
    """Print the table in Markdown."""


def times_path(directory: Path) -> Path:
    """The file of the times of steps, of the runs of a directory."""
    return directory.with_name(f"{directory.name}-steps.json")


def time_ratios(directory: Path) -> Mapping[str, float]:
    """Times of a step over AdamW's by method, none if they were not measured."""
    path = times_path(directory)
    if not path.is_file():
        return {}
    ratios: Mapping[str, float] = json.loads(path.read_text())["over_adamw"]
    return ratios


def time_steps(trainer: Trainer, rounds: int, recipe: Recipe, path: Path) -> None:
    """Has all methods take steps in turns, and records their times over AdamW's."""
    contestants = {c.method: c for group in TRANSLATION for c, _ in group.pairs}
    turns = {
        method: trainer.turn(contestant.run(contestant.grid[0], 0.0, seed=0))
        for method, contestant in contestants.items()
    }
    # The first steps compile, one for each shape of a batch.
    seconds = in_turns(turns, rounds, warm_up=rounds // 4 + 2)
    figures = {
        "recipe": dataclasses.asdict(recipe),
        "rounds": rounds,
        "processor_seconds": {k: float(sum(v)) / rounds for k, v in seconds.items()},
        "over_adamw": {method: time_ratio(seconds, method, "sgd") for method in turns},
        "versions": versions(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, figures)


def main(args: Sequence[str] | None = None) -> None:
    """Does the runs that the command line asks for."""
    options = tyro.cli(Options, args=args)
    watch = Watch(options.minutes)
    with one_line_errors():
        require(options.minutes >= 0, "--minutes must be at least 0", options.minutes)
        require(
            options.time_steps >= 0,
            "--time-steps must be at least 0",
            options.time_steps,
        )
        if options.minutes or options.time_steps:
            train(options, watch)
        ledger = TranslationLedger(options.out, options.recipe, TRANSLATION)
    ledger.ratios = time_ratios(options.out)
    rows = ledger.summary()
    if options.markdown and rows:
        print(as_markdown(rows))
    else:
        print_summary(rows, "Translation, figures after the last epoch")


def train(options: Options, watch: Watch) -> None:
    """Does the runs that are missing, or times steps.

    Raises:
      ValueError: if there is no text.
    """
    recipe = options.recipe
    if options.data_dir is None:
        raise ValueError(
            "--data-dir must name the directory of parallel text, got None."
        )
    text = load_parallel_text(options.data_dir, recipe.source, recipe.target)
    trainer = Trainer(text, recipe)
    if options.time_steps:
        path = times_path(options.out)
        time_steps(trainer, options.time_steps, recipe, path)
        return
    groups = TRANSLATION[::-1] if options.backwards else TRANSLATION
    ledger = TranslationLedger(options.out, recipe, groups)
    runs = grow(ledger, trainer, watch)
    for run in itertools.islice(runs, options.at_most):
        result = ledger.results[run]
        bleu = ", ".join(
            f"{name} {figures['bleu']:.2f}"
            for name, figures in result["quality"].items()
        )
        print(
            f"{file_name(run)}: loss {result['valid_loss']:.4f}, BLEU {bleu}, "
            f"{result['seconds']:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
