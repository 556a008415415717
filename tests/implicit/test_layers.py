"""Sparse backward passes of Flax layers, linen and NNX."""

from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from flax import nnx
from jax import lax

from optax_sam import implicit


class Network(nn.Module):
    """A convolution and two kinds of dense layers, with masks or without."""

    dot_general_cls: type | None = implicit.MaskedDotGeneral
    conv_general_dilated_cls: type | None = implicit.MaskedConvGeneralDilated

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), conv_general_dilated_cls=self.conv_general_dilated_cls)(
            x
        )
        dense = nn.Dense(6, dot_general_cls=self.dot_general_cls, name="twice")
        x = nn.tanh(dense(nn.Dense(6)(x)))
        x = dense(x).mean(axis=(1, 2))
        return nn.DenseGeneral((2, 3), dot_general_cls=self.dot_general_cls)(x)


IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 5, 3)), jnp.float32)


def random_masks(params):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda p: rng.random(p.shape) < 0.5, params)


def linen_gradients(model, params, x=IMAGES, **collections):
    def loss(params, x):
        return jnp.sum(model.apply({"params": params, **collections}, x) ** 2)

    return jax.jit(jax.grad(loss, (0, 1)))(params, x)


def test_linen_without_masks_is_dense():
    model, dense = Network(), Network(None, None)
    variables = jax.jit(model.init)(jax.random.key(0), IMAGES)
    problems.assert_trees_equal(
        variables, jax.jit(dense.init)(jax.random.key(0), IMAGES)
    )
    expected = linen_gradients(dense, variables["params"])
    problems.assert_trees_equal(linen_gradients(model, variables["params"]), expected)
    absent = jax.tree.map(lambda p: optax.MaskedNode(), variables["params"])
    for masks in (absent, {}):
        actual = linen_gradients(model, variables["params"], masks=masks)
        problems.assert_trees_equal(actual, expected)


def test_linen_masks_reach_their_layers():
    model = Network()
    params = jax.jit(model.init)(jax.random.key(0), IMAGES)["params"]
    masks = random_masks(params)
    apply = jax.jit(model.apply)
    problems.assert_trees_equal(
        apply({"params": params, "masks": masks}, IMAGES),
        apply({"params": params}, IMAGES),
    )
    # One at a time: what the layers before it get goes through the masked kernel.
    dense_grads, dense_dx = linen_gradients(model, params)
    for name in ("Conv_0", "twice", "DenseGeneral_0"):
        grads, dx = linen_gradients(model, params, masks={name: masks[name]})
        problems.assert_trees_differ(dx, dense_dx)
        if name == "DenseGeneral_0":
            problems.assert_trees_equal(grads[name], dense_grads[name])
            problems.assert_trees_differ(grads["twice"], dense_grads["twice"])
    conv = nn.Conv(
        4,
        (3, 3),
        strides=2,
        conv_general_dilated_cls=implicit.MaskedConvGeneralDilated,
    )
    params = jax.jit(conv.init)(jax.random.key(0), IMAGES)["params"]
    masks = random_masks(params)
    masked = {**params, "kernel": jnp.where(masks["kernel"], params["kernel"], 0)}

    def input_gradient(params, **collections):
        # A linear loss: its cotangents do not depend on the kernel.
        def loss(x):
            return conv.apply({"params": params, **collections}, x).sum()

        return jax.grad(loss)(IMAGES)

    problems.assert_trees_equal(
        input_gradient(params, masks=masks), input_gradient(masked)
    )


def test_linen_mask_of_a_wrong_shape_names_the_layer():
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Network(name="inner")(x)

    params = jax.jit(Outer().init)(jax.random.key(0), IMAGES)["params"]
    masks = random_masks(params)
    for wrong in (np.ones([6, 5], bool), np.ones([6, 6], np.float32), True):
        masks["inner"]["twice"]["kernel"] = wrong
        with pytest.raises(ValueError, match=r"mask of inner/twice.*\(6, 6\), got"):
            linen_gradients(Outer(), params, masks=masks)


def nnx_network():
    rngs = nnx.Rngs(0)
    return nnx.Sequential(
        nnx.Conv(3, 4, (3, 3), rngs=rngs),
        nnx.BatchNorm(4, rngs=rngs),
        nnx.relu,
        nnx.LinearGeneral(4, (2, 3), rngs=rngs),
        nnx.LinearGeneral((2, 3), 6, axis=(-2, -1), rngs=rngs),
        nnx.Linear(6, 4, rngs=rngs),
    )


