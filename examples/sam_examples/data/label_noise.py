"""Symmetric label noise, and what a run records of it."""

import hashlib

import numpy as np

from sam_examples.data.splits import Dataset


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
      ValueError: if `noise` is outside [0, 1], or there is no other class.
    """
    if not 0 <= noise <= 1:
        raise ValueError(f"noise must be a share from 0 to 1, got {noise}.")
    if noise > 0 and num_classes < 2:
        raise ValueError(
            f"labels of {num_classes} class have no other to flip to; set noise to 0, "
            f"got {noise}."
        )
    generator = np.random.default_rng(seed)
    flipped = generator.choice(len(labels), round(noise * len(labels)), replace=False)
    noisy = labels.copy()
    noisy[flipped] += generator.integers(1, num_classes, len(flipped), labels.dtype)
    return noisy % num_classes


def label_record(dataset: Dataset) -> dict[str, int | str]:
    """What tells the training labels of two runs apart, as it is in JSON.

    Returns:
      `num_labels`, `num_flipped` and `labels_sha256`, which is the hash of the training
      labels, noise included, as little-endian int32.
    """
    labels = np.asarray(dataset.train.labels, "<i4")
    return {
        "num_labels": len(labels),
        "num_flipped": dataset.num_flipped,
        "labels_sha256": hashlib.sha256(labels.tobytes()).hexdigest(),
    }
