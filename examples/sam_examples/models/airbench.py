"""A network for CIFAR that trains in seconds, after airbench (Jordan, 2024).

arXiv 2404.00498: a first layer that whitens patches and is not trained, then three
blocks of two convolutions, of which the first is pooled, each with a normalisation that
has a bias and no scale, and a last layer whose logits are scaled down.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from sam_examples.models.factories import Layer, convolution, numbered

PATCH = 2  # Pixels a side.
_LOGIT_SCALE = 1 / 9


class Airbench(nn.Module):
    """Maps images `[B, H, W, C]` to logits `[B, num_classes]`.

    The filters of the first layer are among the statistics, `batch_stats["whitening"]`,
    which a pass leaves as they are: put those of :func:`whitening_filters` there.

    Attributes:
      num_classes: number of logits.
      widths: channels of the three blocks.
      conv: makes a convolution without bias, see `models.factories`.
      dtype: type of the computation; parameters and logits are float32.
      stride: pixels from one whitened patch to the next; with 2 they do not overlap,
        and the network costs a quarter.
    """

    num_classes: int = 10
    widths: tuple[int, int, int] = (64, 256, 256)
    conv: Layer = convolution
    dtype: DTypeLike = jnp.float32
    stride: int = 1

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Maps images to logits."""
        x = nn.gelu(self._whitened(images))
        conv = numbered(self.conv, "Conv")
        for width in self.widths:
            x = self._convolved(x, width, conv, train, pool=True)
            x = self._convolved(x, width, conv, train, pool=False)
        x = jnp.max(x, axis=(1, 2))
        logits = nn.Dense(self.num_classes, use_bias=False, dtype=self.dtype)(x)
        return _LOGIT_SCALE * logits.astype(jnp.float32)

    def _whitened(self, images: jax.Array) -> jax.Array:
        size = PATCH**2 * images.shape[-1]
        shape = (PATCH, PATCH, images.shape[-1], 2 * size)
        filters = self.variable("batch_stats", "whitening", jnp.zeros, shape)
        kernel = filters.value.astype(self.dtype)
        return jax.lax.conv_general_dilated(
            images.astype(self.dtype),
            kernel,
            window_strides=(self.stride, self.stride),
            padding="VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    def _convolved(
        self, x: jax.Array, width: int, conv: Layer, train: bool, *, pool: bool
    ) -> jax.Array:
        x = conv(width, (3, 3), padding=1, dtype=self.dtype)(x)
        x = _max_of_fours(x) if pool else x
        # Quick to forget, as there are few steps.
        x = nn.BatchNorm(
            use_running_average=not train,
            momentum=0.6,
            use_scale=False,
            dtype=self.dtype,
        )(x)
        return nn.gelu(x)


def _max_of_fours(x: jax.Array) -> jax.Array:
    """Pools 2x2 pixels; XLA is far slower at the gradient of a window's maximum."""
    height, width = x.shape[1] // 2, x.shape[2] // 2
    x = x[:, : 2 * height, : 2 * width]
    return jnp.max(x.reshape(len(x), height, 2, width, 2, -1), axis=(2, 4))


def whitening_filters(images: Any, epsilon: float = 5e-4) -> np.ndarray:
    """Filters whose outputs on patches of these images are uncorrelated, of variance 1.

    Args:
      images: `[N, H, W, C]`, normalized; 5,000 are plenty.
      epsilon: added to the variances, which keeps noise small.

    Returns:
      `[height, width, C, 2 * height * width * C]`: each filter, and its negative, which
      an activation treats differently.
    """
    images = np.asarray(images, np.float32)
    height, width = (size - PATCH + 1 for size in images.shape[1:3])
    corners = [(i, j) for i in range(PATCH) for j in range(PATCH)]
    patches = np.concatenate(
        [images[:, i : i + height, j : j + width] for i, j in corners], axis=-1
    )
    patches = patches.reshape(-1, patches.shape[-1])
    variances, directions = np.linalg.eigh(patches.T @ patches / len(patches))
    filters = directions / np.sqrt(variances + epsilon)
    filters = np.concatenate([filters, -filters], axis=-1)
    return filters.reshape(PATCH, PATCH, images.shape[-1], -1)
