"""VGG with batch normalisation (Simonyan and Zisserman, 2015, arXiv 1409.1556).

Stages of 3x3 convolutions, each with a bias and a normalisation, end in a maximum over
2x2; two hidden dense layers follow. On ImageNet they see the 7x7 positions that are
left of 224x224 pixels, on CIFAR the only one: that is the network of the papers on
sharpness. Other code for CIFAR has no hidden layers.

Convolutions start from the normal distribution of variance 2 / fan-out (He et al.,
2015, arXiv 1502.01852), dense layers from that of deviation 0.01, as in torchvision;
the paper needed shallower networks, trained before, to start from.
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
    max_pool,
)

_normal = nn.initializers.normal(0.01)


class VGGLayer(nn.Module):
    """A 3x3 convolution with a bias, a normalisation and a ReLU.

    Attributes:
      features: output channels.
      conv: makes a convolution without bias, see `models.factories`.
      norm: makes a normalisation, see `models.factories`.
      dtype: type of the computation; parameters stay in float32.
    """

    features: int
    conv: Layer = convolution
    norm: Layer = batch_norm
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps `[B, H, W, C]` to `[B, H, W, features]`."""
        x = self.conv(
            self.features,
            (3, 3),
            padding=1,
            kernel_init=he_normal_fan_out,
            dtype=self.dtype,
            name="conv",
        )(x)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x += bias.astype(self.dtype)[None, None, None]
        return nn.relu(self.norm(train=train, dtype=self.dtype, name="norm")(x))


class VGG(nn.Module):
    """A VGG network; every stage halves the image.

    Attributes:
      stage_sizes: convolutions in each stage.
      num_classes: number of logits.
      width: channels of the first stage; every further one doubles them, up to 8 times
        as many.
      hidden: widths of the hidden dense layers; by default twice 64 times `width`.
      conv: makes a convolution without bias, see `models.factories`.
      norm: makes a normalisation, see `models.factories`.
      dropout_rate: dropout after each hidden layer, or before the head where there is
        none; off at 0, the paper's is 0.5.
      dtype: type of the computation; parameters and logits are float32.
      dense: makes a dense layer, see `models.factories`.
    """

    stage_sizes: Sequence[int]
    num_classes: int
    width: int = 64
    hidden: Sequence[int] | None = None
    conv: Layer = convolution
    norm: Layer = batch_norm
    dropout_rate: float = 0.0
    dtype: DTypeLike = jnp.float32
    dense: Layer = nn.Dense

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Maps images `[B, H, W, C]` to logits `[B, num_classes]`.

        Raises:
          ValueError: if the images are too small to be halved by each stage.
        """
        check_size(min(images.shape[1:3]), len(self.stage_sizes))
        x, number = images, 0
        for stage, num_layers in enumerate(self.stage_sizes):
            for _ in range(num_layers):
                x = VGGLayer(
                    features=self.width * 2 ** min(stage, 3),
                    conv=self.conv,
                    norm=self.norm,
                    dtype=self.dtype,
                    name=f"layer_{number}",
                )(x, train)
                number += 1
            x = max_pool(x, (2, 2), (2, 2))
        x = x.reshape(len(x), -1)
        dropout = partial(nn.Dropout, self.dropout_rate, deterministic=not train)
        dense = partial(self.dense, kernel_init=_normal, dtype=self.dtype)
        hidden = (64 * self.width,) * 2 if self.hidden is None else self.hidden
        if not hidden:
            x = dropout()(x)
        for layer, features in enumerate(hidden):
            x = dropout()(nn.relu(dense(features, name=f"hidden_{layer}")(x)))
        logits: jax.Array = dense(self.num_classes, name="head")(x)
        return logits.astype(jnp.float32)


def check_size(image_size: int, num_stages: int) -> None:
    """Raises a ValueError unless each stage can halve the image."""
    if image_size < 2**num_stages:
        raise ValueError(
            f"a VGG of {num_stages} stages halves the image {num_stages} times and "
            f"needs at least {2**num_stages} pixels a side, got {image_size}; choose "
            f"at most {max(1, image_size.bit_length() - 1)} stages."
        )
