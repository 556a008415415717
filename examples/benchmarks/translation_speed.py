"""How fast a finished run of translate.py translates, and its training gets batches."""

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

if not __package__:  # Run as a script, which leaves examples/ off the path.
    sys.path.insert(0, str(Path(__file__).parents[1]))

from sam_examples.benchmarking import measure
from sam_examples.data.token_batches import EncodedPairs
from sam_examples.settings.command_line import one_line_errors
from sam_examples.settings.translation import TranslationConfig, parse_translation
from sam_examples.training.build import Optimizer
from sam_examples.training.trainer import Trainer
from sam_examples.training.translation import load_text, make_translation_task
from sam_examples.training.translator import Translator, load_finished

PIPELINE = "pipeline"
STEPS: Mapping[str, Mapping[str, float]] = {"sgd": {}, "sam": {"rho": measure.RHO}}


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures a finished run of translate.py, on the text that it was trained on.

    Of held-out sentences the greedy search and beam search translate as many a second,
    compiled before. In each round of the other measurement the input pipeline makes
    some batches, and steps of the base and of SAM are taken on as many; ratios are
    medians, over the rounds, of the ratio within a round. All is on one device.
    """

    run: Path
    """Directory of the run, its --out."""
    beams: tuple[int, ...] = (1, 4)
    """Numbers of beginnings that a search keeps; 1 is greedy."""
    sentences: int = 500
    """Held-out sentences to translate."""
    batches: int = 8
    """Batches of a round."""
    rounds: int = 5
    """Timed rounds, of translations as well."""
    json: Path | None = None
    """File for all figures."""


def check(options: Options) -> None:
    """Raises a ValueError if an option is out of range."""
    measure.check(options, "sentences", "batches", "rounds")
    if min(options.beams, default=0) < 1:
        raise ValueError(f"--beams must be at least 1 each, got {options.beams}.")


def translating(
    config: TranslationConfig, finished: Any, sentences: Sequence[str]
) -> Callable[[], float]:
    """A function that translates, and returns the seconds of a sentence."""
    model, subwords, params = finished
    translator = Translator(config, model, subwords, params, num_devices=1)

    def turn() -> float:
        translator(sentences)
        return 1 / translator.sentences_per_second

    return turn


def measure_translations(
    options: Options, config: TranslationConfig, finished: Any
) -> dict[str, dict[str, float]]:
    """A row for each search."""
    sentences = load_text(config).valid.sources[: options.sentences]
    turns = {}
    for beams in options.beams:
        name = "greedy" if beams == 1 else f"beam search, {beams}"
        searching = dataclasses.replace(config, beams=beams)
        turns[name] = translating(searching, finished, sentences)
    seconds = measure.in_turns(turns, options.rounds, warm_up=1)
    return {
        name: {"sentences_per_second": float(1 / np.median(taken))}
        for name, taken in seconds.items()
    }


def stepping(trainer: Trainer, batches: Sequence[Any]) -> Callable[[], float]:
    """A function that takes a step on each batch, and returns the seconds of one."""

    def turn() -> float:
        start = time.perf_counter()
        for batch in batches:
            metrics = trainer.train(batch)
        float(metrics.loss)  # That of the last step, after all others.
        return (time.perf_counter() - start) / len(batches)

    return turn


def measure_batches(
    options: Options, config: TranslationConfig, finished: Any
) -> dict[str, dict[str, float]]:
    """A row for each step that the input pipeline feeds."""
    model, subwords, _ = finished
    text = load_text(config)
    calls = options.batches * (options.rounds + measure.WARM_UP)
    # So many epochs that the pipeline has batches for all calls.
    config = dataclasses.replace(config, epochs=calls)
    train, valid = (
        EncodedPairs(*map(subwords.encode, pairs)).cut_off(config.max_length)
        for pairs in (text.train, text.valid)
    )
    task = make_translation_task(config, train, valid, model, 1)
    batches = [
        jax.tree.map(lambda x: x[None], task.batches[step])
        for step in range(options.batches)
    ]
    turns = {}
    for method, values in STEPS.items():
        of_method = dataclasses.replace(config, method=method, fully_sharded=False)
        optimizer = Optimizer(of_method, values, task.steps_per_epoch)
        turns[method] = stepping(Trainer(of_method, task, optimizer, 1), batches)
    turns[PIPELINE] = measure.making_batches(task.batches, options.batches, [])
    seconds = measure.in_turns(turns, options.rounds)
    tokens = task.units_per_step
    return {
        f"{config.base} alone" if method == "sgd" else f"{method} on {config.base}": {
            "pipeline_tokens_per_second": tokens / float(np.median(seconds[PIPELINE])),
            "step_tokens_per_second": tokens / float(np.median(seconds[method])),
            "pipeline_over_step": measure.time_ratio(seconds, method, PIPELINE),
        }
        for method in STEPS
    }


def main(args: Sequence[str] | None = None) -> None:
    """Runs the measurement that the command line asks for."""
    options = tyro.cli(Options, args=args)
    with one_line_errors():
        check(options)
        config = parse_translation(["--config", str(options.run / "config.json")])
        finished = load_finished(config, options.run)
    searches = measure_translations(options, config, finished)
    cores = f"{config.model}, {os.cpu_count()} cores"
    title = f"Translations of {options.sentences:,} sentences by {cores}"
    measure.print_table(searches, title, first="search", digits=1)
    steps = measure_batches(options, config, finished)
    title = f"Batches of at most {config.batch_tokens:,} tokens, {cores}"
    measure.print_table(steps, title, first="step", digits=1)
    measure.save(options, searches=searches, steps=steps)


if __name__ == "__main__":
    main()
