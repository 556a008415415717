"""Gradients that are not finite, or zero, and the steps after them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import optax_sam

PROBLEM = problems.perceptron()


def perturbing(tx, params):
    """A compiled step whose update, of a base with rate one, is minus `w + epsilon`."""

    def step(grads, state):
        updates, state = tx.update(grads, state, params, grad_fn=lambda p: p)
        return jax.tree.map(jnp.negative, updates), state

    return jax.jit(step)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("method", ["sam", "asam", "vasso"])
def test_a_gradient_that_is_not_finite_changes_no_state_and_perturbs_nothing(
    method, bad
):
    hyperparameters = {"rho": 0.1} | ({"theta": 0.5} if method == "vasso" else {})
    tx = getattr(optax_sam, method)(optax.sgd(1.0), **hyperparameters)
    params, grads = PROBLEM.params, problems.gradient(PROBLEM)
    step, state = perturbing(tx, params), tx.init(params)
    for _ in range(2):
        point, state = step(grads, state)
    spoilt = grads | {"b1": problems.replaced(grads["b1"], 3, bad)}
    unmoved, after = step(spoilt, state)
    problems.assert_trees_equal(after.ascent_state, state.ascent_state)
    problems.assert_trees_equal(unmoved, params)
    assert problems.norm(jax.tree.map(np.subtract, point, params)) > 0.01


MASK = {"w": True, "b": False}
LINKS = {
    "average": optax_sam.suppress_variance(0.5),
    "radius": optax_sam.scale_to_radius(0.1),
    "mask": optax_sam.perturb_only(MASK),
}


@functools.cache
def perturbing_by(order):
    """Of a chain of these links: the parameters, the state and the step."""
    ascent = optax.chain(*(LINKS[link] for link in order.split()))
    tx = optax_sam.sharpness_aware(optax.sgd(1.0), ascent)
    params = {"w": np.ones((64, 64), np.float32), "b": np.ones((64, 64), np.float32)}
    return params, tx.init(params), perturbing(tx, params)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("leaf", ["w", "b"])
@pytest.mark.parametrize(
    "order",
    ["average radius", "average radius mask", "average mask radius", "radius mask"],
)
def test_training_goes_on_after_a_bad_gradient(order, leaf, bad):
    """Also where the bad entry is masked, and in leaves where XLA's max drops NaN."""
    params, state, step = perturbing_by(order)
    first, state = step(params, state)
    spoilt = params | {leaf: problems.replaced(params[leaf], (3, 4), bad)}
    unmoved, after = step(spoilt, state)
    again, after = step(params, after)
    problems.assert_trees_equal(unmoved, params)
    # As if the bad step had not been.
    problems.assert_trees_equal(again, first)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after))
    counts = [int(count) for _, count in optax.tree.get_all_with_path(after, "count")]
    assert set(counts) == {2}


def test_what_a_mask_drops_before_anything_reads_it_need_not_be_finite():
    params, state, step = perturbing_by("mask radius")
    expected, after = step(params, state)
    spoilt = params | {"b": np.full_like(params["b"], np.nan)}
    actual, after_spoilt = step(spoilt, state)
    problems.assert_trees_equal(actual, expected)
    problems.assert_trees_equal(after_spoilt.ascent_state, after.ascent_state)


def test_an_average_that_overflows_its_dtype_is_clipped():
    tx = optax_sam.vasso(optax.sgd(0.1), 0.1, 0.5, accumulator_dtype=jnp.float16)
    params = np.ones(3, np.float32)
    step, state = perturbing(tx, params), tx.init(params)
    for scale in (1.0, 1e6, 1.0):
        updates, state = step(np.float32(scale) * params, state)
        assert np.isfinite(updates).all()
    # Half of the largest float16, and half of the last gradient.
    expected = np.full(3, 0.5 * 65504 + 0.5, np.float16)
    np.testing.assert_array_equal(optax.tree.get(state, "direction"), expected)


def test_it_is_the_clean_gradient_that_must_be_finite_not_what_the_ascent_makes_of_it():
    ascent = optax.chain(
        optax.zero_nans(),
        optax_sam.suppress_variance(0.5),
        optax_sam.scale_to_radius(0.1),
    )
    tx = optax_sam.sharpness_aware(optax.sgd(0.1), ascent)
    params = np.ones(2, np.float32)
    state = tx.init(params)
    _, after = perturbing(tx, params)(np.float32([1, np.nan]), state)
    problems.assert_trees_equal(after.ascent_state, state.ascent_state)


