"""RW-SAM's slopes by finite differences, next to the exact ones."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import optax_sam

if not __package__:  # Run as a script, which leaves examples/ off the path.
    sys.path.insert(0, str(Path(__file__).parents[1]))

from sam_examples.benchmarking import measure
from sam_examples.data import Dataset, Split, load_digits, normalized
from sam_examples.models.convolution import PatchConv
from sam_examples.models.resnet import ResNet, group_norm
from sam_examples.settings.command_line import one_line_errors, require
from sam_examples.training.step import (
    make_init,
    make_prepare,
    make_scoring_loss_fn,
    make_step,
    make_train_steps,
)

DELTAS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


@dataclasses.dataclass(frozen=True)
class Options:
    """Compares the slopes of single digits in a ResNet with the exact ones.

    An error is the sum of `|s - exact|` over examples and directions, over that of
    `exact`. Normalisation is by groups, so that no example's loss depends on others.
    """

    widths: tuple[int, ...] = (8, 32)
    """Channels of the first stage, multiples of 8; each makes a network."""
    stages: tuple[int, ...] = (1, 1, 1)
    """Blocks in each stage."""
    steps: int = 0
    """Steps of SGD before the slopes are taken."""
    num_examples: int = 64
    """Training images whose slopes are taken; there are 1,025."""
    directions: int = 8
    """Vectors of random signs."""
    json: Path | None = None
    """File for all figures."""


def make_slopes(model: ResNet) -> Callable[..., jax.Array]:
    """Makes `slopes(params, batch, key, delta) -> [B]`, exact if delta is None."""
    loss_fn = make_scoring_loss_fn(model)

    def slopes(
        params: Any, batch: Split, key: jax.Array, delta: float | None
    ) -> jax.Array:
        link = optax_sam.reweight_by_sharpness(
            0.0,
            key=key,
            delta=1.0 if delta is None else delta,
            estimator="jvp" if delta is None else "finite_difference",
        )

        def slope(example: Split) -> jax.Array:
            # The mean over a batch of one; the gradient is not used, hence not taken.
            _, state = link.update(
                params,
                link.init(params),
                params,
                loss_fn=lambda params, batch: loss_fn(params, batch, {}, key),
                batch=jax.tree.map(lambda x: x[None], example),
            )
            norm: jax.Array = state.mean_directional_norm
            return norm

        return jax.vmap(slope)(batch)

    return jax.jit(slopes)


def make_params(model: ResNet, dataset: Dataset, steps: int) -> Any:
    """Makes parameters, those of the first steps of a training if there are any."""
    tx = optax.sgd(0.05, momentum=0.9)
    state = make_init(model, dataset)(0, tx)
    if steps:
        key = jax.random.key(0)
        indices = jax.random.randint(key, (steps, 64), 0, len(dataset.train.labels))
        train_steps = make_train_steps(make_step(model, tx, make_prepare(dataset)))
        batches = dataset.train.take(np.asarray(indices))
        state, _ = train_steps(state, batches, jax.random.split(key, steps))
    # Rounded, so that both types compute at the same parameters.
    return optax.tree.cast(state.params, jnp.bfloat16)


def measure_errors(
    options: Options, width: int, dataset: Dataset
) -> dict[str, dict[str, float]]:
    """The errors in a network of this width, a row for each delta and one for jvp."""
    batch = normalized(dataset.train.take(slice(options.num_examples)), dataset)
    model = ResNet(options.stages, 10, width, conv=PatchConv, norm=group_norm)
    rounded = make_params(model, dataset, options.steps)
    # This generator compiles faster than the default one.
    keys = jax.random.split(jax.random.key(0, impl="rbg"), options.directions)
    exact: Any = None
    case = f"{sum(x.size for x in jax.tree.leaves(rounded)):,} weights"
    rows: dict[str, dict[str, float]] = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        params = optax.tree.cast(rounded, dtype)
        slopes = make_slopes(model.clone(dtype=dtype))
        if exact is None:  # In float32, which comes first.
            exact = np.stack([slopes(params, batch, key, None) for key in keys])
        for delta in (*DELTAS, None):
            s = np.stack([slopes(params, batch, key, delta) for key in keys])
            name = "jvp" if delta is None else f"{delta:.0e}"
            row = rows.setdefault(f"{case}: {name}", {})
            error = np.sum(np.abs(s - exact)) / np.sum(exact)
            row[f"{dtype.__name__}_error_over_exact"] = float(error)
    return rows


def main(args: Sequence[str] | None = None) -> None:
    """Runs the measurement that the command line asks for."""
    options = tyro.cli(Options, args=args)
    with one_line_errors():
        measure.check(options, "num_examples", "directions")
        widths = options.widths
        valid = min(widths, default=0) >= 8 and not any(w % 8 for w in widths)
        require(valid, "--widths must be positive multiples of 8", widths)
        require(options.steps >= 0, "--steps must be at least 0", options.steps)
    dataset = load_digits()
    rows: dict[str, dict[str, float]] = {}
    for width in widths:
        rows |= measure_errors(options, width, dataset)
    title = "Errors of slopes along random signs"
    measure.print_table(rows, title, first="delta", digits=4)
    measure.save(options, rows=rows)


if __name__ == "__main__":
    main()
