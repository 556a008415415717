"""What Sparse SAM costs and saves, next to SGD and SAM."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import numpy as np
import optax
import tyro
from rich.progress import track

import optax_sam
from optax_sam import implicit

if not __package__:  # Run as a script, which leaves examples/ off the path.
    sys.path.insert(0, str(Path(__file__).parents[1]))

from sam_examples.benchmarking import measure
from sam_examples.benchmarking.measure import (
    BASE,
    RHO,
    SGD,
    Compiled,
    Figures,
    Problem,
    Row,
    engine,
)
from sam_examples.models.convolution import PatchConv
from sam_examples.models.resnet import ResNet
from sam_examples.settings.command_line import one_line_errors
from sam_examples.training.step import LossFn, make_loss_fn, make_scoring_loss_fn

SAM = "SAM"
SSAM_F, SSAM_D = "SSAM-F between refreshes", "SSAM-D between refreshes"
NOT_DUE, DUE = 1, 0  # Counts of steps.


@dataclasses.dataclass(frozen=True)
class Options(measure.Options):
    """Measures the steps of Sparse SAM, and what a refresh of its mask takes.

    Steps are those of step_cost.py. A refresh is a step with a new mask less one
    without.
    """

    batch_size: int = 128
    """Images of a step; all of them are scored."""
    rounds: int = 5
    """Timed rounds; in each of them every row of the table takes a step."""
    refresh_rounds: int = 3
    """Timed rounds of refreshes."""
    refresh_every: int = 390
    """Steps over which a refresh is spread; 390 are an epoch of CIFAR at batch 128."""


class Conv(PatchConv):
    """PatchConv under the name of linen's convolution, hence with its parameters."""


def perturbing(
    *layers: str | Callable[[str], bool], mask_first: bool = True, **losses: Any
) -> Row:
    """SAM that perturbs only some of the layers."""
    mask = optax_sam.perturb_only(optax_sam.select_layers(*layers))
    links = [mask, optax_sam.scale_to_radius(RHO)]
    ascent = optax.chain(*(links if mask_first else reversed(links)))
    return engine(optax_sam.sharpness_aware(BASE, ascent), **losses)


def blocks(stage_sizes: Sequence[int], last: int) -> list[str]:
    """Names of the last blocks of a ResNet and of its head."""
    n = sum(stage_sizes)
    return [*(f"BasicBlock_{i}" for i in range(n - last, n)), "Dense_0"]


def keeping(share: float) -> Callable[[ResNet], LossFn]:
    """The loss of a network whose backward keeps this share of the channels."""
    product = implicit.Channels(1 - share).conv_general_dilated
    conv = partial(nn.Conv, use_bias=False, conv_general_dilated=product)
    return lambda model: make_loss_fn(model.clone(conv=conv))


def scored_by_products(model: ResNet) -> Callable[..., jax.Array]:
    """The loss in evaluation mode, with convolutions that are fast in loops."""
    return make_scoring_loss_fn(model.clone(conv=Conv))


def sparse_sam(
    estimator: Any, scoring: Any = make_scoring_loss_fn, **settings: Any
) -> Row:
    """Sparse SAM with array masks of half the weights."""
    tx = optax_sam.sparse_sam(
        BASE,
        RHO,
        optax_sam.unstructured(0.5),
        refresh_every=10**6,
        estimator=estimator,
        **{"num_examples": 10**6} | settings,
    )
    return engine(tx, scoring_loss_fn=scoring)


DYNAMIC = engine(
    optax_sam.dynamic_sparse_sam(BASE, RHO, 0.5, refresh_every=10**6, decay_steps=10**7)
)


def make_steps(stage_sizes: Sequence[int]) -> Mapping[str, Row]:
    """The rows of the table of steps, none of which makes a mask."""
    head, stage = blocks(stage_sizes, 1), blocks(stage_sizes, stage_sizes[-1])
    half = keeping(0.5)
    return {
        SGD: engine(BASE),
        SAM: engine(optax_sam.sam(BASE, RHO)),
        SSAM_F: sparse_sam("per_example"),
        SSAM_D: DYNAMIC,
        "static, last block and head": perturbing(*head),
        "static, last stage and head": perturbing(*stage),
        "static, all norm layers": perturbing(lambda path: "BatchNorm" in path),
        "implicit, 1/2 kept": engine(optax_sam.sam(BASE, RHO), ascent_loss_fn=half),
        "implicit, 1/4 kept": engine(
            optax_sam.sam(BASE, RHO), ascent_loss_fn=keeping(0.25)
        ),
        "implicit, 1/2 kept, last stage": perturbing(*stage, ascent_loss_fn=half),
    }


# Rows of the table of refreshes, and the same with their loops in one piece, which
# the compiler can count: with all examples in one chunk and all probes unrolled.
REFRESHES: Mapping[str, tuple[Row, Row]] = {
    name: (sparse_sam(*row), sparse_sam(*row, chunk_size=10**6))
    for name, row in {
        "per example, nn.Conv": ("per_example",),
        "per example, PatchConv": ("per_example", scored_by_products),
        "4 probes, nn.Conv": ("probes",),
        "4 probes, PatchConv": ("probes", scored_by_products),
    }.items()
} | {"SSAM-D, no scores": (DYNAMIC, DYNAMIC)}


