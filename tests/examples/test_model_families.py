"""What all families of models have in common."""

import re
from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sam_examples.models import pyramidnet, vgg, vit, wide_resnet
from sam_examples.models.convolution import PatchConv
from sam_examples.models.factories import NORMS
from sam_examples.models.resnet import BottleneckBlock, ResNet

import optax_sam
from optax_sam import implicit

pytestmark = pytest.mark.full

SIZE = 8
# The least that has every kind of layer of the family.
FAMILIES = {
    "resnet": partial(
        ResNet, (1,), 3, width=4, block=BottleneckBlock, shared_names=True
    ),
    "resnet for imagenet": partial(
        ResNet, (1,), 3, width=4, stem="imagenet", shared_names=True
    ),
    "wide resnet": partial(wide_resnet.WideResNet, (1, 1), 3, widen_factor=2, width=4),
    "vgg": partial(vgg.VGG, (1, 1), 3, width=4, hidden=(8,)),
    "pyramidnet": partial(pyramidnet.PyramidNet, (1, 1), 3, alpha=6, width=4),
    "vit": partial(vit.ViT, 3, patch_size=4, width=8, num_layers=1, num_heads=2),
}
every_family = pytest.mark.parametrize("family", FAMILIES)
# What compiles takes longer than what runs.
jit = partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)


def key(seed):
    return jax.random.key(seed, impl="rbg")


def make_batch():
    images = jax.random.normal(jax.random.key(7), (4, SIZE, SIZE, 3))
    return images, jnp.arange(4) % 3


def init(model, images=None):
    images = make_batch()[0] if images is None else images
    return jit(partial(model.init, train=False))(key(0), images)


@cache
def variables_of(family):
    return init(FAMILIES[family]())


def mean_loss(model, params, variables):
    images, labels = make_batch()
    logits, _ = model.apply(
        {**variables, "params": params}, images, True, mutable=["batch_stats"]
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses)


@every_family
def test_parameters_are_the_same_whatever_is_put_in(family):
    half = implicit.Channels(0.5)
    convolution = partial(
        nn.Conv, use_bias=False, conv_general_dilated=half.conv_general_dilated
    )
    dense = partial(nn.Dense, dot_general=half.dot_general)
    patches = partial(PatchConv, dot_general=half.dot_general)
    variables = variables_of(family)
    images = make_batch()[0]

    shapes = jax.tree.map(jnp.shape, variables)
    for conv in (convolution, patches):
        model = FAMILIES[family](conv=conv, dense=dense)
        made = jax.eval_shape(partial(model.init, train=False), key(0), images)
        assert jax.tree.map(jnp.shape, made) == shapes

    @jit
    def logits_and_gradient(variables):
        plain, sparse, cut = (
            FAMILIES[family](**layers)
            for layers in (
                {},
                {"conv": convolution, "dense": dense},
                {"conv": patches, "dense": dense},
            )
        )
        logits = [m.apply(variables, images, False) for m in (plain, sparse, cut)]
        gradient = jax.grad(partial(mean_loss, sparse))(variables["params"], variables)
        return logits, gradient

    (plain, sparse, cut), gradient = logits_and_gradient(variables)
    np.testing.assert_array_equal(sparse, plain)
    np.testing.assert_allclose(cut, plain, rtol=1e-4, atol=1e-5)
    # The implicit layers are everywhere: half of all features have no gradient.
    kernels = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree.leaves_with_path(gradient)
        if "kernel" in str(path)
    }
    assert len(kernels) >= 4
    for path, leaf in kernels.items():
        features = leaf.shape[-1]
        reached = jnp.any(leaf.reshape(-1, features), axis=0)
        assert 0 < jnp.sum(reached) <= features - features // 2, path


@every_family
def test_all_products_are_computed_in_bfloat16(family):
    model = FAMILIES[family](dtype=jnp.bfloat16)
    variables = jax.eval_shape(
        partial(model.init, train=False), key(0), make_batch()[0]
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}

    def run(train, variables):
        images = make_batch()[0]
        return model.apply(
            variables, images, train, mutable=["batch_stats"] if train else False
        )

    for train in (False, True):
        program = str(jax.make_jaxpr(partial(run, train))(variables))
        products = re.findall(
            r"(\w+)\[[^\]]*\] = (conv_general_dilated|dot_general)", program
        )
        types = [dtype for dtype, _ in products]
        # Attention adds up its products in float32.
        in_attention = 2 if family == "vit" else 0
        assert types.count("f32") <= in_attention
        assert types.count("bf16") == len(types) - types.count("f32") >= 4
    assert jax.eval_shape(partial(run, False), variables).dtype == jnp.float32


@every_family
def test_evaluation_is_by_the_running_statistics(family):
    model, variables = FAMILIES[family](), variables_of(family)
    images = make_batch()[0]

    @jit
    def run(variables):
        others = jnp.concatenate([images[:1], 3 * images[1:] + 1])
        alone, among = (
            model.apply(variables, x, False)[0] for x in (images[:1], others)
        )
        trained, new = model.apply(variables, images, True, mutable=["batch_stats"])
        return alone, among, trained, new.get("batch_stats", {})

    alone, among, trained, new = run(variables)
    np.testing.assert_allclose(alone, among, rtol=1e-5, atol=1e-5)
    stats = variables.get("batch_stats", {})
    if family == "vit":
        assert not stats
        return
    moved = {**variables, "batch_stats": jax.tree.map(lambda s: 2 * s + 1, stats)}
    moved_alone, _, moved_trained, _ = run(moved)
    assert not np.allclose(alone, moved_alone, rtol=1e-2)
    np.testing.assert_array_equal(trained, moved_trained)
    for (path, before), after in zip(
        jax.tree.leaves_with_path(stats), jax.tree.leaves(new), strict=True
    ):
        assert np.any(before != after), path


@every_family
def test_a_step_of_sam_moves_all_weights(family):
    model, variables = FAMILIES[family](dropout_rate=0.1), variables_of(family)

    def loss_fn(params, batch, batch_stats, dropout_key):
        logits, new = model.apply(
            {"params": params, "batch_stats": batch_stats},
            batch[0],
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": dropout_key},
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
        return losses, new.get("batch_stats", {})

    tx = optax_sam.sam(optax.sgd(0.1), rho=0.05)
    step = jit(optax_sam.value_and_update(loss_fn, tx, has_aux=True))
    params = variables["params"]
    stats = variables.get("batch_stats", {})
    (loss, _), updates, _ = step(params, tx.init(params), make_batch(), stats, key(1))
    assert 0.5 < loss < 3
    for path, update in jax.tree.leaves_with_path(updates):
        assert np.all(np.isfinite(update)), path
        # What a bias adds, a later normalisation may take away.
        if "bias" not in str(path):
            assert np.max(np.abs(update)) > 1e-6, path


@pytest.mark.parametrize(
    "family", [name for name in FAMILIES if name not in ("vit", "pyramidnet")]
)
def test_normalisation_can_be_that_of_groups(family):
    model = FAMILIES[family](norm=NORMS["group"])
    images = make_batch()[0]
    made = jax.eval_shape(partial(model.init, train=False), key(0), images)
    assert set(made) == {"params"}
    plain = variables_of(family)["params"]
    assert jax.tree.map(jnp.shape, made["params"]) == jax.tree.map(jnp.shape, plain)
