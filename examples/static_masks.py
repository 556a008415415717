"""Sparse SAM with static masks chosen from data: perturbs layers of large Fisher score.

Layers that are not perturbed are known when the step is compiled, and their gradients
in the clean pass are not computed. So a new mask is a new program; every program is
kept, in case its mask returns.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from command_line import (
    check_training,
    make_run_directory,
    one_line_errors,
    require,
    versions,
    write_json,
)
from data import Dataset, load_digits
from layers import Chooser, layers_of
from methods import momentum_sgd
from models.convolution import fastest_convolution
from models.resnet import ResNet
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from training import (
    make_evaluate,
    make_init,
    make_train_steps,
    shuffled_batches,
)

import optax_sam


@dataclasses.dataclass(frozen=True)
class Options:
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
    epochs: int = 40
    """Passes over the 1,025 training images."""
    noise: float = 0.6
    """Share of the training labels that are replaced by another class."""
    batch_size: int = 64
    """Images of a step."""
    learning_rate: float = 0.1
    """At the start; it falls to 0 along a cosine."""
    weight_decay: float = 3e-3
    """L2 penalty of all parameters."""
    stages: tuple[int, ...] = (1, 1, 1)
    """Blocks in each stage of the ResNet."""
    width: int = 8
    """Channels of the first stage, which double in each stage."""
    dropout: float = 0.0
    """Dropout rate on the features before the last layer."""
    seed: int = 0
    """Draws label noise, parameters and batches."""
    out: Path | None = None
    """Directory of the results. By default a new one in runs/."""


class Trainer:
    """A network in training, whose mask may change between epochs.

    Attributes:
      state: the parameters, the running statistics and the optimizer's state.
      step_seconds: time of a step in each epoch, without compiling.
    """

    def __init__(
        self,
        make_tx: Callable[[Any], optax.GradientTransformation],
        model: ResNet,
        dataset: Dataset,
        seed: int,
    ) -> None:
        """Draws the parameters; `make_tx(mask)` makes the optimizer of a mask."""
        self._make_tx, self._model, self._dataset = make_tx, model, dataset
        # The state of the optimizer does not depend on the mask.
        self.state = make_init(model, dataset)(seed, make_tx(True))
        self._train_split = jax.tree.map(jnp.asarray, dataset.train)
        self._programs: dict[tuple[bool, ...], Any] = {}
        self.step_seconds: list[float] = []

    @property
    def num_programs(self) -> int:
        """How many programs were compiled."""
        return len(self._programs)

    def train_epoch(self, mask: Any, indices: jax.Array, key: jax.Array) -> None:
        """Trains on `indices[steps, batch_size]`, perturbing what the mask selects."""
        arguments = (self.state, self._train_split, indices, key)
        program = tuple(jax.tree.leaves(mask))
        if program not in self._programs:
            train_steps = make_train_steps(
                self._model, self._make_tx(mask), self._dataset
            )
            self._programs[program] = train_steps.lower(*arguments).compile()
        start = time.perf_counter()
        self.state, metrics = self._programs[program](*arguments)
        metrics.loss.block_until_ready()
        self.step_seconds.append((time.perf_counter() - start) / len(indices))


def check(options: Options, num_examples: int) -> None:
    """Raises a ValueError if an option is out of range."""
    check_training(options, num_examples)
    for name in ("choose_every", "num_examples"):
        value, flag = getattr(options, name), name.replace("_", "-")
        require(value >= 1, f"--{flag} must be at least 1", value)
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


def main(args: Sequence[str] | None = None) -> None:
    """Runs the training that the command line asks for."""
    options = tyro.cli(Options, args=args)
    with one_line_errors():
        dataset = load_digits(options.noise, options.seed)
        num_examples = len(dataset.train.labels)
        check(options, num_examples)
        num_steps = options.epochs * (num_examples // options.batch_size)
        base = momentum_sgd(options.learning_rate, num_steps, options.weight_decay)
        sam = optax_sam.scale_to_radius(options.sam_rho)
        radius = optax_sam.scale_to_radius(options.rho)
        directory = make_run_directory(options.out, "static-masks")
    model = ResNet(
        stage_sizes=options.stages,
        num_classes=dataset.num_classes,
        width=options.width,
        dropout_rate=options.dropout,
        conv=fastest_convolution(jax.default_backend()),
    )

    def masked(mask: Any) -> optax.GradientTransformation:
        # The mask comes first: gradients that no norm reads are not computed.
        ascent = optax.chain(optax_sam.perturb_only(mask), radius)
        return optax_sam.sharpness_aware(base, ascent)

    def unmasked(mask: Any) -> optax.GradientTransformation:
        return optax_sam.sharpness_aware(base, sam)

    trainers = {
        "static masks": Trainer(masked, model, dataset, options.seed),
        "SAM": Trainer(unmasked, model, dataset, options.seed),
    }
    sparse = trainers["static masks"]
    choose = Chooser(
        model,
        dataset,
        sparse.state,
        sparsity=options.sparsity,
        num_examples=options.num_examples,
    )
    choices = []
    for epoch in tqdm(range(options.epochs), unit="epoch"):
        if epoch % options.choose_every == 0:
            mask = choose(sparse.state)
            layers = layers_of(mask)
            choices.append({"epoch": epoch, "layers": layers})
            others = [name for name in choose.cost if name not in layers]
            tqdm.write(f"epoch {epoch + 1}: leaves out {', '.join(others)}")
        key = jax.random.fold_in(jax.random.key(options.seed), epoch)
        indices = shuffled_batches(key, num_examples, options.batch_size)
        # In turns, so that a slow spell of the machine hits both.
        sparse.train_epoch(mask, indices, key)
        trainers["SAM"].train_epoch(True, indices, key)

    evaluate = make_evaluate(model, dataset)
    seconds = [np.array(trainer.step_seconds) for trainer in trainers.values()]
    figures = {
        "choices": choices,
        "cost": choose.cost,
        "step_time_over_sam": float(np.median(seconds[0] / seconds[1])),
        "methods": {
            name: {
                "test_accuracy": float(evaluate(trainer.state, dataset.test).accuracy),
                "step_seconds": float(np.median(trainer.step_seconds)),
                "programs": trainer.num_programs,
            }
            for name, trainer in trainers.items()
        },
    }
    settings = dataclasses.asdict(options)
    write_json(
        directory / "results.json",
        {"settings": settings, "versions": versions(), **figures},
    )
    print_results(figures)
    print(f"Results in {directory / 'results.json'}")


if __name__ == "__main__":
    main()