@contextlib.contextmanager
def unrolled() -> Iterator[None]:
    """Unrolls scans: the compiler counts the body of a loop once."""
    with mock.patch("jax.lax.scan", partial(jax.lax.scan, unroll=True)):
        yield


def exact_flops(row: Row, problem: Problem, count: int | None = None) -> float:
    """FLOPs of a step, in which a mask is due or not if a count is given."""
    # The effort that goes into machine code changes none of the figures.
    compiler_options: dict[str, str | bool] = {"xla_backend_optimization_level": "0"}
    with unrolled():
        compiled = measure.compile_step(row, problem, compiler_options, count=count)
    return compiled.cost["flops"]


def scoring_memory(problem: Problem, num_examples: int) -> float:
    """Temporary memory of the Fisher information of single examples, over params."""
    variables = jax.eval_shape(problem.init)
    loss_fn = make_scoring_loss_fn(problem.model)

    def scores(params: Any, stats: Any, batch: Any) -> Any:
        def losses(params: Any, batch: Any) -> jax.Array:
            return loss_fn(params, batch, stats, jax.random.key(0))

        return optax_sam.fisher_diagonal(losses, params, batch)

    batch = jax.tree.map(
        lambda x: np.zeros((num_examples, *x.shape[1:]), x.dtype), problem.batch
    )
    params, stats = variables["params"], variables["batch_stats"]
    compiled: Any = jax.jit(scores).lower(params, stats, batch).compile()
    bytes_ = compiled.memory_analysis().temp_size_in_bytes
    return float(bytes_ / measure.num_bytes(params))


def refreshing(compiled: Compiled, batch: Any) -> Callable[[], float]:
    """A function that takes a step with a refresh, then one without; seconds more."""
    state = compiled.init()
    reset = jax.jit(partial(measure.set_counts, count=DUE))

    def turn() -> float:
        nonlocal state
        state = state._replace(opt_state=reset(state.opt_state))
        state, due = measure.timed(compiled.step, state, batch)
        state, not_due = measure.timed(compiled.step, state, batch)
        return due - not_due

    return turn


def measure_steps(options: Options, problem: Problem) -> Mapping[str, Figures]:
    """The figures of the table of steps."""
    rows = make_steps(options.stage_sizes)
    compiled = {
        name: measure.compile_step(row, problem)
        for name, row in track(rows.items(), "compiling")
    }
    for name, row in rows.items():
        if name in (SSAM_F, SSAM_D):
            compiled[name].cost["flops"] = exact_flops(row, problem, NOT_DUE)
    turns = {name: step.turn(problem.batch) for name, step in compiled.items()}
    seconds = measure.in_turns(turns, options.rounds)
    costs = {name: step.cost for name, step in compiled.items()}
    return {
        name: cost
        | {
            "seconds": float(np.median(seconds[name])),
            "flops_over_sgd": cost["flops"] / costs[SGD]["flops"],
            "temp_over_sam": cost["temp_bytes"] / costs[SAM]["temp_bytes"],
            "time_over_sgd": measure.time_ratio(seconds, name, SGD),
            "time_over_sam": measure.time_ratio(seconds, name, SAM),
        }
        for name, cost in costs.items()
    }


def measure_refreshes(
    options: Options, problem: Problem, steps: Mapping[str, Figures]
) -> Mapping[str, Figures]:
    """The figures of the table of refreshes, given those of the steps."""
    rows = {}
    for name, (row, in_one_piece) in track(REFRESHES.items(), "refreshes"):
        between = steps[SSAM_D if row is DYNAMIC else SSAM_F]
        compiled = measure.compile_step(row, problem)
        turn = refreshing(compiled, problem.batch)
        seconds = float(
            np.median([turn() for _ in range(1 + options.refresh_rounds)][1:])
        )
        flops = exact_flops(in_one_piece, problem, DUE) - between["flops"]
        temp_bytes = compiled.cost["temp_bytes"] - steps[SAM]["temp_bytes"]
        figures = {
            "flops_over_sgd": flops / steps[SGD]["flops"],
            "time_over_sgd": seconds / steps[SGD]["seconds"],
            "temp_over_params": temp_bytes / steps[SAM]["param_bytes"],
        }
        per_step = {
            f"{what}_per_step": figures[f"{what}_over_sgd"] / options.refresh_every
            for what in ("flops", "time")
        }
        rows[name] = {"flops": flops, "seconds": seconds} | figures | per_step
    return rows


def main(args: Sequence[str] | None = None) -> None:
    """Runs the measurement that the command line asks for."""
    options = tyro.cli(Options, args=args)
    with one_line_errors():
        measure.check(options, "refresh_rounds", "refresh_every")
        problem = measure.make_problem(options)
    steps = measure_steps(options, problem)
    milliseconds = 1e3 * steps[SGD]["seconds"]
    title = f"Steps, {os.cpu_count()} cores; SGD: {milliseconds:.1f} ms"
    measure.print_table(steps, title)
    refreshes = measure_refreshes(options, problem, steps)
    title = f"Refreshes, {options.batch_size} examples; per step: every "
    measure.print_table(
        refreshes, f"{title}{options.refresh_every} steps", first="refresh", digits=4
    )
    memory = {
        f"{n} examples": {"temp_over_params": scoring_memory(problem, n)}
        for n in (16, 128)
    }
    measure.print_table(memory, "Scores from single examples alone", first="scored")
    measure.save(options, steps=steps, refreshes=refreshes, scoring=memory)


if __name__ == "__main__":
    main()
