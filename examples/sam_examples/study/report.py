"""The tables and figures of a page, made from the runs that are recorded.

A page says where they go: what stands between `<!-- key -->` and `<!-- / -->` is that
of the key, in a line or in several. Keys are words with bars between them:

* `table | small | sparse`: a row for each configuration of a setting and a question;
* `noises | small | noise`: the same, with a column of test accuracies for each share of
  wrong labels;
* `value | small | 0.4 | SAM | test`: one figure of one configuration;
* `digits | sparse`: a row for each configuration of a question of the digits;
* `translation`: the table of the runs that translate;
* `front`: a row for each method, with what it is called and what it came to.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sam_examples.settings.command_line import require
from sam_examples.study.cifar10_runs import (
    PRICE,
    REWEIGHT,
    SETTINGS,
    SPARSE,
    THETA,
)
from sam_examples.study.ledger import (
    Entry,
    Ledger,
    as_markdown,
    best_of,
    mean_and_spread,
)
from sam_examples.study.translation import Recipe, TranslationLedger
from sam_examples.study.translation_runs import GROUPS

_BLOCK = re.compile(r"(<!-- ([^>]*?) -->)(\n?).*?\n?(<!-- / -->)", re.DOTALL)
# What the label of further trials of a configuration ends in.
_FURTHER = re.compile(", (farther|farthest|finer|nearer|SGD's rate)$")
Row = Mapping[str, str]


class Book:
    """All runs of the study, by setting."""

    def __init__(self, results: Path) -> None:
        """Reads nothing yet.

        Args:
          results: directory that has one of each setting.
        """
        self._results = results

    @functools.cache  # noqa: B019
    def ledger(self, setting: str) -> Ledger:
        """The runs of a setting."""
        require(setting in SETTINGS, f"a setting is one of {list(SETTINGS)}", setting)
        recipe, groups = SETTINGS[setting].recipe, SETTINGS[setting].groups
        return Ledger(self._results / setting, recipe, groups)

    @functools.cache  # noqa: B019
    def entries(self, setting: str, question: str | None = None) -> list[Entry]:
        """What is known of each configuration, further trials of it included."""
        variants: dict[tuple[str, float], list[Entry]] = {}
        for entry in self.ledger(setting).entries():
            variants.setdefault(_base(entry), []).append(entry)
        asked = map(_base, self.ledger(setting).entries(question))
        return [_merge(variants[key]) for key in dict.fromkeys(asked)]

    def entry(self, setting: str, noise: float, label: str) -> Entry:
        """What is known of one configuration.

        Raises:
          ValueError: if nothing is.
        """
        for entry in self.entries(setting):
            if (entry.noise, entry.contestant.label) == (noise, label):
                return entry
        raise ValueError(f"{setting} has no runs of {label} at noise {noise:g}.")

    def time(self, setting: str, entry: Entry) -> float:
        """Time of a training, over that of the first configuration, the base.

        It is the number of epochs times the time of a step: as it was measured in
        turns, or else in the trainings themselves.
        """
        base = next(e for e in self.entries(setting) if e.noise == entry.noise)
        ratios = self.ledger(setting).ratios
        label = entry.contestant.label
        if label in ratios:
            ratio = ratios[label]
        else:
            own, bases = (np.median(e.figures("step_seconds")) for e in (entry, base))
            ratio = float(own / bases)
        return ratio * entry.contestant.epochs / base.contestant.epochs

    def digits(self, name: str) -> Any:
        """A study of the digits, as it was written."""
        return json.loads((self._results / "digits" / f"{name}.json").read_text())

    @functools.cache  # noqa: B019
    def translation(self) -> TranslationLedger:
        """The runs that translate."""
        return TranslationLedger(self._results / "multi30k", Recipe(), GROUPS)


def _base(entry: Entry) -> tuple[str, float]:
    """The configuration that an entry has trials of, and the share of wrong labels."""
    return _FURTHER.sub("", entry.contestant.label), entry.noise


def _merge(variants: Sequence[Entry]) -> Entry:
    """That of the best trial out of all."""
    best, tried = best_of(variants), sum(entry.tried for entry in variants)
    contestant = dataclasses.replace(best.contestant, label=_base(best)[0])
    return best._replace(contestant=contestant, tried=tried)


def render(page: str, book: Book) -> str:
    """The page with its tables and figures as the runs have them.

    Raises:
      ValueError: if a key is unknown, or has no runs.
    """

    def block(match: re.Match[str]) -> str:
        begin, key, newline, end = match.groups()
        kind, *words = (word.strip() for word in key.split("|"))
        require(kind in _KINDS, f"a key begins with one of {list(_KINDS)}", key)
        return f"{begin}{newline}{_KINDS[kind](book, *words)}{newline}{end}"

    return _BLOCK.sub(block, page)


def _percent(values: Any) -> str:
    return mean_and_spread(100 * np.asarray(values), 1)


def _measure(name: str, digits: int) -> Callable[[Book, str, Entry], str]:
    def column(book: Book, setting: str, entry: Entry) -> str:
        values = [result["measures"][name] for result in entry.results]
        return mean_and_spread(values, digits)

    return column


def _figure(name: str) -> Callable[[Book, str, Entry], str]:
    return lambda book, setting, entry: _percent(entry.figures(name))


_COLUMNS: Mapping[str, Callable[[Book, str, Entry], str]] = {
    "configuration": lambda book, setting, entry: entry.contestant.label,
    "epochs": lambda book, setting, entry: str(entry.contestant.epochs),
    "best of": lambda book, setting, entry: str(entry.tried),
    "chosen": lambda book, setting, entry: entry.chosen,
    "seeds": lambda book, setting, entry: str(len(entry.results)),
    "held out": _figure("valid"),
    "test": _figure("test"),
    "fitted": _figure("fitted"),
    "time": lambda book, setting, entry: f"{book.time(setting, entry):.2f}",
    "largest eigenvalue": _measure("top_eigenvalue", 1),
    "trace of the Hessian": _measure("hessian_trace", 0),
    "trace of the covariance": _measure("covariance_trace", 1),
    "cosine, steps": _measure("cosine", 2),
    "cosine, batches": _measure("mean_cosine", 2),
    "relative variance": _measure("relative_variance", 2),
}
_ALWAYS = ("configuration", "epochs", "best of", "chosen", "seeds", "test")
_CURVATURE = ("largest eigenvalue", "trace of the Hessian")
_OF_SETTING: Mapping[str, Sequence[str]] = {
    "full": (*_ALWAYS, "time"),
    "brief": (*_ALWAYS, "time"),
    "directions": (
        "configuration",
        "seeds",
        "test",
        "cosine, steps",
        "cosine, batches",
        "relative variance",
        *_CURVATURE,
    ),
}
_OF_QUESTION: Mapping[str, Sequence[str]] = {
    THETA: (*_ALWAYS, *_CURVATURE),
    REWEIGHT: (*_ALWAYS, "trace of the covariance", "time"),
    SPARSE: (*_ALWAYS, "time"),
    PRICE: (*_ALWAYS, "fitted", "time"),
}


def _table(book: Book, setting: str, question: str, noise: str | None = None) -> str:
    """A row for each configuration."""
    default = _OF_QUESTION.get(question, (*_ALWAYS, "fitted", "time"))
    columns = _OF_SETTING.get(setting, default)
    rows = [
        {name: _COLUMNS[name](book, setting, entry) for name in columns}
        for entry in book.entries(setting, question)
        if noise is None or entry.noise == float(noise)
    ]
    require(bool(rows), "a table needs runs", f"{setting}, {question}, {noise}")
    return as_markdown(rows)


def _noises(book: Book, setting: str, question: str) -> str:
    """A row for each configuration, a column for each share of wrong labels."""
    entries = book.entries(setting, question)
    noises = sorted({entry.noise for entry in entries})
    labels = dict.fromkeys(entry.contestant.label for entry in entries)
    cells = {(e.contestant.label, e.noise): e for e in entries}

    def cell(label: str, noise: float) -> str:
        entry = cells.get((label, noise))
        if entry is None:
            return ""
        return _percent(entry.figures("test"))

    rows = []
    for label in labels:
        entry = next(cells[label, n] for n in noises if (label, n) in cells)
        rows.append(
            {
                "configuration": label,
                "epochs": str(entry.contestant.epochs),
                **{f"{100 * noise:g} % wrong": cell(label, noise) for noise in noises},
                "time": f"{book.time(setting, entry):.2f}",
            }
        )
    return as_markdown(rows)


def _value(book: Book, setting: str, noise: str, label: str, name: str) -> str:
    """A figure of a configuration."""
    require(name in _COLUMNS, f"a figure is one of {list(_COLUMNS)}", name)
    return _COLUMNS[name](book, setting, book.entry(setting, float(noise), label))


_LITTLE = 0.05  # What has no shares, as no larger than the spread of seeds.


def _digits(book: Book, *names: str) -> str:
    """Rho, test accuracy and the gain over SGD in that of SAM, and steps' times."""
    first = book.digits(names[0])
    times = {
        width: ratios
        for name in names
        for width, ratios in book.digits(name)["times"].items()
    }
    base, top = (np.mean(first["rows"][name]["test"]) for name in ("SGD", "SAM"))

    def gain(row: Mapping[str, Any]) -> Row:
        if top - base < _LITTLE:
            return {}
        return {"gain": f"{100 * (np.mean(row['test']) - base) / (top - base):.0f}"}

    rows = [
        {
            "configuration": label,
            "rho": f"{row['rho']:g}" if row["rho"] else "",
            "test": _percent(row["test"]),
            **gain(row),
            **{
                f"step / SGD's, width {width}": f"{ratios[label]:.2f}"
                for width, ratios in times.items()
            },
        }
        for label, row in first["rows"].items()
    ]
    return as_markdown(rows)


