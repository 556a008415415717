"""What a training step of a large model holds and sends, fully sharded.

Compiled for simulated devices and never run: no array is ever made.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.progress import track

import optax_sam

if not __package__:  # Run as a script, which leaves examples/ off the path.
    sys.path.insert(0, str(Path(__file__).parents[1]))

from sam_examples.benchmarking import measure
from sam_examples.benchmarking.collectives import GATHER, REDUCE, traffic
from sam_examples.benchmarking.measure import RHO, SGD, sam_by_hand
from sam_examples.benchmarking.sharded import (
    Problem,
    bytes_on_a_device,
    compile_step,
)
from sam_examples.devices.sharding import (
    as_shapes,
    by_examples,
    by_first_divisible_axis,
    make_mesh,
    simulate_devices,
)
from sam_examples.models.transformer import Transformer, make_language_loss_fn
from sam_examples.settings.command_line import one_line_errors, require

HAND_WRITTEN, SAM, VASSO, SSAM_D, SSAM_F = (
    "SAM by hand",
    "SAM",
    "VaSSO",
    "SSAM-D",
    "SSAM-F",
)
BASES: Mapping[str, optax.GradientTransformation] = {
    SGD: measure.BASE,
    "AdamW": optax.adamw(1e-3),
}


class Method(NamedTuple):
    """A method around a base optimizer.

    Attributes:
      make: from the base to the optimizer.
      bytes_per_weight: what its own state should take, for each of the weights.
    """

    make: Callable[[optax.GradientTransformation], optax.GradientTransformation]
    bytes_per_weight: int = 0


METHODS: Mapping[str, Method] = {
    "SAM": Method(lambda base: optax_sam.sam(base, RHO)),
    "VaSSO": Method(lambda base: optax_sam.vasso(base, RHO, theta=0.4), 4),
    "SSAM-D": Method(
        lambda base: optax_sam.dynamic_sparse_sam(
            base, RHO, 0.5, refresh_every=100, decay_steps=10_000
        ),
        1,
    ),
    "SSAM-F": Method(
        lambda base: optax_sam.sparse_sam(
            base,
            RHO,
            optax_sam.unstructured(0.5),
            refresh_every=100,
            estimator="probes",
        ),
        1,
    ),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Compiles steps of a transformer whose parameters and state all devices share.

    The defaults make 1.1 billion parameters on 64 devices. Every device has a part of
    every array and of the batch, and gathers a layer when it is needed. The figures are
    the compiler's, of one device.
    """

    devices: int = 64
    """Simulated CPU devices, which divide the width."""
    width: int = 2048
    """Of the residual stream."""
    layers: int = 20
    """Number of layers."""
    hidden: int = 8192
    """Width of the perceptrons' hidden layers."""
    heads: int = 16
    """Attention heads, which divide the width."""
    vocabulary: int = 32_768
    """Number of tokens."""
    length: int = 128
    """Tokens of a sequence; every device has one sequence."""
    bases: tuple[str, ...] = tuple(BASES)
    """Base optimizers, each a row and beneath every method."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Methods; SAM by hand comes with SGD."""
    json: Path | None = None
    """File for all figures."""


def make_problem(options: Options) -> Problem:
    """The shapes of everything, and their places on the devices."""
    sizes = ("devices", "width", "layers", "hidden", "heads", "vocabulary", "length")
    measure.check(options, *sizes)
    for name, other in (("devices", "width"), ("heads", "width")):
        divisor, number = getattr(options, name), getattr(options, other)
        require(number % divisor == 0, f"--{name} must divide --{other}", divisor)
    for base in options.bases:
        require(base in BASES, f"--bases must be of {', '.join(BASES)}", base)
    for method in options.methods:
        known = ", ".join(METHODS)
        require(method in METHODS, f"--methods must be of {known}", method)
    simulate_devices(options.devices)
    mesh = make_mesh(options.devices)
    examples = by_examples(mesh)
    place: Any = partial(jax.lax.with_sharding_constraint, shardings=examples)
    model = Transformer(
        options.vocabulary,
        options.width,
        options.layers,
        options.heads,
        options.hidden,
        # Else the compiler may share out the tokens of a layer in another way.
        place=place,
    )
    shape = (options.devices, options.length + 1)
    tokens = as_shapes(np.zeros(shape, np.int32), examples)
    params = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros(shape, jnp.int32)[:, :-1])
    )["params"]
    params = as_shapes(params, by_first_divisible_axis(mesh, params))
    return Problem(make_language_loss_fn(model), params, tokens, mesh)


