"""Training steps in the style of Flax's own examples, which become sharpness-aware."""

import difflib
import inspect
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from flax import nnx
from flax.training import train_state
from meshes import DEVICES, fully_sharded
from methods import METHODS, defaults

import optax_sam
from optax_sam.flax import TrainState, nnx_value_and_update

RNG = np.random.default_rng(0)
BATCH = {
    "image": RNG.normal(size=(64, 6)).astype(np.float32),
    "label": RNG.integers(4, size=64, dtype=np.int32),
}
TOKENS = RNG.integers(16, size=(16, 8), dtype=np.int32)
cross_entropy = optax.softmax_cross_entropy_with_integer_labels
methods = pytest.mark.parametrize("method", defaults(METHODS, ("sam",)))


def base():
    return optax.sgd(0.1, momentum=0.9)


# MNIST: NNX, batch normalisation, and dropout that draws from an argument.


class Classifier(nnx.Module):
    def __init__(self, *, rngs):
        self.hidden = nnx.Linear(6, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.3)
        self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x, rngs=None):
        return self.head(self.dropout(nnx.relu(self.norm(self.hidden(x))), rngs=rngs))


def plain_mnist_loss_fn(model, rngs, batch):
    logits = model(batch["image"], rngs)
    loss = cross_entropy(logits, batch["label"]).mean()
    return loss, jnp.mean(logits.argmax(-1) == batch["label"])


def mnist_loss_fn(model, rngs, batch):
    logits = model(batch["image"], rngs)
    loss = cross_entropy(logits, batch["label"])
    return loss, jnp.mean(logits.argmax(-1) == batch["label"])


@nnx.jit
def plain_mnist_step(model, optimizer, metrics, rngs, batch):
    grad_fn = nnx.value_and_grad(plain_mnist_loss_fn, has_aux=True)
    (loss, accuracy), grads = grad_fn(model, rngs, batch)
    metrics.update(loss=loss, accuracy=accuracy)
    optimizer.update(model, grads)


@nnx.jit
def mnist_step(model, optimizer, metrics, rngs, batch):
    step = nnx_value_and_update(mnist_loss_fn, has_aux=True)
    loss, accuracy = step(model, optimizer, rngs, batch)
    metrics.update(loss=loss, accuracy=accuracy)


def train_mnist(train_step, tx):
    model, rngs = Classifier(rngs=nnx.Rngs(0)), nnx.Rngs(1)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    names = ("loss", "accuracy")
    metrics = nnx.MultiMetric(**{name: nnx.metrics.Average(name) for name in names})
    for _ in range(3):
        train_step(model, optimizer, metrics, rngs, BATCH)
    assert metrics.loss.count[...] == 3
    changing = nnx.state((model, rngs), nnx.Not(nnx.RngKey))
    return nnx.as_pure((changing, optimizer.opt_state, nnx.state(metrics)))


def test_any_nnx_optimizer_takes_the_steps_of_nnx_value_and_grad():
    tx = optax.adamw(1e-2)
    problems.assert_trees_equal(
        train_mnist(mnist_step, tx), train_mnist(plain_mnist_step, tx)
    )


@methods
def test_nnx_steps_are_those_of_the_functional_api(method):
    tx = METHODS[method](base())
    objects = Classifier(rngs=nnx.Rngs(0)), nnx.Rngs(1)
    filters = nnx.Param, nnx.RngKey, ...
    graph, params, keys, rest = nnx.as_pure(nnx.split(objects, *filters))

    def loss_fn(params, batch, keys, rest):
        objects = nnx.merge(graph, nnx.State({0: params}), keys, rest)
        losses, accuracy = mnist_loss_fn(*objects, batch)
        return losses, (nnx.as_pure(nnx.state(objects, *filters))[2], accuracy)

    @jax.jit
    def train_step(params, opt_state, rest):
        step = optax_sam.value_and_update(loss_fn, tx, has_aux=True)
        (value, (rest, accuracy)), updates, opt_state = step(
            params, opt_state, BATCH, keys, rest
        )
        return optax.apply_updates(params, updates), opt_state, rest, value, accuracy

    params, values, accuracies = params[0], [], []
    opt_state = tx.init(params)
    for _ in range(3):
        params, opt_state, rest, value, accuracy = train_step(params, opt_state, rest)
        values.append(value)
        accuracies.append(accuracy)
    nnx.update(objects, nnx.State({0: params}), rest)

    state, actual_opt_state, metrics = train_mnist(mnist_step, tx)
    expected = nnx.as_pure(nnx.state(objects, nnx.Not(nnx.RngKey)))
    problems.assert_trees_equal((state, actual_opt_state), (expected, opt_state))
    assert state[1]["default"]["count"] == 3
    np.testing.assert_allclose(metrics["loss"]["total"], sum(values), rtol=1e-6)
    np.testing.assert_allclose(metrics["accuracy"]["total"], sum(accuracies), rtol=1e-6)


