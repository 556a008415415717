"""What each family of models is known by: its start, its shapes, its blocks."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sam_examples.models import make, pyramidnet, vgg, vit, wide_resnet

pytestmark = pytest.mark.full

# What compiles takes longer than what runs.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def key(seed):
    return jax.random.key(seed, impl="rbg")


def init(model, x=None):
    x = jnp.zeros((1, 8, 8, 3)) if x is None else x
    return jit(partial(model.init, train=False))(key(0), x)


def deviation(kernel, expected):
    np.testing.assert_allclose(jnp.std(kernel), expected, rtol=0.03)
    np.testing.assert_allclose(jnp.mean(kernel), 0, atol=0.03 * expected)
    # A normal distribution; one cut off at two deviations ends at 2.3 of its own.
    assert jnp.max(jnp.abs(kernel)) > 3 * jnp.std(kernel)


def test_wide_resnets_and_pyramidnets_start_by_fan_out():
    wide = wide_resnet.WideResNet((1,), 3, widen_factor=2, width=32)
    params = init(wide)["params"]
    deviation(params["stem"]["kernel"], np.sqrt(2 / (9 * 32)))
    deviation(params["block_0"]["conv_0"]["kernel"], np.sqrt(2 / (9 * 64)))
    deviation(params["block_0"]["shortcut"]["kernel"], np.sqrt(2 / 64))
    pyramid = pyramidnet.PyramidNet((1,), 3, alpha=64, width=32)
    params = init(pyramid)["params"]
    deviation(params["block_0"]["conv_0"]["kernel"], np.sqrt(2 / (9 * 96)))


def test_vgg_starts_by_fan_out_and_small_dense_layers():
    params = init(vgg.VGG((1, 1), 300, width=32, hidden=(300,)))["params"]
    deviation(params["layer_1"]["conv"]["kernel"], np.sqrt(2 / (9 * 64)))
    assert not np.any(params["layer_1"]["bias"])
    for name in ("hidden_0", "head"):
        deviation(params[name]["kernel"], 0.01)
        assert not np.any(params[name]["bias"])


def test_transformers_start_small():
    model = vit.ViT(100, 2, width=96, num_layers=1, num_heads=3)
    params = init(model)["params"]
    layer = params["layer_0"]
    names = ("query", "key", "value", "out", "up", "down")
    for dense in (*(layer[name] for name in names), params["head"]):
        deviation(dense["kernel"], 0.02)
        assert not np.any(dense["bias"])
    deviation(params["positions"], 0.02)
    assert 0.01 < np.std(params["class_token"]) < 0.03
    kernel = params["patches"]["kernel"]
    np.testing.assert_allclose(np.std(kernel), np.sqrt(1 / 12), rtol=0.05)
    # LeCun's is cut off at two deviations of the normal distribution before.
    assert np.max(np.abs(kernel)) < 2.3 * np.sqrt(1 / 12)


def shapes_of(model, size, names):
    def run():
        return model.init_with_output(
            key(0),
            jnp.zeros((1, size, size, 3)),
            train=False,
            capture_intermediates=True,
            mutable=["params", "batch_stats", "intermediates"],
        )[1]["intermediates"]

    outputs = jax.eval_shape(run)
    return [outputs[name]["__call__"][0].shape[1:] for name in names]


def test_stages_have_the_published_shapes():
    names = ("stem", "block_0", "block_3", "block_4", "block_8", "norm")
    assert shapes_of(make("wrn28_10", 10, image_size=32), 32, names) == [
        (32, 32, 16),
        (32, 32, 160),
        (32, 32, 160),
        (16, 16, 320),
        (8, 8, 640),
        (8, 8, 640),
    ]
    names = ("stem", "block_0", "block_17", "block_18", "block_36", "block_53")
    assert shapes_of(make("pyramidnet110", 10, image_size=32), 32, names) == [
        (32, 32, 16),
        (32, 32, 21),
        (32, 32, 106),
        (16, 16, 111),
        (8, 8, 201),
        (8, 8, 286),
    ]
    names = ("layer_0", "layer_1", "layer_3", "layer_5", "layer_7", "hidden_1")
    assert shapes_of(make("vgg11_bn", 10, image_size=32), 32, names) == [
        (32, 32, 64),
        (16, 16, 128),
        (8, 8, 256),
        (4, 4, 512),
        (2, 2, 512),
        (4096,),
    ]
    small = make("vit_s", 10, image_size=32)
    assert shapes_of(small, 32, ("layer_0", "head")) == [(65, 384), (10,)]


def zeroed(variables, *names):
    """Sets the kernels of some layers to zero."""
    return jax.tree.map_with_path(
        lambda path, leaf: 0 * leaf if any(n in str(path) for n in names) else leaf,
        variables,
    )


def test_a_block_of_a_pyramid_averages_and_pads_its_shortcut():
    block = pyramidnet.PyramidBlock(features=7, stride=2)
    x = jax.random.normal(key(1), (2, 5, 4, 3))
    variables = zeroed(init(block, x), "conv_1")
    out = jit(partial(block.apply, train=False))(variables, x)
    assert out.shape == (2, 3, 2, 7)
    x = np.asarray(x)
    averages = x[:, :4].reshape(2, 2, 2, 2, 2, 3).mean((2, 4))
    np.testing.assert_allclose(out[:, :2, :, :3], averages, rtol=1e-5, atol=1e-6)
    # What is left over of an odd height.
    last = x[:, 4:].reshape(2, 1, 2, 2, 3).mean(3)
    np.testing.assert_allclose(out[:, 2:, :, :3], last, rtol=1e-5, atol=1e-6)
    assert not np.any(out[..., 3:])


def test_a_wide_block_projects_what_its_first_relu_gives():
    x = jax.random.normal(key(1), (2, 4, 4, 3))
    block = wide_resnet.WideBlock(features=5, stride=2)
    variables = zeroed(init(block, x), "conv_1")
    out = jit(partial(block.apply, train=False))(variables, x)
    kernel = variables["params"]["shortcut"]["kernel"][0, 0]
    activated = np.maximum(np.asarray(x) / np.sqrt(1 + 1e-5), 0)[:, ::2, ::2]
    np.testing.assert_allclose(
        out, activated @ np.asarray(kernel), rtol=1e-4, atol=1e-5
    )
    same = wide_resnet.WideBlock(features=3)
    variables = zeroed(init(same, x), "conv_1")
    assert "shortcut" not in variables["params"]
    out = jit(partial(same.apply, train=False))(variables, x)
    np.testing.assert_array_equal(out, x)


def in_float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def test_an_encoder_computes_what_the_paper_says():
    x = jax.random.normal(key(1), (2, 5, 8))
    encoder = vit.Encoder(num_heads=2, hidden=16)
    # Sharper than at the start, where attention is all but uniform, with biases.
    variables = jax.tree.map(
        lambda leaf: 10 * leaf if leaf.ndim == 2 else leaf + 0.5, init(encoder, x)
    )
    out = jit(partial(encoder.apply, train=False))(variables, x)

    params, x = in_float64(variables["params"]), np.asarray(x, np.float64)

    def norm(number, x):
        p = params[f"norm_{number}"]
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * p["scale"] + p["bias"]

    def dense(name, x):
        return x @ params[name]["kernel"] + params[name]["bias"]

    y = norm(0, x)
    query, keys, value = (
        dense(name, y).reshape(2, 5, 2, 4) for name in ("query", "key", "value")
    )
    scores = np.exp(np.einsum("bthd,bshd->bhts", query, keys) / np.sqrt(4))
    weights = scores / scores.sum(-1, keepdims=True)
    y = np.einsum("bhts,bshd->bthd", weights, value).reshape(2, 5, 8)
    x = x + dense("out", y)
    y = dense("up", norm(1, x))
    y = y * np.vectorize(lambda a: 0.5 * (1 + math.erf(a / math.sqrt(2))))(y)
    np.testing.assert_allclose(out, x + dense("down", y), rtol=1e-5, atol=3e-5)


def test_a_layer_of_vgg_adds_its_bias_before_it_normalises():
    x = jax.random.normal(key(1), (2, 4, 4, 3))
    layer = vgg.VGGLayer(5)
    variables = init(layer, x)
    params = variables["params"]
    params = {**params, "bias": params["bias"] + jnp.arange(5.0)}
    moved = jax.tree.map(lambda s: s + 1, variables["batch_stats"])
    apply = jit(partial(layer.apply, train=False))
    out = apply({"params": params, "batch_stats": moved}, x)
    plain = jax.lax.conv_general_dilated(
        x,
        params["conv"]["kernel"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    # Of mean 1 and variance 2.
    expected = (np.asarray(plain) + np.arange(5.0) - 1) / np.sqrt(2 + 1e-5)
    np.testing.assert_allclose(out, np.maximum(expected, 0), rtol=1e-4, atol=1e-5)


def test_a_transformer_knows_patches_by_their_positions_alone():
    model = vit.ViT(3, patch_size=4, width=8, num_layers=1, num_heads=2)
    images = jax.random.normal(key(1), (2, 8, 8, 3))
    variables = init(model, images)
    swapped = jnp.roll(images, 4, axis=1)  # Swaps the upper and the lower patches.
    positions = variables["params"]["positions"]
    moved = positions[:, jnp.array([0, 3, 4, 1, 2])]
    run = jit(partial(model.apply, train=False))
    expected = run(variables, images)
    params = {**variables["params"], "positions": moved}
    np.testing.assert_allclose(
        run({"params": params}, swapped), expected, rtol=1e-4, atol=1e-6
    )
    assert not np.allclose(run(variables, swapped), expected, rtol=1e-3, atol=0)
    # The bias of the patches moves all tokens but that of the class.
    shift = jnp.arange(8.0)
    params = {**variables["params"], "patch_bias": shift}
    by_bias = run({"params": params}, images)
    moved = positions + shift[None, None] * (jnp.arange(5) > 0)[None, :, None]
    params = {**variables["params"], "positions": moved}
    np.testing.assert_allclose(run({"params": params}, images), by_bias, rtol=1e-4)
    assert not np.allclose(by_bias, expected, rtol=1e-3, atol=0)
