"""The tables and the figures of comparisons."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

BASELINE = "sgd"  # In the comparison of methods, and `SGD` in that of trade-offs.
SGD = "SGD"

# Okabe and Ito's colours, which the colour-blind can tell apart; the line styles remain
# in grey.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("solid", "dashed", "dashdot", (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P")


@dataclass
class Curves:
    """What one method did with one seed, epoch by epoch.

    Attributes:
      train_loss: mean loss of the clean passes on the noisy labels.
      train_accuracy: share of noisy labels predicted in the clean passes.
      valid_accuracy: accuracy on the validation split.
      test_accuracy: accuracy on the test split.
      step_seconds: wall time of the epoch over its steps.
    """

    train_loss: list[float] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)
    valid_accuracy: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)


def summarize(curves: Mapping[str, Sequence[Curves]]) -> dict[str, dict[str, Any]]:
    """Final accuracies and step times of each method, given its curves by seed."""
    summary: dict[str, dict[str, Any]] = {}
    for method, seeds in curves.items():
        seconds = np.array([seed.step_seconds for seed in seeds])
        summary[method] = {
            f"final_{split}_accuracy": _mean_and_std(
                [getattr(seed, f"{split}_accuracy")[-1] for seed in seeds]
            )
            for split in ("test", "valid", "train")
        }
        summary[method]["step_seconds"] = float(np.median(seconds))
        if BASELINE in curves:
            # Epoch by epoch, as the methods take turns: a slow spell hits all of them.
            baseline = np.array([seed.step_seconds for seed in curves[BASELINE]])
            ratio = float(np.median(seconds / baseline))
            summary[method][f"step_time_over_{BASELINE}"] = ratio
    return summary


def _mean_and_std(values: Sequence[float]) -> dict[str, float | None]:
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": spread}


def print_table(summary: Mapping[str, Mapping[str, Any]], title: str) -> None:
    """Prints final test accuracy and step time of each method."""
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    columns = ["test accuracy (%)", "validation (%)", "step (ms)"]
    ratio_key = f"step_time_over_{BASELINE}"
    if any(ratio_key in figures for figures in summary.values()):
        columns.append(f"step / {BASELINE}")
    for column in columns:
        table.add_column(column, justify="right")
    for method, figures in summary.items():
        ratio = figures.get(ratio_key)
        table.add_row(
            method,
            _percent(figures["final_test_accuracy"]),
            _percent(figures["final_valid_accuracy"]),
            f"{1e3 * figures['step_seconds']:.2f}",
            *([] if ratio is None else [f"{ratio:.2f}"]),
        )
    Console(highlight=False).print(table)


def _percent(accuracy: Mapping[str, float | None]) -> str:
    """Mean and, of several seeds, standard deviation."""
    values = (accuracy["mean"], accuracy["std"])
    return " ± ".join(f"{100 * value:.1f}" for value in values if value is not None)


def print_trade_off(
    rows: Mapping[str, Mapping[str, Any]],
    times: Mapping[int, Mapping[str, float]],
    *,
    best: str,
    title: str,
) -> None:
    """Prints test accuracy and step time of each row.

    Args:
      rows: `rho`, and `test`, the accuracies of the seeds, by name.
      times: times of a step over that of `SGD`, by the network's width and name.
      best: the row whose gain over `SGD` the others keep a part of.
      title: title of the table.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("configuration")
    columns = ["rho", "test (%)", f"of {best}'s\ngain (%)"]
    columns += [f"step / {SGD}\nwidth {width}" for width in times]
    for column in columns:
        table.add_column(column, justify="right")
    for name, row in rows.items():
        gain = ""
        if {SGD, best} <= rows.keys():
            base, top, mean = (np.mean(rows[n]["test"]) for n in (SGD, best, name))
            gain = f"{100 * (mean - base) / (top - base):.0f}" if top != base else ""
        table.add_row(
            name,
            f"{row['rho']:g}" if row["rho"] else "",
            _percent(_mean_and_std(row["test"])),
            gain,
            *(f"{time[name]:.2f}" for time in times.values()),
        )
    Console(highlight=False).print(table)


