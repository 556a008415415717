import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from methods import cover, defaults

import optax_sam


def recorder():
    """A transformation that keeps what its update got."""
    seen = {}

    def update_fn(updates, state, params=None, **extra_args):
        seen.update(updates=updates, params=params, extra_args=extra_args)
        return updates, state

    tx = optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)
    return tx, seen


def by_hand(tx, problem, **extra_args):
    """The first update and the state after it, compiled as one."""

    @jax.jit
    def update(grads, params):
        return tx.update(grads, tx.init(params), params, **extra_args)

    return update(problems.gradient(problem), problem.params)


PROBLEM = problems.perceptron()
LOSS = {"loss_fn": PROBLEM.loss_fn, "batch": PROBLEM.batch}


def test_descends_along_the_gradient_at_the_perturbed_point():
    keep_params = optax.GradientTransformation(lambda p: p, lambda u, s, p: (u, p))
    updates, state = by_hand(optax_sam.sam(keep_params, rho=0.5), PROBLEM, **LOSS)
    clean = problems.gradient(PROBLEM)
    length = np.float32(0.5 / problems.norm(clean))
    point = jax.tree.map(lambda p, g: p + length * g, PROBLEM.params, clean)
    expected = problems.gradient(PROBLEM._replace(params=point))
    problems.assert_trees_close(updates, expected, rtol=1e-4, atol=1e-6)
    problems.assert_trees_equal(state.base_state, PROBLEM.params)


@pytest.mark.parametrize("method", defaults(["sam", "asam", "vasso"], ["sam", "asam"]))
def test_the_three_ways_to_call_agree(method):
    hyperparameters = {"rho": 0.1} | ({"theta": 0.5} if method == "vasso" else {})
    tx = getattr(optax_sam, method)(optax.sgd(0.1), **hyperparameters)
    updates, state = by_hand(tx, PROBLEM, **LOSS)
    grad_fn = jax.grad(problems.mean_loss(PROBLEM))
    with_grad_fn, _ = by_hand(tx, PROBLEM, grad_fn=grad_fn)
    problems.assert_trees_close(with_grad_fn, updates, rtol=1e-5, atol=1e-7)
    step = jax.jit(optax_sam.value_and_update(PROBLEM.loss_fn, tx))
    value, through, through_state = step(
        PROBLEM.params, tx.init(PROBLEM.params), PROBLEM.batch
    )
    problems.assert_trees_close(through, updates, rtol=1e-5, atol=1e-7)
    states = map(problems.without_losses, (through_state, state))
    problems.assert_trees_close(*states, rtol=1e-5, atol=1e-7)
    assert value == pytest.approx(float(problems.mean_loss(PROBLEM)(PROBLEM.params)))


def test_grad_fn_wins_over_loss_fn():
    marker = jax.tree.map(np.ones_like, PROBLEM.params)
    tx = optax_sam.sam(optax.identity(), rho=0.1)
    updates, _ = by_hand(tx, PROBLEM, **LOSS, grad_fn=lambda _: marker)
    problems.assert_trees_equal(updates, marker)


def test_scalar_losses_will_do():
    tx = optax_sam.sam(optax.sgd(0.1), rho=0.1)
    updates, _ = by_hand(tx, PROBLEM, **LOSS)

    def scalar_loss(params, batch):
        return jnp.mean(PROBLEM.loss_fn(params, batch))

    scalar, _ = by_hand(tx, PROBLEM, loss_fn=scalar_loss, batch=PROBLEM.batch)
    problems.assert_trees_close(scalar, updates, rtol=1e-6, atol=1e-8)
    step = jax.jit(optax_sam.value_and_update(scalar_loss, tx))
    _, through, _ = step(PROBLEM.params, tx.init(PROBLEM.params), PROBLEM.batch)
    problems.assert_trees_close(through, updates, rtol=1e-6, atol=1e-8)


def test_parameters_come_back_exactly():
    tx = optax_sam.sam(optax.set_to_zero(), rho=10.0)
    params, _ = problems.train(tx, PROBLEM, 50)
    problems.assert_trees_equal(params, PROBLEM.params)


def test_base_gets_value_and_unknown_arguments_but_not_the_protocols():
    base, seen = recorder()
    by_hand(optax_sam.sam(base, rho=0.1), PROBLEM, **LOSS, value=1.5, tag="mine")
    del seen["extra_args"]["grad"]
    assert seen["extra_args"] == {"value": 1.5, "tag": "mine"}


