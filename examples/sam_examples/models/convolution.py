"""A convolution as one matrix product, for loops on the CPU.

XLA on the CPU gives fast code to the gradient of a convolution only outside of loops:
the rewrite that makes it one of the library's convolutions visits the entry computation
alone (jax-ml/jax issue 12868), and an epoch compiled as one `lax.scan` is ten to
twenty times slower than its steps one by one. A matrix product is as fast inside.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from optax_sam import implicit


class PatchConv(nn.Module):
    """Cuts `x` into patches and multiplies them with the kernel, without a bias.

    Parameters and values are those of `flax.linen.Conv`. The patches take
    `kernel_size[0] * kernel_size[1]` times the memory of the input.

    Attributes:
      features: output channels.
      kernel_size: height and width of the kernel.
      strides: steps between patches.
      padding: zeros added at each side.
      kernel_init: initializer of the kernel `[height, width, C, features]`.
      dtype: type of the computation; the kernel stays in float32.
      dot_general: multiplies the patches with the kernel, as `jax.lax.dot_general`.
    """

    features: int
    kernel_size: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    padding: int = 0
    kernel_init: Initializer = nn.initializers.lecun_normal()
    dtype: DTypeLike = jnp.float32
    dot_general: Callable[..., jax.Array] = jax.lax.dot_general

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[B, H, W, C]` to `[B, H', W', features]`."""
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        sides = (self.padding, self.padding)
        x = jnp.pad(x, ((0, 0), sides, sides, (0, 0)))
        cut = _tiles if self.strides == self.kernel_size else _patches
        last_with_first = (((x.ndim - 1,), (0,)), ((), ()))
        return self.dot_general(
            cut(x, self.kernel_size, self.strides),
            kernel.reshape(-1, self.features),
            last_with_first,
        )


def _patches(
    x: jax.Array, kernel_size: tuple[int, int], strides: tuple[int, int]
) -> jax.Array:
    """Cuts `[B, H, W, C]` into patches, `[B, H', W', height * width * C]`."""
    rows, columns = (
        [slice(i, size - k + i + 1, stride) for i in range(k)]
        for size, k, stride in zip(x.shape[1:3], kernel_size, strides, strict=True)
    )
    patches = [x[:, row, column] for row in rows for column in columns]
    return jnp.concatenate(patches, axis=-1)


def _tiles(
    x: jax.Array, kernel_size: tuple[int, int], strides: tuple[int, int]
) -> jax.Array:
    """The same for patches side by side, such as the 16x16 ones of transformers."""
    del strides
    height, width = kernel_size
    rows, columns = x.shape[1] // height, x.shape[2] // width
    x = x[:, : rows * height, : columns * width]
    x = x.reshape(len(x), rows, height, columns, width, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(len(x), rows, columns, -1)


def fastest_convolution(
    backend: str, backward: implicit.Channels | None = None
) -> Callable[..., nn.Module]:
    """The convolution for a model trained in a compiled loop on `backend`.

    Args:
      backend: such as "cpu".
      backward: the rule of its backward, the usual by default.
    """
    on_cpu = backend == "cpu"
    conv: Callable[..., nn.Module] = (
        PatchConv if on_cpu else partial(nn.Conv, use_bias=False)
    )
    if backward is None:
        return conv
    if on_cpu:
        return partial(conv, dot_general=backward.dot_general)
    return partial(conv, conv_general_dilated=backward.conv_general_dilated)
