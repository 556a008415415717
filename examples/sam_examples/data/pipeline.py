"""The input pipeline, on Grain: seeded, resumable, and for any number of processes.

`training_batches` and `evaluation_batches` say what each batch is; nothing is read
before it is asked for, and any batch can be asked for first. `prefetched` prepares
batches in the background, and begins where a run left off.
"""

import functools
from collections.abc import Callable
from typing import Any

import grain
import numpy as np

from sam_examples.data.image_folders import ImageFolder
from sam_examples.data.splits import Split
from sam_examples.data.transforms import center_crop, random_resized_crop

# transform(image, rng) -> [H, W, C]
Transform = Callable[[Any, np.random.Generator], np.ndarray]


def training_batches(
    split: Split | ImageFolder,
    *,
    batch_size: int,
    epochs: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    transform: Transform | None = None,
) -> grain.MapDataset:
    """The batches of a training; item `i` is that of step `i`.

    Each epoch has all examples in another order, but for those that would make an
    incomplete last batch. Order and transforms follow from the seed and the step alone,
    so that a run can go on at any step, and processes together see what one would see.

    Args:
      split: what to train on.
      batch_size: examples of a step, over all processes.
      epochs: passes over the examples.
      seed: draws order and transforms, 0 or more.
      process_index: which process this is.
      process_count: how many processes share each batch.
      transform: `transform(image, rng)` makes the image that goes into the batch, out
        of a Pillow image or `[H, W, C]`. By default images of a folder are cropped,
        resized and flipped at random, see `random_resized_crop`, and those in memory
        stay as they are: `augment` treats them on the device.

    Returns:
      `epochs * (N // batch_size)` batches, each a `Split` of NumPy arrays with the rows
      `process_index * b` up to `(process_index + 1) * b` of the step's batch, where `b`
      is `batch_size / process_count`.

    Raises:
      ValueError: if an argument is out of range.
    """
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}.")
    own = _own_rows(batch_size, process_index, process_count)
    order = _Order(len(split.labels), batch_size, seed)
    if isinstance(split, Split) and transform is None:
        examples = _in_memory(split)

        def batch(step: int) -> Split:
            return examples.take(order.examples(step)[1][own])
    else:
        random_image = _on_images(transform or _crop_of(split))
        source = grain.MapDataset.source(_Examples(split))
        transformed = source.seed(seed).random_map(random_image)

        def batch(step: int) -> Split:
            epoch, indices = order.examples(step)
            # Each index has a generator of its own; one beyond the last is that of an
            # example in a later epoch.
            indices = indices[own] + epoch * len(source)
            examples = [transformed[int(index)] for index in indices]
            return Split(*(np.stack(x) for x in zip(*examples, strict=True)))

    return grain.MapDataset.range(epochs * order.steps).map(batch)


def evaluation_batches(
    split: Split | ImageFolder,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.MapDataset:
    """All examples in order, in batches of which the last is filled up.

    Args:
      split: what to evaluate on; images of a folder are resized and cropped in the
        middle, see `center_crop`.
      batch_size: examples of a batch, over all processes.
      process_index: which process this is.
      process_count: how many processes share each batch.

    Returns:
      `ceil(N / batch_size)` pairs of a `Split` and weights `[b]`, float32, which are 1
      for examples and 0 for the zeros that fill the last batch up.

    Raises:
      ValueError: if an argument is out of range.
    """
    num_examples = len(split.labels)
    own = _own_rows(batch_size, process_index, process_count)
    gather = _in_memory(split).take if isinstance(split, Split) else _crops(split)

    def batch(step: int) -> tuple[Split, np.ndarray]:
        rows = step * batch_size + np.arange(batch_size)[own]
        present = rows < num_examples
        return _filled_up(gather(rows[present]), len(rows)), present.astype(np.float32)

    return grain.MapDataset.range(-(-num_examples // batch_size)).map(batch)


class _Order:
    """Which examples each step has, over all processes.

    Drawn by NumPy an epoch at a time: Grain's own shuffle takes longer for an index
    than it takes to copy a small image.
    """

    def __init__(self, num_examples: int, batch_size: int, seed: int) -> None:
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}.")
        if batch_size > num_examples:
            raise ValueError(
                f"batch_size must be at most {num_examples:,}, the number of training "
                f"examples, got {batch_size:,}."
            )
        self.steps = num_examples // batch_size
        self._batch_size = batch_size

        # Threads may be at the end of an epoch and at the start of the next.
        @functools.lru_cache(maxsize=2)
        def permutation(epoch: int) -> np.ndarray:
            # Unlike (seed, epoch), the key shares no draws with those of the bare seed.
            sequence = np.random.SeedSequence(seed, spawn_key=(epoch,))
            return np.random.default_rng(sequence).permutation(num_examples)

        self._permutation = permutation

    def examples(self, step: int) -> tuple[int, np.ndarray]:
        """The epoch of a step, and the indices of its examples."""
        epoch, step = divmod(step, self.steps)
        first = step * self._batch_size
        return epoch, self._permutation(epoch)[first : first + self._batch_size]


class _Examples:
    """A source of single examples."""

    def __init__(self, split: Split | ImageFolder) -> None:
        self._split = _in_memory(split) if isinstance(split, Split) else split

    def __len__(self) -> int:
        return len(self._split.labels)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        if isinstance(self._split, ImageFolder):
            return self._split[index]
        return self._split.images[index], self._split.labels[index]


def _own_rows(batch_size: int, process_index: int, process_count: int) -> slice:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index must be from 0 to process_count - 1 = {process_count - 1}, "
            f"got {process_index}."
        )
    if batch_size % process_count:
        raise ValueError(
            f"batch_size must be a multiple of process_count = {process_count}, got "
            f"{batch_size}."
        )
    size = batch_size // process_count
    return slice(process_index * size, (process_index + 1) * size)


def _in_memory(split: Split) -> Split:
    return Split(*map(np.asarray, split))


def _crops(folder: ImageFolder) -> Callable[[np.ndarray], Split]:
    def gather(rows: np.ndarray) -> Split:
        images = np.zeros((len(rows), *folder.image_shape), np.uint8)
        for image, row in zip(images, rows, strict=True):
            image[...] = center_crop(folder[row][0], size=folder.image_size)
        return Split(images, folder.labels[rows])

    return gather


def _filled_up(batch: Split, size: int) -> Split:
    missing = size - len(batch.labels)
    if not missing:
        return batch
    pad = [np.zeros((missing, *x.shape[1:]), x.dtype) for x in batch]
    return Split(*(np.concatenate(pair) for pair in zip(batch, pad, strict=True)))


def _crop_of(split: Split | ImageFolder) -> Transform:
    size = split.image_shape[0]
    return lambda image, rng: random_resized_crop(image, rng, size=size)


def _on_images(transform: Transform) -> Callable[..., Split]:
    def on_images(example: tuple[Any, Any], rng: np.random.Generator) -> Split:
        image, label = example
        return Split(transform(image, rng), label)

    return on_images