def test_base_gets_the_clean_gradient_where_it_is_finite():
    def update_fn(updates, state, params=None, *, grad, **extra_args):
        return grad, state

    base = optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)
    tx = optax_sam.sam(base, rho=0.1)
    params, perturbed = jnp.zeros(2), jnp.array([5.0, 6.0])
    for clean, expected in ([1.0, 2.0], [1.0, 2.0]), ([1.0, np.nan], [5.0, 6.0]):
        updates, _ = tx.update(
            jnp.array(clean), tx.init(params), params, grad_fn=lambda _: perturbed
        )
        np.testing.assert_array_equal(updates, expected)


def test_base_gets_the_protocols_arguments_that_it_names():
    got = {}

    def update_fn(updates, state, params=None, *, batch, losses=0, **extra_args):
        got.update(batch=batch, losses=losses, extra_args=set(extra_args))
        return updates, state

    base = optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)
    by_hand(optax_sam.sam(base, rho=0.1), PROBLEM, **LOSS)
    assert got == {"batch": PROBLEM.batch, "losses": 0, "extra_args": {"grad"}}


def test_ascent_gets_the_protocol_and_unknown_arguments():
    ascent, seen = recorder()
    ascent = optax.chain(ascent, optax.scale(0.1))
    tx = optax_sam.sharpness_aware(optax.sgd(0.1), ascent)
    always = {"advance", "is_gradient", "base_state"}
    by_hand(tx, PROBLEM, **LOSS, tag="mine")
    assert set(seen["extra_args"]) == {"loss_fn", "batch", "tag"} | always
    by_hand(tx, PROBLEM, grad_fn=lambda params: params)
    assert set(seen["extra_args"]) == {"grad_fn"} | always
    by_hand(tx, PROBLEM, loss_fn=lambda p, _: jnp.sum(p["b0"]), batch=None)
    assert set(seen["extra_args"]) == {"loss_fn", "batch"} | always


def test_what_an_ascent_hands_on_is_added_in_the_dtype_of_the_parameters():
    params = np.ones(3, jnp.bfloat16)
    ascent = optax.stateless(lambda g, _: 0.1 * g.astype(jnp.float32))
    tx = optax_sam.sharpness_aware(optax.identity(), ascent)

    def update(params):
        return tx.update(params, tx.init(params), params, grad_fn=lambda p: p)[0]

    assert jax.eval_shape(update, params).dtype == jnp.bfloat16


def line_search():
    return optax.chain(
        optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=9)
    )


OPTIMIZERS = {
    "adam": lambda: optax.adam(1e-2),
    "momo": lambda: optax.contrib.momo(0.1),
    "polyak_sgd": lambda: optax.polyak_sgd(0.1),
    "reduce_on_plateau": lambda: optax.chain(
        optax.sgd(0.1), optax.contrib.reduce_on_plateau()
    ),
    "sophia": lambda: optax.contrib.sophia(1e-2),
    "schedule_free_sgd": lambda: optax.contrib.schedule_free_sgd(0.1),
    "MultiSteps": lambda: optax.MultiSteps(optax.sgd(0.1), 2),
    "lbfgs": optax.lbfgs,
    "backtracking_linesearch": line_search,
}


@cover(wrap={"plain": False, "sam": True}, optimizer=OPTIMIZERS)
def test_any_optimizer_gets_what_it_asks_for(optimizer, wrap):
    problem, tx = problems.quadratic(), optimizer()
    tx = optax_sam.sam(tx, rho=0.01) if wrap else tx
    params, _ = problems.train(tx, problem, 30)
    before, after = (problems.mean_loss(problem)(p) for p in (problem.params, params))
    assert jnp.isfinite(after)
    assert after < before


def test_the_scale_of_the_loss_changes_no_epsilon():
    tx, params = optax_sam.sam(optax.identity(), rho=0.1), PROBLEM.params

    @jax.jit
    def perturbed(grads):
        return tx.update(grads, tx.init(params), params, grad_fn=lambda p: p)[0]

    grads = problems.gradient(PROBLEM)
    scaled = jax.tree.map(lambda g: np.float32(2**12) * g, grads)
    problems.assert_trees_equal(perturbed(scaled), perturbed(grads))
