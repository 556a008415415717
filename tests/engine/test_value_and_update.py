"""The step of `value_and_update`: its losses, its value and what it passes on."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import optax_sam

PROBLEM = problems.perceptron()


def take(step, tx, params, *args):
    """A compiled step from the first state."""
    return jax.jit(lambda params, *args: step(params, tx.init(params), *args))(
        params, *args
    )


def test_loss_runs_once_per_pass():
    calls = []

    def loss_fn(params, batch):
        calls.append(params)
        return PROBLEM.loss_fn(params, batch)

    tx = optax_sam.sam(optax.sgd(0.1), 0.1)
    step = optax_sam.value_and_update(loss_fn, tx)
    state = jax.eval_shape(tx.init, PROBLEM.params)
    jax.eval_shape(step, PROBLEM.params, state, PROBLEM.batch)
    assert len(calls) == 2


def test_the_ascent_gets_the_losses_their_function_and_the_pullback():
    weights = np.arange(16, dtype=np.float32)
    params, loss_fn, batch = PROBLEM
    other = jax.tree.map(lambda x: x[:5], batch)
    calls = []

    def counted(params, batch):
        calls.append(params)
        return loss_fn(params, batch)

    def update_fn(updates, state, params, *, loss_fn, losses, pullback, **extra_args):
        before = len(calls)
        pulled = pullback(weights)
        assert len(calls) == before  # It runs no forward pass.
        return updates, (losses, loss_fn(params, other), pulled)

    ascent = optax.GradientTransformationExtraArgs(
        lambda params: (jnp.zeros(16), jnp.zeros(5), params), update_fn
    )
    tx = optax_sam.sharpness_aware(optax.sgd(0.1), ascent)
    step = optax_sam.value_and_update(counted, tx)
    losses, of_other, pulled = take(step, tx, params, batch)[2].ascent_state

    @jax.jit
    def expected(params):
        losses, vjp = jax.vjp(lambda p: loss_fn(p, batch), params)
        return losses, loss_fn(params, other), *vjp(weights)

    problems.assert_trees_close(
        (losses, of_other, pulled), expected(params), rtol=1e-5, atol=1e-5
    )


def test_aux_comes_from_the_clean_pass_and_later_arguments_go_to_both():
    keys = []

    def loss_fn(w, batch, key, statistics):
        keys.append(key)
        return jnp.sum(w) * batch, (w, statistics + 1)

    tx, w = optax_sam.sam(optax.sgd(0.1), rho=1.0), jnp.ones(3)
    step = optax_sam.value_and_update(loss_fn, tx, has_aux=True)
    (value, (clean, statistics)), _, _ = step(
        w, tx.init(w), jnp.ones(4), jnp.int32(7), 1.0
    )
    assert value.shape == ()
    np.testing.assert_array_equal(clean, w)
    assert statistics == 2.0
    assert [int(k) for k in keys] == [7, 7]


def test_value_is_accumulated_in_float32():
    problem = problems.quadratic(jnp.float16)
    loss_fn = lambda p, b: problem.loss_fn(p, b) * 0 + 60_000.0  # noqa: E731
    tx = optax.sgd(0.1)
    step = optax_sam.value_and_update(loss_fn, tx)
    value, _, _ = take(step, tx, problem.params, problem.batch)
    assert value.dtype == jnp.float32
    assert value == np.float16(60_000.0)


def test_without_a_batch():
    tx = optax_sam.sam(optax.sgd(0.1), rho=0.1)
    step = optax_sam.value_and_update(lambda w: jnp.sum(w**2), tx)
    value, updates, _ = take(step, tx, np.float32([3, 4]))
    assert value == 25.0
    np.testing.assert_allclose(updates, [-0.612, -0.816], rtol=1e-5)


def test_pullback_takes_float32_weights_for_losses_in_half_precision():
    problem, dtypes = problems.perceptron(jnp.bfloat16), set()

    def update_fn(updates, state, params=None, *, pullback, **extra_args):
        dtypes.add(pullback(np.ones(16, np.float32))["w0"].dtype)
        return updates, state

    ascent = optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)
    tx = optax_sam.sharpness_aware(optax.sgd(0.1), ascent)
    step = optax_sam.value_and_update(problem.loss_fn, tx)
    state = jax.eval_shape(tx.init, problem.params)
    jax.eval_shape(step, problem.params, state, problem.batch)
    assert dtypes == {jnp.dtype(jnp.bfloat16)}


def test_the_ascent_reads_the_gradient_of_its_own_loss():
    """And the perturbed pass that of loss_fn; auxiliary data are the clean pass's."""

    def loss_fn(w, batch, scale):
        return scale * jnp.sum((w[None] - batch) ** 2, -1) / 2, "of loss_fn"

    def ascent_loss_fn(w, batch, scale):
        # Another gradient, (0, 1), and another number of examples.
        return loss_fn(w, batch, scale)[0][:1] * 0 + w[1], jnp.float32(7)

    tx = optax_sam.sam(optax.sgd(1.0), rho=0.5)
    step = optax_sam.value_and_update(
        loss_fn, tx, has_aux=True, ascent_loss_fn=ascent_loss_fn
    )
    w, batch = np.float32([3, 4]), np.float32([[1, 1], [1, 3]])
    (value, aux), updates, _ = take(step, tx, w, batch, 2.0)
    assert (value, aux) == (4.0, 7.0)
    # The gradient at (3, 4.5) of both examples, whose mean is (1, 2), times the scale.
    np.testing.assert_allclose(updates, [-4.0, -5.0], rtol=1e-6)


