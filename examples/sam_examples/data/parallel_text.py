"""Sentences in two languages, line by line, from plain text files.

The layout is that in which IWSLT, WMT and Multi30k are published once unpacked: one
directory with `train.de` and `train.en`, `val.*` or `valid.*`, and test sets whose
names begin with `test`, each file as it is or as `.gz`.
"""

import gzip
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple


class Pairs(NamedTuple):
    """Sentences and their translations.

    Attributes:
      sources: sentences, one a line.
      targets: their translations, as many.
    """

    sources: list[str]
    targets: list[str]


class ParallelText(NamedTuple):
    """Sentences in two languages, in splits.

    Attributes:
      name: what it is called.
      train: what to train on.
      valid: what to choose hyperparameters on.
      tests: what to report, by the name of the set.
      notes: what was left out and why, in sentences.
    """

    name: str
    train: Pairs
    valid: Pairs
    tests: Mapping[str, Pairs]
    notes: tuple[str, ...] = ()


def load_parallel_text(directory: Path, source: str, target: str) -> ParallelText:
    """Loads all splits; pairs with an empty line are left out, and noted.

    Args:
      directory: where the files are.
      source: the language to translate from, as in the names of the files.
      target: the language to translate to.

    Raises:
      FileNotFoundError: if the directory or one of its files is missing.
      ValueError: if a language is not there, the files of a split have different
        numbers of lines, or one is no text.
    """
    files = _files(directory)
    languages = sorted(files.get("train", {}))
    for language in (source, target):
        if language not in languages:
            raise ValueError(
                f"{directory} has no training text in {language!r}; there is train."
                f"{' and train.'.join(languages) or '* in no language'}."
            )
    valid = next((name for name in ("val", "valid") if name in files), None)
    tests = sorted(name for name in files if name.startswith("test"))
    if valid is None or not tests:
        missing = "test*" if valid else "val.* or valid.*"
        raise FileNotFoundError(
            f"{directory} has no {missing} beside train.*; held-out and test sentences "
            "are files of their own."
        )
    notes: list[str] = []

    def read(name: str) -> Pairs:
        return _read_pairs(directory, name, files[name], (source, target), notes)

    train, held_out = read("train"), read(valid)
    by_name = {name: read(name) for name in tests}
    return ParallelText(directory.name, train, held_out, by_name, tuple(notes))


def read_lines(path: Path) -> list[str]:
    """The lines of a text file in UTF-8, without spaces around them.

    Args:
      path: unpacked if it ends in `.gz`.

    Raises:
      OSError: if it cannot be read.
      ValueError: if it is damaged or no text.
    """
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged or no text in UTF-8 ({error}).") from error
    # `str.splitlines` would also split at characters that sentences may have.
    lines = [line.strip() for line in text.split("\n")]
    return lines if lines[-1] else lines[:-1]


def _files(directory: Path) -> dict[str, dict[str, Path]]:
    """The files of a directory by split and language."""
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{directory} is no directory; --data-dir is that of train.*, val.* and "
            "test*.*, such as train.de and train.en."
        )
    files: dict[str, dict[str, Path]] = {}
    for path in sorted(directory.iterdir(), reverse=True):  # Unpacked ones count.
        name, _, language = path.name.removesuffix(".gz").rpartition(".")
        if name:
            files.setdefault(name, {})[language] = path
    return files


def _read_pairs(
    directory: Path,
    name: str,
    files: Mapping[str, Path],
    languages: tuple[str, str],
    notes: list[str],
) -> Pairs:
    for language in languages:
        if language not in files:
            raise FileNotFoundError(
                f"{directory / name}.{language} is missing, and so is its .gz; there "
                f"is {name}.{f' and {name}.'.join(sorted(files))}."
            )
    sources, targets = (read_lines(files[language]) for language in languages)
    if len(sources) != len(targets):
        counts = " and ".join(
            f"{files[language].name} {len(lines):,}"
            for language, lines in zip(languages, (sources, targets), strict=True)
        )
        raise ValueError(
            f"{directory}: {counts} lines; each line must be the translation of the "
            "other's."
        )
    whole = [(s, t) for s, t in zip(sources, targets, strict=True) if s and t]
    if not whole:
        raise ValueError(f"{directory}: the files of {name} have no pair of sentences.")
    if empty := len(sources) - len(whole):
        notes.append(
            f"{empty:,} of {len(sources):,} pairs of {name} have an empty line and are "
            "left out"
        )
    return Pairs([s for s, _ in whole], [t for _, t in whole])
