"""What a training step costs, next to its base optimizer and to other SAMs."""

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import tyro
from rich.progress import track

import optax_sam

if not __package__:  # Run as a script, which leaves examples/ off the path.
    sys.path.insert(0, str(Path(__file__).parents[1]))

from sam_examples.benchmarking import measure
from sam_examples.benchmarking.by_hand import (
    contrib_sam,
    make_contrib_sam,
    momentum_sam,
    plain,
)
from sam_examples.benchmarking.measure import (
    BASE,
    RHO,
    SGD,
    Problem,
    Row,
    Update,
    engine,
    sam_by_hand,
)
from sam_examples.settings.command_line import one_line_errors

PERIOD = 5  # Of ascents that are not made in every step, and steps of a turn.
ASCENDING, WAITING = ", ascending", ", waiting"
# Batch statistics are the clean pass's, as in the other rows.
CONTRIB_SAM = make_contrib_sam(BASE, RHO)


@dataclasses.dataclass(frozen=True)
class Options(measure.Options):
    """Measures training steps of a CIFAR ResNet, next to SGD's and to other SAMs.

    A step is forward and backward passes with batch normalisation in train mode, SGD
    with momentum and the update of the parameters, compiled as one function whose state
    is donated. FLOPs and temporary memory are the compiler's figures; times are taken
    in turns of five steps and compared round by round, and medians are shown.
    """


def from_gradients(
    tx: optax.GradientTransformation, make_update: Callable[[Any], Update]
) -> Row:
    """An update made from `jax.value_and_grad` of the mean loss."""

    def row(problem: Problem) -> tuple[optax.GradientTransformation, Update]:
        def mean_loss(*args: Any) -> tuple[jax.Array, Any]:
            losses, aux = problem.loss_fn(*args)
            return losses.mean(), aux

        return tx, make_update(jax.value_and_grad(mean_loss, has_aux=True))

    return row


def in_quarters(problem: Problem) -> tuple[optax.GradientTransformation, Update]:
    """m-SAM, a quarter of the batch being a micro-batch."""
    size = max(1, problem.batch.labels.size // 4)
    # All at once: the compiler would count the FLOPs of a loop's body once.
    tx = optax_sam.m_sam(BASE, RHO, size, micro_batches_at_once=None)
    return engine(tx)(problem)


def in_some_steps(
    name: str, *links: optax.GradientTransformationExtraArgs
) -> dict[str, Row]:
    """SAM in every fifth step with links before the base, and each branch by itself."""
    base, ascent = optax.chain(*links, BASE), optax_sam.scale_to_radius(RHO)
    conditions = {
        "": optax_sam.every(PERIOD),
        ASCENDING: lambda count: True,
        WAITING: lambda count: False,
    }
    return {
        name + part: engine(
            optax_sam.sharpness_aware(base, ascent, ascend_when=ascends)
        )
        for part, ascends in conditions.items()
    }


# The rows of the table; the first three are what the others are measured against.
HAND_WRITTEN, CONTRIB = "SAM by hand", "optax.contrib.sam"
ROWS: Mapping[str, Row] = {
    SGD: from_gradients(BASE, partial(plain, base=BASE)),
    HAND_WRITTEN: from_gradients(BASE, partial(sam_by_hand, base=BASE, rho=RHO)),
    CONTRIB: from_gradients(CONTRIB_SAM, partial(contrib_sam, tx=CONTRIB_SAM)),
    "SGD value_and_update": engine(BASE),
    "optax_sam.sam": engine(optax_sam.sam(BASE, RHO)),
    "optax_sam.asam": engine(optax_sam.asam(BASE, 10 * RHO)),
    "optax_sam.vasso": engine(optax_sam.vasso(BASE, RHO, theta=0.4)),
    "optax_sam.friendly_sam": engine(optax_sam.friendly_sam(BASE, RHO)),
    "optax_sam.gsam": engine(optax_sam.gsam(BASE, RHO, alpha=0.2)),
    "optax_sam.wsam": engine(optax_sam.wsam(BASE, RHO, gamma=0.8)),
    "optax_sam.rw_sam": engine(optax_sam.rw_sam(BASE, RHO, strength=0.1)),
    "optax_sam.rw_sam jvp": engine(
        optax_sam.rw_sam(BASE, RHO, strength=0.1, estimator="jvp")
    ),
    "optax_sam.m_sam": in_quarters,
    "Momentum-SAM by hand": from_gradients(
        BASE, partial(momentum_sam, base=BASE, rho=RHO)
    ),
    "optax_sam.momentum_sam": engine(optax_sam.momentum_sam(BASE, RHO)),
    "optax_sam.vasso one_pass": engine(
        optax_sam.vasso(BASE, RHO, theta=0.4, one_pass=True)
    ),
    **in_some_steps("optax_sam.every(5)"),
    **in_some_steps("optax_sam.look_sam", optax_sam.reuse_ascent(alpha=0.7)),
}


def mean_flops(costs: Any, name: str) -> float:
    """FLOPs of a step, of all of which every fifth ascends.

    Of a condition XLA counts the dearer branch.
    """
    branches = [costs.get(name + part) for part in (ASCENDING, WAITING)]
    if None in branches:
        return float(costs[name]["flops"])
    ascending, waiting = (branch["flops"] for branch in branches)
    return float(ascending + (PERIOD - 1) * waiting) / PERIOD


def compare(costs: Any, seconds: Any) -> dict[str, dict[str, float]]:
    """The figures of every row, and what they are over those of other rows."""
    ratio = partial(measure.time_ratio, seconds)
    return {
        name: cost
        | {
            "seconds": float(np.median(seconds[name])),
            "flops_over_sgd": mean_flops(costs, name) / costs[SGD]["flops"],
            "temp_over_contrib": cost["temp_bytes"] / costs[CONTRIB]["temp_bytes"],
            "state_over_params": cost["state_bytes"] / cost["param_bytes"],
            "time_over_sgd": ratio(name, SGD),
            "time_over_hand_written": ratio(name, HAND_WRITTEN),
        }
        for name, cost in costs.items()
    }


def main(args: Sequence[str] | None = None) -> None:
    """Runs the measurement that the command line asks for."""
    options = tyro.cli(Options, args=args)
    with one_line_errors():
        problem = measure.make_problem(options)
    compiled = {
        name: measure.compile_step(row, problem)
        for name, row in track(ROWS.items(), "compiling")
    }
    turns = {name: step.turn(problem.batch, PERIOD) for name, step in compiled.items()}
    seconds = measure.in_turns(turns, options.rounds)
    rows = compare({name: step.cost for name, step in compiled.items()}, seconds)
    milliseconds = 1e3 * rows[SGD]["seconds"]
    title = f"Steps, {os.cpu_count()} cores; SGD: {milliseconds:.1f} ms"
    measure.print_table(rows, title)
    measure.save(options, rows=rows)


if __name__ == "__main__":
    main()