@pytest.mark.parametrize("name", ["loss_fn", "ascent_loss_fn", "scoring_loss_fn"])
def test_losses_that_are_no_functions(name):
    functions = {"loss_fn": PROBLEM.loss_fn, name: 3}
    with pytest.raises(TypeError, match=f"value_and_update: {name} must be a function"):
        optax_sam.value_and_update(tx=optax.sgd(0.1), **functions)


@pytest.mark.parametrize("name", ["loss_fn", "ascent_loss_fn", "scoring_loss_fn"])
def test_messages_name_the_function_that_was_called(name):
    """Whose losses of the single examples are wrong, or are not those."""
    link = optax_sam.sparsify_by_fisher(optax_sam.n_m(1, 2), refresh_every=1)
    if name == "ascent_loss_fn":
        link = optax_sam.reweight_by_sharpness(0.1, key=0)
    radius = optax_sam.scale_to_radius(0.1)
    tx = optax_sam.sharpness_aware(optax.sgd(0.1), optax.chain(link, radius))

    def step(losses_of, **kwargs):
        functions = {"loss_fn": PROBLEM.loss_fn, name: losses_of}
        step = optax_sam.value_and_update(tx=tx, **functions, **kwargs)
        state = jax.eval_shape(tx.init, PROBLEM.params)
        return jax.eval_shape(step, PROBLEM.params, state, PROBLEM.batch)

    with pytest.raises(ValueError, match=rf"each example.* and {name} returned .*mean"):
        step(lambda p, b: jnp.mean(PROBLEM.loss_fn(p, b)))
    with pytest.raises(TypeError, match=f": {name} must return a JAX array.*tuple"):
        step(lambda p, b: (PROBLEM.loss_fn(p, b), 0))


def test_auxiliary_data_of_a_scoring_loss():
    pattern = optax_sam.n_m(1, 2)
    tx = optax_sam.sparse_sam(optax.sgd(0.1), 0.1, pattern, refresh_every=1)

    def with_aux(params, batch):
        return PROBLEM.loss_fn(params, batch), 0

    step = optax_sam.value_and_update(
        with_aux, tx, has_aux=True, scoring_loss_fn=with_aux
    )
    state = jax.eval_shape(tx.init, PROBLEM.params)
    with pytest.raises(TypeError, match=r"scoring_loss_fn must.* no auxiliary data"):
        jax.eval_shape(step, PROBLEM.params, state, PROBLEM.batch)


def test_a_base_gets_no_scoring_loss_it_does_not_name():
    seen = []

    def update(updates, state, params, **extra_args):
        seen.append(extra_args)
        return updates, state

    base = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    tx = optax_sam.sam(base, 0.1)
    step = optax_sam.value_and_update(
        PROBLEM.loss_fn, tx, scoring_loss_fn=PROBLEM.loss_fn
    )
    state = jax.eval_shape(tx.init, PROBLEM.params)
    jax.eval_shape(step, PROBLEM.params, state, PROBLEM.batch)
    assert "value" in seen[0]
    assert "scoring_loss_fn" not in seen[0]
