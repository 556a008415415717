"""Vision transformers (Dosovitskiy et al., 2021, arXiv 2010.11929).

Pre-normalisation, a class token, learned positions and a last layer normalisation, with
the head on the class token. The small and tiny ones are those of DeiT (Touvron et al.,
2021, arXiv 2012.12877), and so is the initialisation, which trains from scratch: all
dense layers, positions and the class token from the normal distribution of deviation
0.02 (truncated at 100 deviations in the authors' code, that is nowhere), the patch
embedding from LeCun's, biases from 0.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sam_examples.models.attention import Attention
from sam_examples.models.factories import Layer, convolution, layer_norm

_normal = nn.initializers.normal(0.02)


class Encoder(nn.Module):
    """Attention and a perceptron, each after a normalisation and around a shortcut.

    Attributes:
      num_heads: attention heads; divides the width.
      hidden: width of the perceptron's hidden layer.
      dense: makes a dense layer, see `models.factories`.
      norm: makes a normalisation, see `models.factories`.
      dropout_rate: dropout after the attention and in the perceptron, off at 0.
      dtype: type of the computation; parameters stay in float32.
    """

    num_heads: int
    hidden: int
    dense: Layer = nn.Dense
    norm: Layer = layer_norm
    dropout_rate: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps tokens `[B, T, width]` to the same shape."""
        dense = partial(self.dense, kernel_init=_normal, dtype=self.dtype)
        norm = partial(self.norm, train=train, dtype=self.dtype)
        dropout = partial(nn.Dropout, self.dropout_rate, deterministic=not train)

        width = x.shape[-1]
        attention = Attention(width, self.num_heads, dense)
        nn.share_scope(self, attention)  # The names of its layers are those here.
        y = norm(name="norm_0")(x)
        x += dropout()(attention(y, attention.keys(y)))
        y = dense(self.hidden, name="up")(norm(name="norm_1")(x))
        y = dropout()(nn.gelu(y, approximate=False))
        x += dropout()(dense(width, name="down")(y))
        return x


class ViT(nn.Module):
    """A vision transformer that classifies images of one size.

    Attributes:
      num_classes: number of logits.
      patch_size: pixels along a side of a patch; divides the image's sides.
      width: of the tokens.
      num_layers: number of encoder layers.
      num_heads: attention heads of each; divides the width.
      hidden: width of the perceptrons' hidden layers; by default 4 times `width`.
      conv: makes the patch embedding, see `models.factories`; its bias is the model's.
      dense: makes a dense layer, see `models.factories`.
      norm: makes a normalisation over the last axis, see `models.factories`.
      dropout_rate: dropout after positions are added, after each attention and in each
        perceptron; off at 0.
      dtype: type of the computation; parameters and logits are float32.
    """

    num_classes: int
    patch_size: int = 16
    width: int = 768
    num_layers: int = 12
    num_heads: int = 12
    hidden: int | None = None
    conv: Layer = convolution
    dense: Layer = nn.Dense
    norm: Layer = layer_norm
    dropout_rate: float = 0.0
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Maps images `[B, H, W, C]` to logits `[B, num_classes]`.

        Raises:
          ValueError: if patches do not cover the images exactly.
        """
        for size in images.shape[1:3]:
            check_size(size, self.patch_size)
        x = self._embed(images)
        x = nn.Dropout(self.dropout_rate, deterministic=not train)(x)
        for layer in range(self.num_layers):
            x = Encoder(
                num_heads=self.num_heads,
                hidden=self.hidden or 4 * self.width,
                dense=self.dense,
                norm=self.norm,
                dropout_rate=self.dropout_rate,
                dtype=self.dtype,
                name=f"layer_{layer}",
            )(x, train)
        x = self.norm(train=train, dtype=self.dtype, name="norm")(x)[:, 0]
        head = partial(self.dense, kernel_init=_normal, dtype=self.dtype, name="head")
        logits: jax.Array = head(self.num_classes)(x)
        return logits.astype(jnp.float32)

    def _embed(self, images: jax.Array) -> jax.Array:
        """Maps images to tokens `[B, 1 + patches, width]`, the class token first."""
        patch = (self.patch_size, self.patch_size)
        patches = self.conv(
            self.width,
            patch,
            patch,
            padding=0,
            kernel_init=nn.initializers.lecun_normal(),
            dtype=self.dtype,
            name="patches",
        )(images)
        patches = patches.reshape(len(images), -1, self.width)
        bias = self.param("patch_bias", nn.initializers.zeros, (self.width,))
        patches += bias.astype(self.dtype)[None, None]
        token = self.param("class_token", _normal, (1, 1, self.width))
        tokens = jnp.tile(token.astype(self.dtype), (len(images), 1, 1))
        x = jnp.concatenate([tokens, patches], axis=1)
        positions = self.param("positions", _normal, (1, *x.shape[1:]))
        return x + positions.astype(self.dtype)


def check_size(image_size: int, patch_size: int) -> None:
    """Raises a ValueError unless whole patches cover the image."""
    if image_size % patch_size:
        raise ValueError(
            f"patches of {patch_size} pixels must cover the image exactly, got "
            f"{image_size} pixels a side; scale or crop images to a multiple of "
            f"{patch_size}."
        )
