"""Models by name: their sizes, and what does not fit."""

import math
from itertools import pairwise

import jax
import jax.numpy as jnp
import pytest
from sam_examples.models import MODELS, make, vgg
from sam_examples.models.resnet import ResNet

# (name, classes, image size): those of the published networks, batch normalisation's
# scales and biases included.
PUBLISHED = {
    ("resnet18", 10, 32): 11_173_962,
    ("resnet34", 10, 32): 21_282_122,
    ("resnet50", 10, 32): 23_520_842,
    ("resnet18", 1000, 224): 11_689_512,
    ("resnet34", 1000, 224): 21_797_672,
    ("resnet50", 1000, 224): 25_557_032,
    ("resnet101", 1000, 224): 44_549_160,
    ("resnet152", 1000, 224): 60_192_808,
    ("wrn28_10", 10, 32): 36_479_194,
    ("wrn28_10", 100, 32): 36_536_884,
    # The network of the papers on sharpness, which has hidden dense layers.
    ("vgg11_bn", 10, 32): 28_149_514,
    ("vgg11_bn", 1000, 224): 132_868_840,
    ("vgg13_bn", 1000, 224): 133_053_736,
    ("vgg16_bn", 1000, 224): 138_365_992,
    ("vgg19_bn", 1000, 224): 143_678_248,
    ("pyramidnet110", 10, 32): 28_485_477,
    ("vit_ti", 1000, 224): 5_717_416,
    ("vit_s", 1000, 224): 22_050_664,
    ("vit_b", 1000, 224): 86_567_656,
}


def variables_of(model, size, channels=3):
    images = jnp.zeros((1, size, size, channels))
    return jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


DEEP = ("pyramidnet110", "resnet152")  # What takes a second or two to trace.


@pytest.mark.parametrize(
    "network",
    [
        pytest.param(network, marks=[pytest.mark.full] * (network[0] in DEEP))
        for network in PUBLISHED
    ],
    ids=str,
)
def test_models_have_the_published_number_of_parameters(network):
    name, num_classes, size = network
    model = make(name, num_classes, image_size=size)
    assert count(variables_of(model, size)["params"]) == PUBLISHED[network]


def test_vgg_without_hidden_layers_has_the_number_of_other_code():
    model = vgg.VGG((1, 1, 2, 2, 2), num_classes=10, hidden=())
    assert count(variables_of(model, 32)["params"]) == 9_231_114


def test_pyramidnet_has_the_number_of_parameters_that_its_widths_give():
    widths = [16 + 5 * block for block in range(55)]
    assert widths[-1] == 286
    stem = 3 * 9 * 16 + 2 * 16
    blocks = sum(
        2 * m + 9 * m * n + 2 * n + 9 * n * n + 2 * n for m, n in pairwise(widths)
    )
    head = 2 * 286 + 286 * 10 + 10
    assert stem + blocks + head == PUBLISHED["pyramidnet110", 10, 32]


@pytest.mark.full
@pytest.mark.parametrize("name", MODELS)
def test_every_model_takes_images_of_cifar_in_either_form(name):
    model = make(name, 7, image_size=32, dtype=jnp.bfloat16, dropout=0.1)
    variables = variables_of(model, 32)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    logits = jax.eval_shape(
        lambda v: model.apply(v, jnp.zeros((2, 32, 32, 3)), False), variables
    )
    assert (logits.shape, logits.dtype) == ((2, 7), jnp.float32)


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "published", "narrow", "parts"),
    [
        ("resnet50", 64, 4, ("Conv_0", "BottleneckBlock_15", "Dense_0")),
        ("wrn28_10", 16, 1, ("stem", "block_11", "head")),
        ("vgg11_bn", 64, 4, ("layer_0", "layer_7", "hidden_0", "head")),
        ("pyramidnet110", 16, 8, ("stem", "block_53", "head")),
    ],
)
def test_width_scales_all_channels(name, published, narrow, parts):
    models = (make(name, 7, image_size=32, width=w) for w in (published, narrow))
    wide, small = (variables_of(model, 32)["params"] for model in models)
    assert wide == variables_of(make(name, 7, image_size=32), 32)["params"]
    assert jax.tree.structure(wide) == jax.tree.structure(small)
    for part in parts:
        for a, b in zip(
            *(jax.tree.leaves(p[part]) for p in (wide, small)), strict=True
        ):
            scaled = [x if x in (1, 3, 7) else x * narrow / published for x in a.shape]
            # A PyramidNet rounds widths.
            assert b.shape == pytest.approx(scaled, abs=1 if "pyr" in name else 0)


