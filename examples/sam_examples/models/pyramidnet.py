"""PyramidNets (Han et al., 2017, arXiv 1610.02915): every block is wider than the last.

Basic blocks, in which the first ReLU is left out and a last normalisation added. What
a block is wider by, its shortcut fills with zeros; where the image halves, the shortcut
is its average over 2x2. Convolutions start from the normal distribution of variance
2 / fan-out, as in the authors' code.
"""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sam_examples.models.factories import (
    Layer,
    avg_pool,
    batch_norm,
    convolution,
    he_normal_fan_out,
)


class PyramidBlock(nn.Module):
    """Two 3x3 convolutions between normalisations, and a shortcut without parameters.

    Attributes:
      features: output channels, at least those of the input.
      stride: 1, or 2 to halve the image.
      conv: makes a convolution without bias, see `models.factories`.
      norm: makes a normalisation, see `models.factories`.
      dtype: type of the computation; parameters stay in float32.
    """

    features: int
    stride: int = 1
    conv: Layer = convolution
    norm: Layer = batch_norm
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps `[B, H, W, C]` to `[B, H / stride, W / stride, features]`."""
        conv = partial(self.conv, kernel_init=he_normal_fan_out, dtype=self.dtype)
        norm = partial(self.norm, train=train, dtype=self.dtype)
        strides = (self.stride, self.stride)

        y = norm(name="norm_0")(x)
        y = conv(self.features, (3, 3), strides, padding=1, name="conv_0")(y)
        y = nn.relu(norm(name="norm_1")(y))
        y = conv(self.features, (3, 3), padding=1, name="conv_1")(y)
        y = norm(name="norm_2")(y)
        if self.stride > 1:
            # Rows and columns left over are averaged by themselves, as the
            # convolution keeps them.
            x = avg_pool(x, strides, strides, "SAME", count_include_pad=False)
        wider = self.features - x.shape[-1]
        total: jax.Array = y + jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, wider)))
        return total


class PyramidNet(nn.Module):
    """An additive PyramidNet for small images.

    Attributes:
      stage_sizes: blocks in each stage; every stage but the first halves the image.
      num_classes: number of logits.
      alpha: how many channels the last block has more than the stem; each block adds
        an equal part, rounded.
      width: channels of the stem.
      conv: makes a convolution without bias, see `models.factories`.
      norm: makes a normalisation, see `models.factories`.
      dropout_rate: dropout on the pooled features, off at 0.
      dtype: type of the computation; parameters and logits are float32.
      dense: makes the head, see `models.factories`.
    """

    stage_sizes: Sequence[int]
    num_classes: int
    alpha: float
    width: int = 16
    conv: Layer = convolution
    norm: Layer = batch_norm
    dropout_rate: float = 0.0
    dtype: DTypeLike = jnp.float32
    dense: Layer = nn.Dense

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Maps images `[B, H, W, C]` to logits `[B, num_classes]`."""
        stem = partial(self.conv, kernel_init=he_normal_fan_out, dtype=self.dtype)
        norm = partial(self.norm, train=train, dtype=self.dtype)
        x = stem(self.width, (3, 3), padding=1, name="stem")(images)
        x = norm(name="stem_norm")(x)
        number, total = 0, sum(self.stage_sizes)
        for stage, num_blocks in enumerate(self.stage_sizes):
            for block in range(num_blocks):
                x = PyramidBlock(
                    features=self.width + round(self.alpha * (number + 1) / total),
                    stride=2 if stage > 0 and block == 0 else 1,
                    conv=self.conv,
                    norm=self.norm,
                    dtype=self.dtype,
                    name=f"block_{number}",
                )(x, train)
                number += 1
        x = jnp.mean(nn.relu(norm(name="norm")(x)), axis=(1, 2))
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        head = self.dense(self.num_classes, dtype=self.dtype, name="head")
        logits: jax.Array = head(x)
        return logits.astype(jnp.float32)
