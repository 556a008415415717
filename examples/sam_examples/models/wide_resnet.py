"""Wide residual networks (Zagoruyko and Komodakis, 2016, arXiv 1605.07146).

Normalisation and ReLU come before each convolution. Where a block changes the shape,
its shortcut is a 1x1 convolution of what its first ReLU gives. Convolutions start from
the normal distribution of variance 2 / fan-out, as in the authors' code.
"""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sam_examples.models.factories import (
    Layer,
    batch_norm,
    convolution,
    he_normal_fan_out,
)


class WideBlock(nn.Module):
    """Two 3x3 convolutions, dropout between them, and a shortcut.

    Attributes:
      features: output channels.
      stride: stride of the first convolution and of the projection.
      conv: makes a convolution without bias, see `models.factories`.
      norm: makes a normalisation, see `models.factories`.
      dropout_rate: dropout between the convolutions, off at 0.
      dtype: type of the computation; parameters stay in float32.
    """

    features: int
    stride: int = 1
    conv: Layer = convolution
    norm: Layer = batch_norm
    dropout_rate: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps `[B, H, W, C]` to `[B, H / stride, W / stride, features]`."""
        conv = partial(self.conv, kernel_init=he_normal_fan_out, dtype=self.dtype)
        norm = partial(self.norm, train=train, dtype=self.dtype)
        strides = (self.stride, self.stride)
        changes = x.shape[-1] != self.features or self.stride > 1

        y = nn.relu(norm(name="norm_0")(x))
        if changes:
            x = conv(self.features, (1, 1), strides, padding=0, name="shortcut")(y)
        y = conv(self.features, (3, 3), strides, padding=1, name="conv_0")(y)
        y = nn.relu(norm(name="norm_1")(y))
        y = nn.Dropout(self.dropout_rate, deterministic=not train)(y)
        y = conv(self.features, (3, 3), padding=1, name="conv_1")(y)
        total: jax.Array = x + y
        return total


class WideResNet(nn.Module):
    """A wide residual network for small images.

    Attributes:
      stage_sizes: blocks in each stage; every stage but the first halves the image.
      num_classes: number of logits.
      widen_factor: channels of the first stage over those of the stem; every further
        stage doubles them.
      width: channels of the stem.
      conv: makes a convolution without bias, see `models.factories`.
      norm: makes a normalisation, see `models.factories`.
      dropout_rate: dropout inside the blocks, off at 0; the paper's is 0.3.
      dtype: type of the computation; parameters and logits are float32.
      dense: makes the head, see `models.factories`.
    """

    stage_sizes: Sequence[int]
    num_classes: int
    widen_factor: int = 10
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
        x = stem(self.width, (3, 3), padding=1, name="stem")(images)
        number = 0
        for stage, num_blocks in enumerate(self.stage_sizes):
            for block in range(num_blocks):
                x = WideBlock(
                    features=self.width * self.widen_factor * 2**stage,
                    stride=2 if stage > 0 and block == 0 else 1,
                    conv=self.conv,
                    norm=self.norm,
                    dropout_rate=self.dropout_rate,
                    dtype=self.dtype,
                    name=f"block_{number}",
                )(x, train)
                number += 1
        x = nn.relu(self.norm(train=train, dtype=self.dtype, name="norm")(x))
        x = jnp.mean(x, axis=(1, 2))
        head = self.dense(self.num_classes, dtype=self.dtype, name="head")
        logits: jax.Array = head(x)
        return logits.astype(jnp.float32)
