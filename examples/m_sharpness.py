"""The smaller the part of a batch that ascends for itself, the more SAM helps."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import optax
import tyro
from compare import compare, prepare
from sam_examples.reporting.figures import plot_accuracy_over_size
from sam_examples.reporting.tables import print_table, summarize
from sam_examples.settings.command_line import (
    NoisyDigits,
    make_run_directory,
    one_line_errors,
    require,
    write_results,
)
from sam_examples.settings.methods import check_batch, make_tx

RW_SAM = "RW-SAM"


@dataclasses.dataclass(frozen=True)
class Options(NoisyDigits):
    """Trains with m-SAM for several m, and with RW-SAM, at the same rho.

    m-SAM lets every m examples of a batch ascend for themselves; with all of them it
    is SAM. RW-SAM ascends with the whole batch, most with its sharpest examples.
    Prints test accuracies after the last epoch, mean and standard deviation over seeds,
    and step times; writes results.json and a plot, m_sharpness.png.
    """

    sizes: tuple[int, ...] = (64, 32, 16, 8, 4)
    """The m, each of which must divide the batch."""
    rho: float = 0.1
    """Radius of all perturbations."""
    strength: float = 0.1
    """The strength of RW-SAM."""
    seeds: int = 3
    """Number of seeds; each draws the label noise, the parameters and the batches."""
    norm: Literal["batch", "group"] = "group"
    """Normalisation; that of batches would normalise each micro-batch by itself."""


def make_txs(
    options: Options, base: optax.GradientTransformation, num_steps: int
) -> dict[str, optax.GradientTransformation]:
    """The optimizers by name, RW-SAM first."""
    values: Mapping[str, Any] = {"rho": options.rho, "strength": options.strength}
    txs = {RW_SAM: make_tx("rw_sam", base, values, num_steps)}
    for size in options.sizes:
        values = {"rho": options.rho, "micro_batch_size": size}
        txs[f"m = {size}"] = make_tx("m_sam", base, values, num_steps)
    return txs


def main(args: Sequence[str] | None = None) -> None:
    """Runs the comparison that the command line asks for."""
    options = tyro.cli(Options, args=args)
    with one_line_errors():
        require(len(options.sizes) > 0, "--sizes must be given", "none")
        datasets, num_steps, base = prepare(options)
        for size in options.sizes:
            check_batch({"m_sam": {"micro_batch_size": size}}, options.batch_size)
        txs = make_txs(options, base, num_steps)
        directory = make_run_directory(options.out, "m-sharpness")
    contestants = compare(options, datasets, txs)
    summary = summarize({name: c.curves for name, c in contestants.items()})
    title = (
        f"m-SAM, rho {options.rho:g}; digits, {100 * options.noise:g} % wrong labels, "
        f"{options.seeds} seed{'s' if options.seeds > 1 else ''}"
    )
    print_table(summary, title)
    accuracies = {
        name: [100 * seed.test_accuracy[-1] for seed in contestant.curves]
        for name, contestant in contestants.items()
    }
    plot_accuracy_over_size(
        {size: accuracies[f"m = {size}"] for size in options.sizes},
        {f"RW-SAM, strength {options.strength:g}": accuracies[RW_SAM]},
        title,
        directory / "m_sharpness.png",
    )
    write_results(
        directory / "results.json",
        options,
        methods=summary,
        test_accuracies=accuracies,
    )
    print(f"Results in {directory}: m_sharpness.png, results.json")


if __name__ == "__main__":
    main()
