"""The layers that a model makes, and what it calls to make them.

A family takes them as fields, under the same names, so that an implicit backward of
Sparse SAM, a convolution for the CPU or another normalisation can be put in:

* `conv(features, kernel_size, strides, padding=, kernel_init=, dtype=, name=)` makes a
  convolution without a bias. `strides` and `name` may be left out.
* `dense(features, kernel_init=, dtype=, name=)` makes a dense layer with a bias.
  `kernel_init` and `name` may be left out.
* `norm(train=, dtype=, scale_init=, name=)` makes a normalisation. `scale_init` and
  `name` may be left out.

Layers have the same parameters under the same names whatever is put in, so that models
that differ in nothing else can exchange them. Parameters are float32, `dtype` is the
type of the computation.
"""

import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
from jax.typing import DTypeLike

Layer = Callable[..., nn.Module]

# Typed, which they are not in linen.
avg_pool: Callable[..., jax.Array] = nn.avg_pool
max_pool: Callable[..., jax.Array] = nn.max_pool

# He et al. (2015, arXiv 1502.01852), eq. 10 and eq. 14: either keeps the variance.
he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
he_normal_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")

convolution: Layer = partial(nn.Conv, use_bias=False)


def batch_norm(*, train: bool, dtype: DTypeLike, **kwargs: Any) -> nn.Module:
    """Batch normalisation whose running statistics move by a tenth each step."""
    return nn.BatchNorm(
        use_running_average=not train, momentum=0.9, dtype=dtype, **kwargs
    )


def group_norm(
    *, train: bool, dtype: DTypeLike, num_groups: int = 8, **kwargs: Any
) -> nn.Module:
    """Group normalisation, the same in training and evaluation."""
    del train
    return nn.GroupNorm(num_groups=num_groups, dtype=dtype, **kwargs)


def layer_norm(*, train: bool, dtype: DTypeLike, **kwargs: Any) -> nn.Module:
    """Layer normalisation over the last axis, the same in training and evaluation."""
    del train
    return nn.LayerNorm(dtype=dtype, **kwargs)


# With 4 groups, which widths that are multiples of 4 allow.
NORMS: Mapping[str, Layer] = {
    "batch": batch_norm,
    "group": partial(group_norm, num_groups=4),
}


def numbered(layer: Layer, prefix: str) -> Layer:
    """Makes layers named `prefix_0`, `prefix_1` and so on, as linen would itself.

    Linen takes the name of the class for the prefix, which differs with what is put in.
    """
    numbers = itertools.count()

    def make_layer(*args: Any, **kwargs: Any) -> nn.Module:
        return layer(*args, name=f"{prefix}_{next(numbers)}", **kwargs)

    return make_layer
