"""Compares sharpness-aware methods with SGD on the digits with label noise."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import jax
import optax
import tyro
from sam_examples.command_line import (
    NoisyDigits,
    check_training,
    make_run_directory,
    one_line_errors,
    require,
    versions,
    write_json,
)
from sam_examples.data import Dataset, Split, load_digits
from sam_examples.evaluation import Evaluate, make_evaluate
from sam_examples.figures import plot_test_accuracy
from sam_examples.methods import METHODS, check_batch, hyperparameters, make_tx
from sam_examples.optimizers import momentum_sgd
from sam_examples.report import Curves, print_table, summarize
from sam_examples.training import (
    TrainState,
    make_init,
    make_model,
    make_train_steps,
    shuffled_batches,
)
from tqdm import tqdm


@dataclasses.dataclass(frozen=True)
class Options(NoisyDigits):
    """Compares methods on the digits with label noise, and shows what a step costs.

    A small ResNet learns scikit-learn's digits, some of whose training labels are
    wrong, with every method and several seeds. Prints the test accuracy after the last
    epoch, mean and standard deviation over seeds, and the time of a step; writes all
    figures to results.json and a plot to accuracy.png.
    """

    methods: Annotated[
        tuple[str, ...],
        tyro.conf.arg(help=f"Methods to compare, out of {', '.join(METHODS)}."),
    ] = ("sgd", "sam", "vasso")
    seeds: int = 5
    """Number of seeds; each draws the label noise, the parameters and the batches."""
    hyperparameters: tuple[str, ...] = ()
    """Changes such as rho=0.1, for every method that has one, or vasso.theta=0.2."""


class Contestant:
    """A method in the comparison, compiled once and trained from seed after seed.

    Attributes:
      state: that of the training.
      curves: what it did so far, a `Curves` for each seed.
      compile_seconds: wall time of the compilation.
    """

    def __init__(
        self, train_steps: Any, state: TrainState, split: Split, batch_size: int
    ) -> None:
        """Compiles the training of an epoch on a split of this shape."""
        key = jax.random.key(0)
        indices = shuffled_batches(key, len(split.labels), batch_size)
        start = time.perf_counter()
        self._train_epoch = train_steps.lower(state, split, indices, key).compile()
        self.compile_seconds = time.perf_counter() - start
        self.curves: list[Curves] = []

    def begin(self, state: TrainState) -> None:
        """Starts anew from a state."""
        self.state = state
        self.curves.append(Curves())

    def train_epoch(
        self, dataset: Dataset, indices: jax.Array, key: jax.Array, evaluate: Evaluate
    ) -> Curves:
        """Trains for an epoch, evaluates, and returns the curves since `begin`."""
        start = time.perf_counter()
        self.state, train = self._train_epoch(self.state, dataset.train, indices, key)
        train.loss.block_until_ready()
        seconds = time.perf_counter() - start
        curves = self.curves[-1]
        curves.step_seconds.append(seconds / len(indices))
        curves.train_loss.append(float(train.loss))
        curves.train_accuracy.append(float(train.accuracy))
        curves.valid_accuracy.append(
            float(evaluate(self.state, dataset.valid).accuracy)
        )
        curves.test_accuracy.append(float(evaluate(self.state, dataset.test).accuracy))
        return curves


def prepare(
    options: Any,
) -> tuple[list[Dataset], int, optax.GradientTransformation]:
    """The digits of every seed, the number of steps, and the base optimizer.

    Raises:
      ValueError: if an option is out of range.
    """
    require(options.seeds >= 1, "--seeds must be at least 1", options.seeds)
    datasets = [load_digits(options.noise, seed) for seed in range(options.seeds)]
    num_examples = len(datasets[0].train.labels)
    check_training(options, num_examples)
    num_steps = options.epochs * (num_examples // options.batch_size)
    base = momentum_sgd(options.learning_rate, num_steps, options.weight_decay)
    return datasets, num_steps, base


def compare(
    options: Any,
    datasets: Sequence[Dataset],
    txs: Mapping[str, optax.GradientTransformation],
    after_epoch: Callable[[str, TrainState], None] | None = None,
) -> dict[str, Contestant]:
    """Trains every method with every seed.

    Args:
      options: those of `NoisyDigits`.
      datasets: one for each seed, of the same shapes.
      txs: the optimizer of each method.
      after_epoch: called with the method and the state after each epoch.
    """
    model = make_model(options, datasets[0].num_classes)
    init = make_init(model, datasets[0])
    evaluate = make_evaluate(model, datasets[0])
    contestants = {
        method: Contestant(
            make_train_steps(model, tx, datasets[0]),
            init(0, tx),
            datasets[0].train,
            options.batch_size,
        )
        for method, tx in tqdm(txs.items(), desc="compile", unit="method")
    }
    turns = len(datasets) * options.epochs * len(txs)
    with tqdm(total=turns, unit="epoch", mininterval=0.5) as bar:
        for seed, dataset in enumerate(datasets):
            for method, contestant in contestants.items():
                contestant.begin(init(seed, txs[method]))
            for epoch in range(options.epochs):
                key = jax.random.fold_in(jax.random.key(seed), epoch)
                indices = shuffled_batches(
                    key, len(dataset.train.labels), options.batch_size
                )
                # In turns, so that a slow spell of the machine hits every method.
                for method, contestant in contestants.items():
                    curves = contestant.train_epoch(dataset, indices, key, evaluate)
                    bar.set_description(f"seed {seed}, {method}", refresh=False)
                    bar.set_postfix(
                        loss=f"{curves.train_loss[-1]:.3f}",
                        accuracy=f"{curves.valid_accuracy[-1]:.3f}",
                        refresh=False,
                    )
                    bar.update()
                    if after_epoch is not None:
                        after_epoch(method, contestant.state)
    return contestants


def _label(name: str, value: Any) -> str:
    return f"{name}={value}" if isinstance(value, str) else f"{name}={value:g}"


def main(args: Sequence[str] | None = None) -> None:
    """Runs the comparison that the command line asks for."""
    options = tyro.cli(Options, args=args)
    with one_line_errors():
        chosen = hyperparameters(options.methods, options.hyperparameters)
        datasets, num_steps, base = prepare(options)
        check_batch(chosen, options.batch_size)
        txs = {
            method: make_tx(method, base, values, num_steps)
            for method, values in chosen.items()
        }
        directory = make_run_directory(options.out, "compare")
    start = time.perf_counter()
    contestants = compare(options, datasets, txs)
    curves = {method: contestant.curves for method, contestant in contestants.items()}
    summary = summarize(curves)
    spread = "" if options.seeds == 1 else ": mean and standard deviation"
    title = (
        f"Digits, {100 * options.noise:g} % wrong labels, "
        f"{options.seeds} seed{'s' if options.seeds > 1 else ''}{spread}"
    )
    labels = {
        method: " ".join([method, *(_label(*pair) for pair in values.items())])
        for method, values in chosen.items()
    }
    print_table({labels[method]: row for method, row in summary.items()}, title)
    plot_test_accuracy(
        {labels[method]: seeds for method, seeds in curves.items()},
        title,
        directory / "accuracy.png",
    )
    write_json(
        directory / "results.json",
        {
            "settings": dataclasses.asdict(options),
            "versions": versions(),
            "seconds": time.perf_counter() - start,
            "methods": {
                method: {
                    "hyperparameters": chosen[method],
                    "compile_seconds": contestants[method].compile_seconds,
                    **summary[method],
                    "seeds": [dataclasses.asdict(seed) for seed in curves[method]],
                }
                for method in contestants
            },
        },
    )
    print(f"Results in {directory}: accuracy.png, results.json")


if __name__ == "__main__":
    main()