# A decoder: donated model and optimizer, and an embedding that is also the last layer.


class Decoder(nnx.Module):
    def __init__(self, *, rngs):
        self.embed = nnx.Embed(16, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.output = self.embed

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + self.attention(x, mask=nnx.make_causal_mask(tokens))
        return self.output.attend(x)


def plain_decoder_loss_fn(model, tokens):
    logits = model(tokens[:, :-1])
    return cross_entropy(logits, tokens[:, 1:]).mean()


def decoder_loss_fn(model, tokens):
    logits = model(tokens[:, :-1])
    return cross_entropy(logits, tokens[:, 1:]).mean(axis=1)


@nnx.jit(donate_argnums=(0, 1))
def plain_decoder_step(model, optimizer, tokens):
    loss, grads = nnx.value_and_grad(plain_decoder_loss_fn)(model, tokens)
    optimizer.update(model, grads)
    return loss


@nnx.jit(donate_argnums=(0, 1))
def decoder_step(model, optimizer, tokens):
    loss = nnx_value_and_update(decoder_loss_fn)(model, optimizer, tokens)
    return loss


def train_decoder(train_step, tx, place=lambda x: x):
    model = Decoder(rngs=nnx.Rngs(0))
    nnx.update(model, place(nnx.as_pure(nnx.state(model))))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    loss = [train_step(model, optimizer, place(TOKENS)) for _ in range(3)][-1]
    assert model.output is model.embed
    return loss, nnx.as_pure((nnx.state(model), optimizer.opt_state))


@pytest.mark.full
def test_shared_parameters_are_updated_once():
    problems.assert_trees_close(
        train_decoder(decoder_step, base()),
        train_decoder(plain_decoder_step, base()),
        rtol=1e-5,
        atol=1e-7,
    )


@pytest.mark.full
@pytest.mark.parametrize(
    "method", ["sam", "vasso", "sparse", "reweighted", "micro-batches"]
)
def test_sharded_models_take_the_steps_of_one_device(method):
    tx = METHODS[method](base())
    loss, (state, opt_state) = train_decoder(decoder_step, tx, fully_sharded)
    for x, y in zip(
        jax.tree.leaves(state), jax.tree.leaves(fully_sharded(state)), strict=True
    ):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
    expected_loss, (expected, expected_opt_state) = train_decoder(decoder_step, tx)
    if method == "sparse":
        # The biases of keys have slopes of zero: which of them stay is rounding.
        opt_state, expected_opt_state = (
            x.base_state for x in (opt_state, expected_opt_state)
        )
    problems.assert_trees_close(
        (loss, state, opt_state),
        (expected_loss, expected, expected_opt_state),
        rtol=1e-4,
        atol=1e-5,
    )


# ImageNet: linen and pmap, batch statistics, a weight penalty in the loss.


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8)(x)
        x = nn.BatchNorm(use_running_average=False)(x)
        return nn.Dense(4)(nn.relu(x))


class PlainState(train_state.TrainState):
    batch_stats: Any


class State(TrainState):
    batch_stats: Any


