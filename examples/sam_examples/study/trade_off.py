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

from sam_examples.benchmarking.measure import (
    in_turns,
    mean_time_ratio,
    stepping,
    time_ratio,
)
from sam_examples.reporting.figures import plot_accuracy_over_time
from sam_examples.reporting.tables import print_trade_off
from sam_examples.settings.command_line import (
    NoisyDigits,
    make_run_directory,
    one_line_errors,
    require,
    require_at_least_one,
    write_results,
)
from sam_examples.study.configurations import SAM, SGD, Configuration
from sam_examples.study.digits import Digits, Runs, best_rho

TUNING_SEED = 1000
SETTINGS = ("epochs", "noise", "batch_size", "learning_rate", "weight_decay", "width")


@dataclasses.dataclass(frozen=True)
class Options(NoisyDigits):
    """Tunes rho for every configuration, trains it and times its steps.

    A small ResNet learns the digits with label noise, as in compare.py. Every
    configuration gets the rho that does best on the validation split, and is then
    trained with other seeds, whose test accuracy counts. Its steps are timed in turns
    with those of all others. Every training is added to runs.jsonl in --out as it ends,
    and not repeated if found there. Prints a table; writes results.json and, for each
    width that is timed, a plot.
    """

    question: tyro.conf.Suppress[str] = ""
    configurations: tuple[str, ...] = ()
    """The rows of the table, by default all there are."""
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
        state = self.digits.start(self.configurations[SGD], width, TUNING_SEED)
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
            state = self.digits.start(configuration, options.width, seed)
            return train(state, self.digits.epochs(seed, options.epochs), rho)

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
        epoch = self.digits.epochs(0, 1)
        for name in tqdm(self.options.configurations, desc="compile"):
            configuration = self.configuration(name)
            train = self.digits.make_train(configuration, width)
            state = self.digits.start(configuration, width, 0)
            turns[name] = stepping(train, state, epoch, 0.1)
        seconds = in_turns(turns, self.options.timing_rounds)
        ratios = {}
        for name in turns:
            differ = self.configuration(name).ascend_when is not None
            ratio = mean_time_ratio if differ else time_ratio
            ratios[name] = ratio(seconds, name, SGD)
        sgd = float(np.median(seconds[SGD])) / len(epoch.keys)
        return {"sgd_seconds": sgd, "load": os.getloadavg()[0], **ratios}


def check(options: Options, configurations: Mapping[str, Configuration]) -> None:
    """Raises a ValueError if an option of a study is out of range."""
    require_at_least_one(options, "seeds", "tuning_seeds", "timing_rounds")
    for name in options.configurations:
        names = "; ".join(configurations)
        require(name in configurations, f"--configurations are out of {names}", name)
    if not options.skip_timing:
        known = SGD in options.configurations
        require(known, f"times are over those of {SGD}; add it", options.configurations)


def run(
    options: Options, configurations: Mapping[str, Configuration], title: str
) -> None:
    """Runs a study, prints its table, and writes figures and plots.

    Args:
      options: see there.
      configurations: the rows to choose from, with `SGD` and `SAM`.
      title: of the table and the plots.
    """
    with one_line_errors():
        digits = Digits(options)
        check(options, configurations)
        directory = make_run_directory(options.out, f"digits-{options.question}")
        settings = {setting: getattr(options, setting) for setting in SETTINGS}
        runs = Runs(directory / "runs.jsonl", settings)
    study = Study(options, digits, runs, configurations)
    with tqdm(unit="run") as bar:
        rows = {row: study.train(row, bar) for row in options.configurations}
    times: Mapping[int, Mapping[str, float]] = {}
    if not options.skip_timing:
        times = {width: study.times(width) for width in options.timing_widths}
    write_results(
        directory / "results.json",
        options,
        cores=os.cpu_count(),
        rows=rows,
        times=times,
    )
    title = f"{title}, a network of width {options.width}"
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
