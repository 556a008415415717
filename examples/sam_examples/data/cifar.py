"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009), from local files."""

from pathlib import Path

import numpy as np

from sam_examples.data.cifar_files import (
    CIFAR10,
    CIFAR100,
    Archive,
    Examples,
    read_archive,
)
from sam_examples.data.label_noise import flip_labels
from sam_examples.data.splits import Dataset, Split

# Of the 50,000 training images, by channel.
CIFAR10_MEAN = np.array([125.31, 122.95, 113.87], np.float32)
CIFAR10_STD = np.array([62.99, 62.09, 66.70], np.float32)
CIFAR100_MEAN = np.array([129.30, 124.07, 112.43], np.float32)
CIFAR100_STD = np.array([68.17, 65.39, 70.42], np.float32)


def load_cifar10(
    data_dir: Path | str,
    noise: float = 0.0,
    seed: int = 0,
    *,
    num_valid: int = 5_000,
    images_per_file: int = 10_000,
) -> Dataset:
    """Loads CIFAR-10; the last training images become the validation split.

    Args:
      data_dir: where `cifar-10-batches-py` or `cifar-10-batches-bin` is, or lies in.
      noise: share of the training labels to replace, see `flip_labels`.
      seed: draws which labels flip, and to what.
      num_valid: size of the validation split.
      images_per_file: 10,000 in the published files.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if a file is truncated or holds something else, or an argument is out
        of range.
    """
    train, test = read_archive(
        CIFAR10, Path(data_dir), images_per_file, images_per_file
    )
    mean, std = CIFAR10_MEAN, CIFAR10_STD
    return _dataset(CIFAR10, train, test, noise, seed, num_valid, mean, std)


def load_cifar100(
    data_dir: Path | str,
    noise: float = 0.0,
    seed: int = 0,
    *,
    num_valid: int = 5_000,
    num_train_images: int = 50_000,
    num_test_images: int = 10_000,
) -> Dataset:
    """Loads CIFAR-100 with its 100 fine classes.

    The last training images become the validation split.

    Args:
      data_dir: where `cifar-100-python` or `cifar-100-binary` is, or lies in.
      noise: share of the training labels to replace, see `flip_labels`.
      seed: draws which labels flip, and to what.
      num_valid: size of the validation split.
      num_train_images: 50,000 in the published file, the validation split included.
      num_test_images: 10,000 in the published file.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if a file is truncated or holds something else, or an argument is out
        of range.
    """
    train, test = read_archive(
        CIFAR100, Path(data_dir), num_train_images, num_test_images
    )
    mean, std = CIFAR100_MEAN, CIFAR100_STD
    return _dataset(CIFAR100, train, test, noise, seed, num_valid, mean, std)


def _dataset(
    archive: Archive,
    train: Examples,
    test: Examples,
    noise: float,
    seed: int,
    num_valid: int,
    mean: np.ndarray,
    std: np.ndarray,
) -> Dataset:
    images, labels = train
    if not 0 <= num_valid < len(labels):
        raise ValueError(
            f"num_valid must be from 0 to {len(labels) - 1:,}, to leave training "
            f"images of {archive.name}, got {num_valid:,}."
        )
    size = len(labels) - num_valid
    noisy = flip_labels(labels[:size], noise, archive.num_classes, seed)
    return Dataset(
        name=archive.name.lower().replace("-", ""),
        num_classes=archive.num_classes,
        train=Split(images[:size], noisy),
        valid=Split(images[size:], labels[size:]),
        test=Split(*test),
        mean=mean,
        std=std,
        num_flipped=int(np.sum(noisy != labels[:size])),
    )