def plot_test_accuracy(
    curves: Mapping[str, Sequence[Curves]], title: str, path: Path
) -> None:
    """Plots the test accuracy over epochs: mean over seeds, and a deviation around."""
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    for index, (method, seeds) in enumerate(curves.items()):
        accuracy = 100 * np.array([seed.test_accuracy for seed in seeds])
        epochs = np.arange(1, accuracy.shape[1] + 1)
        mean = accuracy.mean(axis=0)
        axes.plot(
            epochs,
            mean,
            color=COLORS[index % len(COLORS)],
            linestyle=STYLES[index % len(STYLES)],
            linewidth=2,
            marker="o",
            markersize=5,
            markevery=[-1],
            clip_on=False,
            label=f"{mean[-1]:.1f} %  {method}",
        )
        if len(seeds) > 1:
            spread = accuracy.std(axis=0, ddof=1)
            axes.fill_between(
                epochs,
                mean - spread,
                mean + spread,
                color=COLORS[index % len(COLORS)],
                alpha=0.18,
                linewidth=0,
            )
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("Epoch")
    axes.set_ylabel("Test accuracy (%)")
    axes.set_xlim(1, max(2, len(epochs)))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title="last epoch", frameon=False, alignment="left", handlelength=4)
    figure.savefig(path, dpi=150)


def plot_accuracy_over_time(
    rows: Mapping[str, Mapping[str, Any]],
    times: Mapping[str, float],
    title: str,
    path: Path,
) -> None:
    """Plots test accuracy, mean and deviation over seeds, over the time of a step.

    Args:
      rows: `kind`, and `test`, the accuracies of the seeds, by name.
      times: time of a step over that of `SGD`, by name.
      title: title of the figure.
      path: file to write.
    """
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    axes = figure.subplots()
    kinds = list(dict.fromkeys(row["kind"] for row in rows.values()))
    order = sorted(rows, key=lambda name: times[name])
    for number, name in enumerate(order, start=1):
        accuracy = 100 * np.array(rows[name]["test"])
        kind = kinds.index(rows[name]["kind"])
        point = (times[name], accuracy.mean())
        axes.errorbar(
            *point,
            yerr=accuracy.std(ddof=1) if len(accuracy) > 1 else None,
            color=COLORS[kind - 1],
            marker=MARKERS[kind % len(MARKERS)],
            markersize=8,
            elinewidth=1,
            linestyle="none",
            label=f"{number}  {name}",
        )
        # A number, as names would hide each other.
        axes.annotate(
            str(number), point, (6, 5), textcoords="offset points", fontsize=10
        )
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(f"Time of a step / time of a step of {SGD}")
    axes.set_ylabel("Test accuracy (%)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def plot_accuracy_over_size(
    accuracies: Mapping[int, Sequence[float]],
    lines: Mapping[str, Sequence[float]],
    title: str,
    path: Path,
) -> None:
    """Plots test accuracies, mean and deviation over seeds, over micro-batch sizes.

    Args:
      accuracies: in per cent, of each seed, by the size of a micro-batch.
      lines: accuracies of what has no size, by name; each becomes a horizontal line.
      title: title of the figure.
      path: file to write.
    """
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    sizes = sorted(accuracies)
    means, spreads = zip(*(_mean_and_spread(accuracies[m]) for m in sizes), strict=True)
    axes.errorbar(
        sizes, means, spreads, color=COLORS[0], marker="o", capsize=4, label="m-SAM"
    )
    for index, (name, values) in enumerate(lines.items(), start=1):
        mean, spread = _mean_and_spread(values)
        color, style = COLORS[index % len(COLORS)], STYLES[index % len(STYLES)]
        axes.axhline(mean, color=color, linestyle=style, label=name)
        axes.axhspan(mean - spread, mean + spread, color=color, alpha=0.12, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, map(str, sizes))
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("m, examples that ascend together")
    axes.set_ylabel("Test accuracy (%)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def _mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
    return float(np.mean(values)), float(spread)
