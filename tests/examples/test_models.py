import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sam_examples.models.convolution import PatchConv, fastest_convolution
from sam_examples.models.resnet import (
    BasicBlock,
    BottleneckBlock,
    ResNet,
    group_norm,
)


def init_shapes(model, shape):
    images = jnp.zeros(shape)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def test_resnet18_has_the_published_number_of_parameters():
    variables = init_shapes(ResNet((2, 2, 2, 2), num_classes=10), (1, 32, 32, 3))
    assert count(variables["params"]) == 11_173_962


def test_digits_resnet_is_small_and_returns_logits():
    model = ResNet((1, 1, 1), num_classes=7, width=16)
    variables = init_shapes(model, (1, 8, 8, 1))
    assert count(variables["params"]) < 100_000
    logits = jax.eval_shape(
        partial(model.apply, train=False), variables, jnp.zeros((5, 8, 8, 1))
    )
    assert (logits.shape, logits.dtype) == ((5, 7), jnp.float32)


def test_every_stage_but_the_first_halves_the_image_and_doubles_the_width():
    model = ResNet((1, 2, 1), 10, width=4)
    images = jnp.zeros((2, 16, 16, 3))

    def run():
        return model.init_with_output(
            jax.random.key(0),
            images,
            train=False,
            capture_intermediates=lambda module, _: "Block" in type(module).__name__,
            mutable=["params", "batch_stats", "intermediates"],
        )[1]["intermediates"]

    outputs = jax.eval_shape(run)
    shapes = [outputs[f"BasicBlock_{i}"]["__call__"][0].shape for i in range(4)]
    assert shapes == [(2, 16, 16, 4), (2, 8, 8, 8), (2, 8, 8, 8), (2, 4, 4, 16)]


def test_the_stem_for_imagenet_leaves_a_quarter_and_bottlenecks_widen_four_times():
    model = ResNet((3, 4, 6, 3), num_classes=10, block=BottleneckBlock, stem="imagenet")

    def run():
        return model.init_with_output(
            jax.random.key(0),
            jnp.zeros((1, 224, 224, 3)),
            train=False,
            capture_intermediates=True,
            mutable=["params", "batch_stats", "intermediates"],
        )[1]["intermediates"]

    outputs = jax.eval_shape(run)
    ends = [
        outputs[f"BottleneckBlock_{i}"]["__call__"][0].shape for i in (2, 6, 12, 15)
    ]
    assert ends == [
        (1, 56, 56, 256),
        (1, 28, 28, 512),
        (1, 14, 14, 1024),
        (1, 7, 7, 2048),
    ]
    inside = outputs["BottleneckBlock_3"]
    convolutions = [inside[f"Conv_{i}"]["__call__"][0].shape for i in range(4)]
    # The stride is in the 3x3 convolution, and in the shortcut's.
    assert convolutions == [
        (1, 56, 56, 128),
        (1, 28, 28, 128),
        (1, 28, 28, 512),
        (1, 28, 28, 512),
    ]


def convolve(x, kernel, stride, padding):
    """A convolution in float64, by its definition."""
    size, (_, height, width, _) = len(kernel), x.shape
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    out = 0
    for i in range(size):
        for j in range(size):
            part = x[:, i : i + height : stride, j : j + width : stride]
            out = out + np.einsum("bhwc,cf->bhwf", part, kernel[i, j])
    return out