def plain_imagenet_step(state, batch):
    def loss_fn(params, batch):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, new = state.apply_fn(variables, batch["image"], mutable=["batch_stats"])
        loss = cross_entropy(logits, batch["label"]).mean()
        penalty = sum(jnp.sum(x**2) for x in jax.tree.leaves(params) if x.ndim > 1)
        accuracy = jnp.mean(logits.argmax(-1) == batch["label"])
        return loss + 1e-4 * penalty, (new["batch_stats"], accuracy)

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    value, grads = grad_fn(state.params, batch)
    grads = jax.lax.pmean(grads, "batch")
    loss, (batch_stats, accuracy) = value
    state = state.apply_gradients(grads=grads, batch_stats=batch_stats)
    return state, jax.lax.pmean({"loss": loss, "accuracy": accuracy}, "batch")


def imagenet_step(state, batch):
    def loss_fn(params, batch):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, new = state.apply_fn(variables, batch["image"], mutable=["batch_stats"])
        loss = cross_entropy(logits, batch["label"])
        penalty = sum(jnp.sum(x**2) for x in jax.tree.leaves(params) if x.ndim > 1)
        accuracy = jnp.mean(logits.argmax(-1) == batch["label"])
        return loss + 1e-4 * penalty, (new["batch_stats"], accuracy)

    value, state = state.apply_loss(loss_fn, batch, has_aux=True, axis_name="batch")
    loss, (batch_stats, accuracy) = value
    state = state.replace(batch_stats=batch_stats)
    return state, jax.lax.pmean({"loss": loss, "accuracy": accuracy}, "batch")


def make_imagenet(kind, tx):
    model = Net()
    variables = model.init(jax.random.key(0), BATCH["image"])
    return kind.create(apply_fn=model.apply, tx=tx, **variables)


def train_imagenet(train_step, state):
    step = jax.pmap(train_step, "batch", donate_argnums=0)
    parts = jax.tree.map(lambda x: x.reshape(DEVICES, -1, *x.shape[1:]), BATCH)
    state = jax.tree.map(lambda x: jnp.stack([x] * DEVICES), state)
    for _ in range(3):
        state, metrics = step(state, parts)
    np.testing.assert_array_equal(state.step, 3)
    return state.params, state.opt_state, state.batch_stats, metrics


@pytest.mark.full
def test_any_optimizer_takes_the_steps_of_apply_gradients():
    tx = optax.adamw(1e-2)
    *trained, metrics = train_imagenet(imagenet_step, make_imagenet(State, tx))
    *expected, their_metrics = train_imagenet(
        plain_imagenet_step, make_imagenet(PlainState, tx)
    )
    problems.assert_trees_equal(trained, expected)
    # The mean of losses with the penalty in each; theirs adds it to the mean.
    problems.assert_trees_close(metrics, their_metrics, rtol=1e-6, atol=0)


@methods
def test_linen_steps_are_those_of_the_functional_api(method):
    tx = METHODS[method](base())

    def functional_step(state, batch):
        def loss_fn(params, batch, batch_stats):
            variables = {"params": params, "batch_stats": batch_stats}
            logits, new = Net().apply(
                variables, batch["image"], mutable=["batch_stats"]
            )
            losses = cross_entropy(logits, batch["label"])
            penalty = sum(jnp.sum(x**2) for x in jax.tree.leaves(params) if x.ndim > 1)
            accuracy = jnp.mean(logits.argmax(-1) == batch["label"])
            return losses + 1e-4 * penalty, (new["batch_stats"], accuracy)

        step = optax_sam.value_and_update(loss_fn, tx, has_aux=True, axis_name="batch")
        (loss, (batch_stats, accuracy)), updates, opt_state = step(
            state.params, state.opt_state, batch, state.batch_stats
        )
        state = state.replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
            batch_stats=batch_stats,
        )
        return state, jax.lax.pmean({"loss": loss, "accuracy": accuracy}, "batch")

    problems.assert_trees_equal(
        train_imagenet(imagenet_step, make_imagenet(State, tx)),
        train_imagenet(functional_step, make_imagenet(PlainState, tx)),
    )


