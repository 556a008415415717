"""The figures of the examples, as PNG files."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sam_examples.reporting.tables import SGD, Curves

# Okabe and Ito's colours, which the colour-blind can tell apart; the line styles remain
# in grey.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("solid", "dashed", "dashdot", (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P")


def plot_test_accuracy(
    curves: Mapping[str, Sequence[Curves]], title: str, path: Path
) -> None:
    """Plots the test accuracy over epochs: mean over seeds, and a deviation around.

    The legend is below and lengthens the page, so that however many methods there are,
    and however long their names, the axes keep their size.
    """
    lines = [line for method in curves for line in _in_legend(method).splitlines()]
    figure = Figure(figsize=(7, 4.6 + 0.2 * len(lines)), layout="constrained")
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
            label=f"{mean[-1]:.1f} %  {_in_legend(method)}",
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
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _tidy(axes)
    figure.legend(
        title="last epoch",
        loc="outside lower left",
        frameon=False,
        alignment="left",
        handlelength=4,
        fontsize=9,
    )
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
    _tidy(axes)
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
    _tidy(axes)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def plot_loss_surfaces(
    surfaces: Mapping[str, np.ndarray], steps: np.ndarray, title: str, path: Path
) -> None:
    """Plots how far the loss is above that of a solution around it, side by side.

    Args:
      surfaces: losses `[len(steps), len(steps)]` by name, with the solution in the
        middle.
      steps: along either direction.
      title: title of the figure.
      path: file to write.
    """
    figure = Figure(figsize=(5 * len(surfaces) + 1, 4.9), layout="constrained")
    levels = np.outer(10.0 ** np.arange(-2, 4), (1, 2, 5)).ravel()
    middle = len(steps) // 2
    above = {name: s - s[middle, middle] for name, s in surfaces.items()}
    highest = max(float(surface.max()) for surface in above.values())
    levels = levels[: max(2, np.searchsorted(levels, highest) + 1)]
    panels = figure.subplots(1, len(surfaces), sharex=True, sharey=True, squeeze=False)
    for axes, (name, surface) in zip(panels[0], above.items(), strict=True):
        # Nothing is below the lowest level, where it would be left blank.
        surface = np.maximum(surface, levels[0])
        filled = axes.contourf(
            steps, steps, surface, levels, norm=LogNorm(), cmap="cividis"
        )
        lines = axes.contour(
            steps, steps, surface, levels[1::3], colors="white", linewidths=0.7
        )
        axes.clabel(lines, fmt="%g", fontsize=8)
        axes.plot(0, 0, marker="x", color="#D55E00", markersize=9, markeredgewidth=2)
        loss = surfaces[name][middle, middle]
        axes.set_title(f"{name}, whose loss is {loss:.2f}", fontsize=11)
        axes.set_xlabel("Step along the first direction")
        axes.set_aspect("equal")
    panels[0][0].set_ylabel("Step along the second direction")
    bar = figure.colorbar(filled, ax=panels, ticks=levels, format="%g")
    bar.set_label("Training loss above that of the solution (nats)")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.savefig(path, dpi=150)


def plot_spectra(
    densities: Mapping[str, np.ndarray],
    grids: Mapping[str, np.ndarray],
    top: Mapping[str, float],
    title: str,
    path: Path,
) -> None:
    """Plots densities of eigenvalues, each in a panel, with the largest marked.

    Args:
      densities: on its grid, `[n]`, by name.
      grids: eigenvalues `[n]`, by name.
      top: the largest eigenvalue, by name.
      title: title of the figure.
      path: file to write.
    """
    figure = Figure(figsize=(8, 2.4 * len(densities) + 0.8), layout="constrained")
    panels = figure.subplots(len(densities), 1, sharex=True, sharey=True, squeeze=False)
    for index, (name, density) in enumerate(densities.items()):
        axes, color = panels[index][0], COLORS[index % len(COLORS)]
        # The tails of the smoothing would fill the plot below what they stand for.
        axes.fill_between(grids[name], density, 1e-9, color=color, alpha=0.35)
        axes.plot(grids[name], density, color=color, linewidth=1)
        axes.axvline(top[name], color=color, linestyle="dashed", linewidth=1.2)
        axes.text(
            0.3,  # Right of the peak at zero.
            0.92,
            f"{name}: largest eigenvalue {top[name]:.3g}",
            transform=axes.transAxes,
            va="top",
        )
        axes.set_yscale("log")
        axes.set_ylim(1e-6, 2 * max(density.max() for density in densities.values()))
        axes.set_ylabel("Density")
        _tidy(axes)
    panels[-1][0].set_xlabel("Eigenvalue of the Hessian of the training loss")
    panels[0][0].set_title(title, loc="left", fontsize=11)
    figure.savefig(path, dpi=150)


def plot_weights(
    weights: Mapping[str, np.ndarray],
    effective_share: np.ndarray,
    title: str,
    path: Path,
) -> None:
    """Plots RW-SAM's weights over the epochs, of groups of examples.

    Args:
      weights: `[epochs, examples]`, relative to equal weights, by the group's name.
      effective_share: effective sample size over the batch size, `[epochs]`.
      title: title of the figure.
      path: file to write.
    """
    figure = Figure(figsize=(8, 5.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.2))
    epochs = np.arange(1, len(effective_share) + 1)
    for index, (name, values) in enumerate(weights.items()):
        color, style = COLORS[index % len(COLORS)], STYLES[index % len(STYLES)]
        low, median, high = np.quantile(values, (0.1, 0.5, 0.9), axis=1)
        above.plot(epochs, median, color=color, linestyle=style, label=name)
        above.fill_between(epochs, low, high, color=color, alpha=0.15, linewidth=0)
        for edge in (low, high):  # Where the areas lie on each other.
            above.plot(epochs, edge, color=color, linestyle=style, linewidth=0.7)
    above.axhline(1, color="black", linewidth=0.8)
    above.set_ylabel("Weight / equal weight")
    above.legend(
        frameon=False,
        title="median, 10 % to 90 %",
        alignment="left",
        handlelength=4,
        loc="upper left",
    )
    above.set_title(title, loc="left", fontsize=11)
    below.plot(epochs, 100 * effective_share, color="black")
    below.set_ylim(0, 105)
    below.set_ylabel("Effective\nsample size\n(% of the batch)")
    below.set_xlabel("Epoch")
    below.set_xlim(1, max(2, len(epochs)))
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    _tidy(above)
    _tidy(below)
    figure.savefig(path, dpi=150)


def _in_legend(name: str) -> str:
    """A name in lines that a page of 7 inches is wide enough for."""
    return textwrap.fill(name, 72, subsequent_indent=" " * 12)


def _tidy(axes: Axes) -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
    return float(np.mean(values)), float(spread)
