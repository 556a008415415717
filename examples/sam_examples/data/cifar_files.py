"""Reads CIFAR-10 and CIFAR-100 in the two layouts that each is published in.

`cifar-10-batches-py` and `cifar-100-python` hold Python pickles, `cifar-10-batches-bin`
and `cifar-100-binary` records of the labels, a byte each, and 3,072 bytes of pixels.
CIFAR-10 has five files of training images, CIFAR-100 one with a coarse and a fine label
for each image, of which only the fine one is read.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sam_examples.data import pickled_arrays

IMAGE_SIZE = 32 * 32 * 3

# Images [N, 32, 32, 3] in uint8 and labels [N] in int32.
Examples = tuple[np.ndarray, np.ndarray]


class Labels(NamedTuple):
    """How an archive labels its images.

    Attributes:
      archive: its published name.
      num_classes: labels are below this.
      key: name of the labels in its pickles.
      num_bytes: bytes of labels in a record, of which the last one counts.
    """

    archive: str
    num_classes: int
    key: str
    num_bytes: int


class Layout(NamedTuple):
    """How a published archive lays its files out.

    Attributes:
      directory: name of the directory in the archive.
      train: names of the files of training images.
      test: name of the file of test images.
      read: reads one file, given its path, the number of its images and its labels.
    """

    directory: str
    train: tuple[str, ...]
    test: str
    read: Callable[[Path, int, Labels], Examples]

    def files(self) -> tuple[str, ...]:
        """The names of all files."""
        return (*self.train, self.test)


class Archive(NamedTuple):
    """A data set in the layouts that it is published in.

    Attributes:
      labels: how its images are labelled.
      layouts: the published layouts.
    """

    labels: Labels
    layouts: tuple[Layout, ...]

    @property
    def name(self) -> str:
        """The published name."""
        return self.labels.archive

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return self.labels.num_classes


def read_archive(
    archive: Archive, data_dir: Path, images_per_train_file: int, test_images: int
) -> tuple[Examples, Examples]:
    """Reads the training and the test images.

    Args:
      archive: what to look for.
      data_dir: the directory of one of the layouts, or the one it lies in.
      images_per_train_file: number of images that each training file has to hold.
      test_images: number of images that the test file has to hold.

    Raises:
      FileNotFoundError: if no layout is there, or one of its files is missing.
      ValueError: if a file is truncated or holds something else.
    """
    layout, directory = _find_layout(archive, data_dir)

    def read(name: str, num_images: int) -> Examples:
        path = directory / name
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing; {layout.directory} consists of "
                f"{', '.join(layout.files())}: unpack the archive again."
            )
        return layout.read(path, num_images, archive.labels)

    parts = (read(name, images_per_train_file) for name in layout.train)
    images, labels = zip(*parts, strict=True)
    train = np.concatenate(images), np.concatenate(labels)
    return train, read(layout.test, test_images)


def _find_layout(archive: Archive, data_dir: Path) -> tuple[Layout, Path]:
    for layout in archive.layouts:
        for directory in (data_dir, data_dir / layout.directory):
            if any((directory / name).is_file() for name in layout.files()):
                return layout, directory
    expected = " or of ".join(
        f"{layout.directory} ({layout.train[0]}, ...)" for layout in archive.layouts
    )
    raise FileNotFoundError(
        f"no {archive.name} in {data_dir}: expected the files of {expected} in it or "
        "in its subdirectory of that name; unpack the published archive there."
    )


def _read_binary(path: Path, num_images: int, labels: Labels) -> Examples:
    content = np.fromfile(path, np.uint8)
    record = labels.num_bytes + IMAGE_SIZE
    if content.size != num_images * record:
        of_labels = "1 byte" if labels.num_bytes == 1 else f"{labels.num_bytes} bytes"
        raise ValueError(
            f"{path} has {content.size:,} bytes; expected {num_images * record:,}, "
            f"{num_images:,} records of {of_labels} of label and {IMAGE_SIZE:,} of "
            f"pixels: the file is truncated or none of {labels.archive}'s."
        )
    records = content.reshape(num_images, record)
    pixels = records[:, labels.num_bytes :]
    return _examples(path, pixels, records[:, labels.num_bytes - 1], labels)


def _read_pickle(path: Path, num_images: int, labels: Labels) -> Examples:
    expected = (
        f"expected a pickled dictionary with 'data', {num_images:,} rows of "
        f"{IMAGE_SIZE:,} uint8, and {labels.key!r}, {num_images:,} integers"
    )
    try:
        content = pickled_arrays.load(path)
    # A damaged pickle can make the unpickler raise almost anything.
    except Exception as error:
        raise ValueError(
            f"{path} is truncated or no {labels.archive} pickle ({error}); {expected}."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; {expected}.")
    # Python 2 wrote the keys as bytes.
    content = {k.decode() if isinstance(k, bytes) else k: v for k, v in content.items()}
    for key in ("data", labels.key):
        if key not in content:
            names = ", ".join(map(str, content)) or "nothing"
            raise ValueError(f"{path} has no {key!r} but {names}; {expected}.")
    pixels, classes = np.asarray(content["data"]), np.asarray(content[labels.key])
    if pixels.shape != (num_images, IMAGE_SIZE) or pixels.dtype != np.uint8:
        raise ValueError(
            f"{path} has 'data' of shape {pixels.shape} and type {pixels.dtype}; "
            f"{expected}."
        )
    if classes.shape != (num_images,) or classes.dtype.kind not in "iu":
        raise ValueError(
            f"{path} has {labels.key!r} of shape {classes.shape} and type "
            f"{classes.dtype}; {expected}."
        )
    return _examples(path, pixels, classes, labels)


def _examples(
    path: Path, pixels: np.ndarray, classes: np.ndarray, labels: Labels
) -> Examples:
    if classes.min() < 0 or classes.max() >= labels.num_classes:
        raise ValueError(
            f"{path} has labels from {classes.min()} to {classes.max()}; expected 0 to "
            f"{labels.num_classes - 1}: the file is damaged or none of "
            f"{labels.archive}'s."
        )
    # The files store a plane for each colour; convolutions here take channels last.
    images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), classes.astype(np.int32)


_PARTS = tuple(f"data_batch_{i}" for i in range(1, 6))
_BINARY_PARTS = tuple(f"{part}.bin" for part in _PARTS)

CIFAR10 = Archive(
    Labels("CIFAR-10", 10, "labels", 1),
    (
        Layout("cifar-10-batches-py", _PARTS, "test_batch", _read_pickle),
        Layout("cifar-10-batches-bin", _BINARY_PARTS, "test_batch.bin", _read_binary),
    ),
)
CIFAR100 = Archive(
    Labels("CIFAR-100", 100, "fine_labels", 2),
    (
        Layout("cifar-100-python", ("train",), "test", _read_pickle),
        Layout("cifar-100-binary", ("train.bin",), "test.bin", _read_binary),
    ),
)