def test_ascent_states_of_any_dtype_survive_a_bad_gradient():
    def init_fn(params):
        del params
        return {"key": jax.random.key(0), "flag": jnp.array(False), "n": jnp.int32(3)}

    def update_fn(updates, state, params=None):
        del params
        key = jax.random.split(state["key"])[0]
        return updates / 2, {"key": key, "flag": ~state["flag"], "n": state["n"] + 1}

    ascent = optax.GradientTransformation(init_fn, update_fn)
    tx = optax_sam.sharpness_aware(optax.sgd(0.1), ascent)
    params = np.ones(2, np.float32)
    step, state = perturbing(tx, params), tx.init(params)
    _, bad = step(params * np.float32(np.nan), state)
    assert bad.ascent_state["key"] == state.ascent_state["key"]
    assert (bool(bad.ascent_state["flag"]), int(bad.ascent_state["n"])) == (False, 3)
    _, good = step(params, state)
    assert good.ascent_state["key"] != state.ascent_state["key"]
    assert (bool(good.ascent_state["flag"]), int(good.ascent_state["n"])) == (True, 4)


def test_apply_if_finite_inside_skips_the_step_around_does_not_see_it():
    """A second gradient that is not finite reaches the base alone."""
    params = np.ones(2, np.float32)

    def bad_at_the_top(p):
        return jnp.where(p > 1.0, jnp.nan, p)

    def update(tx):
        step = jax.jit(functools.partial(tx.update, grad_fn=bad_at_the_top))
        return step(params, tx.init(params), params)[0]

    inside = optax_sam.sam(optax.apply_if_finite(optax.sgd(0.1), 5), rho=0.1)
    np.testing.assert_array_equal(update(inside), np.zeros(2))
    around = optax.apply_if_finite(optax_sam.sam(optax.sgd(0.1), rho=0.1), 5)
    assert np.isnan(update(around)).all()


def test_zero_gradient_takes_the_step_of_the_base():
    tx = optax_sam.vasso(optax.sgd(0.1), rho=0.1, theta=0.5)
    params = jnp.ones(3)
    step = jax.jit(optax_sam.value_and_update(lambda w: 0.0 * jnp.sum(w), tx))
    _, updates, state = step(params, tx.init(params))
    np.testing.assert_array_equal(updates, jnp.zeros(3))
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(state))


BAD = jnp.array([np.nan, -1.0, np.inf, -np.inf])


@pytest.mark.parametrize(
    ("alias", "name", "hyperparameters"),
    [
        (optax_sam.sam, "rho", {}),
        (optax_sam.asam, "rho", {}),
        (optax_sam.asam, "eta", {"rho": 0.1}),
        (optax_sam.vasso, "theta", {"rho": 0.1}),
    ],
)
def test_hyperparameters_out_of_range_leave_parameters_finite(
    alias, name, hyperparameters
):
    """Those of a schedule; by NaN, a radius below zero and an infinite one is zero."""
    problem = problems.quadratic()
    base = optax.sgd(0.1)
    tx = alias(base, **hyperparameters, **{name: lambda count: BAD[count]})
    params, state = problems.train(tx, problem, len(BAD))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((params, state)))
    if name == "rho":
        expected, _ = problems.train(base, problem, len(BAD))
        problems.assert_trees_equal(params, expected)


SPARSITY = {"sparsity": 0.5, "refresh_every": 1, "decay_steps": 9}


@pytest.mark.parametrize(
    ("alias", "name", "harmless", "others"),
    [
        (optax_sam.vasso, "theta", 1.0, {}),
        (optax_sam.rw_sam, "delta", 1e-4, {"strength": 9.0}),
        pytest.param(optax_sam.sam, "rho", 0.0, {}, marks=pytest.mark.full),
        pytest.param(optax_sam.asam, "eta", 0.0, {}, marks=pytest.mark.full),
        pytest.param(optax_sam.rw_sam, "strength", 0.0, {}, marks=pytest.mark.full),
        pytest.param(
            *(optax_sam.dynamic_sparse_sam, "drop_fraction", 0.0, SPARSITY),
            marks=pytest.mark.full,
        ),
    ],
)
def test_what_stands_for_a_hyperparameter_that_is_nan(alias, name, harmless, others):
    problem = problems.perceptron()
    nan, expected = (
        problems.train(
            alias(optax.sgd(0.1), **{"rho": 0.1} | others | {name: schedule}),
            problem,
            3,
        )
        for schedule in (optax.constant_schedule(np.nan), lambda count: harmless)
    )
    problems.assert_trees_equal(nan, expected)


def test_injected_hyperparameters_out_of_range_are_held():
    tx = optax.inject_hyperparams(optax_sam.sam)(optax.sgd(0.1), rho=0.1)
    params = np.ones(2, np.float32)
    state = tx.init(params)
    step = jax.jit(functools.partial(tx.update, grad_fn=lambda p: p))
    for bad in BAD:
        state.hyperparams["rho"] = bad
        updates, _ = step(params, state, params)
        np.testing.assert_array_equal(updates, -0.1 * params)
