"""Gradients that are not finite, or zero, and the steps after them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import optax_sam

PROBLEM = problems.perceptron()


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("method", ["sam", "asam", "vasso"])
def test_a_gradient_that_is_not_finite_changes_no_state_and_perturbs_nothing(
    method, bad
):
    hyperparameters = {"rho": 0.1} | ({"theta": 0.5} if method == "vasso" else {})
    points = []

    def grad_fn(params):
        points.append(params)
        return params

    tx = getattr(optax_sam, method)(optax.sgd(0.1), **hyperparameters)
    params = PROBLEM.params
    grads = jax.grad(problems.mean_loss(PROBLEM))(params)
    state = tx.init(params)
    for _ in range(2):
        _, state = tx.update(grads, state, params, grad_fn=grad_fn)
    spoilt = grads | {"b1": grads["b1"].at[3].set(bad)}
    _, after = tx.update(spoilt, state, params, grad_fn=grad_fn)
    problems.assert_trees_equal(after.ascent_state, state.ascent_state)
    problems.assert_trees_equal(points[-1], params)
    assert problems.norm(jax.tree.map(jnp.subtract, points[0], params)) > 0.01


MASK = {"w": True, "b": False}
LINKS = {
    "average": optax_sam.suppress_variance(0.5),
    "radius": optax_sam.scale_to_radius(0.1),
    "mask": optax_sam.perturb_only(MASK),
}


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("leaf", ["w", "b"])
@pytest.mark.parametrize(
    "order",
    ["average radius", "average radius mask", "average mask radius", "radius mask"],
)
def test_training_goes_on_after_a_bad_gradient(order, leaf, bad):
    """Also where the bad entry is masked, and in leaves where XLA's max drops NaN."""
    ascent = optax.chain(*(LINKS[link] for link in order.split()))
    tx = optax_sam.sharpness_aware(optax.sgd(0.1), ascent)
    params = {"w": jnp.ones((64, 64)), "b": jnp.ones((64, 64))}
    points = []

    def grad_fn(params):
        points.append(params)
        return params

    state = tx.init(params)
    _, state = tx.update(params, state, params, grad_fn=grad_fn)
    spoilt = params | {leaf: params[leaf].at[3, 4].set(bad)}
    _, after = tx.update(spoilt, state, params, grad_fn=grad_fn)
    _, after = tx.update(params, after, params, grad_fn=grad_fn)
    problems.assert_trees_equal(points[1], params)
    # As if the bad step had not been.
    problems.assert_trees_equal(points[2], points[0])
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(after))
    counts = [int(count) for _, count in optax.tree.get_all_with_path(after, "count")]
    assert set(counts) == {2}


def test_an_average_that_overflows_its_dtype_is_clipped():
    tx = optax_sam.vasso(optax.sgd(0.1), 0.1, 0.5, accumulator_dtype=jnp.float16)
    params, state = jnp.ones(3), tx.init(jnp.ones(3))
    for scale in (1.0, 1e6, 1.0):
        updates, state = tx.update(scale * params, state, params, grad_fn=lambda p: p)
        assert jnp.isfinite(updates).all()
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
    params, state = jnp.ones(2), tx.init(jnp.ones(2))
    _, after = tx.update(jnp.array([1.0, jnp.nan]), state, params, grad_fn=lambda p: p)
    problems.assert_trees_equal(after.ascent_state, state.ascent_state)


def test_ascent_states_of_any_dtype_survive_a_bad_gradient():
    def init_fn(params):
        del params
        return {"key": jax.random.key(0), "flag": jnp.array(False), "n": jnp.int32(3)}

    def update_fn(updates, state, params=None):
        del params
        key = jax.random.split(state["key"])[0]
        return updates, {"key": key, "flag": ~state["flag"], "n": state["n"] + 1}

    ascent = optax.GradientTransformation(init_fn, update_fn)
    tx = optax_sam.sharpness_aware(optax.sgd(0.1), ascent)
    params, state = jnp.ones(2), tx.init(jnp.ones(2))
    _, bad = tx.update(params * jnp.nan, state, params, grad_fn=lambda p: p)
    assert bad.ascent_state["key"] == state.ascent_state["key"]
    assert (bool(bad.ascent_state["flag"]), int(bad.ascent_state["n"])) == (False, 3)
    _, good = tx.update(params, state, params, grad_fn=lambda p: p)
    assert good.ascent_state["key"] != state.ascent_state["key"]
    assert (bool(good.ascent_state["flag"]), int(good.ascent_state["n"])) == (True, 4)


def test_apply_if_finite_inside_skips_the_step_around_does_not_see_it():
    """A second gradient that is not finite reaches the base alone."""
    params = jnp.ones(2)
    bad_at_the_top = lambda p: jnp.where(p > 1.0, jnp.nan, p)  # noqa: E731
    inside = optax_sam.sam(optax.apply_if_finite(optax.sgd(0.1), 5), rho=0.1)
    updates, _ = inside.update(
        params, inside.init(params), params, grad_fn=bad_at_the_top
    )
    np.testing.assert_array_equal(updates, jnp.zeros(2))
    around = optax.apply_if_finite(optax_sam.sam(optax.sgd(0.1), rho=0.1), 5)
    updates, _ = around.update(
        params, around.init(params), params, grad_fn=bad_at_the_top
    )
    assert jnp.isnan(updates).all()


def test_zero_gradient_takes_the_step_of_the_base():
    tx = optax_sam.vasso(optax.sgd(0.1), rho=0.1, theta=0.5)
    params = jnp.ones(3)
    step = jax.jit(optax_sam.value_and_update(lambda w: 0.0 * jnp.sum(w), tx))
    _, updates, state = step(params, tx.init(params))
    np.testing.assert_array_equal(updates, jnp.zeros(3))
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(state))
