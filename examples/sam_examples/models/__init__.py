"""Flax linen models of the examples, and one way to build those of images by name.

They are called as `model(images, train)`, with images `[B, H, W, C]`, and give float32
logits `[B, num_classes]`; each family has a file of its own. Those of text are in
`encoder_decoder`, which translates, and `transformer`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from sam_examples.models import pyramidnet, resnet, vgg, vit, wide_resnet
from sam_examples.models.factories import NORMS, Layer

# Images of at most so many pixels a side are those of CIFAR's networks.
SMALL = 64

Build = Callable[..., nn.Module]


def make(
    name: str,
    num_classes: int,
    *,
    image_size: int,
    norm: str | Layer = "batch",
    dtype: DTypeLike = jnp.float32,
    conv: Layer | None = None,
    dense: Layer | None = None,
    dropout: float = 0.0,
    width: int | None = None,
    stages: Sequence[int] | None = None,
    shared_names: bool = True,
) -> nn.Module:
    """Builds a model by name, for images of one size.

    Its parameters have the same shapes, and by default names, whatever `conv` and
    `dense` are.

    Args:
      name: out of `MODELS`.
      num_classes: number of logits.
      image_size: pixels a side. Up to 64, ResNets have the stem for CIFAR and vision
        transformers patches of 4 pixels, above the stem for ImageNet and patches of 16.
      norm: "batch", "group" (of channels, in 4 groups), or what makes a normalisation,
        see `models.factories`. A vision transformer has no batch normalisation:
        "batch", the default, leaves it its layer normalisation.
      dtype: type of the computation; parameters and logits are float32.
      conv: makes a convolution without bias, by default `flax.linen.Conv`.
      dense: makes a dense layer, by default `flax.linen.Dense`.
      dropout: rate, where the family has dropout: before the head (ResNet, PyramidNet),
        inside the blocks (wide ResNet), between the dense layers (VGG), or after each
        part of a layer (vision transformer).
      width: channels of the first convolution, which all others are in proportion to:
        for CPUs. As published, 64 (ResNet, VGG) or 16 (wide ResNet, which has
        `widen_factor` times as many in the first stage, PyramidNet and `resnet8`).
      stages: blocks, or for VGG convolutions, in each stage, in place of the published.
      shared_names: False to name the layers of a ResNet, and of no other family, after
        their classes.

    Raises:
      ValueError: if there is no such model, or an option is out of range or does not
        fit its family.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; choose from {', '.join(MODELS)}.")
    sizes: dict[str, Any] = {"num_classes": num_classes, "image_size": image_size}
    if width is not None:
        sizes["width"] = width
    for option, value in sizes.items():
        if value < 1:
            raise ValueError(f"{option} must be at least 1, got {value}.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}.")
    if stages is not None:
        if min(stages, default=0) < 1:
            raise ValueError(
                "stages must be numbers of blocks, each at least 1, such as (1, 1, 1), "
                f"got {tuple(stages)}."
            )
        sizes["stages"] = tuple(stages)
    if not shared_names:
        sizes["shared_names"] = False
    layers = {"conv": conv, "dense": dense}
    options: dict[str, Any] = {"dtype": dtype, "dropout_rate": dropout, "norm": norm}
    options |= {field: layer for field, layer in layers.items() if layer is not None}
    return MODELS[name](name, options, **sizes)


def _resnet(
    name: str,
    options: dict[str, Any],
    num_classes: int,
    image_size: int,
    width: int = 64,
    stages: Sequence[int] = (2, 2, 2, 2),
    shared_names: bool = True,
    **fields: Any,
) -> nn.Module:
    return resnet.ResNet(
        stages,
        num_classes,
        width,
        stem="cifar" if image_size <= SMALL else "imagenet",
        shared_names=shared_names,
        **_with_norm(name, options, width),
        **fields,
    )


def _wide_resnet(
    name: str,
    options: dict[str, Any],
    num_classes: int,
    image_size: int,
    width: int = 16,
    stages: Sequence[int] = (4, 4, 4),
    **fields: Any,
) -> nn.Module:
    _check_small(name, image_size)
    options = _with_norm(name, options, width)
    return wide_resnet.WideResNet(stages, num_classes, width=width, **options, **fields)


