"""A study: tunes rho for every configuration, trains it and times its steps."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import jax
import numpy as np
import tyro
from tqdm import tqdm

from sam_examples.benchmarking.configurations import SAM, SGD, Configuration
from sam_examples.benchmarking.measure import in_turns, time_ratio, timed
from sam_examples.benchmarking.study import Digits, Runs, best_rho
from sam_examples.command_line import (
    NoisyDigits,
    check_training,
    make_run_directory,
    one_line_errors,
    require,
    versions,
    write_json,
)
from sam_examples.figures import plot_accuracy_over_time
from sam_examples.report import print_trade_off

TUNING_SEED = 1000
SETTINGS = ("epochs", "noise", "batch_size", "learning_rate", "weight_decay", "width")


@dataclasses.dataclass(frozen=True)
class Options(NoisyDigits):
    """The options of a study."""

    configurations: tuple[str, ...] = ()
    """Names of the configurations, the rows of the table."""
    seeds: int = 5
    """Seeds of the figures, from 0 on."""
    tuning_seeds: int = 2
    """Seeds that rho is chosen with, from 1000 on."""
    timing_widths: tuple[int, ...] = (8, 32)
    """Widths at which steps are timed."""
    timing_rounds: int = 30
    """Rounds, in each of which every configuration trains for an epoch."""
    skip_timing: bool = False
    """Leave the times out: for when the machine is busy."""
    stages: tyro.conf.Suppress[tuple[int, ...]] = (1, 1, 1)
    norm: tyro.conf.Suppress[Literal["batch"]] = "batch"
    dropout: tyro.conf.Suppress[float] = 0.0  # The configurations name the layers.


@dataclasses.dataclass(frozen=True)
class Study:
    """The training, its options and the results so far."""

    options: Options
    digits: Digits
    runs: Runs
    configurations: Mapping[str, Configuration]

    def configuration(self, name: str) -> Configuration:
        """The configuration of a name; layers are chosen once, after an SGD run."""
        configuration = self.configurations[name]
        if configuration.chosen is None:
            return configuration
        width, sparsity = self.options.width, configuration.chosen
        state, _ = self.digits.start(self.configurations[SGD], width, TUNING_SEED)
        structure = jax.tree.structure(state.params)

        def choose() -> list[bool]:
            state = self.trainer(SGD)(0.0, TUNING_SEED)
            mask = self.digits.layers_of_large_score(
                state, width, TUNING_SEED, sparsity
            )
            leaves: list[bool] = jax.tree.leaves(mask)
            return leaves

        leaves = self.runs.once(("mask", sparsity), choose)
        return configuration.with_layers(jax.tree.unflatten(structure, leaves))

    def trainer(self, name: str) -> Callable[[float, int], Any]:
        """Makes `train(rho, seed) -> state`, compiled once."""
        configuration, options = self.configuration(name), self.options
        train = self.digits.make_train(configuration, options.width)

        def run(rho: float, seed: int) -> Any:
            start = self.digits.start(configuration, options.width, seed)
            return train(*start, self.digits.batches(seed, options.epochs), rho)

        return run

    def train(self, name: str, bar: Any) -> dict[str, Any]:
        """Tunes rho of a configuration and trains it with the seeds of the figures."""
        trainer = None

        def run(rho: float, seed: int) -> dict[str, float]:
            nonlocal trainer
            trainer = trainer or self.trainer(name)
            state = trainer(rho, seed)
            return self.digits.accuracies(state, self.options.width, seed)

        def accuracies(rho: float, seeds: range) -> dict[str, list[float]]:
            bar.set_description(f"{name}, rho {rho:.3g}")
            results = []
            for seed in seeds:
                results.append(
                    self.runs.once((name, rho, seed), partial(run, rho, seed))
                )
                bar.update()
            return {k: [r[k] for r in results] for k in ("valid", "test")}

        tuning = range(TUNING_SEED, TUNING_SEED + self.options.tuning_seeds)
        rho, valid = 0.0, dict[float, float]()
        if name != SGD:
            rho, valid = best_rho(
                lambda r: float(np.mean(accuracies(r, tuning)["valid"]))
            )
        final = accuracies(rho, range(self.options.seeds))
        kind = self.configuration(name).kind
        return {"kind": kind, "rho": rho, "valid_accuracy_of_rho": valid, **final}

    def times(self, width: int) -> dict[str, float]:
        """Times of a step over that of SGD, at this width, and SGD's seconds."""
        turns = {}
        indices = self.digits.batches(0, epochs=1)
        for name in tqdm(self.options.configurations, desc="compile"):
            configuration = self.configuration(name)
            turns[name] = _training(
                self.digits.make_train(configuration, width),
                *self.digits.start(configuration, width, 0),
                indices,
            )
        seconds = in_turns(turns, self.options.timing_rounds)
        ratios = {name: time_ratio(seconds, name, SGD) for name in turns}
        sgd = float(np.median(seconds[SGD])) / len(indices)
        return {"sgd_seconds": sgd, "load": os.getloadavg()[0], **ratios}


def _training(train: Any, state: Any, split: Any, indices: Any) -> Callable[[], float]:
    """A function that trains for another epoch and returns its seconds."""

    def turn() -> float:
        nonlocal state
        state, seconds = timed(train, state, split, indices, 0.1)
        return seconds

    return turn


def check(
    options: Options, configurations: Mapping[str, Configuration], num_examples: int
) -> None:
    """Raises a ValueError if an option is out of range."""
    check_training(options, num_examples)
    for name in ("seeds", "tuning_seeds", "timing_rounds"):
        value, flag = getattr(options, name), name.replace("_", "-")
        require(value >= 1, f"--{flag} must be at least 1", value)
    for name in options.configurations:
        names = "; ".join(configurations)
        require(name in configurations, f"--configurations are out of {names}", name)
    if not options.skip_timing:
        known = SGD in options.configurations
        require(known, f"times are over those of {SGD}; add it", options.configurations)


def run(
    options: Options,
    configurations: Mapping[str, Configuration],
    *,
    name: str,
    title: str,
) -> None:
    """Runs a study, prints its table, and writes figures and plots.

    Args:
      options: see `Options`.
      configurations: the rows to choose from, with `SGD` and `SAM`.
      name: of the directory of the results.
      title: of the table and the plots.
    """
    with one_line_errors():
        digits = Digits(options)
        check(options, configurations, len(digits.dataset(0).train.labels))
        directory = make_run_directory(options.out, name)
        settings = {setting: getattr(options, setting) for setting in SETTINGS}
        runs = Runs(directory / "runs.jsonl", settings)
    study = Study(options, digits, runs, configurations)
    with tqdm(unit="run") as bar:
        rows = {row: study.train(row, bar) for row in options.configurations}
    times: Mapping[int, Mapping[str, float]] = {}
    if not options.skip_timing:
        times = {width: study.times(width) for width in options.timing_widths}
    write_json(
        directory / "results.json",
        {
            "settings": dataclasses.asdict(options),
            "versions": versions(),
            "cores": os.cpu_count(),
            "rows": rows,
            "times": times,
        },
    )
    title = f"{title} of width {options.width}"
    data = f"digits, {100 * options.noise:g} % wrong labels, {options.seeds} seeds"
    print_trade_off(rows, times, best=SAM, title=f"{title}; {data}")
    for width, ratios in times.items():
        plot_accuracy_over_time(
            rows,
            ratios,
            f"{title}\n{data}, steps timed at width {width}",
            directory / f"accuracy-{width}.png",
        )
    print(f"Results in {directory}")