class _Line(NamedTuple):
    """A row of the front page.

    Attributes:
      method: what it is called.
      page: that of the method, if there is one.
      call: how it is made.
      gradients: those of a step.
      labels: an expression of its configurations, of which the best is shown.
    """

    method: str
    page: str
    call: str
    gradients: str
    labels: str


_FRONT = (
    _Line("the base: SGD", "", "optax.sgd(...)", "1", "SGD"),
    _Line("SAM", "sam", "sam(base, rho)", "2", "SAM"),
    _Line("ASAM", "asam", "asam(base, rho)", "2", "ASAM"),
    _Line("VaSSO", "vasso", "vasso(base, rho, theta)", "2", "VaSSO, theta .*"),
    _Line(
        "Friendly SAM", "friendly_sam", "friendly_sam(base, rho)", "2", "Friendly SAM"
    ),
    _Line(
        "Sparse SAM, SSAM-F",
        "sparse_sam",
        "sparse_sam(base, rho, pattern, ...)",
        "2",
        "Fisher, .*",
    ),
    _Line(
        "Sparse SAM, SSAM-D",
        "sparse_sam",
        "dynamic_sparse_sam(base, rho, sparsity, ...)",
        "2",
        "dynamic, .*",
    ),
    _Line(
        "Sparse SAM, first block",
        "sparse_sam",
        "chain(perturb_only(mask), scale_to_radius(rho))",
        "1.8",
        "static: first block",
    ),
    _Line(
        "Sparse SAM, implicit",
        "implicit",
        "value_and_update(..., ascent_loss_fn=...)",
        "1.7",
        "implicit, .*",
    ),
    _Line(
        "RW-SAM",
        "rw_sam",
        "rw_sam(base, rho, strength)",
        "2.3 to 2.7",
        "RW-SAM, strength .*",
    ),
    _Line("m-SAM", "m_sam", "m_sam(base, rho, micro_batch_size)", "2", "m-SAM, .*"),
    _Line("GSAM", "gsam", "gsam(base, rho, alpha)", "2", "GSAM"),
    _Line("WSAM", "wsam", "wsam(base, rho, gamma)", "2", "WSAM"),
    _Line(
        "Functional SAM",
        "functional_sam",
        "functional_loss(output_fn, loss_fn)",
        "2",
        "Functional SAM",
    ),
    _Line(
        "LookSAM", "look_sam", "look_sam(base, rho, every=k)", "1 + 1/k", "LookSAM-5"
    ),
    _Line(
        "Momentum-SAM",
        "momentum_sam",
        "momentum_sam(base, rho)",
        "1",
        "Momentum-SAM",
    ),
    _Line(
        "Momentum-SAM, first block",
        "momentum_sam",
        "chain(perturb_only(mask), follow_momentum(rho))",
        "1",
        "Momentum-SAM, first block",
    ),
)


def _front(book: Book) -> str:
    """A row for each method: how it is called, what it costs and came to."""
    rows = []
    for line in _FRONT:
        entries = [
            entry
            for entry in book.entries("small")
            if re.fullmatch(line.labels, entry.contestant.label) and entry.noise == 0.4
        ]
        best = best_of(entries)
        page = f"docs/methods/{line.page}.md"
        rows.append(
            {
                "method": f"[{line.method}]({page})" if line.page else line.method,
                "in one line": f"`{line.call}`",
                "gradients": line.gradients,
                "trials": str(sum(entry.tried for entry in entries)),
                "test accuracy (%)": _percent(best.figures("test")),
                "time": f"{book.time('small', best):.2f}",
            }
        )
    return as_markdown(rows)


def _translation(book: Book) -> str:
    return as_markdown(book.translation().summary())


_KINDS: Mapping[str, Callable[..., str]] = {
    "table": _table,
    "noises": _noises,
    "value": _value,
    "digits": _digits,
    "translation": _translation,
    "front": _front,
}
