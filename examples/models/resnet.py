"""Residual networks for small images (He et al., 2016, arXiv 1512.03385).

The stem is the CIFAR one, a single 3x3 convolution and no pooling, followed by stages
of basic blocks. Convolutions start from the normal distribution of variance
2 / fan-in of He et al. (2015, arXiv 1502.01852), batch normalisation from the identity.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

# Called as `conv(features, kernel_size, strides, padding=, kernel_init=, dtype=)` for
# each convolution, and as `norm(train=, dtype=)` for each normalisation.
Layer = Callable[..., nn.Module]

he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
convolution: Layer = partial(nn.Conv, use_bias=False)


def batch_norm(*, train: bool, dtype: DTypeLike) -> nn.Module:
    """Batch normalisation whose running statistics move by a tenth each step."""
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=dtype)


def group_norm(*, train: bool, dtype: DTypeLike, num_groups: int = 8) -> nn.Module:
    """Group normalisation, the same in training and evaluation."""
    del train
    return nn.GroupNorm(num_groups=num_groups, dtype=dtype)


# With 4 groups, which widths that are multiples of 4 allow.
NORMS: Mapping[str, Layer] = {
    "batch": batch_norm,
    "group": partial(group_norm, num_groups=4),
}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected where the shape changes.

    Attributes:
      features: output channels.
      stride: stride of the first convolution and of the projection.
      conv: makes a convolution without bias, see `Layer`.
      norm: makes a normalisation, see `Layer`.
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
        conv = partial(self.conv, kernel_init=he_normal, dtype=self.dtype)
        norm = partial(self.norm, train=train, dtype=self.dtype)
        strides = (self.stride, self.stride)

        y = conv(self.features, (3, 3), strides, padding=1)(x)
        y = nn.relu(norm()(y))
        y = conv(self.features, (3, 3), padding=1)(y)
        y = norm()(y)
        if x.shape != y.shape:
            x = norm()(conv(self.features, (1, 1), strides, padding=0)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A residual network with the CIFAR stem.

    Attributes:
      stage_sizes: blocks in each stage; every stage but the first halves the image.
      num_classes: number of logits.
      width: channels of the first stage; every further stage doubles them.
      conv: makes a convolution without bias, see `Layer`.
      norm: makes a normalisation, see `Layer`.
      dropout_rate: dropout on the pooled features, off at 0.
      dtype: type of the computation; parameters and logits are float32.
    """

    stage_sizes: Sequence[int]
    num_classes: int
    width: int = 64
    conv: Layer = convolution
    norm: Layer = batch_norm
    dropout_rate: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Maps images `[B, H, W, C]` to logits `[B, num_classes]`."""
        x = self.conv(
            self.width, (3, 3), padding=1, kernel_init=he_normal, dtype=self.dtype
        )(images)
        x = nn.relu(self.norm(train=train, dtype=self.dtype)(x))
        for stage, num_blocks in enumerate(self.stage_sizes):
            for block in range(num_blocks):
                x = BasicBlock(
                    features=self.width * 2**stage,
                    stride=2 if stage > 0 and block == 0 else 1,
                    conv=self.conv,
                    norm=self.norm,
                    dtype=self.dtype,
                )(x, train)
        x = jnp.mean(x, axis=(1, 2))
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        x = nn.Dense(self.num_classes, dtype=self.dtype)(x)
        return x.astype(jnp.float32)


# The published network for CIFAR: 11,173,962 parameters at 10 classes and width 64.
resnet18 = partial(ResNet, (2, 2, 2, 2))

# One block in each of three stages, for the 8x8 digits: trains in seconds.
resnet8 = partial(ResNet, (1, 1, 1), width=16)
