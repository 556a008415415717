"""What the benchmarks of training steps share: the problem, compiled steps, timings."""

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import track
from rich.table import Table

import optax_sam
from sam_examples.data import Split, prefetched
from sam_examples.models.convolution import PatchConv
from sam_examples.models.factories import convolution
from sam_examples.models.resnet import ResNet
from sam_examples.settings.command_line import (
    check_stages,
    require_at_least_one,
    versions,
    write_json,
)
from sam_examples.training.step import LossFn, TrainState, make_loss_fn

BASE = optax.sgd(0.1, momentum=0.9)
RHO = 0.1
WARM_UP = 2  # Rounds before those that count.
SGD = "SGD"


@dataclasses.dataclass(frozen=True)
class Options:
    """The network and the batch of a training step, and how often it is timed."""

    stage_sizes: tuple[int, ...] = (2, 2, 2, 2)
    """Blocks of each stage; the default is ResNet-18."""
    width: int = 32
    """Channels of the first stage; the published ResNet-18 has 64."""
    batch_size: int = 32
    """Images of a step."""
    image_size: int = 32
    """Height and width of the images."""
    patch_conv: bool = False
    """Convolutions as products of patches: faster in conditions, on a CPU."""
    rounds: int = 20
    """Timed rounds; in each of them every row of the table takes a step."""
    json: Path | None = None
    """File for all figures."""


# update(params, opt_state, *args) -> (loss, aux), updates, opt_state
Update = Callable[..., tuple[Any, Any, Any]]
Step = Callable[[TrainState, Split], TrainState]
Row = Callable[["Problem"], tuple[optax.GradientTransformation, Update]]
Figures = Mapping[str, float]


class Problem(NamedTuple):
    """A network and a batch of noise; `init()` makes parameters and statistics."""

    model: ResNet
    init: Callable[[], Mapping[str, Any]]
    batch: Split
    loss_fn: LossFn


class Compiled(NamedTuple):
    """A compiled step, what makes its first state and what the step costs."""

    step: Any
    init: Callable[[], TrainState]
    cost: dict[str, float]

    def turn(self, batch: Split, steps: int = 1) -> Callable[[], float]:
        """A function that takes the next steps, see `stepping`."""
        return stepping(self.step, self.init(), batch, steps=steps)


def check(options: Any, *names: str) -> None:
    """Raises a ValueError unless these numbers are at least 1; makes JSON's folder."""
    require_at_least_one(options, *names)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)


def make_problem(options: Options) -> Problem:
    """Builds the network and the batch, the same in every run."""
    check(options, "width", "batch_size", "image_size", "rounds")
    check_stages("stage-sizes", options.stage_sizes)
    conv = PatchConv if options.patch_conv else convolution
    model = ResNet(options.stage_sizes, 10, options.width, conv=conv)
    rng = np.random.default_rng(0)
    shape = (options.batch_size, options.image_size, options.image_size, 3)
    images = jnp.asarray(rng.normal(size=shape), jnp.float32)
    labels = jnp.asarray(rng.integers(10, size=options.batch_size), jnp.int32)
    init = jax.jit(lambda: model.init(jax.random.key(0), images[:1], train=False))
    return Problem(model, init, Split(images, labels), make_loss_fn(model))


def engine(
    tx: optax.GradientTransformation, **losses: Callable[[ResNet], Callable[..., Any]]
) -> Row:
    """Any optimizer, through `optax_sam.value_and_update`.

    Args:
      tx: the optimizer.
      **losses: more loss functions for `value_and_update`, each made from the model.
    """

    def row(problem: Problem) -> tuple[optax.GradientTransformation, Update]:
        more = {name: make(problem.model) for name, make in losses.items()}
        return tx, optax_sam.value_and_update(problem.loss_fn, tx, has_aux=True, **more)

    return row


def sam_by_hand(
    value_and_grad: Callable[..., Any], base: optax.GradientTransformation, rho: float
) -> Update:
    """The update of SAM as a careful user writes it who needs nothing else."""

    def update(params: Any, opt_state: Any, *args: Any) -> Any:
        value, grads = value_and_grad(params, *args)
        scale = rho / (optax.tree.norm(grads) + 1e-12)
        perturbed = jax.tree.map(lambda p, g: p + scale * g, params, grads)
        _, grads = value_and_grad(perturbed, *args)
        return value, *base.update(grads, opt_state, params)

    return update