def test_small_and_large_images_get_stems_and_patches_of_their_own():
    for name in ("resnet18", "resnet50"):
        for size, stem in ((64, "cifar"), (65, "imagenet")):
            assert make(name, 10, image_size=size).stem == stem
    assert make("vit_s", 10, image_size=64).patch_size == 4
    assert make("vit_s", 10, image_size=80).patch_size == 16


def test_names_and_stages_choose_the_network():
    model = make("resnet8", 10, image_size=8)
    assert isinstance(model, ResNet)
    assert (model.stage_sizes, model.width) == ((1, 1, 1), 16)
    assert make("resnet18", 10, image_size=8, stages=[1, 3]).stage_sizes == (1, 3)
    norm = make("resnet8", 10, image_size=8, norm="group").norm
    assert norm(train=True, dtype=jnp.float32).num_groups == 4
    assert make("vit_s", 10, image_size=8, norm=norm).norm is norm


BAD = {
    "name": ({"name": "resnet19"}, "unknown model 'resnet19'; choose from resnet8"),
    "classes": ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
    "width": ({"width": 0}, "width must be at least 1, got 0"),
    "dropout": ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
    "stages": ({"stages": (1, 0)}, "each at least 1, such as (1, 1, 1), got (1, 0)"),
    "no stages": ({"stages": ()}, "got ()"),
    "norm": (
        {"norm": "layer"},
        "resnet18 has no norm 'layer'; choose from batch, group",
    ),
    "groups": ({"norm": "group", "width": 6}, "width must be a multiple of 4"),
    "large": (
        {"name": "wrn28_10", "image_size": 224},
        "wrn28_10 is made for images of at most 64 pixels a side, got 224; choose",
    ),
    "large pyramid": (
        {"name": "pyramidnet110", "image_size": 65},
        "pyramidnet110 is made for images of at most 64 pixels",
    ),
    "pyramid's groups": (
        {"name": "pyramidnet110", "norm": "group"},
        "got norm 'group'; choose 'batch'",
    ),
    "small": (
        {"name": "vgg11_bn", "image_size": 8},
        "needs at least 32 pixels a side, got 8; choose at most 3 stages",
    ),
    "width of tokens": (
        {"name": "vit_s", "width": 8},
        "vit_s has no width to choose, got width 8; leave it out, or choose vit_ti",
    ),
    "stages of tokens": ({"name": "vit_b", "stages": (2,)}, "vit_b has no stages"),
    "norm of tokens": (
        {"name": "vit_s", "norm": "group"},
        "vit_s normalises each token by itself, got norm 'group'; leave it out",
    ),
    "patches": (
        {"name": "vit_s", "image_size": 30},
        "patches of 4 pixels must cover the image exactly, got 30 pixels",
    ),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_what_does_not_fit_is_refused_in_one_sentence(changes, message):
    arguments = {"name": "resnet18", "num_classes": 10, "image_size": 32} | changes
    with pytest.raises(ValueError) as error:  # noqa: PT011
        make(**arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(".")


def test_models_refuse_images_that_do_not_fit():
    with pytest.raises(ValueError, match="needs at least 32 pixels a side, got 16"):
        variables_of(vgg.VGG((1, 1, 2, 2, 2), num_classes=2), 16)
    with pytest.raises(ValueError, match="patches of 4 pixels"):
        variables_of(make("vit_ti", 2, image_size=8), 10)
