"""Normalisation and random augmentation of small images, on the device."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from sam_examples.data.splits import Dataset, Split


def normalize(images: ArrayLike, mean: ArrayLike, std: ArrayLike) -> jax.Array:
    """Gives every channel of `[B, H, W, C]` mean 0 and deviation 1, in float32.

    Args:
      images: `[B, H, W, C]`, of any type.
      mean: of each channel, `[C]`.
      std: standard deviation of each channel, `[C]`.
    """
    channels = (1, 1, 1, -1)
    centred = jnp.asarray(images, jnp.float32) - jnp.reshape(mean, channels)
    return centred / jnp.reshape(std, channels)


def normalized(split: Split, dataset: Dataset) -> Split:
    """The examples of a split or a batch as a model sees them."""
    return Split(
        normalize(split.images, dataset.mean, dataset.std), jnp.asarray(split.labels)
    )


def augment(
    key: jax.Array,
    images: jax.Array,
    *,
    pad: int = 4,
    flip: bool = True,
    cutout_size: int = 16,
    cutout_probability: float = 0.5,
) -> jax.Array:
    """Crops, flips and cuts out at random, each image by itself.

    A crop of the image's size after padding, a horizontal flip with probability 1/2,
    and Cutout (DeVries and Taylor, 2017, arXiv 1708.04552): a square whose part inside
    the image becomes 0. Normalize before, so that padding and squares have the mean
    colour. The defaults are those of the papers on CIFAR.

    Each image has three keys of its own, so that what is switched off changes nothing
    about the rest.

    Args:
      key: a PRNG key.
      images: `[B, H, W, C]`.
      pad: pixels of padding on each side, 0 for no crop.
      flip: whether to flip.
      cutout_size: side of the square in pixels, 0 for no Cutout.
      cutout_probability: share of the images that have a square cut out.

    Raises:
      ValueError: if a size is negative or the probability is none.
    """
    if pad < 0 or cutout_size < 0:
        raise ValueError(
            f"pad and cutout_size must be at least 0, got {pad} and {cutout_size}."
        )
    if not 0 <= cutout_probability <= 1:
        raise ValueError(
            f"cutout_probability must be from 0 to 1, got {cutout_probability}."
        )
    cut_out = partial(_cut_out, size=cutout_size, probability=cutout_probability)
    steps: tuple[tuple[bool, Callable[..., jax.Array]], ...] = (
        (pad > 0, partial(_crop, pad=pad)),
        (flip, _flip),
        (cutout_size > 0 and cutout_probability > 0, cut_out),
    )
    keys = jax.random.split(key, (len(steps), len(images)))
    for step_keys, (wanted, step) in zip(keys, steps, strict=True):
        if wanted:
            images = jax.vmap(step)(step_keys, images)
    return images


def _crop(key: jax.Array, image: jax.Array, pad: int) -> jax.Array:
    padded = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    row, column = jax.random.randint(key, (2,), 0, 2 * pad + 1)
    return jax.lax.dynamic_slice(padded, (row, column, 0), image.shape)


def _flip(key: jax.Array, image: jax.Array) -> jax.Array:
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def _cut_out(
    key: jax.Array, image: jax.Array, size: int, probability: float
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
