"""Steps over one to several devices that share a batch: what they take and send.

The devices are simulated and share the cores of this machine, so that more of them
cannot be faster. A time over the base optimizer's on as many devices says only whether
a method scales worse than its base; the bytes sent are those of real devices.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import NamedSharding
from rich.progress import track

import optax_sam

if not __package__:  # Run as a script, which leaves examples/ off the path.
    sys.path.insert(0, str(Path(__file__).parents[1]))

from sam_examples.benchmarking import measure
from sam_examples.benchmarking.collectives import REDUCE, traffic
from sam_examples.benchmarking.sharded import Problem, Step, compile_step
from sam_examples.data import Split
from sam_examples.devices.sharding import (
    as_shapes,
    by_examples,
    make_mesh,
    replicated,
    simulate_devices,
)
from sam_examples.models.convolution import PatchConv
from sam_examples.models.resnet import ResNet, group_norm
from sam_examples.settings.command_line import one_line_errors, require
from sam_examples.settings.methods import (
    METHODS,
    hyperparameters,
    is_functional,
    make_tx,
)
from sam_examples.training.step import cross_entropies, whole

BASELINE, M_SAM = "sgd", "m_sam"
NUM_STEPS = 10_000  # Where a method wants to know the length of a training.


@dataclasses.dataclass(frozen=True)
class Options:
    """Measures the steps of all methods on simulated devices that share a batch.

    Every device has a copy of the parameters of a ResNet with group normalisation, and
    a part of the batch. A micro-batch of m_sam is the part of a device. Within a round
    all methods take a step on the same devices; ratios are medians over rounds.
    """

    devices: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of devices, which divide the batch."""
    methods: Annotated[
        tuple[str, ...], tyro.conf.arg(help=f"Out of {', '.join(METHODS)}.")
    ] = tuple(METHODS)
    stages: tuple[int, ...] = (1,)
    """Blocks of each stage."""
    width: int = 32
    """Channels of the first stage, a multiple of 8."""
    batch_size: int = 64
    """Images of a step, over all devices."""
    image_size: int = 8
    """Height and width of the images."""
    rounds: int = 20
    """Timed rounds."""
    json: Path | None = None
    """File for all figures."""


def check(options: Options) -> None:
    """Raises a ValueError if an option is out of range."""
    measure.check(options, "batch_size", "image_size", "rounds")
    require(
        options.width >= 8 and options.width % 8 == 0,
        "--width must be a positive multiple of 8",
        options.width,
    )
    require(BASELINE in options.methods, f"--methods must have {BASELINE}", "others")
    for count in options.devices:
        fits = count >= 1 and options.batch_size % count == 0
        require(fits, f"--devices must divide --batch-size {options.batch_size}", count)


def make_problem(
    options: Options, num_devices: int
) -> tuple[Problem, Callable[[], Any], Split]:
    """The shapes of parameters and batch, what makes parameters, and a batch of noise.

    Normalisation is by groups: m_sam is then no other model than the rest. The loss is
    in two parts.
    """
    mesh = make_mesh(num_devices)
    model = ResNet(options.stages, 10, options.width, conv=PatchConv, norm=group_norm)
    rng = np.random.default_rng(0)
    shape = (options.batch_size, options.image_size, options.image_size, 3)
    images = rng.normal(size=shape).astype(np.float32)
    batch = Split(images, rng.integers(10, size=options.batch_size).astype(np.int32))

    def init() -> Any:
        key = jax.random.key(0, impl="rbg")  # Compiles faster than the default.
        return model.init(key, jnp.asarray(images[:1]), train=False)["params"]

    def everywhere(tree: Any, place: NamedSharding) -> Any:
        return as_shapes(tree, jax.tree.map(lambda _: place, tree))

    def output_fn(params: Any, batch: Split) -> Any:
        return model.apply({"params": params}, batch.images, train=True)

    problem = Problem(
        optax_sam.functional_loss(output_fn, cross_entropies),
        everywhere(jax.eval_shape(init), replicated(mesh)),
        everywhere(batch, by_examples(mesh)),
        mesh,
    )
    make_params = jax.jit(init, out_shardings=replicated(mesh))
    return problem, make_params, jax.device_put(batch, by_examples(mesh))


def stepping(
    step: Step, params: Any, opt_state: Any, batch: Split
) -> Callable[[], float]:
    """A function that takes the next step and returns its seconds."""
    return measure.stepping(
        lambda state: step.compiled(*state, batch)[:2], (params, opt_state)
    )


def measure_methods(options: Options, num_devices: int) -> dict[str, dict[str, float]]:
    """A row for each method on so many devices."""
    problem, make_params, batch = make_problem(options, num_devices)
    chosen = hyperparameters(options.methods)
    if M_SAM in chosen:
        chosen[M_SAM]["micro_batch_size"] = options.batch_size // num_devices
    turns, sent = {}, {}
    for method, values in track(chosen.items(), f"compiling, {num_devices} devices"):
        tx = make_tx(method, measure.BASE, values, NUM_STEPS)
        loss_fn = problem.loss_fn if is_functional(method) else whole(problem.loss_fn)
        update = optax_sam.value_and_update(loss_fn, tx)
        step = compile_step(problem, tx, update)
        places = jax.tree.map(lambda x: x.sharding, step.opt_state)
        params = make_params()
        opt_state = jax.jit(tx.init, out_shardings=places)(params)
        turns[method] = stepping(step, params, opt_state, batch)
        sent[method] = traffic(step.compiled)
    seconds = measure.in_turns(turns, options.rounds)
    parameters = measure.num_bytes(problem.params)
    return {
        f"{method}, {num_devices}": {
            "seconds": float(np.median(seconds[method])),
            f"time_over_{BASELINE}": measure.time_ratio(seconds, method, BASELINE),
            "reduced_over_params": figures.always[REDUCE] / parameters,
            "other_over_params": _others(figures.always) / parameters,
            "refresh_over_params": figures.sometimes.total() / parameters,
            "collectives_per_step": figures.number,
        }
        for method, figures in sent.items()
    }


def _others(num_bytes: Mapping[str, int]) -> int:
    return sum(size for kind, size in num_bytes.items() if kind != REDUCE)


def main(args: Sequence[str] | None = None) -> None:
    """Runs the measurement that the command line asks for."""
    options = tyro.cli(Options, args=args)
    with one_line_errors():
        check(options)
        hyperparameters(options.methods)
        simulate_devices(max(options.devices, default=1))
        make_mesh(max(options.devices, default=1))
    rows: dict[str, dict[str, float]] = {}
    for num_devices in options.devices:
        rows |= measure_methods(options, num_devices)
    title = f"Steps on simulated devices, batches of {options.batch_size}"
    measure.print_table(rows, title, first="method, devices", digits=2)
    measure.save(options, rows=rows)


if __name__ == "__main__":
    main()
