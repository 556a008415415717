"""Reads pickles of arrays, those that Python 2 wrote included, and runs no code."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np


def load(path: Path) -> Any:
    """Reads a pickle of arrays and Python's own containers.

    Raises:
      Exception: of any kind, if the file is damaged or asks for anything else.
    """
    with path.open("rb") as file:
        return _ArrayUnpickler(file, encoding="bytes").load()


def _make_dtype(code: str, align: Any = False, copy: Any = False) -> np.dtype[Any]:
    # The published pickles pass integers for the flags, which NumPy has deprecated.
    return np.dtype(code, align=bool(align), copy=bool(copy))


def _encode(text: str, encoding: str) -> bytes:
    del encoding  # Python 3 writes bytes as latin1, for Python 2 to read.
    return text.encode("latin1")


# What arrays are pickled with, in NumPy 1 and 2; `_reconstruct` and `_frombuffer`.
_CONSTRUCTORS: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): _encode,
    ("numpy", "dtype"): _make_dtype,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy.core.numeric", "_frombuffer"): np.empty(0).__reduce_ex__(5)[0],
    ("numpy._core.numeric", "_frombuffer"): np.empty(0).__reduce_ex__(5)[0],
}


class _ArrayUnpickler(pickle.Unpickler):
    """Builds arrays and Python's own containers, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _CONSTRUCTORS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _CONSTRUCTORS[module, name]