@pytest.mark.parametrize(
    "changed",
    [
        [(plain_mnist_loss_fn, mnist_loss_fn), (plain_mnist_step, mnist_step)],
        [(plain_decoder_loss_fn, decoder_loss_fn), (plain_decoder_step, decoder_step)],
        [(plain_imagenet_step, imagenet_step)],
    ],
    ids=["mnist", "decoder", "imagenet"],
)
def test_at_most_three_lines_become_others(changed):
    def lines(fn):
        return inspect.getsource(fn).replace("plain_", "").splitlines()

    texts = [difflib.ndiff(lines(old), lines(new)) for old, new in changed]
    new = [line for text in texts for line in text if line.startswith("+ ")]
    assert 0 < len(new) <= 3, new


class Stochastic(nnx.Module):
    """A parameter with a frozen one, beside what changes: draws and a count."""

    def __init__(self):
        self.w = nnx.Param(jnp.ones(3))
        self.frozen = nnx.BatchStat(jnp.full(3, 0.1))
        self.rngs = nnx.Rngs(0)
        self.seen = nnx.Variable(jnp.zeros([]))

    def __call__(self, x):
        self.seen[...] += len(x)
        noise = jax.random.normal(self.rngs(), (3,))
        return x @ (self.w * self.frozen) + noise.sum(), noise


def stochastic_loss_fn(model, x):
    prediction, noise = model(x)
    return prediction**2, noise


def take_step(
    loss_fn=stochastic_loss_fn,
    tx=None,
    has_aux=True,
    model=None,
    size=4,
    **options,
):
    """One step that is not compiled, on equal examples; returns value and model."""
    model = model or Stochastic()
    tx = tx or optax_sam.sam(optax.sgd(0.1), 0.1)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    step = nnx_value_and_update(loss_fn, has_aux=has_aux, **options)
    return step(model, optimizer, jnp.ones((size, 3))), model


# Between micro-batches draws may differ.
@pytest.mark.parametrize(
    "method", defaults([m for m in METHODS if m != "micro-batches"], ("sam",))
)
def test_draws_are_the_same_in_all_passes_and_advance_once(method):
    draws = []

    def loss_fn(model, x):
        losses, noise = stochastic_loss_fn(model, x)
        jax.debug.callback(draws.append, noise)
        return losses

    _, model = take_step(loss_fn, METHODS[method](base()), has_aux=False)
    jax.effects_barrier()
    assert len(draws) > 1
    for draw in draws:
        np.testing.assert_array_equal(draw, draws[0])
    assert model.rngs.default.count[...] == 1
    assert model.seen[...] == 4


def test_what_a_loss_does_not_assign_to_stays_as_it_is():
    model = Stochastic()
    before = model.frozen.get_raw_value(), model.rngs.default.key.get_raw_value()
    # A mean over three micro-batches would round.
    take_step(tx=optax_sam.m_sam(base(), 0.1, micro_batch_size=4), model=model, size=12)
    assert model.frozen.get_raw_value() is before[0]
    assert model.rngs.default.key.get_raw_value() is before[1]


def test_an_optimizer_that_takes_no_extra_arguments():
    _, model = take_step(tx=optax.scale(-1.0))
    _, other = take_step(tx=optax.sgd(1.0))
    np.testing.assert_array_equal(model.w[...], other.w[...])
    assert np.all(model.w[...] != 1)


def test_auxiliary_data_and_the_losses_of_the_ascent_and_of_scores():
    called = []

    def scoring_loss_fn(model, x):
        called.append("scoring")
        model.frozen = None  # It has a copy.
        return x @ model.w[...]

    def ascent_loss_fn(model, x):
        losses, noise = stochastic_loss_fn(model, x)
        return losses[:2], noise[:1]

    pattern = optax_sam.unstructured(0.5)
    tx = optax_sam.sparse_sam(base(), 0.1, pattern, refresh_every=1, num_examples=4)
    (value, aux), model = take_step(
        tx=tx, ascent_loss_fn=ascent_loss_fn, scoring_loss_fn=scoring_loss_fn
    )
    assert called
    assert aux.shape == (1,)
    (expected, noise), _ = take_step()
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_array_equal(aux, noise[:1])
    assert model.frozen[...].shape == (3,)


class Adapted(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.arange(3.0))
        self.adapter = nnx.LoRAParam(jnp.ones(3))

    def __call__(self, x):
        return x @ (self.w + self.adapter**2)


