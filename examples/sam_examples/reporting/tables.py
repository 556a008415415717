"""The figures of comparisons, as numbers and in tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

BASELINE = "sgd"  # In the comparison of methods, and `SGD` in that of trade-offs.
SGD = "SGD"


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
    table.add_column("method", overflow="fold")
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
