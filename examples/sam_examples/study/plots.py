"""The figures of the study, made from the runs that are recorded."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sam_examples.reporting.figures import (
    COLORS,
    MARKERS,
    STYLES,
    plot_accuracy_over_time,
)
from sam_examples.study.cifar10_runs import (
    PRICE,
    REWEIGHT,
)
from sam_examples.study.ledger import Entry
from sam_examples.study.report import Book

_SPARSITIES = (0.5, 0.8, 0.9, 0.99)
# The epochs that a family was trained for, by the end of the label.
_FULL_LENGTHS = ("", ", twice as long", ", four times as long")
_SMALL_LENGTHS = (
    ", a quarter as long",
    ", half as long",
    "",
    ", twice as long",
)


def accuracy_over_time(book: Book, path: Path) -> None:
    """Test accuracy against the time of a training, of all images."""
    figure, panels = _panels(2, (9, 4.2))
    for axes, noise in zip(panels, (0.0, 0.4), strict=True):
        families = ("SGD", "SAM", "Momentum-SAM")
        _lines(axes, book, "full", noise, families, _FULL_LENGTHS)
        others = ("VaSSO", "RW-SAM", "LookSAM-5", "GSAM", "m-SAM, m = 128")
        _points(axes, book, "full", noise, others)
        wrong = f"{100 * noise:g} % of the labels wrong" if noise else "right labels"
        _finish(axes, wrong, "Time of the training / SGD's of ten epochs", log=True)
    _legend(figure, panels[0])
    figure.savefig(path, dpi=150)


def price(book: Book, path: Path) -> None:
    """The same of the small setting, with all that costs less."""
    figure, (axes,) = _panels(1, (8, 4.6))
    families = ("SGD", "SAM", "Momentum-SAM")
    _lines(axes, book, "small", 0.4, families, _SMALL_LENGTHS)
    drawn = {name + length for name in families for length in _SMALL_LENGTHS}
    others = [
        entry.contestant.label
        for entry in book.entries("small", PRICE)
        if entry.contestant.label not in drawn
    ]
    others += [
        "Momentum-SAM, first block",
        "Fisher, 99 %",
        "RW-SAM, strength 1",
    ]
    _points(axes, book, "small", 0.4, others)
    title = "Small setting, 40 % of the labels wrong"
    _finish(axes, title, "Time of the training / SGD's of 24 epochs", log=True)
    _legend(figure, axes)
    figure.savefig(path, dpi=150)


def sparsity(book: Book, path: Path) -> None:
    """Accuracy over sparsity, and of static masks against the time of a step."""
    figure, (left, right) = _panels(2, (9, 4.2))
    for index, kind in enumerate(("Fisher", "dynamic", "random")):
        labels = [f"{kind}, {100 * share:g} %" for share in _SPARSITIES]
        entries = [book.entry("small", 0.4, label) for label in labels]
        _errorbar(left, _SPARSITIES, entries, index, kind)
    for index, name in enumerate(("SAM", "SGD"), start=3):
        _band(left, book.entry("small", 0.4, name), index, name)
    _finish(left, "Masks of weights", "Share of the weights left alone")
    names = [
        *("SGD", "SAM", "static: first block", "static: last block"),
        *("implicit, half of the channels", "implicit, a quarter of the channels"),
    ]
    _points(right, book, "small", 0.4, names, numbered=True)
    _finish(right, "Masks known to the compiler", "Time of a step / SGD's")
    left.legend(frameon=False, fontsize=8)
    right.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def micro_batches(book: Book, path: Path) -> None:
    """Accuracy and the noise of gradients over the size of a micro-batch."""
    figure, (left, right) = _panels(2, (9, 4.2))
    entries = {
        int(e.trial["micro_batch_size"]): e
        for e in book.entries("small", REWEIGHT)
        if "micro_batch_size" in e.trial and e.noise == 0.4
    }
    entries[64] = book.entry("small", 0.4, "SAM")
    sizes = sorted(entries)
    chosen = [entries[m] for m in sizes]
    _errorbar(left, sizes, chosen, 0, "m-SAM")
    _errorbar(right, sizes, chosen, 0, "m-SAM", _covariance)
    for index, name in enumerate(("RW-SAM, strength 0.3", "SGD"), start=1):
        entry = book.entry("small", 0.4, name)
        _band(left, entry, index, name)
        _band(right, entry, index, name, _covariance)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, map(str, sizes))
    _finish(left, "40 % of the labels wrong", "m, images that ascend together")
    _finish(right, "Noise at the end", "m, images that ascend together")
    right.set_ylabel("Trace of the covariance of gradients")
    left.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def theta(book: Book, path: Path) -> None:
    """Accuracy of VaSSO, and how its direction varies, over theta."""
    figure, (left, right) = _panels(2, (9, 4.2))
    entries = {float(e.trial["theta"]): e for e in book.entries("directions")}
    thetas = sorted(entries)
    chosen = [entries[t] for t in thetas]
    _errorbar(left, thetas, chosen, 0, "VaSSO, rho 0.2")
    _finish(left, "40 % of the labels wrong", "theta; 1 is SAM")
    for index, name in enumerate(("cosine", "mean_cosine")):
        label = ("of a step and the one before", "of two batches at the end")[index]
        _errorbar(right, thetas, chosen, index, label, _measure(name))
    _finish(right, "Cosine of two directions", "theta; 1 is SAM")
    right.set_ylabel("Cosine")
    right.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def digits_sparse(book: Book, path: Path) -> None:
    """Accuracy on the digits against the time of a step, of perturbed parts."""
    found = book.digits("sparse")
    title = "SAM along parts of a network: digits, 60 % of the labels wrong"
    plot_accuracy_over_time(found["rows"], found["times"]["8"], title, path)


PLOTS: Mapping[str, Callable[[Book, Path], None]] = {
    "accuracy_over_time": accuracy_over_time,
    "price": price,
    "sparsity": sparsity,
    "micro_batches": micro_batches,
    "theta": theta,
    "digits_sparse": digits_sparse,
}

# Figures of a configuration, one of each seed.
Figures = Callable[[Entry], Any]


def _accuracy(entry: Entry) -> Any:
    return 100 * entry.figures("test")


def _measure(name: str) -> Figures:
    return lambda entry: np.asarray([r["measures"][name] for r in entry.results])


_covariance = _measure("covariance_trace")


def _panels(count: int, size: tuple[float, float]) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _lines(
    axes: Axes,
    book: Book,
    setting: str,
    noise: float,
    families: Sequence[str],
    lengths: Sequence[str],
) -> None:
    """A line for each method, over trainings of several lengths."""
    known = {e.contestant.label: e for e in book.entries(setting) if e.noise == noise}
    for index, name in enumerate(families):
        labels = [name + length for length in lengths if name + length in known]
        entries = [known[label] for label in labels]
        times = [book.time(setting, entry) for entry in entries]
        _errorbar(axes, times, entries, index, name)


def _points(
    axes: Axes,
    book: Book,
    setting: str,
    noise: float,
    labels: Sequence[str],
    *,
    numbered: bool = False,
) -> None:
    """A point for each configuration."""
    known = {e.contestant.label: e for e in book.entries(setting) if e.noise == noise}
    first = 0 if numbered else 3
    for index, label in enumerate(labels, start=first):
        if label in known:
            entry = known[label]
            _errorbar(axes, [book.time(setting, entry)], [entry], index, label)


def _errorbar(
    axes: Axes,
    places: Sequence[float],
    entries: Sequence[Entry],
    index: int,
    label: str,
    figures: Figures = _accuracy,
) -> None:
    """Means and deviations over seeds, with a line where there are several."""
    values = [figures(entry) for entry in entries]
    axes.errorbar(
        places,
        [np.mean(x) for x in values],
        yerr=[np.std(x, ddof=1) if len(x) > 1 else 0.0 for x in values],
        color=COLORS[index % len(COLORS)],
        marker=MARKERS[index % len(MARKERS)],
        linestyle=STYLES[index % len(STYLES)] if len(places) > 1 else "none",
        # Colours come again after seven: hollow markers then.
        markerfacecolor="white" if index >= len(COLORS) else None,
        markersize=6,
        elinewidth=1,
        capsize=2,
        label=label,
    )


def _band(
    axes: Axes, entry: Entry, index: int, label: str, figures: Figures = _accuracy
) -> None:
    """A horizontal line, and a deviation around it."""
    values = figures(entry)
    color, mean = COLORS[index % len(COLORS)], float(np.mean(values))
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    axes.axhline(mean, color=color, linestyle=STYLES[index % len(STYLES)], label=label)
    axes.axhspan(mean - spread, mean + spread, color=color, alpha=0.12, linewidth=0)


def _finish(axes: Axes, title: str, xlabel: str, *, log: bool = False) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(xlabel)
    axes.set_ylabel("Test accuracy (%)")
    if log:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
