"""Reads CIFAR-10 (Krizhevsky, 2009) in the two layouts that it is published in.

`cifar-10-batches-py` holds Python pickles, `cifar-10-batches-bin` records of one byte
of label and 3,072 bytes of pixels. Either has five files of training images and one of
test images, each of 10,000 images.
"""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

NUM_CLASSES = 10
IMAGE_SIZE = 32 * 32 * 3

# Images [N, 32, 32, 3] in uint8 and labels [N] in int32.
Examples = tuple[np.ndarray, np.ndarray]


class Layout(NamedTuple):
    """How a published archive lays its files out.

    Attributes:
      directory: name of the directory in the archive.
      train: names of the files of training images.
      test: name of the file of test images.
      read: reads one file, given its path and the number of its images.
    """

    directory: str
    train: tuple[str, ...]
    test: str
    read: Callable[[Path, int], Examples]


def read_cifar10(
    data_dir: Path, images_per_file: int = 10_000
) -> tuple[Examples, Examples]:
    """Reads the training and the test images.

    Args:
      data_dir: the directory of one of the layouts, or the one it lies in.
      images_per_file: number of images that each file has to hold.

    Raises:
      FileNotFoundError: if no layout is there, or one of its files is missing.
      ValueError: if a file is truncated or holds something else.
    """
    layout, directory = _find_layout(data_dir)

    def read(name: str) -> Examples:
        path = directory / name
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing; {layout.directory} consists of "
                f"{', '.join((*layout.train, layout.test))}: unpack the archive again."
            )
        return layout.read(path, images_per_file)

    images, labels = zip(*(read(name) for name in layout.train), strict=True)
    return (np.concatenate(images), np.concatenate(labels)), read(layout.test)


def _find_layout(data_dir: Path) -> tuple[Layout, Path]:
    for layout in LAYOUTS:
        for directory in (data_dir, data_dir / layout.directory):
            if any((directory / n).is_file() for n in (*layout.train, layout.test)):
                return layout, directory
    raise FileNotFoundError(
        f"no CIFAR-10 in {data_dir}: expected the files of cifar-10-batches-py "
        "(data_batch_1, ...) or of cifar-10-batches-bin (data_batch_1.bin, ...) in it "
        "or in its subdirectory of that name; unpack the published archive there."
    )


def _read_binary(path: Path, num_images: int) -> Examples:
    records = np.fromfile(path, np.uint8)
    size = num_images * (1 + IMAGE_SIZE)
    if records.size != size:
        raise ValueError(
            f"{path} has {records.size:,} bytes; expected {size:,}, {num_images:,} "
            f"records of 1 byte of label and {IMAGE_SIZE:,} of pixels: the file is "
            "truncated or none of CIFAR-10's."
        )
    records = records.reshape(num_images, 1 + IMAGE_SIZE)
    return _examples(path, records[:, 1:], records[:, 0])


def _read_pickle(path: Path, num_images: int) -> Examples:
    expected = (
        f"expected a pickled dictionary with 'data', {num_images:,} rows of "
        f"{IMAGE_SIZE:,} uint8, and 'labels', {num_images:,} integers"
    )
    try:
        with path.open("rb") as file:
            content = _ArrayUnpickler(file, encoding="bytes").load()
    # A damaged pickle can make the unpickler raise almost anything.
    except Exception as error:
        raise ValueError(
            f"{path} is truncated or no CIFAR-10 pickle ({error}); {expected}."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; {expected}.")
    # Python 2 wrote the keys as bytes.
    content = {k.decode() if isinstance(k, bytes) else k: v for k, v in content.items()}
    for key in ("data", "labels"):
        if key not in content:
            names = ", ".join(map(str, content)) or "nothing"
            raise ValueError(f"{path} has no {key!r} but {names}; {expected}.")
    data, labels = np.asarray(content["data"]), np.asarray(content["labels"])
    if data.shape != (num_images, IMAGE_SIZE) or data.dtype != np.uint8:
        raise ValueError(
            f"{path} has 'data' of shape {data.shape} and type {data.dtype}; "
            f"{expected}."
        )
    if labels.shape != (num_images,) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{path} has 'labels' of shape {labels.shape} and type {labels.dtype}; "
            f"{expected}."
        )
    return _examples(path, data, labels)


def _examples(path: Path, pixels: np.ndarray, labels: np.ndarray) -> Examples:
    if labels.min() < 0 or labels.max() >= NUM_CLASSES:
        raise ValueError(
            f"{path} has labels from {labels.min()} to {labels.max()}; expected 0 to "
            f"{NUM_CLASSES - 1}: the file is damaged or none of CIFAR-10's."
        )
    # The files store a plane for each colour; convolutions here take channels last.
    images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), labels.astype(np.int32)


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


LAYOUTS = (
    Layout(
        "cifar-10-batches-py",
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        "test_batch",
        _read_pickle,
    ),
    Layout(
        "cifar-10-batches-bin",
        tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        "test_batch.bin",
        _read_binary,
    ),
)
