"""Residual networks (He et al., 2016, arXiv 1512.03385), for small and large images.

The stem for CIFAR is a single 3x3 convolution and no pooling; that for ImageNet a 7x7
convolution and a maximum over 3x3, each of stride 2. Stages of basic or of bottleneck
blocks follow. A bottleneck has its stride in the 3x3 convolution, which is the "v1.5"
of today's ImageNet figures; in the paper it is in the 1x1 convolution before.

Convolutions start from the normal distribution of variance 2 / fan-in of He et al.
(2015, arXiv 1502.01852), batch normalisation from the identity.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sam_examples.models.factories import (
    NORMS,
    Layer,
    batch_norm,
    convolution,
    group_norm,
    he_normal,
    max_pool,
    numbered,
)

__all__ = [
    "NORMS",
    "BasicBlock",
    "BottleneckBlock",
    "Layer",
    "ResNet",
    "batch_norm",
    "convolution",
    "group_norm",
    "he_normal",
]


class _Block(nn.Module):
    """What basic and bottleneck blocks have in common.

    Attributes:
      features: channels of the 3x3 convolutions.
      stride: stride of a 3x3 convolution and of the projection.
      conv: makes a convolution without bias, see `models.factories`.
      norm: makes a normalisation, see `models.factories`.
      dtype: type of the computation; parameters stay in float32.
      zero_init_last: whether the last normalisation starts with a scale of 0.
      shared_names: see `ResNet`.
    """

    features: int
    stride: int = 1
    conv: Layer = convolution
    norm: Layer = batch_norm
    dtype: DTypeLike = jnp.float32
    zero_init_last: bool = False
    shared_names: bool = False


class BasicBlock(_Block):
    """Two 3x3 convolutions and a shortcut, projected where the shape changes.

    Attributes:
      features: output channels.
    """

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps `[B, H, W, C]` to `[B, H / stride, W / stride, features]`."""
        conv, norm, last_norm = _layers(self, train)
        y = conv(self.features, (3, 3), (self.stride, self.stride), padding=1)(x)
        y = nn.relu(norm()(y))
        y = conv(self.features, (3, 3), padding=1)(y)
        y = last_norm()(y)
        return _add_shortcut(x, y, self.stride, conv, norm)


class BottleneckBlock(_Block):
    """A 3x3 convolution between two of 1x1, and a shortcut as in `BasicBlock`.

    Attributes:
      features: channels of the 3x3 convolution, a quarter of the output's.
    """

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps `[B, H, W, C]` to `[B, H / stride, W / stride, 4 * features]`."""
        conv, norm, last_norm = _layers(self, train)
        y = nn.relu(norm()(conv(self.features, (1, 1), padding=0)(x)))
        y = conv(self.features, (3, 3), (self.stride, self.stride), padding=1)(y)
        y = nn.relu(norm()(y))
        y = last_norm()(conv(4 * self.features, (1, 1), padding=0)(y))
        return _add_shortcut(x, y, self.stride, conv, norm)


# Functions, since linen captures what methods return, which should be arrays.
def _layers(block: _Block, train: bool) -> tuple[Layer, Layer, Layer]:
    """What makes convolutions, normalisations, and the last of those."""
    conv, norm = block.conv, block.norm
    if block.shared_names:
        conv, norm = numbered(conv, "Conv"), numbered(norm, "Norm")
    conv = partial(conv, kernel_init=he_normal, dtype=block.dtype)
    norm = partial(norm, train=train, dtype=block.dtype)
    last_norm = norm
    if block.zero_init_last:
        last_norm = partial(norm, scale_init=nn.initializers.zeros)
    return conv, norm, last_norm


def _add_shortcut(
    x: jax.Array, y: jax.Array, stride: int, conv: Layer, norm: Layer
) -> jax.Array:
    """Adds the input of a block to `y`, projected where the shape changes."""
    if x.shape != y.shape:
        x = norm()(conv(y.shape[-1], (1, 1), (stride, stride), padding=0)(x))
    return nn.relu(x + y)


class ResNet(nn.Module):
    """A residual network.

    Attributes:
      stage_sizes: blocks in each stage; every stage but the first halves the image.
      num_classes: number of logits.
      width: channels of the stem, and of the first stage's 3x3 convolutions; every
        further stage doubles them.
      conv: makes a convolution without bias, see `models.factories`.
      norm: makes a normalisation, see `models.factories`.
      dropout_rate: dropout on the pooled features, off at 0.
      dtype: type of the computation; parameters and logits are float32.
      dense: makes the head, see `models.factories`.
      block: `BasicBlock` or `BottleneckBlock`.
      stem: "cifar" or "imagenet".
      zero_init_last: whether blocks start as their shortcuts, by a scale of 0 in the
        last normalisation of each (Goyal et al., 2017, arXiv 1706.02677).
      shared_names: whether layers are named `Conv_0`, `Norm_0` and so on whatever was
        put in. Otherwise linen names them after their classes, and the parameters of
        `models.convolution.PatchConv` are not found by `nn.Conv`.
    """

    stage_sizes: Sequence[int]
    num_classes: int
    width: int = 64
    conv: Layer = convolution
    norm: Layer = batch_norm
    dropout_rate: float = 0.0
    dtype: DTypeLike = jnp.float32
    dense: Layer = nn.Dense
    block: Callable[..., nn.Module] = BasicBlock
    stem: Literal["cifar", "imagenet"] = "cifar"
    zero_init_last: bool = False
    shared_names: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Maps images `[B, H, W, C]` to logits `[B, num_classes]`."""
        x = self._apply_stem(images, train)
        for stage, num_blocks in enumerate(self.stage_sizes):
            for block in range(num_blocks):
                x = self.block(
                    features=self.width * 2**stage,
                    stride=2 if stage > 0 and block == 0 else 1,
                    conv=self.conv,
                    norm=self.norm,
                    dtype=self.dtype,
                    zero_init_last=self.zero_init_last,
                    shared_names=self.shared_names,
                )(x, train)
        x = jnp.mean(x, axis=(1, 2))
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        dense = numbered(self.dense, "Dense") if self.shared_names else self.dense
        logits: jax.Array = dense(self.num_classes, dtype=self.dtype)(x)
        return logits.astype(jnp.float32)

    def _apply_stem(self, images: jax.Array, train: bool) -> jax.Array:
        conv, norm = self.conv, self.norm
        if self.shared_names:
            conv, norm = numbered(conv, "Conv"), numbered(norm, "Norm")
        conv = partial(conv, kernel_init=he_normal, dtype=self.dtype)
        if self.stem == "cifar":
            x = conv(self.width, (3, 3), padding=1)(images)
        else:
            x = conv(self.width, (7, 7), (2, 2), padding=3)(images)
        x = nn.relu(norm(train=train, dtype=self.dtype)(x))
        if self.stem == "imagenet":
            x = max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        return x
