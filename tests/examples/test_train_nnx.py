from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import train_nnx
from example_support import TINY, check_refusal, results
from flax import nnx
from problems import assert_trees_close, assert_trees_differ
from sam_examples.data import Split
from sam_examples.models import resnet
from sam_examples.models.nnx_resnet import NORMS, ResNet
from sam_examples.settings.methods import hyperparameters, is_functional, make_tx

import optax_sam

# What compiles takes longer than what runs.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
train_step = train_nnx.make_train_step()


def make_batch(seed=0, size=8):
    rng = np.random.default_rng(seed)
    images = rng.normal(1, 2, (size, 4, 4, 1)).astype(np.float32)
    return Split(jnp.asarray(images), jnp.arange(size, dtype=jnp.int32) % 3)


def make_model(stages=(), **kwargs):
    return ResNet(stages, 3, channels=1, width=4, rngs=nnx.Rngs(0), **kwargs)


def split(model):
    """The graph, the parameters, and all else, as arrays."""
    return nnx.as_pure(nnx.split(model, nnx.Param, ...))


def as_linen(tree, suffix=""):
    """The same values under linen's names."""
    names = {
        **{f"conv_{i}": f"Conv_{i}" for i in range(3)},
        **{f"norm_{i}": f"BatchNorm_{i}" for i in range(3)},
        "stem": "Conv_0",
        "stem_norm": "BatchNorm_0",
        "head": "Dense_0",
    }
    out = {}
    for name, part in nnx.to_pure_dict(tree).items():
        if name == "blocks":
            for i, block in part.items():
                out[f"BasicBlock_{i}"] = {names[k]: v for k, v in block.items()}
        elif name in names:
            out[names[name]] = part
    return out


@pytest.mark.full
def test_steps_of_sam_are_those_of_linen():
    # The width doubles, so that a shortcut is projected.
    model = make_model((1, 1))
    linen = resnet.ResNet((1, 1), 3, width=4)
    tx = optax_sam.sam(optax.sgd(0.1, momentum=0.9), rho=0.5)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    _, nnx_params, nnx_rest = split(model)
    params, batch_stats = as_linen(nnx_params), as_linen(nnx_rest)
    start = params
    opt_state = tx.init(params)

    def loss_fn(params, batch, batch_stats):
        variables = {"params": params, "batch_stats": batch_stats}
        logits, new = linen.apply(
            variables, batch.images, True, mutable=["batch_stats"]
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return losses, new["batch_stats"]

    step = quick_jit(optax_sam.value_and_update(loss_fn, tx, has_aux=True))
    for seed in range(3):
        batch = make_batch(seed)
        (loss, batch_stats), updates, opt_state = step(
            params, opt_state, batch, batch_stats
        )
        params = optax.apply_updates(params, updates)
        nnx_loss, _ = train_step(model, optimizer, batch)
        np.testing.assert_allclose(nnx_loss, loss, rtol=1e-5)
    _, nnx_params, nnx_rest = split(model)
    assert_trees_close(as_linen(nnx_params), params, rtol=1e-5, atol=1e-5)
    assert_trees_close(as_linen(nnx_rest), batch_stats, rtol=1e-5, atol=1e-5)
    assert_trees_differ(params, start)

    # Evaluation is by the running statistics, and leaves them alone.
    model.eval()
    variables = {"params": params, "batch_stats": batch_stats}
    logits = quick_jit(linen.apply, static_argnums=2)(variables, batch.images, False)
    np.testing.assert_allclose(
        nnx.jit(lambda m, x: m(x))(model, batch.images), logits, rtol=1e-4, atol=1e-5
    )
    assert_trees_close(split(model)[2], nnx_rest, rtol=0)


def gradient_and_rest(graph, params, rest, batch):
    def loss(params):
        model = nnx.merge(graph, params, rest)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            model(batch.images), batch.labels
        )
        return jnp.mean(losses), nnx.as_pure(nnx.state(model, nnx.Not(nnx.Param)))

    return jax.grad(loss, has_aux=True)(params)


