"""The data sets of the examples: scikit-learn's digits and CIFAR-10, from local files.

Both come as a training, a validation and a test split. Whatever is chosen, is chosen on
the validation split; the test split is for reporting.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import sklearn.datasets
from cifar import read_cifar10
from sklearn.model_selection import train_test_split

# Of the 50,000 training images, by channel.
CIFAR10_MEAN = np.array([125.31, 122.95, 113.87], np.float32)
CIFAR10_STD = np.array([62.99, 62.09, 66.70], np.float32)


class Split(NamedTuple):
    """Examples that belong together.

    Attributes:
      images: `[N, H, W, C]`, as stored: uint8, or float32 of the same range.
      labels: `[N]`, int32.
    """

    images: Any
    labels: Any


class Dataset(NamedTuple):
    """A data set in three splits.

    Attributes:
      name: what it is called on the command line.
      num_classes: number of classes.
      train: the examples to train on, with label noise if asked for.
      valid: the examples to choose hyperparameters on, with clean labels.
      test: the examples to report, with clean labels.
      mean: mean of each channel of the training images, `[C]`.
      std: standard deviation of each channel of the training images, `[C]`.
    """

    name: str
    num_classes: int
    train: Split
    valid: Split
    test: Split
    mean: Any
    std: Any


def load_digits(noise: float = 0.0, seed: int = 0) -> Dataset:
    """Loads the 1,797 handwritten digits of 8x8 pixels that come with scikit-learn.

    The splits are stratified and fixed: 1,025 to train, and 386 each to validate and to
    test.

    Args:
      noise: share of the training labels to replace, see `flip_labels`.
      seed: draws which labels flip, and to what.
    """
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    images = images.astype(np.float32).reshape(-1, 8, 8, 1)
    labels = labels.astype(np.int32)

    def split(images: Any, labels: Any, size: int) -> list[Any]:
        arrays: list[Any] = train_test_split(
            images, labels, test_size=size, stratify=labels, random_state=0
        )
        return arrays

    images, test_images, labels, test_labels = split(images, labels, 386)
    images, valid_images, labels, valid_labels = split(images, labels, 386)
    return Dataset(
        name="digits",
        num_classes=10,
        train=Split(images, flip_labels(labels, noise, 10, seed)),
        valid=Split(valid_images, valid_labels),
        test=Split(test_images, test_labels),
        mean=images.mean(keepdims=True).reshape(1),
        std=images.std(keepdims=True).reshape(1),
    )


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
      ValueError: if a file is truncated or holds something else.
    """
    (images, labels), test = read_cifar10(Path(data_dir), images_per_file)
    size = len(labels) - num_valid
    return Dataset(
        name="cifar10",
        num_classes=10,
        train=Split(images[:size], flip_labels(labels[:size], noise, 10, seed)),
        valid=Split(images[size:], labels[size:]),
        test=Split(*test),
        mean=CIFAR10_MEAN,
        std=CIFAR10_STD,
    )


def flip_labels(
    labels: np.ndarray, noise: float, num_classes: int, seed: int
) -> np.ndarray:
    """Replaces a share of the labels, each by another class drawn uniformly.

    Args:
      labels: `[N]`.
      noise: the share, in [0, 1]; exactly `round(noise * N)` labels change.
      num_classes: number of classes to draw from.
      seed: draws which labels change, and to what.

    Raises:
      ValueError: if `noise` is outside [0, 1].
    """
    if not 0 <= noise <= 1:
        raise ValueError(f"noise must be a share from 0 to 1, got {noise}.")
    generator = np.random.default_rng(seed)
    flipped = generator.choice(len(labels), round(noise * len(labels)), replace=False)
    noisy = labels.copy()
    noisy[flipped] += generator.integers(1, num_classes, len(flipped), labels.dtype)
    return noisy % num_classes


def normalize(images: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    """Gives every channel of `[B, H, W, C]` mean 0 and deviation 1, in float32."""
    channels = (1, 1, 1, -1)
    centred = images.astype(jnp.float32) - jnp.reshape(mean, channels)
    return centred / jnp.reshape(std, channels)


def augment(key: jax.Array, images: jax.Array) -> jax.Array:
    """Crops, flips and cuts out at random, each image by itself.

    A crop of the image's size after padding by 4, a horizontal flip with probability
    1/2, and with probability 1/2 Cutout (DeVries and Taylor, 2017, arXiv 1708.04552): a
    square of 16 pixels, whose part inside the image becomes 0. Normalize before, so
    that padding and squares have the mean colour.

    Args:
      key: a PRNG key.
      images: `[B, H, W, C]`.
    """
    keys = jax.random.split(key, (3, len(images)))
    images = jax.vmap(_crop)(keys[0], images)
    images = jax.vmap(_flip)(keys[1], images)
    return jax.vmap(_cut_out)(keys[2], images)


def _crop(key: jax.Array, image: jax.Array, pad: int = 4) -> jax.Array:
    padded = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    row, column = jax.random.randint(key, (2,), 0, 2 * pad + 1)
    return jax.lax.dynamic_slice(padded, (row, column, 0), image.shape)


def _flip(key: jax.Array, image: jax.Array) -> jax.Array:
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def _cut_out(
    key: jax.Array, image: jax.Array, size: int = 16, probability: float = 0.5
) -> jax.Array:
    height, width, _ = image.shape
    corner_key, apply_key = jax.random.split(key)
    # The corner may lie outside, so that pixels at the border are cut as often.
    limits = jnp.array([height, width]) - size // 2
    row, column = jax.random.randint(corner_key, (2,), -(size // 2), limits)
    rows, columns = jnp.arange(height) - row, jnp.arange(width) - column
    inside_rows = (rows >= 0) & (rows < size)
    inside_columns = (columns >= 0) & (columns < size)
    hole = inside_rows[:, None, None] & inside_columns[None, :, None]
    return jnp.where(hole & jax.random.bernoulli(apply_key, probability), 0, image)
