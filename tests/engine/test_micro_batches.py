"""Micro-batches that ascend each for itself, whatever is in the chain."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from methods import HALF, cover, defaults

import optax_sam

SIZE, BATCH = 4, 16
ASCENTS = {
    "sam": lambda: optax_sam.scale_to_radius(0.1),
    "vasso": lambda: optax.chain(
        optax_sam.suppress_variance(0.4), optax_sam.scale_to_radius(0.1)
    ),
    "rw_sam": lambda: optax.chain(
        optax_sam.reweight_by_sharpness(0.3, key=0, estimator="jvp"),
        optax_sam.scale_to_radius(0.1),
    ),
    "fisher": lambda: optax.chain(
        optax_sam.scale_to_radius(0.1),
        optax_sam.sparsify_by_fisher(optax_sam.unstructured(0.5), refresh_every=2),
    ),
    "dynamic": lambda: optax.chain(
        optax_sam.scale_to_radius(0.1),
        optax_sam.sparsify_dynamically(0.5, refresh_every=2, decay_steps=10, key=0),
    ),
    "adam": lambda: optax.chain(optax.scale_by_adam(), optax_sam.scale_to_radius(0.1)),
}


def perceptron(dtype=jnp.float64):
    return problems.perceptron(dtype, batch_size=BATCH)


loss_fn = problems.perceptron().loss_fn


@functools.cache
def make_step(name, size=None, at_once=1, **kwargs):
    """An optimizer whose update is minus the perturbed gradient, and its step."""
    tx = optax_sam.sharpness_aware(
        optax.apply_if_finite(optax.sgd(1.0), 3),
        ASCENTS[name](),
        micro_batch_size=size,
        micro_batches_at_once=at_once,
    )
    return tx, jax.jit(optax_sam.value_and_update(loss_fn, tx, **kwargs))


def one_step(made, params, batch, state=None):
    """The update and the state after a step."""
    tx, step = made
    _, updates, state = step(params, tx.init(params) if state is None else state, batch)
    return updates, state


def mean_of_micro_batches(made, params, batch, state=None):
    """The mean of the updates by each micro-batch alone."""
    micro_batches = (
        jax.tree.map(lambda x, j=j: x[j : j + SIZE], batch)
        for j in range(0, BATCH, SIZE)
    )
    updates = [one_step(made, params, part, state)[0] for part in micro_batches]
    return jax.tree.map(lambda *x: np.mean(x, axis=0), *updates)


@pytest.mark.usefixtures("x64")
@cover(
    name=ASCENTS.keys(),
    at_once=[1, None, 2],
    default=("sam-2", "vasso-None"),
)
def test_base_descends_along_the_mean_of_what_micro_batches_ascend_to(name, at_once):
    params, _, (x, labels) = perceptron()
    plain, micro = make_step(name), make_step(name, SIZE, at_once)
    # A state that has seen another batch, as the first is special to some ascents.
    _, state = one_step(plain, params, (0.5 * x, labels))
    updates, after = one_step(micro, params, (x, labels), state)
    mean = mean_of_micro_batches(plain, params, (x, labels), state)
    problems.assert_trees_close(updates, mean, rtol=1e-9, atol=1e-12)

    # And the state advances along the whole batch.
    whole, expected = one_step(plain, params, (x, labels), state)
    states = map(problems.without_losses, (after, expected))
    problems.assert_trees_close(*states, rtol=1e-6, atol=1e-12)
    difference = jax.tree.map(np.subtract, updates, whole)
    assert problems.norm(difference) > 1e-4 * problems.norm(whole)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("at_once", defaults([1, None], [1]))
def test_micro_batches_share_the_mask_of_the_whole_batch(at_once):
    """In the very step that makes it."""
    params, _, batch = perceptron()
    updates, state = one_step(make_step("fisher", SIZE, at_once), params, batch)
    plain = make_step("fisher")
    _, expected = one_step(plain, params, batch)
    problems.assert_trees_equal(state.ascent_state[1], expected.ascent_state[1])
    # The next step makes none.
    mean = mean_of_micro_batches(plain, params, batch, expected)
    problems.assert_trees_close(updates, mean, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", defaults(["sam", "vasso", "fisher"], ["sam"]))
def test_one_micro_batch_is_the_whole_batch_bit_for_bit(name):
    params, _, batch = perceptron(jnp.float32)
    state, expected = None, None
    for _ in range(3):
        updates, state = one_step(make_step(name, BATCH), params, batch, state)
        whole, expected = one_step(make_step(name), params, batch, expected)
        problems.assert_trees_equal((updates, state), (whole, expected))
        params = jax.tree.map(np.add, params, updates)


def test_m_sam_is_sam_in_micro_batches():
    params, _, batch = perceptron(jnp.float32)
    tx = optax_sam.m_sam(optax.sgd(1.0), optax.constant_schedule(0.1), SIZE)
    m_sam = tx, jax.jit(optax_sam.value_and_update(loss_fn, tx))
    updates, _ = one_step(m_sam, params, batch)
    expected, _ = one_step(make_step("sam", SIZE), params, batch)
    problems.assert_trees_equal(updates, expected)


@cover(dtype=HALF, at_once=[1, None])
def test_means_are_taken_in_float32(dtype, at_once):
    """A large gradient beside 15 small ones, which half precision would lose."""
    gradients = np.array([256.0] + 15 * [0.1], dtype)
    tx = optax_sam.m_sam(optax.sgd(1.0), 0.1, 1, micro_batches_at_once=at_once)
    step = jax.jit(optax_sam.value_and_update(lambda w, g: g * w, tx))
    params = np.zeros((), dtype)
    _, updates, _ = step(params, tx.init(params), gradients)
    assert updates.dtype == dtype
    mean = np.mean(gradients.astype(np.float32))
    assert updates == -mean.astype(dtype)
    assert updates != -gradients[0] / 16


@cover(
    name=["sam", "vasso", "rw_sam", "fisher"],
    bad_at_once=[(np.inf, 1), (np.nan, None)],
    default=("sam-(nan, None)", "vasso-(inf, 1)"),
)
def test_a_bad_micro_batch_leaves_the_state_as_it_was(name, bad_at_once):
    bad, at_once = bad_at_once
    params, _, (x, labels) = perceptron(jnp.float32)
    micro = make_step(name, SIZE, at_once)
    _, state = one_step(micro, params, (x, labels))
    updates, after = one_step(
        micro, params, (problems.replaced(x, 5, bad), labels), state
    )
    assert problems.norm(updates) == 0
    assert after.base_state.total_notfinite == 1
    problems.assert_trees_equal(after.ascent_state, state.ascent_state)


def test_a_micro_batch_without_a_gradient_is_not_perturbed():
    problem = problems.quadratic()
    # The first half of the batch has its minimum where the parameters are.
    batch = jax.tree.map(
        lambda x, w: problems.replaced(x, slice(4), np.broadcast_to(w, x[:4].shape)),
        problem.batch,
        problem.params,
    )
    second = jax.tree.map(lambda x: x[4:], batch)

    def update(tx, batch):
        step = optax_sam.value_and_update(problem.loss_fn, tx)
        return jax.jit(step)(problem.params, tx.init(problem.params), batch)[1]

    got = update(optax_sam.m_sam(optax.sgd(1.0), 0.5, 4), batch)
    expected = update(optax_sam.sam(optax.sgd(0.5), 0.5), second)
    problems.assert_trees_close(got, expected, rtol=1e-5, atol=1e-7)


def with_aux(params, batch):
    losses = loss_fn(params, batch)
    large = losses > 1.5
    kinds = {"largest": jnp.max(losses), "losses": losses, "large": large}
    half = losses.astype(jnp.bfloat16).min()
    return losses, kinds | {"count": jnp.sum(large), "half": half, "none": None, "": 1}


def value_and_aux(tx, transform=jax.jit):
    params, _, batch = perceptron(jnp.float32)
    step = transform(optax_sam.value_and_update(with_aux, tx, has_aux=True))
    return step(params, tx.init(params), batch)[0]


def expected_value_and_aux():
    """Means of floats, but what is of single examples, or no float, of the batch."""
    params, _, batch = perceptron(jnp.float32)
    losses, aux = jax.jit(with_aux)(params, batch)
    parts = losses.reshape(-1, SIZE)
    half = parts.astype(jnp.bfloat16).min(axis=1).astype(jnp.float32)
    means = {"largest": parts.max(axis=1).mean(), "half": half.mean()}
    means["half"] = means["half"].astype(jnp.bfloat16)
    return (losses.mean(), aux | means), (losses.mean(), aux)


@pytest.mark.parametrize("at_once", defaults([1, 2, None], [2]))
@pytest.mark.parametrize("transform", [jax.jit, lambda step: step])
def test_value_and_aux_are_those_of_the_micro_batches(at_once, transform):
    tx = optax_sam.m_sam(optax.sgd(0.1), 0.1, SIZE, micro_batches_at_once=at_once)
    means, whole = expected_value_and_aux()
    problems.assert_trees_close(value_and_aux(tx, transform), means, rtol=1e-5)
    whole_batch = optax_sam.m_sam(optax.sgd(0.1), 0.1, BATCH)
    problems.assert_trees_close(value_and_aux(whole_batch), whole, rtol=1e-5)


def m_sam(rho=0.1, base=None):
    return optax_sam.m_sam(optax.sgd(0.1) if base is None else base, rho, SIZE)


@cover(
    tx={
        "chain": optax.chain(optax.identity(), optax.chain(m_sam())),
        "inject_hyperparams": optax.inject_hyperparams(m_sam)(rho=0.1),
        "MultiSteps inside": m_sam(base=optax.MultiSteps(optax.sgd(0.1), 2)),
    },
    default=("chain", "inject_hyperparams"),
)
def test_wrappers_hand_value_and_aux_on(tx):
    means, _ = expected_value_and_aux()
    problems.assert_trees_close(value_and_aux(tx), means, rtol=1e-5)


@pytest.mark.parametrize(
    "wrap",
    [lambda tx: optax.MultiSteps(tx, 1), lambda tx: optax.apply_if_finite(tx, 3)],
)
def test_from_a_branch_value_and_aux_are_those_of_the_whole_batch(wrap):
    _, whole = expected_value_and_aux()
    with pytest.warns(UserWarning, match="around a sharpness-aware optimizer"):
        found = value_and_aux(wrap(m_sam()))
    problems.assert_trees_close(found, whole, rtol=1e-5)


def noisy_loss(params, batch, drawing):
    """With dropout, and what draws beside what does not."""
    x, labels = batch
    for key in drawing["keys"]:
        x *= jax.random.bernoulli(key, drawing["rate"], x.shape)
    return loss_fn(params, (x, labels))


def drawing(keys):
    return {"keys": keys, "rate": np.float64(0.7)}


def folded(keys, number):
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


TYPED = jax.random.split(jax.random.key(3), 2)


@pytest.mark.usefixtures("x64")
@cover(
    name=["sam", "rw_sam", "fisher"],
    at_once=[1, 2, None],
    default=("rw_sam-2", "fisher-None"),
)
def test_micro_batches_draw_for_themselves_and_the_same_in_both_passes(name, at_once):
    params, _, batch = perceptron()

    def made(size=None, at_once=1):
        tx, _ = make_step(name, size, at_once)
        step = jax.jit(optax_sam.value_and_update(noisy_loss, tx))
        return lambda state, *args: step(params, state, *args), tx.init(params)

    (whole, state), (micro, _) = made(), made(SIZE, at_once)
    _, _, after = whole(state, batch, drawing(TYPED))
    value, updates, _ = micro(state, batch, drawing(TYPED))
    # A mask that is made in this step is that of the whole batch, by its own draws.
    state = after if name == "fisher" else state
    alone = [
        whole(
            state,
            jax.tree.map(lambda x, j=j: x[j * SIZE : (j + 1) * SIZE], batch),
            drawing(folded(TYPED, j)),
        )[:2]
        for j in range(BATCH // SIZE)
    ]
    mean = jax.tree.map(lambda *x: np.mean(x, axis=0), *alone)
    problems.assert_trees_close((value, updates), mean, rtol=1e-9, atol=1e-12)


def test_the_only_micro_batch_draws_as_the_whole_batch():
    params, _, batch = perceptron(jnp.float32)
    sam = optax_sam.sam(optax.sgd(1.0), 0.1)
    micro = optax_sam.m_sam(optax.sgd(1.0), 0.1, BATCH)
    got, expected = (
        jax.jit(optax_sam.value_and_update(noisy_loss, tx))(
            params, tx.init(params), batch, drawing(TYPED)
        )[:2]
        for tx in (micro, sam)
    )
    problems.assert_trees_equal(got, expected)


def test_raw_keys_are_left_alone():
    seen = []

    def loss_fn(params, batch, key):
        jax.debug.callback(lambda key: seen.append(key.tolist()), key)
        return params * batch

    step = optax_sam.value_and_update(loss_fn, m_sam())
    w, raw = jnp.float32(1), jnp.array([1, 2], jnp.uint32)
    jax.block_until_ready(step(w, m_sam().init(w), jnp.arange(1.0, 9.0), raw))
    jax.effects_barrier()
    assert seen == len(seen) * [[1, 2]]


@pytest.mark.usefixtures("x64")
def test_the_base_gets_what_the_micro_batches_found():
    names = "value", "losses", "grad"

    def update_fn(updates, state, params=None, *, value, losses, grad):
        return updates, dict(zip(names, (value, losses, grad), strict=True))

    params, _, batch = perceptron()
    spy = optax.GradientTransformationExtraArgs(
        lambda p: {"value": 0.0, "losses": jnp.zeros(BATCH), "grad": p}, update_fn
    )
    tx = m_sam(base=spy)
    step = optax_sam.value_and_update(noisy_loss, tx)
    state = tx.init(params)
    value, _, state = jax.jit(step)(params, state, batch, drawing(TYPED))

    def losses_of(params, j):
        part = jax.tree.map(lambda x: x[j * SIZE : (j + 1) * SIZE], batch)
        return noisy_loss(params, part, drawing(folded(TYPED, j)))

    @jax.jit
    def expected(params):
        def clean(params):
            losses = jnp.concatenate([losses_of(params, j) for j in range(4)])
            return losses.mean(), losses

        (value, losses), grad = jax.value_and_grad(clean, has_aux=True)(params)
        return {"value": value, "losses": losses, "grad": grad}

    problems.assert_trees_close(state.base_state, expected(params), rtol=1e-9)
    assert value == state.base_state["value"]


@pytest.mark.parametrize(
    ("losses", "size", "returned"),
    [
        (lambda errors: errors, 1, r"\[8\]; only its first .* \(x, y\)"),
        (lambda errors: jnp.mean(errors), 1, r"\[\]; leave the mean"),
        (lambda errors: errors[:, None] + errors[None], 4, r"\[4, 4\]; only its"),
    ],
)
def test_losses_that_are_not_those_of_the_micro_batch(losses, size, returned):
    """As where `loss_fn(params, x, y)` is given `y` of the whole batch."""

    def loss_fn(w, x, y):
        errors = (w * x - (y if size == 1 else 0)) ** 2
        return losses(errors) if errors.size == size or size == 1 else errors

    tx, w = optax_sam.m_sam(optax.sgd(0.1), 0.1, size), jnp.float32(1)
    step = optax_sam.value_and_update(loss_fn, tx)
    message = rf"^m_sam: .*, shape \[{size}\], and loss_fn returned shape {returned}"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(step, w, tx.init(w), jnp.ones(8), jnp.ones(8))


def test_an_error_of_a_loss_says_that_it_was_called_with_a_part_of_the_batch():
    tx, w = optax_sam.m_sam(optax.sgd(0.1), 0.1, 4), jnp.float32(1)
    x, y = jnp.ones((8, 1)), jnp.ones((8, 1))
    state = tx.init(w)
    note = r"m_sam: loss_fn was called with 4 of the 8 .* such as \(x, y\)"
    step = optax_sam.value_and_update(lambda w, x, y: jnp.sum(w * x - y, -1), tx)
    with pytest.raises(TypeError, match=note):
        jax.eval_shape(step, w, state, x, y)
    update = functools.partial(tx.update, loss_fn=lambda w, x: jnp.sum(w * x - y, -1))
    with pytest.raises(TypeError, match=note):
        jax.eval_shape(lambda: update(w, state, w, batch=x))

    def wrong(w, x):
        raise TypeError("wrong")

    with pytest.raises(TypeError, match="wrong") as caught:
        jax.eval_shape(optax_sam.value_and_update(wrong, tx), w, state, x)
    assert "examples" not in "".join(getattr(caught.value, "__notes__", []))


def of_first_half(params, batch):
    return loss_fn(params, jax.tree.map(lambda x: x[: len(x) // 2], batch))


@pytest.mark.usefixtures("x64")
def test_micro_batches_ascend_by_the_loss_of_the_ascent():
    params, _, batch = perceptron()
    kwargs = {"ascent_loss_fn": of_first_half}
    updates, _ = one_step(make_step("sam", SIZE, **kwargs), params, batch)
    mean = mean_of_micro_batches(make_step("sam", **kwargs), params, batch)
    problems.assert_trees_close(updates, mean, rtol=1e-9, atol=1e-12)


@pytest.mark.full
def test_ascents_are_told_of_their_own_clean_pass():
    params, _, batch = perceptron(jnp.float32)
    seen = []

    def update_fn(updates, state, params=None, **extra_args):
        names = "batch", "scoring_batch", "losses", "value", "grad"
        told = {name: extra_args[name] for name in names} | {"updates": updates}
        jax.debug.callback(lambda **told: seen.append(told), **told)
        return updates, state

    spy = optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)
    tx = optax_sam.sharpness_aware(
        optax.sgd(0.1), spy, micro_batch_size=BATCH // 2, micro_batches_at_once=1
    )
    with jax.disable_jit():  # The scan is a loop in Python.
        optax_sam.value_and_update(loss_fn, tx)(params, tx.init(params), batch)
    first = next(s for s in seen if s["losses"].size == BATCH // 2)
    half = jax.tree.map(lambda x: x[: BATCH // 2], batch)
    problems.assert_trees_equal(first["batch"], half)
    problems.assert_trees_equal(first["scoring_batch"], batch)
    np.testing.assert_allclose(first["losses"], loss_fn(params, half), rtol=1e-6)
    np.testing.assert_allclose(first["value"], first["losses"].mean(), rtol=1e-6)
    problems.assert_trees_equal(first["grad"], first["updates"])
    whole = seen[-1]
    assert whole["losses"].size == BATCH
    problems.assert_trees_equal(whole["scoring_batch"], batch)


def test_leaves_of_the_batch_of_any_kind():
    params, _, (x, labels) = perceptron(jnp.float32)
    keys = jax.random.split(jax.random.key(0), BATCH)

    def noisy_loss(params, batch):
        noise = jax.vmap(lambda key: jax.random.normal(key, (6,)))(batch["keys"])
        return loss_fn(params, (batch["x"] + 0.1 * noise, batch["labels"]))

    def updates(size, host):
        tx = optax_sam.m_sam(optax.sgd(1.0), 0.0, size)
        step = optax_sam.value_and_update(noisy_loss, tx)
        batch = {"x": host(x), "labels": host(labels), "keys": keys, "none": None}
        return jax.jit(step)(params, tx.init(params), batch)[1]

    # Without a perturbation, the size of a micro-batch changes nothing.
    whole = updates(BATCH, jnp.asarray)
    problems.assert_trees_close(updates(SIZE, np.asarray), whole, rtol=1e-5, atol=1e-6)


def test_by_hand_the_clean_gradient_is_not_read():
    params, _, batch = perceptron(jnp.float32)
    tx, _ = make_step("sam", SIZE)

    @jax.jit
    def update(grads, params):
        return tx.update(
            grads,
            tx.init(params),
            params,
            loss_fn=loss_fn,
            batch=batch,
        )[0]

    nowhere = jax.tree.map(lambda p: np.full_like(p, np.nan), params)
    updates = update(nowhere, params)
    through, _ = one_step(make_step("sam", SIZE), params, batch)
    problems.assert_trees_close(updates, through, rtol=1e-5, atol=1e-7)


def run(problem, batch, size=SIZE, **micro):
    """Takes a step without running it."""
    tx = optax_sam.m_sam(optax.sgd(0.1), 0.1, size, **micro)
    step = optax_sam.value_and_update(problem.loss_fn, tx)
    state = tx.init(problem.params)
    return jax.make_jaxpr(step)(problem.params, state, batch)


@pytest.mark.parametrize(
    ("size", "micro", "match"),
    [
        (5, {}, r"= 5 does not divide the 16 .* one of \[1, 2, 4, 8, 16\]"),
        (32, {}, "= 32 does not divide the 16 examples of the batch"),
        (4, {"micro_batches_at_once": 3}, "= 3 does not divide the 4 micro-batches"),
    ],
)
def test_sizes_that_do_not_divide(size, micro, match):
    problem = problems.perceptron()
    with pytest.raises(ValueError, match=match):
        run(problem, problem.batch, size, **micro)


def test_more_at_once_than_there_are_is_all():
    problem = problems.perceptron()
    all_at_once, more = (
        str(run(problem, problem.batch, micro_batches_at_once=n)) for n in (None, 100)
    )
    addresses = re.compile("0x[0-9a-f]+")
    assert addresses.sub("", more) == addresses.sub("", all_at_once)


def test_batches_that_cannot_be_cut():
    problem = problems.perceptron()

    def loss_fn(params, batch):
        return problem.loss_fn(params, batch["examples"])

    leafy = problem._replace(loss_fn=loss_fn)
    x, labels = problem.batch
    with pytest.raises(ValueError, match=r"batch\['t'\] is a scalar"):
        run(leafy, {"examples": (x, labels), "t": jnp.float32(1)})
    with pytest.raises(ValueError, match=r"got lengths \[3, 16\]"):
        run(leafy, {"examples": (x, labels), "extra": jnp.ones(3)})
    constant = problem._replace(loss_fn=lambda p, b: problem.loss_fn(p, (x, labels)))
    with pytest.raises(ValueError, match=r"^m_sam: no batch was passed"):
        run(constant, ())


def test_grad_fn_cannot_see_micro_batches():
    problem = problems.perceptron()
    tx = optax_sam.m_sam(optax.sgd(0.1), 0.1, SIZE)
    with pytest.raises(ValueError, match=r"grad_fn.*pass loss_fn and batch"):
        tx.update(
            problem.params,
            tx.init(problem.params),
            problem.params,
            grad_fn=lambda params: params,
        )


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"micro_batch_size": 0}, ValueError, "micro_batch_size = 0 is out of range"),
        ({"micro_batch_size": 2.0}, TypeError, "micro_batch_size must be an integer"),
        ({"micro_batch_size": True}, TypeError, "must be an integer >= 1, got True"),
        ({"micro_batch_size": None}, TypeError, "must be an integer >= 1, got None"),
        (
            {"micro_batch_size": 4, "micro_batches_at_once": 0},
            ValueError,
            "micro_batches_at_once = 0 is out of range",
        ),
    ],
)
def test_bad_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        optax_sam.m_sam(optax.sgd(0.1), 0.1, **arguments)
