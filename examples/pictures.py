"""Draws what sharpness-aware training does: accuracy, loss surfaces, spectra, weights.

A small ResNet learns the digits, some of whose labels are wrong, with SGD, SAM and
RW-SAM. Four pictures come of it:

* accuracy.png: test accuracy over the epochs;
* loss_surface.png: the training loss around the solutions of SGD and SAM, in a plane
  of two random directions whose filters are as large as the network's;
* spectrum.png: the density of the eigenvalues of the Hessian at both;
* weights.png: how RW-SAM weights examples with right and with wrong labels.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from compare import Contestant, compare, prepare
from sam_examples.analysis.example_weights import (
    WeightsOverTime,
    draw_weights,
)
from sam_examples.data import Dataset, Split, normalized
from sam_examples.reporting.figures import (
    plot_loss_surfaces,
    plot_spectra,
    plot_test_accuracy,
)
from sam_examples.settings.command_line import (
    NoisyDigits,
    make_run_directory,
    one_line_errors,
    require,
    write_results,
)
from sam_examples.settings.methods import hyperparameters, make_tx
from sam_examples.training.build import make_network
from sam_examples.training.step import (
    TrainState,
    make_scoring_loss_fn,
)
from tqdm import tqdm

from optax_sam import diagnostics

NAMES = {"sgd": "SGD", "sam": "SAM", "rw_sam": "RW-SAM"}
FLAT = ("sgd", "sam")  # Whose surfaces and spectra are compared.


@dataclasses.dataclass(frozen=True)
class Options(NoisyDigits):
    """Trains with SGD, SAM and RW-SAM, and draws four pictures of it.

    They are accuracy.png, loss_surface.png, spectrum.png and weights.png, some five
    minutes on two CPU cores, a part of which goes into compiling and does not depend on
    the options; figures.json has the numbers.
    """

    seeds: int = 3
    """Number of seeds of the accuracies; the other pictures are of the last."""
    hyperparameters: tuple[str, ...] = ()
    """Changes such as sam.rho=0.3 or rw_sam.strength=1."""
    extent: float = 0.5
    """How far the surface goes, in multiples of the solution's filters."""
    points: int = 21
    """Points of the surface along each direction; an odd number."""
    iterations: int = 48
    """Lanczos iterations of the spectrum for each probe."""
    probes: int = 2
    """Random vectors that the spectrum is an average over."""


def check(options: Options) -> None:
    """Raises a ValueError if an option is out of range; the message says which."""
    require(options.extent > 0, "--extent must be positive", options.extent)
    require(
        options.points >= 3 and options.points % 2 == 1,
        "--points must be an odd number of at least 3, with the solution in the middle",
        options.points,
    )
    for name in ("iterations", "probes"):
        value = getattr(options, name)
        require(value >= 2, f"--{name} must be at least 2", value)


def draw_surfaces(
    options: Options, model: nn.Module, dataset: Dataset, states: Any, path: Path
) -> dict[str, Any]:
    """Draws the loss around the solutions, and returns it at them."""
    batch = normalized(dataset.train, dataset)
    steps = np.linspace(-options.extent, options.extent, options.points)
    xs = jnp.asarray(steps)

    @jax.jit
    def surface(state: TrainState, batch: Split) -> jax.Array:
        directions = diagnostics.filter_normalized_directions(state.params, key=0)
        loss_fn = partial(_evaluated, make_scoring_loss_fn(model), state.batch_stats)
        return diagnostics.loss_surface(
            loss_fn, state.params, batch, directions, xs, xs
        )

    surfaces = {
        NAMES[method]: np.asarray(surface(states[method], batch))
        for method in tqdm(FLAT, desc="loss surface")
    }
    title = "Training loss around the solution, along filter-normalised directions"
    plot_loss_surfaces(surfaces, steps, title, path)
    middle = options.points // 2
    return {name: float(x[middle, middle]) for name, x in surfaces.items()}


def draw_spectra(
    options: Options, model: nn.Module, dataset: Dataset, states: Any, path: Path
) -> dict[str, Any]:
    """Draws the spectra at the solutions, and returns eigenvalues and traces."""
    batch = normalized(dataset.train, dataset)

    @jax.jit
    def spectrum(state: TrainState, batch: Split) -> Any:
        loss_fn = partial(_evaluated, make_scoring_loss_fn(model), state.batch_stats)
        arguments = (loss_fn, state.params, batch)
        return (
            diagnostics.spectral_density(
                *arguments,
                iterations=options.iterations,
                num_probes=options.probes,
                key=0,
            ),
            diagnostics.top_eigenvalues(*arguments, count=1, key=1).values[0],
            diagnostics.hessian_trace(*arguments, num_probes=16, key=2),
        )

    densities, grids, figures = {}, {}, {}
    for method in tqdm(FLAT, desc="spectrum"):
        name = NAMES[method]
        density, top, trace = spectrum(states[method], batch)
        low, high = float(density.nodes.min()), float(density.nodes.max())
        grids[name] = np.linspace(low - 0.5, high + 0.5, 2000)
        densities[name] = np.asarray(
            diagnostics.smooth_density(density, jnp.asarray(grids[name]), width=0.02)
        )
        figures[name] = {
            "largest eigenvalue": float(top),
            "trace": float(trace.mean),
            "standard error of the trace": float(trace.standard_error),
        }
    top = {name: values["largest eigenvalue"] for name, values in figures.items()}
    title = "Density of the eigenvalues of the Hessian at the solution"
    plot_spectra(densities, grids, top, title, path)
    return figures


def _evaluated(loss_fn: Any, batch_stats: Any, params: Any, batch: Split) -> jax.Array:
    """Losses in evaluation mode, which are a function of the parameters alone."""
    losses: jax.Array = loss_fn(params, batch, batch_stats, None)
    return losses


def final(contestants: dict[str, Contestant]) -> dict[str, TrainState]:
    """The states after the last epoch of the last seed."""
    return {method: contestant.state for method, contestant in contestants.items()}


def main(args: Sequence[str] | None = None) -> None:
    """Draws the pictures that the command line asks for."""
    options = tyro.cli(Options, args=args)
    with one_line_errors():
        check(options)
        chosen = hyperparameters(NAMES, options.hyperparameters)
        datasets, num_steps, base = prepare(options)
        txs = {
            method: make_tx(method, base, values, num_steps)
            for method, values in chosen.items()
        }
        directory = make_run_directory(options.out, "pictures")
    dataset = datasets[-1]
    model = make_network(options, dataset)
    history = WeightsOverTime(model, dataset, options.batch_size, chosen["rw_sam"])
    contestants = compare(options, datasets, txs, history)
    history.weights = history.weights[-options.epochs :]
    curves = {NAMES[m]: contestant.curves for m, contestant in contestants.items()}
    title = f"Digits, {100 * options.noise:g} % wrong labels"
    plot_test_accuracy(curves, title, directory / "accuracy.png")
    draw_weights(
        history, options.noise, dataset, options.seeds - 1, directory / "weights.png"
    )
    inputs = options, model, dataset, final(contestants)
    losses = draw_surfaces(*inputs, directory / "loss_surface.png")
    spectra = draw_spectra(*inputs, directory / "spectrum.png")
    figures = {"training loss at the solution": losses, "spectrum": spectra}
    write_results(
        directory / "figures.json", options, hyperparameters=chosen, **figures
    )
    print(
        f"Pictures in {directory}: accuracy.png, loss_surface.png, spectrum.png, "
        "weights.png; numbers in figures.json"
    )


if __name__ == "__main__":
    main()
