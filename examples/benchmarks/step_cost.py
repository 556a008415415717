"""What a training step costs, next to its base optimizer and to other SAMs."""

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

import optax_sam

if not __package__:  # Run as a script, which leaves examples/ off the path.
    sys.path.insert(0, str(Path(__file__).parents[1]))

from command_line import one_line_errors, require, versions, write_json
from data import Split
from models.resnet import ResNet
from training import LossFn, TrainState, make_loss_fn

BASE = optax.sgd(0.1, momentum=0.9)
RHO = 0.1
# Opaque mode takes both gradients in one step; batch statistics are the clean pass's.
CONTRIB_SAM = optax.contrib.sam(
    BASE, optax.chain(optax.contrib.normalize(), optax.sgd(RHO)), opaque_mode=True
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures training steps of a CIFAR ResNet, next to SGD's and to other SAMs.

    A step is forward and backward passes with batch normalisation in train mode, SGD
    with momentum and the update of the parameters, compiled as one function whose state
    is donated. FLOPs and temporary memory are the compiler's figures; times are taken
    in turns and compared round by round, and medians are shown.
    """

    stage_sizes: tuple[int, ...] = (2, 2, 2, 2)
    """Blocks of each stage; the default is ResNet-18."""
    width: int = 32
    """Channels of the first stage; the published ResNet-18 has 64."""
    batch_size: int = 32
    """Images of a step."""
    image_size: int = 32
    """Height and width of the images."""
    rounds: int = 20
    """Timed rounds; in each of them every row of the table takes a step."""
    json: Path | None = None
    """File for all figures."""


# update(params, opt_state, *args) -> (loss, aux), updates, opt_state
Update = Callable[..., tuple[Any, Any, Any]]
Row = Callable[[LossFn], tuple[optax.GradientTransformation, Update]]


class Problem(NamedTuple):
    """A network and a batch of noise; `init()` makes parameters and statistics."""

    init: Callable[[], Mapping[str, Any]]
    batch: Split
    loss_fn: LossFn


def make_problem(options: Options) -> Problem:
    """Builds the network and the batch, the same in every run."""
    model = ResNet(options.stage_sizes, num_classes=10, width=options.width)
    rng = np.random.default_rng(0)
    shape = (options.batch_size, options.image_size, options.image_size, 3)
    images = jnp.asarray(rng.normal(size=shape), jnp.float32)
    labels = jnp.asarray(rng.integers(10, size=options.batch_size), jnp.int32)
    init = jax.jit(lambda: model.init(jax.random.key(0), images[:1], train=False))
    return Problem(init, Split(images, labels), make_loss_fn(model))


def plain_sgd(grad_fn: Any, params: Any, opt_state: Any, *args: Any) -> Any:
    """The base optimizer, as in any training loop with Optax."""
    value, grads = grad_fn(params, *args)
    return value, *BASE.update(grads, opt_state, params)


def written_out(grad_fn: Any, params: Any, opt_state: Any, *args: Any) -> Any:
    """SAM as a careful user writes it who needs nothing else."""
    value, grads = grad_fn(params, *args)
    scale = RHO / (optax.tree.norm(grads) + 1e-12)
    perturbed = jax.tree.map(lambda p, g: p + scale * g, params, grads)
    _, grads = grad_fn(perturbed, *args)
    return value, *BASE.update(grads, opt_state, params)


def contrib(grad_fn: Any, params: Any, opt_state: Any, *args: Any) -> Any:
    """Optax's own SAM, which looks for the perturbed gradient itself."""
    value, grads = grad_fn(params, *args)
    return value, *CONTRIB_SAM.update(
        grads, opt_state, params, grad_fn=lambda p, _: grad_fn(p, *args)[1]
    )


def by_hand(tx: optax.GradientTransformation, update: Callable[..., Any]) -> Row:
    """An update that takes its gradients from `jax.value_and_grad`."""

    def row(loss_fn: LossFn) -> tuple[optax.GradientTransformation, Update]:
        def mean_loss(*args: Any) -> tuple[jax.Array, Any]:
            losses, aux = loss_fn(*args)
            return losses.mean(), aux

        return tx, partial(update, jax.value_and_grad(mean_loss, has_aux=True))

    return row


def engine(tx: optax.GradientTransformation) -> Row:
    """Any optimizer, through `optax_sam.value_and_update`."""
    return lambda loss_fn: (tx, optax_sam.value_and_update(loss_fn, tx, has_aux=True))


# The rows of the table; the first three are what the others are measured against.
SGD, HAND_WRITTEN, CONTRIB = "SGD", "SAM by hand", "optax.contrib.sam"
ROWS: Mapping[str, Row] = {
    SGD: by_hand(BASE, plain_sgd),
    HAND_WRITTEN: by_hand(BASE, written_out),
    CONTRIB: by_hand(CONTRIB_SAM, contrib),
    "SGD value_and_update": engine(BASE),
    "optax_sam.sam": engine(optax_sam.sam(BASE, RHO)),
    "optax_sam.asam": engine(optax_sam.asam(BASE, 10 * RHO)),
    "optax_sam.vasso": engine(optax_sam.vasso(BASE, RHO, theta=0.4)),
}


def compile_step(
    row: Row, problem: Problem, compiler_options: dict[str, str | bool] | None = None
) -> tuple[Any, Callable[[], TrainState], dict[str, float]]:
    """Compiles a step; returns it, what makes the first state and what it costs."""
    tx, update = row(problem.loss_fn)

    def init() -> TrainState:
        variables = problem.init()
        return TrainState(**variables, opt_state=tx.init(variables["params"]))

    def step(state: TrainState, batch: Split) -> TrainState:
        params, stats, opt_state = state
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
    return compiled, init, cost


def num_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree, which may be shapes only."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def time_steps(compiled: Any, states: Any, batch: Split, rounds: int) -> Any:
    """Takes steps in turns (A B C A B C ...); returns their seconds for every row."""
    seconds = {name: np.zeros(rounds) for name in compiled}
    for turn in track(range(-2, rounds), "timing"):  # Turns before 0 warm up.
        for name, step in compiled.items():
            start = time.perf_counter()
            states[name] = step(states[name], batch)
            for leaf in jax.tree.leaves(states[name]):
                leaf.block_until_ready()
            if turn >= 0:
                seconds[name][turn] = time.perf_counter() - start
    return seconds


def compare(costs: Any, seconds: Any) -> dict[str, dict[str, float]]:
    """The figures of every row, and what they are over those of other rows."""

    def time_over(name: str, other: str) -> float:
        return float(np.median(seconds[name] / seconds[other]))

    return {
        name: cost
        | {
            "seconds": float(np.median(seconds[name])),
            "flops_over_sgd": cost["flops"] / costs[SGD]["flops"],
            "temp_over_contrib": cost["temp_bytes"] / costs[CONTRIB]["temp_bytes"],
            "state_over_params": cost["state_bytes"] / cost["param_bytes"],
            "time_over_sgd": time_over(name, SGD),
            "time_over_hand_written": time_over(name, HAND_WRITTEN),
        }
        for name, cost in costs.items()
    }


def print_table(rows: Mapping[str, Mapping[str, float]], title: str) -> None:
    """Prints, for every row, its figures over those of other rows."""
    columns = [key for key in rows[SGD] if "_over_" in key]
    table = Table("step", title=title, title_justify="left")
    for key in columns:
        header = key.replace("_over_", "\n/ ").replace("_", " ")
        table.add_column(header, justify="right", no_wrap=True)
    for name, row in rows.items():
        table.add_row(name, *(f"{row[key]:.3f}" for key in columns))
    Console(highlight=False).print(table)


def main(args: Sequence[str] | None = None) -> None:
    """Runs the measurement that the command line asks for."""
    options = tyro.cli(Options, args=args)
    with one_line_errors():
        for name in ("width", "batch_size", "image_size", "rounds"):
            value, flag = getattr(options, name), name.replace("_", "-")
            require(value >= 1, f"--{flag} must be at least 1", value)
        problem = make_problem(options)
        if options.json is not None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
    compiled, states, costs = {}, {}, {}
    for name in track(ROWS, "compiling"):
        compiled[name], init, costs[name] = compile_step(ROWS[name], problem)
        states[name] = init()
    seconds = time_steps(compiled, states, problem.batch, options.rounds)
    rows = compare(costs, seconds)
    milliseconds = 1e3 * rows[SGD]["seconds"]
    print_table(rows, f"Steps, {os.cpu_count()} cores; SGD: {milliseconds:.1f} ms")
    if options.json is not None:
        settings = dataclasses.asdict(options) | {"cores": os.cpu_count()}
        content = {"settings": settings, "versions": versions(), "rows": rows}
        write_json(options.json, content)


if __name__ == "__main__":
    main()