def measure_step(
    problem: Problem, tx: optax.GradientTransformation, update: Any
) -> dict[str, float]:
    """The figures of one row, in bytes on each device."""
    compiled, opt_state, seconds = compile_step(problem, tx, update)
    memory, sent = compiled.memory_analysis(), traffic(compiled)
    ascent_state = getattr(opt_state, "ascent_state", ())
    return {
        "param_bytes": bytes_on_a_device(problem.params),
        "state_bytes": bytes_on_a_device(opt_state),
        "ascent_state_bytes": bytes_on_a_device(ascent_state),
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "gather_bytes": sent.always[GATHER],
        "reduce_bytes": sent.always[REDUCE],
        "other_bytes": sent.always.total() - sent.always[GATHER] - sent.always[REDUCE],
        "refresh_bytes": sent.sometimes.total(),
        "collectives": sent.number,
        "compile_seconds": seconds,
    }


def compare(
    row: Mapping[str, float], base: Mapping[str, float], ideal_state: float
) -> dict[str, float]:
    """The figures of a row, and what they are over those of its base and the ideal.

    Args:
      row: the figures.
      base: those of the base optimizer alone.
      ideal_state: bytes of the optimizer's state if devices share it evenly.
    """
    parameters = row["param_bytes"]
    sent = base["gather_bytes"] + base["reduce_bytes"]
    return {
        **row,
        "state_over_params": row["state_bytes"] / parameters,
        "state_over_ideal": row["state_bytes"] / ideal_state,
        "temp_over_params": row["temp_bytes"] / parameters,
        "more_temp_over_params": (row["temp_bytes"] - base["temp_bytes"]) / parameters,
        "gathered_over_base": row["gather_bytes"] / base["gather_bytes"],
        "reduced_over_base": row["reduce_bytes"] / base["reduce_bytes"],
        "refresh_over_base": row["refresh_bytes"] / sent,
        "seconds_per_compilation": row["compile_seconds"],
    }


def measure_base(
    problem: Problem, base_name: str, methods: Sequence[str]
) -> dict[str, dict[str, float]]:
    """The rows of a base optimizer alone and beneath every method."""
    base = BASES[base_name]
    num_weights = sum(x.size for x in jax.tree.leaves(problem.params))
    num_devices = problem.mesh.size

    def mean_loss(params: Any, batch: jax.Array) -> jax.Array:
        loss: jax.Array = problem.loss_fn(params, batch).mean()
        return loss

    txs = {base_name: base} | {
        f"{base_name}, {name}": METHODS[name].make(base) for name in methods
    }
    updates = {
        name: optax_sam.value_and_update(problem.loss_fn, tx)
        for name, tx in txs.items()
    }
    if base_name == SGD:
        name = f"{base_name}, {HAND_WRITTEN}"
        txs[name] = base
        updates[name] = sam_by_hand(jax.value_and_grad(mean_loss), base, RHO)
    base_bytes = measure.num_bytes(jax.eval_shape(base.init, problem.params))
    rows: dict[str, dict[str, float]] = {}
    for name, tx in track(txs.items(), f"compiling {base_name}"):
        row = measure_step(problem, tx, updates[name])
        method = METHODS.get(name.partition(", ")[2])
        own = method.bytes_per_weight * num_weights if method else 0
        first = rows.get(base_name, row)
        rows[name] = compare(row, first, (base_bytes + own) / num_devices)
    return rows


def main(args: Sequence[str] | None = None) -> None:
    """Compiles what the command line asks for."""
    options = tyro.cli(Options, args=args)
    with one_line_errors():
        problem = make_problem(options)
    rows: dict[str, dict[str, float]] = {}
    for base in options.bases:
        rows |= measure_base(problem, base, options.methods)
    num_weights = sum(x.size for x in jax.tree.leaves(problem.params))
    share = rows[options.bases[0]]["param_bytes"] / 2**20
    title = (
        f"{num_weights:,} parameters on {options.devices} devices; "
        f"{share:.1f} MiB of them on each"
    )
    measure.print_table(rows, title, digits=2)
    measure.save(options, num_weights={"total": num_weights}, rows=rows)


if __name__ == "__main__":
    main()
