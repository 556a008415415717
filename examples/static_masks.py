"""Sparse SAM with static masks chosen from data: perturbs layers of large Fisher score.

Layers that are not perturbed are known when the step is compiled, and their gradients
in the clean pass are not computed. So a new mask is a new program; every program is
kept, in case its mask returns.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.console import Console
from rich.table import Table
from sam_examples.command_line import (
    NoisyDigits,
    check_training,
    make_run_directory,
    one_line_errors,
    require,
    versions,
    write_json,
)
from sam_examples.data import Dataset, load_digits
from sam_examples.evaluation import make_evaluate
from sam_examples.layers import Chooser, layers_of
from sam_examples.models.resnet import ResNet
from sam_examples.optimizers import momentum_sgd
from sam_examples.training import (
    make_init,
    make_model,
    make_train_steps,
    shuffled_batches,
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


def make_trainers(
    options: Options, dataset: Dataset
) -> tuple[ResNet, Trainer, Trainer]:
    """The network, in training with static masks and with SAM."""
    num_steps = options.epochs * (len(dataset.train.labels) // options.batch_size)
    base = momentum_sgd(options.learning_rate, num_steps, options.weight_decay)
    radius = optax_sam.scale_to_radius(options.rho)
    model = make_model(options, dataset.num_classes)

    def masked(mask: Any) -> optax.GradientTransformation:
        # The mask comes first: gradients that no norm reads are not computed.
        ascent = optax.chain(optax_sam.perturb_only(mask), radius)
        return optax_sam.sharpness_aware(base, ascent)

    def unmasked(mask: Any) -> optax.GradientTransformation:
        return optax_sam.sam(base, options.sam_rho)

    sparse, sam = (
        Trainer(make_tx, model, dataset, options.seed) for make_tx in (masked, unmasked)
    )
    return model, sparse, sam


def train(
    options: Options, choose: Chooser, sparse: Trainer, sam: Trainer, num_examples: int
) -> list[dict[str, Any]]:
    """Trains both, and returns which layers were chosen when."""
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
        sam.train_epoch(True, indices, key)
    return choices


def main(args: Sequence[str] | None = None) -> None:
    """Runs the training that the command line asks for."""
    options = tyro.cli(Options, args=args)
    with one_line_errors():
        dataset = load_digits(options.noise, options.seed)
        num_examples = len(dataset.train.labels)
        check(options, num_examples)
        model, sparse, sam = make_trainers(options, dataset)
        directory = make_run_directory(options.out, "static-masks")
    choose = Chooser(
        model,
        dataset,
        sparse.state,
        sparsity=options.sparsity,
        num_examples=options.num_examples,
    )
    choices = train(options, choose, sparse, sam, num_examples)
    evaluate = make_evaluate(model, dataset)
    ratio = np.array(sparse.step_seconds) / np.array(sam.step_seconds)
    figures = {
        "choices": choices,
        "cost": choose.cost,
        "step_time_over_sam": float(np.median(ratio)),
        "methods": {
            name: {
                "test_accuracy": float(evaluate(trainer.state, dataset.test).accuracy),
                "step_seconds": float(np.median(trainer.step_seconds)),
                "programs": trainer.num_programs,
            }
            for name, trainer in {"static masks": sparse, "SAM": sam}.items()
        },
    }
    settings = {"settings": dataclasses.asdict(options), "versions": versions()}
    write_json(directory / "results.json", settings | figures)
    print_results(figures)
    print(f"Results in {directory / 'results.json'}")


if __name__ == "__main__":
    main()
