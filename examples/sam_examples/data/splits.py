"""What a data set is: examples in three splits."""

from typing import Any, NamedTuple


class Split(NamedTuple):
    """Examples that belong together, or a batch of them.

    The number of examples is `len(split.labels)`; `len(split)` is that of the tuple.

    Attributes:
      images: `[N, H, W, C]`, as stored: uint8, or float32 of the same range.
      labels: `[N]`, int32.
    """

    images: Any
    labels: Any

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Height, width and channels of an image."""
        return tuple(self.images.shape[1:])

    def take(self, indices: Any) -> "Split":
        """The examples of these indices, in their shape and order."""
        return Split(self.images[indices], self.labels[indices])


class Dataset(NamedTuple):
    """A data set in three splits.

    Each split is a `Split` of arrays in memory, or an `ImageFolder`, whose images are
    read as they are needed. Both have `labels` and `image_shape`.

    Attributes:
      name: what it is called on the command line.
      num_classes: number of classes.
      train: the examples to train on, with label noise if asked for.
      valid: the examples to choose hyperparameters on, with clean labels.
      test: the examples to report, with clean labels.
      mean: mean of each channel of the training images, `[C]`.
      std: standard deviation of each channel of the training images, `[C]`.
      num_flipped: how many of the training labels are noise.
    """

    name: str
    num_classes: int
    train: Any
    valid: Any
    test: Any
    mean: Any
    std: Any
    num_flipped: int = 0