def _pyramidnet(
    name: str,
    options: dict[str, Any],
    num_classes: int,
    image_size: int,
    width: int = 16,
    stages: Sequence[int] = (18, 18, 18),
    *,
    alpha: float,
) -> nn.Module:
    _check_small(name, image_size)
    if options["norm"] == "group":
        raise ValueError(
            f"{name} has widths that no groups of channels divide, got norm 'group'; "
            "choose 'batch'."
        )
    options = _with_norm(name, options, width)
    alpha *= width / 16
    return pyramidnet.PyramidNet(stages, num_classes, alpha, width, **options)


def _vgg(
    name: str,
    options: dict[str, Any],
    num_classes: int,
    image_size: int,
    width: int = 64,
    stages: Sequence[int] = (1, 1, 2, 2, 2),
) -> nn.Module:
    vgg.check_size(image_size, len(stages))
    return vgg.VGG(stages, num_classes, width, **_with_norm(name, options, width))


def _vit(
    name: str,
    options: dict[str, Any],
    num_classes: int,
    image_size: int,
    width: int | None = None,
    stages: Sequence[int] | None = None,
    *,
    tokens: int,
    num_heads: int,
) -> nn.Module:
    for option, value in {"width": width, "stages": stages}.items():
        if value is not None:
            raise ValueError(
                f"{name} has no {option} to choose, got {option} {value}; leave it "
                "out, or choose vit_ti, vit_s or vit_b."
            )
    options = dict(options)
    norm = options.pop("norm")
    if callable(norm):
        options["norm"] = norm
    elif norm != "batch":
        raise ValueError(
            f"{name} normalises each token by itself, got norm {norm!r}; leave it out."
        )
    patch_size = 4 if image_size <= SMALL else 16
    vit.check_size(image_size, patch_size)
    return vit.ViT(num_classes, patch_size, tokens, num_heads=num_heads, **options)


def _check_small(name: str, image_size: int) -> None:
    if image_size > SMALL:
        raise ValueError(
            f"{name} is made for images of at most {SMALL} pixels a side, got "
            f"{image_size}; choose a ResNet, VGG or vision transformer."
        )


def _with_norm(name: str, options: dict[str, Any], width: int) -> dict[str, Any]:
    """The options with what makes a normalisation in place of its name."""
    norm = options["norm"]
    if not callable(norm):
        if norm not in NORMS:
            raise ValueError(
                f"{name} has no norm {norm!r}; choose from {', '.join(NORMS)}, or pass "
                "a function that makes it."
            )
        if norm == "group" and width % 4:
            raise ValueError(
                f"width must be a multiple of 4 for groups of channels, got {width}."
            )
        norm = NORMS[norm]
    return {**options, "norm": norm}


_bottleneck = partial(_resnet, block=resnet.BottleneckBlock)

# As published, but for resnet8, which is for the digits and trains in seconds. VGG's
# are configurations A, B, D and E; wide ResNets have a depth of 6 n + 4 and PyramidNets
# one of 6 n + 2, with n blocks a stage.
MODELS: Mapping[str, Build] = MappingProxyType(
    {
        "resnet8": partial(_resnet, width=16, stages=(1, 1, 1)),
        "resnet18": partial(_resnet, stages=(2, 2, 2, 2)),
        "resnet34": partial(_resnet, stages=(3, 4, 6, 3)),
        "resnet50": partial(_bottleneck, stages=(3, 4, 6, 3)),
        "resnet101": partial(_bottleneck, stages=(3, 4, 23, 3)),
        "resnet152": partial(_bottleneck, stages=(3, 8, 36, 3)),
        "wrn28_10": partial(_wide_resnet, widen_factor=10),
        "vgg11_bn": partial(_vgg, stages=(1, 1, 2, 2, 2)),
        "vgg13_bn": partial(_vgg, stages=(2, 2, 2, 2, 2)),
        "vgg16_bn": partial(_vgg, stages=(2, 2, 3, 3, 3)),
        "vgg19_bn": partial(_vgg, stages=(2, 2, 4, 4, 4)),
        "pyramidnet110": partial(_pyramidnet, alpha=270.0),
        "vit_ti": partial(_vit, tokens=192, num_heads=3),
        "vit_s": partial(_vit, tokens=384, num_heads=6),
        "vit_b": partial(_vit, tokens=768, num_heads=12),
    }
)
