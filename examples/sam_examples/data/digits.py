"""The handwritten digits that come with scikit-learn."""

from typing import Any

import numpy as np
import sklearn.datasets
from sklearn.model_selection import train_test_split

from sam_examples.data.label_noise import flip_labels
from sam_examples.data.splits import Dataset, Split


def load_digits(noise: float = 0.0, seed: int = 0) -> Dataset:
    """Loads the 1,797 handwritten digits of 8x8 pixels that come with scikit-learn.

    The splits are stratified and fixed: 1,025 to train, and 386 each to validate and to
    test.

    Args:
      noise: share of the training labels to replace, see `flip_labels`.
      seed: draws which labels flip, and to what.

    Raises:
      ValueError: if `noise` is outside [0, 1].
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
    noisy = flip_labels(labels, noise, 10, seed)
    return Dataset(
        name="digits",
        num_classes=10,
        train=Split(images, noisy),
        valid=Split(valid_images, valid_labels),
        test=Split(test_images, test_labels),
        mean=images.mean(keepdims=True).reshape(1),
        std=images.std(keepdims=True).reshape(1),
        num_flipped=int(np.sum(noisy != labels)),
    )