LAYERS = {0: "conv_general_dilated", 3: "dot_general", 4: "dot_general"}


def nnx_gradients(sparsify=lambda model: model):
    graph, params, rest = nnx.as_pure(nnx.split(nnx_network(), nnx.Param, ...))

    def loss(params, x):
        model = sparsify(nnx.merge(graph, params, rest))
        return jnp.sum(model(x) ** 2), nnx.as_pure(nnx.state(model, nnx.BatchStat))

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, IMAGES)


@cache
def dense_nnx_gradients():
    return nnx_gradients()


def by_assignment(backward_of):
    """What `sparsify` should do, written out for the model above."""

    def inject(model):
        for i, name in (LAYERS | {5: "dot_general"}).items():
            setattr(model.layers[i], name, getattr(backward_of(i), name))
        return model

    return inject


def test_nnx_channels():
    channels = implicit.Channels(0.5)
    actual = nnx_gradients(lambda model: implicit.sparsify(model, channels))
    problems.assert_trees_equal(
        actual, nnx_gradients(by_assignment(lambda i: channels))
    )
    problems.assert_trees_differ(actual, dense_nnx_gradients())


@pytest.mark.parametrize("form", ["state of arrays", "state of Params", "dict"])
def test_nnx_masks(form):
    params = nnx.as_pure(nnx.state(nnx_network(), nnx.Param))
    pure = random_masks(params)
    masks = {
        "state of arrays": lambda: pure,
        "state of Params": lambda: jax.tree.map(nnx.Param, pure),
        "dict": lambda: nnx.to_pure_dict(pure),
    }[form]()
    actual = nnx_gradients(lambda model: implicit.sparsify(model, masks))
    expected = nnx_gradients(
        by_assignment(lambda i: implicit.Masked(pure["layers"][i]["kernel"]))
    )
    problems.assert_trees_equal(actual, expected)
    problems.assert_trees_differ(actual[0], dense_nnx_gradients()[0])
    # Values and statistics are those of the dense model.
    problems.assert_trees_equal(actual[1], dense_nnx_gradients()[1])


def test_nnx_layers_without_a_mask_stay_dense():
    masks = {"layers": {5: {"kernel": np.ones([6, 4], bool), "bias": True}}}
    masks["layers"][0] = {"kernel": optax.MaskedNode()}
    sparse = implicit.sparsify(nnx_network(), masks)
    assert [getattr(sparse.layers[i], name) for i, name in LAYERS.items()] == [
        lax.conv_general_dilated,
        None,
        None,
    ]
    problems.assert_trees_equal(
        nnx_gradients(lambda model: implicit.sparsify(model, masks)),
        dense_nnx_gradients(),
    )


def test_nnx_model_is_left_alone_and_shares_its_variables():
    model = nnx_network()
    sparse = implicit.sparsify(model, implicit.Channels(0.5))
    assert model.layers[0].conv_general_dilated is lax.conv_general_dilated
    assert sparse.layers[0].kernel is model.layers[0].kernel
    before = model.layers[1].mean[...]
    sparse(IMAGES)
    problems.assert_trees_differ(model.layers[1].mean[...], before)
    # Equal graph definitions: a compiled function that takes the model is reused.
    other = implicit.sparsify(model, implicit.Channels(0.5))
    assert nnx.graphdef(sparse) == nnx.graphdef(other)
    assert hash(nnx.graphdef(sparse)) == hash(nnx.graphdef(other))
    back = implicit.sparsify(sparse, implicit.Channels(0))
    assert back.layers[5].dot_general == implicit.Channels(0).dot_general


def test_nnx_models_and_masks_that_do_not_fit():
    masks = {"layers": {5: {"kernel": np.ones([4, 6], bool)}}}
    with pytest.raises(ValueError, match=r"mask of layers/5 .*\(6, 4\), got"):
        implicit.sparsify(nnx_network(), masks)(IMAGES)
    for wrong in ({}, {"layer": masks["layers"]}):
        with pytest.raises(ValueError, match="found nothing to change in Sequential"):
            implicit.sparsify(nnx_network(), wrong)
    own = nnx.Linear(3, 4, dot_general=lambda *a, **k: 0, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="the layer a has a dot_general of its own"):
        implicit.sparsify(nnx.Dict(a=own), implicit.Channels(0.5))
