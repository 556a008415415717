"""Images per second of training steps, as they are on an accelerator."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import optax_sam

if not __package__:  # Run as a script, which leaves examples/ off the path.
    sys.path.insert(0, str(Path(__file__).parents[1]))

from sam_examples.benchmarking import measure
from sam_examples.benchmarking.measure import (
    BASE,
    RHO,
    SGD,
    Compiled,
    Problem,
    Row,
    engine,
)
from sam_examples.benchmarking.together import together
from sam_examples.settings.command_line import one_line_errors, require
from sam_examples.training.step import make_loss_fn

from benchmarks.step_cost import CONTRIB, HAND_WRITTEN
from benchmarks.step_cost import ROWS as WRITTEN

RADIUS = optax_sam.scale_to_radius(RHO)


@dataclasses.dataclass(frozen=True)
class Options(measure.Options):
    """Measures images per second of a CIFAR ResNet's training steps, and ratios to SGD.

    The defaults are the published ResNet-18 with the computation in bfloat16 and
    parameters in float32. Steps are taken in turns and compared round by round; medians
    are shown. Masks are those between two refreshes.
    """

    width: int = 64
    """Channels of the first stage; 8 suits a CPU."""
    batch_size: int = 128
    """Images of a step."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the computation."""
    steps: int = 10
    """Steps that each row takes in a round, none of which waits for the one before."""
    rows: tuple[str, ...] = ()
    """Rows beside SGD's, by the beginnings of their names; without any, all."""


def static(*layers: str) -> Row:
    """Sparse SAM with a static mask that perturbs these layers only."""
    mask = optax_sam.select_layers(*layers)
    ascent = optax.chain(optax_sam.perturb_only(mask), RADIUS)
    return engine(optax_sam.sharpness_aware(BASE, ascent))


def make_rows(options: Options) -> Mapping[str, Row]:
    """The rows of the table."""
    blocks = sum(options.stage_sizes)
    dynamic = optax_sam.dynamic_sparse_sam(
        BASE, RHO, 0.5, refresh_every=1000, decay_steps=10**6, key=0
    )
    fisher = optax_sam.sparse_sam(
        BASE, RHO, optax_sam.unstructured(0.5), refresh_every=1000
    )
    size = options.batch_size // 4
    return {
        SGD: engine(BASE),
        "SAM": engine(optax_sam.sam(BASE, RHO)),
        HAND_WRITTEN: WRITTEN[HAND_WRITTEN],
        CONTRIB: WRITTEN[CONTRIB],
        "ASAM": engine(optax_sam.asam(BASE, 10 * RHO)),
        "VaSSO": engine(optax_sam.vasso(BASE, RHO, theta=0.4)),
        "VaSSO of one pass": engine(optax_sam.vasso(BASE, RHO, 0.4, one_pass=True)),
        "Momentum-SAM": engine(optax_sam.momentum_sam(BASE, RHO)),
        "Momentum-SAM by hand": WRITTEN["Momentum-SAM by hand"],
        "Friendly SAM": engine(optax_sam.friendly_sam(BASE, RHO)),
        "GSAM": engine(optax_sam.gsam(BASE, RHO, 0.1)),
        "WSAM": engine(optax_sam.wsam(BASE, RHO, 0.6)),
        "LookSAM-5": engine(optax_sam.look_sam(BASE, RHO)),
        "SSAM-F, half": engine(fisher),
        "SSAM-D, half": engine(dynamic),
        "static: last block": static(f"BasicBlock_{blocks - 1}", "Dense_0"),
        "static: first block": static("BasicBlock_0"),
        "RW-SAM": engine(optax_sam.rw_sam(BASE, RHO, strength=0.1)),
        f"m-SAM, m = {size}": engine(optax_sam.m_sam(BASE, RHO, size)),
    }


def choose_rows(options: Options) -> dict[str, Row]:
    """The rows that the options ask for."""
    wanted = (SGD, *options.rows)
    rows = make_rows(options).items()
    return {k: v for k, v in rows if not options.rows or k.startswith(wanted)}


def make_problem(options: Options) -> Problem:
    """The network in the type that is asked for, and a batch of noise."""
    measure.check(options, "steps")
    require(
        options.batch_size % 4 == 0,
        "--batch-size must be a multiple of 4, for m-SAM's micro-batches",
        options.batch_size,
    )
    problem = measure.make_problem(options)
    model = problem.model.clone(dtype=jnp.dtype(options.dtype))
    return problem._replace(model=model, loss_fn=make_loss_fn(model))


def compile_steps(rows: Mapping[str, Row], problem: Problem) -> dict[str, Compiled]:
    """Compiles a step of each row."""

    def compile_row(name: str) -> Compiled:
        # Masks are made at the first step; a count past it takes the branch away.
        count = 1 if "SSAM" in name else None
        return measure.compile_step(rows[name], problem, count=count)

    steps = together([partial(compile_row, name) for name in rows])
    return dict(zip(rows, steps, strict=True))


def main(args: Sequence[str] | None = None) -> None:
    """Runs the measurement that the command line asks for."""
    options = tyro.cli(Options, args=args)
    with one_line_errors():
        problem = make_problem(options)
    compiled = compile_steps(choose_rows(options), problem)
    turns = {
        name: step.turn(problem.batch, options.steps) for name, step in compiled.items()
    }
    seconds = measure.in_turns(turns, options.rounds, warm_up=3)
    rows = {
        name: {
            "images_per_second": options.batch_size / float(np.median(seconds[name])),
            "time_over_sgd": measure.time_ratio(seconds, name, SGD),
            "flops_over_sgd": step.cost["flops"] / compiled[SGD].cost["flops"],
        }
        for name, step in compiled.items()
    }
    device = jax.devices()[0].device_kind
    title = f"ResNet, width {options.width}, {options.dtype}, on {device}"
    measure.print_table(rows, title, digits=2)
    measure.save(options, rows=rows)


if __name__ == "__main__":
    main()