@pytest.mark.full
@pytest.mark.parametrize("block", [BasicBlock, BottleneckBlock])
def test_blocks_compute_what_the_paper_says(block):
    module = block(features=3, stride=2)
    x = jax.random.normal(jax.random.key(0), (2, 6, 4, 5))
    init = jax.jit(partial(module.init, train=False))
    variables = init(jax.random.key(1, impl="rbg"), x)
    rng = np.random.default_rng(2)
    # Statistics and scales of all sorts: those of evaluation have to be the running.
    variables = jax.tree.map_with_path(
        lambda path, v: v if "kernel" in str(path) else rng.uniform(0.5, 2, v.shape),
        variables,
    )
    params, stats = jax.tree.map(
        lambda v: np.asarray(v, np.float64),
        (variables["params"], variables["batch_stats"]),
    )

    def conv_and_norm(i, x, stride):
        kernel = params[f"Conv_{i}"]["kernel"]
        x = convolve(x, kernel, stride, len(kernel) // 2)
        norm, s = params[f"BatchNorm_{i}"], stats[f"BatchNorm_{i}"]
        return (x - s["mean"]) / np.sqrt(s["var"] + 1e-5) * norm["scale"] + norm["bias"]

    y = np.asarray(x, np.float64)
    strides = (2, 1) if block is BasicBlock else (1, 2, 1)
    for i, stride in enumerate(strides):
        y = conv_and_norm(i, y if i == 0 else np.maximum(y, 0), stride)
    shortcut = conv_and_norm(len(strides), np.asarray(x, np.float64), 2)
    actual = jax.jit(partial(module.apply, train=False))(variables, x)
    np.testing.assert_allclose(
        actual, np.maximum(y + shortcut, 0), rtol=1e-4, atol=1e-4
    )


@pytest.mark.full
def test_blocks_can_start_as_their_shortcuts():
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
    for block in (
        BasicBlock(8, zero_init_last=True),
        BottleneckBlock(2, zero_init_last=True),
    ):
        out, _ = jax.jit(partial(block.init_with_output, train=True))(
            jax.random.key(1, impl="rbg"), x
        )
        np.testing.assert_array_equal(out, jnp.maximum(x, 0))


def test_parameters_of_patches_fit_convolutions_if_names_are_shared():
    def shapes(conv, **kwargs):
        model = ResNet((1, 1), 3, width=4, conv=conv, **kwargs)
        return init_shapes(model, (1, 8, 8, 1))

    plain = partial(nn.Conv, use_bias=False)
    assert shapes(PatchConv, shared_names=True) == shapes(plain, shared_names=True)
    assert shapes(PatchConv) != shapes(plain)


@pytest.mark.full
def test_convolutions_start_with_the_published_variance():
    model = ResNet((1,), 10, width=128)
    init = jax.jit(partial(model.init, train=False))
    params = init(jax.random.key(0, impl="rbg"), jnp.zeros((1, 8, 8, 3)))["params"]
    kernel = params["BasicBlock_0"]["Conv_1"]["kernel"]
    np.testing.assert_allclose(jnp.std(kernel), math.sqrt(2 / (9 * 128)), rtol=0.01)
    # A normal distribution; a truncated one ends at 2.3 deviations.
    assert jnp.max(jnp.abs(kernel)) > 4 * jnp.std(kernel)


def test_norm_and_computation_type_can_be_chosen():
    model = ResNet((1,), 10, width=8, norm=group_norm, dtype=jnp.bfloat16)
    variables = init_shapes(model, (1, 8, 8, 1))
    assert set(variables) == {"params"}
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    jaxpr = jax.make_jaxpr(partial(model.apply, train=False))(
        variables, jnp.zeros((1, 8, 8, 1))
    )
    assert "bf16[1,8,8,8] = conv_general_dilated" in str(jaxpr)
    assert jaxpr.out_avals[0].dtype == jnp.float32


@pytest.mark.full
def test_dropout_is_off_in_evaluation_and_drawn_from_its_key_in_training():
    model = ResNet((), 3, width=8, dropout_rate=0.5)
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
    variables = jax.jit(partial(model.init, train=False))(jax.random.key(0), images)

    @partial(jax.jit, static_argnums=1)
    def logits(seed, train):
        rngs = {"dropout": jax.random.key(seed)}
        return model.apply(
            variables, images, train, rngs=rngs, mutable=["batch_stats"]
        )[0]

    np.testing.assert_array_equal(logits(0, False), logits(1, False))
    np.testing.assert_array_equal(logits(0, True), logits(0, True))
    assert not jnp.allclose(logits(0, True), logits(1, True))


# Patches side by side take a way of their own; with 3 and 3, some pixels are left over.
@pytest.mark.full
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("size", "padding"), [(1, 0), (3, 1), (3, 0)])
def test_patches_convolve(size, padding, stride):
    args = {"kernel_size": (size, size), "strides": (stride, stride)}
    args |= {"features": 5, "padding": padding}
    images = jax.random.normal(jax.random.key(0), (2, 8, 6, 3))
    variables = nn.Conv(**args, use_bias=False).init(jax.random.key(1), images)

    def value(conv, variables, images):
        return jnp.sum(jnp.sin(conv.apply(variables, images)))

    expected, actual = (
        jax.jit(jax.value_and_grad(partial(value, conv), (0, 1)))(variables, images)
        for conv in (nn.Conv(**args, use_bias=False), PatchConv(**args))
    )
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), actual, expected
    )


def test_patches_are_for_the_cpu_only():
    assert isinstance(fastest_convolution("cpu")(4, (3, 3)), PatchConv)
    conv = fastest_convolution("gpu")(4, (3, 3))
    assert isinstance(conv, nn.Conv)
    assert not conv.use_bias
