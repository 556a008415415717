"""The ResNet of `models.resnet`, in Flax NNX, for small images.

Modules here hold their parameters, running statistics and random numbers. They start in
training mode; `model.eval()` and `model.train()` switch all layers.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from sam_examples.models.factories import he_normal

# Called as `norm(features, dtype=, rngs=)` for each normalisation.
Norm = Callable[..., nnx.Module]

# By the same names as those of linen; groups are 4.
NORMS: Mapping[str, Norm] = MappingProxyType(
    {
        "batch": partial(nnx.BatchNorm, momentum=0.9),
        "group": partial(nnx.GroupNorm, num_groups=4),
    }
)


def _convolution(
    inputs: int, features: int, size: int, stride: int, dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.Conv:
    return nnx.Conv(
        inputs,
        features,
        (size, size),
        stride,
        padding=size // 2,
        use_bias=False,
        dtype=dtype,
        kernel_init=he_normal,
        rngs=rngs,
    )


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions and a shortcut, projected where the shape changes."""

    def __init__(
        self,
        inputs: int,
        features: int,
        *,
        stride: int = 1,
        norm: Norm = NORMS["batch"],
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        """Draws the parameters.

        Args:
          inputs: input channels.
          features: output channels.
          stride: stride of the first convolution and of the projection.
          norm: makes a normalisation, see `Norm`.
          dtype: type of the computation; parameters are float32.
          rngs: what to draw from.
        """
        conv = partial(_convolution, dtype=dtype, rngs=rngs)
        self.conv_0 = conv(inputs, features, 3, stride)
        self.norm_0 = norm(features, dtype=dtype, rngs=rngs)
        self.conv_1 = conv(features, features, 3, 1)
        self.norm_1 = norm(features, dtype=dtype, rngs=rngs)
        self.projects = stride > 1 or inputs != features
        if self.projects:
            self.conv_2 = conv(inputs, features, 1, stride)
            self.norm_2 = norm(features, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[B, H, W, inputs]` to `[B, H / stride, W / stride, features]`."""
        y = nnx.relu(self.norm_0(self.conv_0(x)))
        y = self.norm_1(self.conv_1(y))
        if self.projects:
            x = self.norm_2(self.conv_2(x))
        total: jax.Array = nnx.relu(x + y)
        return total


class ResNet(nnx.Module):
    """A residual network with the stem for CIFAR."""

    def __init__(
        self,
        stage_sizes: Sequence[int],
        num_classes: int,
        *,
        channels: int,
        width: int = 64,
        norm: Norm = NORMS["batch"],
        dropout_rate: float = 0.0,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        """Draws the parameters.

        Args:
          stage_sizes: blocks in each stage; every stage but the first halves the image.
          num_classes: number of logits.
          channels: of the images.
          width: channels of the first stage; every further stage doubles them.
          norm: makes a normalisation, see `Norm`.
          dropout_rate: dropout on the pooled features, off at 0.
          dtype: type of the computation; parameters and logits are float32.
          rngs: what to draw from, "params" now and "dropout" in training.
        """
        self.stem = _convolution(channels, width, 3, 1, dtype, rngs)
        self.stem_norm = norm(width, dtype=dtype, rngs=rngs)
        blocks, inputs = [], width
        for stage, num_blocks in enumerate(stage_sizes):
            for block in range(num_blocks):
                features = width * 2**stage
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(
                    BasicBlock(
                        inputs,
                        features,
                        stride=stride,
                        norm=norm,
                        dtype=dtype,
                        rngs=rngs,
                    )
                )
                inputs = features
        self.blocks = nnx.List(blocks)
        self.dropout = nnx.Dropout(dropout_rate, rngs=rngs)
        self.head = nnx.Linear(inputs, num_classes, dtype=dtype, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images `[B, H, W, channels]` to logits `[B, num_classes]`."""
        x = nnx.relu(self.stem_norm(self.stem(images)))
        for block in self.blocks:
            x = block(x)
        x = self.dropout(jnp.mean(x, axis=(1, 2)))
        logits: jax.Array = self.head(x)
        return logits.astype(jnp.float32)
