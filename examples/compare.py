"""Compares sharpness-aware methods with SGD on the digits with label noise."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import optax
import tyro
from sam_examples.data import Dataset
from sam_examples.reporting.figures import plot_test_accuracy
from sam_examples.reporting.tables import Curves, print_table, summarize
from sam_examples.settings.command_line import (
    NoisyDigits,
    make_run_directory,
    one_line_errors,
    require,
    write_results,
)
from sam_examples.settings.methods import (
    METHODS,
    check_batch,
    hyperparameters,
    is_functional,
    make_tx,
)
from sam_examples.training.build import make_network
from sam_examples.training.epochs import Epoch, draw_epoch, prepare_digits, timed_epoch
from sam_examples.training.evaluation import Evaluate, make_evaluate
from sam_examples.training.step import (
    TrainState,
    make_init,
    make_prepare,
    make_step,
    make_train_steps,
)
from tqdm import tqdm


@dataclasses.dataclass(frozen=True)
class Options(NoisyDigits):
    """Compares methods on the digits with label noise, and shows what a step costs.

    A small ResNet learns scikit-learn's digits, some of whose training labels are
    wrong, with every method and several seeds. Prints the test accuracy after the last
    epoch, mean and standard deviation over seeds, and the time of a step; writes all
    figures to results.json and a plot to accuracy.png. Methods are shown with their rho
    and the hyperparameters that were changed; results.json has the others as well.
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

    def __init__(self, train_steps: Any, state: TrainState, epoch: Epoch) -> None:
        """Compiles the training of an epoch of this shape."""
        start = time.perf_counter()
        self._train_steps = train_steps.lower(state, *epoch).compile()
        self.compile_seconds = time.perf_counter() - start
        self.curves: list[Curves] = []

    def begin(self, state: TrainState) -> None:
        """Starts anew from a state."""
        self.state = state
        self.curves.append(Curves())

    def train_epoch(self, epoch: Epoch, dataset: Dataset, evaluate: Evaluate) -> Curves:
        """Trains for an epoch, evaluates, and returns the curves since `begin`."""
        self.state, train, seconds = timed_epoch(self._train_steps, self.state, epoch)
        curves = self.curves[-1]
        curves.step_seconds.append(seconds)
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
    of_seeds = [prepare_digits(options, seed) for seed in range(options.seeds)]
    datasets, (num_steps, *_), (base, *_) = zip(*of_seeds, strict=True)
    return list(datasets), num_steps, base


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
    model = make_network(options, datasets[0])
    init = make_init(model, datasets[0])
    evaluate = make_evaluate(model, datasets[0])
    prepare_batch = make_prepare(datasets[0])
    first = draw_epoch(datasets[0].train, options.batch_size, seed=0, epoch=0)
    contestants = {
        method: Contestant(
            make_train_steps(
                make_step(model, tx, prepare_batch, functional=is_functional(method))
            ),
            init(0, tx),
            first,
        )
        for method, tx in tqdm(txs.items(), desc="compile", unit="method")
    }
    turns = len(datasets) * options.epochs * len(txs)
    with tqdm(total=turns, unit="epoch", mininterval=0.5) as bar:
        for seed, dataset in enumerate(datasets):
            for method, contestant in contestants.items():
                contestant.begin(init(seed, txs[method]))
            for number in range(options.epochs):
                epoch = draw_epoch(dataset.train, options.batch_size, seed, number)
                # In turns, so that a slow spell of the machine hits every method.
                for method, contestant in contestants.items():
                    curves = contestant.train_epoch(epoch, dataset, evaluate)
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


def label(method: str, values: Mapping[str, Any]) -> str:
    """The name of a method, with its rho and what else is not the default."""
    defaults = hyperparameters([method])[method]
    shown = (
        f"{name}={x}"
        for name, x in values.items()
        if name == "rho" or x != defaults[name]
    )
    return " ".join([method, *shown])


def main(args: Sequence[str] | None = None) -> None:
    """Runs the comparison that the command line asks for."""
    options = tyro.cli(Options, args=args)
    with one_line_errors():
        require(len(options.methods) > 0, "--methods must be given", "none")
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
    labels = {method: label(method, values) for method, values in chosen.items()}
    print_table({labels[method]: row for method, row in summary.items()}, title)
    plot_test_accuracy(
        {labels[method]: seeds for method, seeds in curves.items()},
        title,
        directory / "accuracy.png",
    )
    write_results(
        directory / "results.json",
        options,
        seconds=time.perf_counter() - start,
        methods={
            method: {
                "hyperparameters": chosen[method],
                "compile_seconds": contestants[method].compile_seconds,
                **summary[method],
                "seeds": [dataclasses.asdict(seed) for seed in curves[method]],
            }
            for method in contestants
        },
    )
    print(f"Results in {directory}: accuracy.png, results.json")


if __name__ == "__main__":
    main()
