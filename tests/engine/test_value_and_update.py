"""The step of `value_and_update`: its losses, its value and what it passes on."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import optax_sam

PROBLEM = problems.perceptron()


def test_loss_runs_once_per_pass_and_the_ascent_gets_the_pullback():
    calls = []
    ascent, seen = problems.recorder()

    def loss_fn(params, batch):
        calls.append(params)
        return PROBLEM.loss_fn(params, batch)

    tx = optax_sam.sharpness_aware(optax.sgd(0.1), ascent)
    step = optax_sam.value_and_update(loss_fn, tx)
    step(PROBLEM.params, tx.init(PROBLEM.params), PROBLEM.batch)
    assert len(calls) == 2
    extra = seen["extra_args"]
    np.testing.assert_array_equal(
        extra["losses"], PROBLEM.loss_fn(PROBLEM.params, PROBLEM.batch)
    )
    other = jax.tree.map(lambda x: x[:5], PROBLEM.batch)
    np.testing.assert_array_equal(
        extra["loss_fn"](PROBLEM.params, other), PROBLEM.loss_fn(PROBLEM.params, other)
    )
    weights = jnp.arange(16.0)
    expected = jax.grad(lambda p: jnp.sum(weights * PROBLEM.loss_fn(p, PROBLEM.batch)))(
        PROBLEM.params
    )
    problems.assert_trees_close(
        extra["pullback"](weights), expected, rtol=1e-5, atol=1e-5
    )
    assert len(calls) == 3  # One for `other`. Pulling back runs no forward pass.


def test_aux_comes_from_the_clean_pass_and_later_arguments_go_to_both():
    keys = []

    def loss_fn(params, batch, key, statistics):
        keys.append(key)
        return PROBLEM.loss_fn(params, batch), (params["b0"], statistics + 1)

    tx = optax_sam.sam(optax.sgd(0.1), rho=1.0)
    step = optax_sam.value_and_update(loss_fn, tx, has_aux=True)
    (value, (bias, statistics)), _, _ = step(
        PROBLEM.params, tx.init(PROBLEM.params), PROBLEM.batch, jnp.int32(7), 1.0
    )
    assert value.shape == ()
    np.testing.assert_array_equal(bias, PROBLEM.params["b0"])
    assert statistics == 2.0
    assert [int(k) for k in keys] == [7, 7]


def test_value_is_accumulated_in_float32():
    problem = problems.quadratic(jnp.float16)
    loss_fn = lambda p, b: problem.loss_fn(p, b) * 0 + 60_000.0  # noqa: E731
    step = optax_sam.value_and_update(loss_fn, optax.sgd(0.1))
    value, _, _ = step(
        problem.params, optax.sgd(0.1).init(problem.params), problem.batch
    )
    assert value.dtype == jnp.float32
    assert value == np.float16(60_000.0)


def test_without_a_batch():
    step = optax_sam.value_and_update(
        lambda w: jnp.sum(w**2), tx := optax_sam.sam(optax.sgd(0.1), rho=0.1)
    )
    value, updates, _ = step(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))
    assert value == 25.0
    np.testing.assert_allclose(updates, [-0.612, -0.816], rtol=1e-5)


def test_pullback_takes_float32_weights_for_losses_in_half_precision():
    problem = problems.perceptron(jnp.bfloat16)
    ascent, seen = problems.recorder()
    tx = optax_sam.sharpness_aware(optax.sgd(0.1), ascent)
    step = optax_sam.value_and_update(problem.loss_fn, tx)
    step(problem.params, tx.init(problem.params), problem.batch)
    gradient = seen["extra_args"]["pullback"](jnp.ones(16, jnp.float32))
    assert gradient["w0"].dtype == jnp.bfloat16


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
    w, batch = jnp.array([3.0, 4.0]), jnp.array([[1.0, 1.0], [1.0, 3.0]])
    (value, aux), updates, _ = jax.jit(step)(w, tx.init(w), batch, 2.0)
    assert (value, aux) == (4.0, 7.0)
    # The gradient at (3, 4.5) of both examples, whose mean is (1, 2), times the scale.
    np.testing.assert_allclose(updates, [-4.0, -5.0], rtol=1e-6)


@pytest.mark.parametrize("name", ["loss_fn", "ascent_loss_fn", "scoring_loss_fn"])
def test_losses_that_are_no_functions(name):
    functions = {"loss_fn": PROBLEM.loss_fn, name: 3}
    with pytest.raises(TypeError, match=f"value_and_update: {name} must be a function"):
        optax_sam.value_and_update(tx=optax.sgd(0.1), **functions)


def test_a_base_gets_no_scoring_loss_it_does_not_name():
    seen = []

    def update(updates, state, params, **extra_args):
        seen.append(extra_args)
        return updates, state

    base = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    step = optax_sam.value_and_update(
        PROBLEM.loss_fn, optax_sam.sam(base, 0.1), scoring_loss_fn=PROBLEM.loss_fn
    )
    step(PROBLEM.params, optax_sam.sam(base, 0.1).init(PROBLEM.params), PROBLEM.batch)
    assert "value" in seen[0]
    assert "scoring_loss_fn" not in seen[0]