def test_a_loss_in_two_parts_is_that_of_the_functional_api():
    """Functional SAM, with dropout and batch statistics of an NNX model."""

    def outputs_fn(model, rngs, batch):
        logits = model(batch["image"], rngs)
        return logits, jnp.mean(logits.argmax(-1) == batch["label"])

    def of_outputs(logits, rngs, batch):
        assert isinstance(rngs, nnx.Rngs)
        return cross_entropy(logits, batch["label"])

    tx = optax_sam.sam(optax.sgd(1.0), 0.5)
    loss_fn = optax_sam.functional_loss(outputs_fn, of_outputs, has_aux=True)
    model, rngs = Classifier(rngs=nnx.Rngs(0)), nnx.Rngs(1)
    graph, params, rest = nnx.split((model, rngs), nnx.Param, ...)

    def arrays_fn(params, batch, rest):
        model, rngs = nnx.merge(graph, params, rest)
        return model(batch["image"], rngs)

    arrays_loss = optax_sam.functional_loss(
        arrays_fn, lambda logits, batch, rest: cross_entropy(logits, batch["label"])
    )
    update = jax.jit(optax_sam.value_and_update(arrays_loss, tx))
    arrays = nnx.as_pure((params, rest))
    value, updates, _ = update(arrays[0], tx.init(arrays[0]), BATCH, arrays[1])
    expected = jax.tree.leaves(optax.apply_updates(arrays[0], updates))

    step = nnx.jit(nnx_value_and_update(loss_fn, has_aux=True))
    found, accuracy = step(model, nnx.Optimizer(model, tx, wrt=nnx.Param), rngs, BATCH)
    np.testing.assert_allclose(found, value, rtol=1e-6)
    assert 0 <= accuracy <= 1
    assert rngs.default.count[...] == 1
    leaves = jax.tree.leaves(nnx.as_pure(nnx.state(model, nnx.Param)))
    problems.assert_trees_close(leaves, expected, rtol=1e-5, atol=1e-6)


def test_the_second_part_of_a_loss_keeps_no_changes():
    def of_outputs(logits, rngs, batch):
        noise = jax.random.normal(rngs.params(), logits.shape)
        return cross_entropy(logits + noise, batch["label"])

    loss_fn = optax_sam.functional_loss(
        lambda model, rngs, batch: model(batch["image"], rngs), of_outputs
    )
    model = Classifier(rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax_sam.sam(base(), 0.1), wrt=nnx.Param)
    with pytest.raises(ValueError, match="second part of loss_fn assigns"):
        nnx_value_and_update(loss_fn)(model, optimizer, nnx.Rngs(1), BATCH)
    with pytest.raises(ValueError, match="has_aux must be that which the loss was"):
        nnx_value_and_update(loss_fn, has_aux=True)(
            model, optimizer, nnx.Rngs(1), BATCH
        )


def test_the_optimizer_says_which_parameters_the_loss_is_differentiated_by():
    def make():
        model = Adapted()
        tx = optax_sam.sam(base(), 0.1)
        return model, nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)

    def loss_fn(model, x):
        return model(x) ** 2

    x = jnp.ones((4, 3))
    model, optimizer = make()
    nnx_value_and_update(loss_fn)(model, optimizer, x)
    by_hand, optimizer = make()
    graph, _, rest = nnx.split(by_hand, nnx.LoRAParam, ...)
    grad_fn = nnx.grad(
        lambda model: jnp.mean(loss_fn(model, x)),
        argnums=nnx.DiffState(0, nnx.LoRAParam),
    )
    optimizer.update(
        by_hand,
        grad_fn(by_hand),
        grad_fn=lambda params: grad_fn(nnx.merge(graph, params, rest)),
    )
    problems.assert_trees_close(
        *(nnx.as_pure(nnx.state(x)) for x in (model, by_hand)), rtol=1e-6
    )
    np.testing.assert_array_equal(model.w[...], jnp.arange(3.0))
    assert np.all(model.adapter[...] != 1)


def assigns(model, x):
    model.w[...] *= 2
    return stochastic_loss_fn(model, x)


def adds(model, x):
    model.last = nnx.Variable(x)
    return stochastic_loss_fn(model, x)