def compile_step(
    row: Row,
    problem: Problem,
    compiler_options: dict[str, str | bool] | None = None,
    *,
    count: int | None = None,
) -> Compiled:
    """Compiles a step.

    Args:
      row: the optimizer and its update.
      problem: the network and the batch.
      compiler_options: passed to XLA.
      count: if given, the step takes all counts of the state to be this number. The
        compiler then knows what is due, and removes the branch that is not.
    """
    tx, update = row(problem)

    def init() -> TrainState:
        variables = problem.init()
        return TrainState(**variables, opt_state=tx.init(variables["params"]))

    def step(state: TrainState, batch: Split) -> TrainState:
        params, stats, opt_state = state
        if count is not None:
            opt_state = set_counts(opt_state, count)
        key = jax.random.key(0)  # Of the dropout that there is not.
        value, updates, opt_state = update(params, opt_state, batch, stats, key)
        _, (stats, _) = value
        return TrainState(optax.apply_updates(params, updates), stats, opt_state)

    state = jax.eval_shape(init)
    lowered = jax.jit(step, donate_argnums=0).lower(state, problem.batch)
    compiled: Any = lowered.compile(compiler_options)
    cost = {
        "flops": compiled.cost_analysis()["flops"],
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "state_bytes": num_bytes(state.opt_state),
        "param_bytes": num_bytes(state.params),
    }
    return Compiled(compiled, init, cost)


def set_counts(opt_state: Any, count: int) -> Any:
    """The state with all counts of steps set to `count`."""
    return optax.tree.set(opt_state, count=jnp.asarray(count, jnp.int32))


def num_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree, which may be shapes only."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def timed(fn: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """What a compiled function returns, and the seconds until all of it is there."""
    start = time.perf_counter()
    out = fn(*args)
    for leaf in jax.tree.leaves(out):
        leaf.block_until_ready()
    return out, time.perf_counter() - start


def in_turns(
    turns: Mapping[str, Callable[[], float]], rounds: int, *, warm_up: int = WARM_UP
) -> dict[str, Any]:
    """Calls all in turns (A B C A B C ...); returns what each returned, round by round.

    Rounds of warm-up come before those that count.
    """
    seconds = {name: np.zeros(rounds) for name in turns}
    for i in track(range(-warm_up, rounds), "timing"):
        for name, turn in turns.items():
            taken = turn()
            if i >= 0:
                seconds[name][i] = taken
    return seconds


def stepping(
    step: Callable[..., Any], state: Any, *args: Any, steps: int = 1
) -> Callable[[], float]:
    """A function that takes the next steps and returns the seconds of one.

    Of several, each is handed over while those before it run, as in a training.

    Args:
      step: `step(state, *args) -> state`.
      state: the first state.
      *args: what else each step gets.
      steps: how many steps to take.
    """

    def take(state: Any) -> Any:
        for _ in range(steps):
            state = step(state, *args)
        return state

    def turn() -> float:
        nonlocal state
        state, seconds = timed(take, state)
        return seconds / steps

    return turn


def making_batches(
    dataset: grain.MapDataset,
    batches: int,
    first_seconds: list[float],
    *,
    num_threads: int | None = None,
) -> Callable[[], float]:
    """A function that makes the next batches, and returns the seconds of one.

    Args:
      dataset: the batches of all calls.
      batches: how many of them a call makes.
      first_seconds: gets the seconds until the first batch of each call.
      num_threads: see `prefetched`.
    """
    done = 0

    def turn() -> float:
        nonlocal done
        start = time.perf_counter()
        # Nothing is left to prepare when the next turn is timed.
        part = dataset[done : done + batches]
        with_threads = prefetched(part, num_threads=num_threads)
        next(with_threads)
        first_seconds.append(time.perf_counter() - start)
        for _ in with_threads:
            pass
        done += batches
        return (time.perf_counter() - start) / batches

    return turn


def time_ratio(seconds: Mapping[str, Any], name: str, other: str) -> float:
    """The median, over the rounds, of the ratio within a round."""
    return float(np.median(seconds[name] / seconds[other]))


def mean_time_ratio(seconds: Mapping[str, Any], name: str, other: str) -> float:
    """The same where rounds differ: the mean without a tenth of them at either end."""
    ratios = np.sort(seconds[name] / seconds[other])
    tenth = len(ratios) // 10
    return float(np.mean(ratios[tenth : len(ratios) - tenth]))


def print_table(
    rows: Mapping[str, Figures], title: str, *, first: str = "step", digits: int = 3
) -> None:
    """Prints the figures that are "a_over_b" or "a_per_b", a column for each."""
    keys = [key for row in rows.values() for key in row]
    columns = [k for k in dict.fromkeys(keys) if "_over_" in k or "_per_" in k]
    table = Table(first, title=title, title_justify="left")
    for key in columns:
        header = key.replace("_over_", "\n/ ").replace("_per_", "\nper ")
        table.add_column(header.replace("_", " "), justify="right", no_wrap=True)
    for name, row in rows.items():
        cells = (f"{row[key]:.{digits}f}" if key in row else "" for key in columns)
        table.add_row(name, *cells)
    # In the 80 columns that a file is taken to have, wide figures break the names.
    width = None if sys.stdout.isatty() else 1000
    Console(highlight=False, width=width).print(table)


def save(options: Any, **tables: Mapping[str, Figures]) -> None:
    """Writes all figures to the file that the options name, if they name one."""
    if options.json is not None:
        settings = dataclasses.asdict(options) | {
            "cores": os.cpu_count(),
            "device": jax.devices()[0].device_kind,
        }
        del settings["json"]
        write_json(
            options.json, {"settings": settings, "versions": versions(), **tables}
        )
