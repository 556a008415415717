"""Sparse SAM with static masks chosen from data: perturbs layers of large Fisher score.

Layers that are not perturbed are known when the step is compiled, and their gradients
in the clean pass are not computed. So a new mask is a new program; every program is
kept, in case its mask returns.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
import tyro
from rich.console import Console
from rich.table import Table
from sam_examples.analysis.layers import Chooser, layers_of
from sam_examples.data import Dataset, Split
from sam_examples.settings.command_line import (
    NoisyDigits,
    make_run_directory,
    one_line_errors,
    require,
    require_at_least_one,
    write_results,
)
from sam_examples.training.build import make_network
from sam_examples.training.epochs import Epoch, draw_epoch, prepare_digits, timed_epoch
from sam_examples.training.evaluation import make_evaluate
from sam_examples.training.step import (
    make_init,
    make_prepare,
    make_step,
    make_train_steps,
)
from tqdm import tqdm

import optax_sam


@dataclasses.dataclass(frozen=True)
class Options(NoisyDigits):
    """Trains on the noisy digits with static masks that are chosen anew now and then.

    At the start and after every few epochs all layers are scored by their Fisher
    information. Those with the most of it per cost are perturbed, as many as fit the
    budget. SAM trains in turns with it, for comparison. Prints every choice, the test
    accuracies and the times of a step; writes all figures to results.json.
    """

    sparsity: float = 0.5
    """Share to leave out, at least, of what the weights' gradients cost."""
    choose_every: int = 10
    """Epochs between choices of layers."""
    num_examples: int = 128
    """Training images that are scored."""
    rho: float = 0.7
    """Radius of the perturbation of the chosen layers."""
    sam_rho: float = 0.5
    """Radius of SAM's perturbation."""
    seed: int = 0
    """Draws label noise, parameters and batches."""


class Contestant:
    """A network in training, whose mask may change between epochs.

    Attributes:
      state: the parameters, the running statistics and the optimizer's state.
      step_seconds: time of a step in each epoch, without compiling.
    """

    def __init__(
        self,
        make_tx: Callable[[Any], optax.GradientTransformation],
        model: nn.Module,
        dataset: Dataset,
        seed: int,
    ) -> None:
        """Draws the parameters; `make_tx(mask)` makes the optimizer of a mask."""
        self._make_tx, self._model = make_tx, model
        self._prepare = make_prepare(dataset)
        # The state of the optimizer does not depend on the mask.
        self.state = make_init(model, dataset)(seed, make_tx(True))
        self._programs: dict[tuple[bool, ...], Any] = {}
        self.step_seconds: list[float] = []

    @property
    def num_programs(self) -> int:
        """How many programs were compiled."""
        return len(self._programs)

    def train_epoch(self, mask: Any, epoch: Epoch) -> None:
        """Trains for an epoch, perturbing what the mask selects."""
        program = tuple(jax.tree.leaves(mask))
        if program not in self._programs:
            step = make_step(self._model, self._make_tx(mask), self._prepare)
            lowered = make_train_steps(step).lower(self.state, *epoch)
            self._programs[program] = lowered.compile()
        self.state, _, seconds = timed_epoch(self._programs[program], self.state, epoch)
        self.step_seconds.append(seconds)


def check(options: Options) -> None:
    """Raises a ValueError if an option of static masks is out of range."""
    require_at_least_one(options, "choose_every", "num_examples")
    require(
        0 <= options.sparsity < 1,
        "--sparsity must be at least 0 and below 1",
        options.sparsity,
    )


def print_results(figures: dict[str, Any]) -> None:
    """Prints the accuracies and the times of a step."""
    table = Table("", "test accuracy (%)", "step (ms)", "programs")
    for name, row in figures["methods"].items():
        table.add_row(
            name,
            f"{100 * row['test_accuracy']:.1f}",
            f"{1e3 * row['step_seconds']:.2f}",
            str(row["programs"]),
        )
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"A step takes {figures['step_time_over_sam']:.2f} of SAM's time "
        "(median over the epochs)."
    )


def make_contestants(
    options: Options,
    model: nn.Module,
    dataset: Dataset,
    base: optax.GradientTransformation,
) -> tuple[Contestant, Contestant]:
    """The network in training with static masks and with SAM."""
    radius = optax_sam.scale_to_radius(options.rho)

    def masked(mask: Any) -> optax.GradientTransformation:
        # The mask comes first: gradients that no norm reads are not computed.
        ascent = optax.chain(optax_sam.perturb_only(mask), radius)
        return optax_sam.sharpness_aware(base, ascent)

    def unmasked(mask: Any) -> optax.GradientTransformation:
        return optax_sam.sam(base, options.sam_rho)

    sparse, sam = (
        Contestant(make_tx, model, dataset, options.seed)
        for make_tx in (masked, unmasked)
    )
    return sparse, sam


def train(
    options: Options, split: Split, choose: Chooser, sparse: Contestant, sam: Contestant
) -> list[dict[str, Any]]:
    """Trains both, and returns which layers were chosen when."""
    choices = []
    for number in tqdm(range(options.epochs), unit="epoch"):
        if number % options.choose_every == 0:
            mask = choose(sparse.state)
            layers = layers_of(mask)
            choices.append({"epoch": number, "layers": layers})
            others = [name for name in choose.cost if name not in layers]
            tqdm.write(f"epoch {number + 1}: leaves out {', '.join(others)}")
        epoch = draw_epoch(split, options.batch_size, options.seed, number)
        # In turns, so that a slow spell of the machine hits both.
        sparse.train_epoch(mask, epoch)
        sam.train_epoch(True, epoch)
    return choices


def main(args: Sequence[str] | None = None) -> None:
    """Runs the training that the command line asks for."""
    options = tyro.cli(Options, args=args)
    with one_line_errors():
        dataset, _, base = prepare_digits(options, options.seed)
        check(options)
        model = make_network(options, dataset)
        sparse, sam = make_contestants(options, model, dataset, base)
        directory = make_run_directory(options.out, "static-masks")
    choose = Chooser(
        model,
        dataset,
        sparse.state,
        sparsity=options.sparsity,
        num_examples=options.num_examples,
    )
    choices = train(options, dataset.train, choose, sparse, sam)
    evaluate = make_evaluate(model, dataset)
    ratio = np.array(sparse.step_seconds) / np.array(sam.step_seconds)
    figures = {
        "choices": choices,
        "cost": choose.cost,
        "step_time_over_sam": float(np.median(ratio)),
        "methods": {
            name: {
                "test_accuracy": float(evaluate(x.state, dataset.test).accuracy),
                "step_seconds": float(np.median(x.step_seconds)),
                "programs": x.num_programs,
            }
            for name, x in {"static masks": sparse, "SAM": sam}.items()
        },
    }
    write_results(directory / "results.json", options, **figures)
    print_results(figures)
    print(f"Results in {directory / 'results.json'}")


if __name__ == "__main__":
    main()