@pytest.mark.full
def test_both_passes_drop_the_same_and_the_clean_one_leaves_its_statistics():
    model, batch = make_model(dropout_rate=0.5), make_batch()
    graph, params, rest = split(model)
    rho, learning_rate = 2.0, 0.5

    @partial(quick_jit, static_argnums=0)
    def by_hand(graph, params, rest):
        gradient, clean = gradient_and_rest(graph, params, rest, batch)
        scale = rho / optax.tree.norm(gradient)
        near = jax.tree.map(lambda p, g: p + scale * g, params, gradient)
        same, perturbed = gradient_and_rest(graph, near, rest, batch)
        other, _ = gradient_and_rest(graph, near, clean, batch)
        return (
            clean,
            perturbed,
            *(
                jax.tree.map(lambda p, g: p - learning_rate * g, params, g)
                for g in (same, other)
            ),
        )

    clean, perturbed, same, other = by_hand(graph, params, rest)
    tx = optax_sam.sam(optax.sgd(learning_rate), rho)
    train_step(model, nnx.Optimizer(model, tx, wrt=nnx.Param), batch)
    _, params_after, rest_after = split(model)
    assert_trees_close(params_after, same, rtol=1e-5, atol=1e-6)
    assert not np.allclose(same["head"]["kernel"], other["head"]["kernel"], rtol=1e-3)
    assert_trees_close(rest_after, clean, rtol=1e-5, atol=1e-6)
    mean = rest_after["stem_norm"]["mean"]
    assert not np.allclose(mean, perturbed["stem_norm"]["mean"], rtol=1e-3)
    # The next step draws anew: a single draw was counted.
    counts = [r["dropout"]["rngs"]["count"] for r in (rest, rest_after)]
    assert counts[1] == counts[0] + 1


# Together the last ones want all that a step can be given.
METHODS = ["sgd", "m_sam", "functional_sam+vasso", "rw_sam+vasso+sparse_sam"]


@pytest.mark.full
@pytest.mark.parametrize("method", METHODS)
def test_methods_train(method):
    (values,) = hyperparameters([method], []).values()
    values |= {k: v for k, v in {"micro_batch_size": 4}.items() if k in values}
    tx = make_tx(method, optax.sgd(0.1), values, 10)
    model = make_model(dropout_rate=0.1)
    before = split(model)[1]
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    step = train_nnx.make_train_step(functional=is_functional(method))
    loss, accuracy = step(model, optimizer, make_batch())
    after = split(model)[1]
    assert 0.5 < loss < 3
    assert 0 <= accuracy <= 1
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        assert np.all(np.isfinite(a))
        assert np.any(a != b)


@pytest.mark.full
def test_sam_costs_two_passes_and_rw_sam_a_third_more():
    def flops(tx):
        model = make_model((1,))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        lowered = train_step.lower(model, optimizer, make_batch(size=32))
        return lowered.cost_analysis()["flops"]

    base = optax.sgd(0.1)
    one = flops(base)
    assert flops(optax_sam.sam(base, 0.1)) / one == pytest.approx(2, abs=0.02)
    assert flops(optax_sam.rw_sam(base, 0.1, strength=0.1)) / one < 2.5


@pytest.mark.full
def test_the_network_is_that_of_linen():
    model = nnx.eval_shape(
        lambda: ResNet((2, 2, 2, 2), 10, channels=3, rngs=nnx.Rngs(0))
    )
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(leaf.size for leaf in leaves) == 11_173_962
    model = make_model((1,), norm=NORMS["group"], dtype=jnp.bfloat16)
    _, params, rest = split(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert "stem_norm" not in rest
    logits = nnx.eval_shape(lambda m, x: m(x), model, make_batch().images)
    assert logits.dtype == jnp.float32


def test_the_script_reports_the_last_epoch(tmp_path, capsys):
    sizes = [*TINY, "--epochs", "2", "--batch-size", "256"]
    options = ["--method", "vasso", "--hyperparameters", "theta=0.3", "--noise", "0"]
    train_nnx.main([*sizes, *options, "--out", str(tmp_path)])
    output, progress = capsys.readouterr()
    figures = results(tmp_path)
    assert figures["hyperparameters"] == {"rho": 0.5, "theta": 0.3}
    assert figures["settings"]["method"] == "vasso"
    assert {len(curve) for curve in figures["epochs"].values()} == {2}
    losses = figures["epochs"]["train_loss"]
    assert losses[1] < losses[0]
    assert f"test accuracy {100 * figures['test_accuracy']:.2f} %" in output
    assert figures["test_accuracy"] * 386 == pytest.approx(
        round(figures["test_accuracy"] * 386)
    )
    assert "epoch 2 of 2" in progress
    assert "loss=" in progress


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "adam"], "unknown method 'adam'"),
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--hyperparameters", "rho=-1"], "rho = -1 is out of range"),
        (["--method", "m_sam", "--batch-size", "40"], "must divide --batch-size 40"),
    ],
)
def test_the_script_refuses_bad_options_in_one_line(capsys, options, message):
    check_refusal(capsys, message, train_nnx.main, options)