def mean(model, x):
    return jnp.mean(stochastic_loss_fn(model, x)[0])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss_fn": 1}, TypeError, "loss_fn must be a function"),
        ({"loss_fn": mean}, TypeError, "must return a pair"),
        ({"has_aux": False}, TypeError, "has_aux=True"),
        (
            {
                "loss_fn": mean,
                "has_aux": False,
                "tx": optax_sam.rw_sam(base(), 0.1, strength=0.1),
            },
            ValueError,
            "needs the loss of each example.*leave the mean",
        ),
        ({"loss_fn": assigns}, ValueError, "changes parameters"),
        ({"loss_fn": adds}, ValueError, "add variables before the step"),
        (
            {"model": nnx.Dropout(0.1)},
            ValueError,
            "must have parameters.*Param.*nnx.Optimizer",
        ),
    ],
)
def test_what_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        take_step(**options)


def test_an_optimizer_of_something_else_is_refused():
    model, other = Stochastic(), nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    step = nnx_value_and_update(stochastic_loss_fn, has_aux=True)
    for tx in (base(), optax_sam.sam(base(), 0.1)):
        optimizer = nnx.Optimizer(other, tx, wrt=nnx.Param)
        with pytest.raises(TypeError, match=r"of other parameters.*new nnx\.Opt"):
            step(model, optimizer, jnp.ones((4, 3)))
    for wrong in (model, nnx.ModelAndOptimizer(model, base())):
        with pytest.raises(TypeError, match=r"step\(model, optimizer, \*args\)"):
            step(model, wrong, jnp.ones((4, 3)))


def test_a_forgotten_batch_is_told_of():
    model = Classifier(rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, base(), wrt=nnx.Param)
    step = nnx_value_and_update(mnist_loss_fn, has_aux=True)
    with pytest.raises(TypeError, match="missing 1 required positional arg") as caught:
        step(model, optimizer, nnx.Rngs(1))
    message = "nnx_value_and_update: the step got no batch"
    assert any(message in note for note in caught.value.__notes__)


def test_messages_lead_to_the_step_of_the_model():
    model, x = Stochastic(), jnp.ones((4, 3))
    tx = optax_sam.sam(base(), 0.1)
    with pytest.raises(TypeError, match=r"uint32.*flax\.nnx_value_and_update"):
        optax_sam.value_and_update(stochastic_loss_fn, tx)(model, (), x)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = nnx.grad(mean)(model, x)
    for loss_fn in (lambda model, x: model(x), lambda model, x: model.eval()):
        with pytest.raises((TypeError, AttributeError), match="nnx_value_and_update"):
            optimizer.update(model, grads, loss_fn=loss_fn, batch=x)
    for kind in (TrainState, train_state.TrainState):
        state = kind.create(apply_fn=None, params={"w": x}, tx=tx)
        message = r"state\.apply_loss\(loss_fn, batch\) of optax_sam\.flax\.TrainState"
        with pytest.raises(ValueError, match=message):
            state.apply_gradients(grads={"w": x})
    with pytest.raises(TypeError, match=r"^TrainState\.apply_loss: loss_fn must be"):
        TrainState.create(apply_fn=None, params={"w": x}, tx=tx).apply_loss(x, mean)


@pytest.mark.parametrize("wrapped", [True, False])
def test_gradients_of_a_merged_model_are_as_good_as_those_of_arrays(wrapped):
    model = Stochastic()
    graph, params, rest = nnx.as_pure(nnx.split(model, nnx.Param, ...))
    tx = optax_sam.sam(base(), 0.1)

    def loss(model):
        return jnp.mean(stochastic_loss_fn(model, jnp.ones((4, 3)))[0])

    def grad_fn(params):
        gradient = nnx.grad(loss)(nnx.merge(graph, params, rest))
        assert isinstance(gradient["w"], nnx.Param)
        return gradient if wrapped else nnx.to_pure_dict(gradient)

    updates, _ = tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)
    _, expected = take_step(tx=tx)
    np.testing.assert_allclose(params["w"] + updates["w"], expected.w[...], rtol=1e-6)
