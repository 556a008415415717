import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import optax_sam


def recorder():
    """A base optimizer that keeps what its update got."""
    seen = {}

    def update_fn(updates, state, params=None, **extra_args):
        seen.update(updates=updates, params=params, extra_args=extra_args)
        return updates, state

    tx = optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)
    return tx, seen


def by_hand(tx, problem, **extra_args):
    grads = jax.grad(problems.mean_loss(problem))(problem.params)
    state = tx.init(problem.params)
    return tx.update(grads, state, problem.params, **extra_args)


PROBLEM = problems.perceptron()
LOSS = {"loss_fn": PROBLEM.loss_fn, "batch": PROBLEM.batch}


def test_descends_along_the_gradient_at_the_perturbed_point():
    base, seen = recorder()
    by_hand(optax_sam.sam(base, rho=0.5), PROBLEM, **LOSS)
    grad = jax.grad(problems.mean_loss(PROBLEM))
    clean = grad(PROBLEM.params)
    length = 0.5 / problems.norm(clean)
    point = jax.tree.map(lambda p, g: p + length * g, PROBLEM.params, clean)
    problems.assert_trees_close(seen["updates"], grad(point), rtol=1e-4, atol=1e-6)
    problems.assert_trees_equal(seen["params"], PROBLEM.params)


@pytest.mark.parametrize("method", ["sam", "asam", "vasso"])
def test_the_three_ways_to_call_agree(method):
    hyperparameters = {"rho": 0.1} | ({"theta": 0.5} if method == "vasso" else {})
    tx = getattr(optax_sam, method)(optax.sgd(0.1), **hyperparameters)
    updates, state = by_hand(tx, PROBLEM, **LOSS)
    grad_fn = jax.grad(problems.mean_loss(PROBLEM))
    with_grad_fn, _ = by_hand(tx, PROBLEM, grad_fn=grad_fn)
    problems.assert_trees_close(with_grad_fn, updates, rtol=1e-5, atol=1e-7)
    step = optax_sam.value_and_update(PROBLEM.loss_fn, tx)
    value, through, through_state = step(
        PROBLEM.params, tx.init(PROBLEM.params), PROBLEM.batch
    )
    problems.assert_trees_close(through, updates, rtol=1e-5, atol=1e-7)
    problems.assert_trees_close(through_state, state, rtol=1e-5, atol=1e-7)
    assert value == pytest.approx(float(problems.mean_loss(PROBLEM)(PROBLEM.params)))


def test_grad_fn_wins_over_loss_fn():
    base, seen = recorder()
    marker = jax.tree.map(jnp.ones_like, PROBLEM.params)
    by_hand(optax_sam.sam(base, rho=0.1), PROBLEM, **LOSS, grad_fn=lambda _: marker)
    problems.assert_trees_equal(seen["updates"], marker)


def test_scalar_losses_will_do():
    tx = optax_sam.sam(optax.sgd(0.1), rho=0.1)
    updates, _ = by_hand(tx, PROBLEM, **LOSS)

    def scalar_loss(params, batch):
        return jnp.mean(PROBLEM.loss_fn(params, batch))

    scalar, _ = by_hand(tx, PROBLEM, loss_fn=scalar_loss, batch=PROBLEM.batch)
    problems.assert_trees_close(scalar, updates, rtol=1e-6, atol=1e-8)
    step = optax_sam.value_and_update(scalar_loss, tx)
    _, through, _ = step(PROBLEM.params, tx.init(PROBLEM.params), PROBLEM.batch)
    problems.assert_trees_close(through, updates, rtol=1e-6, atol=1e-8)


def test_parameters_come_back_exactly():
    tx = optax_sam.sam(optax.set_to_zero(), rho=10.0)
    params, _ = problems.train(tx, PROBLEM, 50)
    problems.assert_trees_equal(params, PROBLEM.params)


def test_loss_runs_once_per_pass_and_the_ascent_gets_the_pullback():
    calls = []
    ascent, seen = recorder()

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


def test_base_gets_value_and_unknown_arguments_but_not_the_protocols():
    base, seen = recorder()
    by_hand(optax_sam.sam(base, rho=0.1), PROBLEM, **LOSS, value=1.5, tag="mine")
    assert seen["extra_args"] == {"value": 1.5, "tag": "mine"}


def test_base_gets_the_protocols_arguments_that_it_names():
    got = {}

    def update_fn(updates, state, params=None, *, batch, losses=0, **extra_args):
        got.update(batch=batch, losses=losses, extra_args=extra_args)
        return updates, state

    base = optax.GradientTransformationExtraArgs(optax.init_empty_state, update_fn)
    by_hand(optax_sam.sam(base, rho=0.1), PROBLEM, **LOSS)
    assert got == {"batch": PROBLEM.batch, "losses": 0, "extra_args": {}}


def test_ascent_gets_the_protocol_and_unknown_arguments():
    ascent, seen = recorder()
    tx = optax_sam.sharpness_aware(optax.sgd(0.1), ascent)
    by_hand(tx, PROBLEM, **LOSS, tag="mine")
    assert set(seen["extra_args"]) == {"loss_fn", "batch", "tag"}
    by_hand(tx, PROBLEM, grad_fn=lambda params: params)
    assert set(seen["extra_args"]) == {"grad_fn"}
    by_hand(tx, PROBLEM, loss_fn=lambda p, _: jnp.sum(p["b0"]), batch=None)
    assert set(seen["extra_args"]) == {"loss_fn", "batch"}


def test_what_an_ascent_hands_on_is_added_in_the_dtype_of_the_parameters():
    params = jnp.ones(3, jnp.bfloat16)
    ascent = optax.stateless(lambda updates, _: updates.astype(jnp.float32))
    tx = optax_sam.sharpness_aware(optax.sgd(0.1), ascent)
    points = []
    tx.update(params, tx.init(params), params, grad_fn=lambda p: points.append(p) or p)
    assert points[0].dtype == jnp.bfloat16


def test_pullback_takes_float32_weights_for_losses_in_half_precision():
    problem = problems.perceptron(jnp.bfloat16)
    ascent, seen = recorder()
    tx = optax_sam.sharpness_aware(optax.sgd(0.1), ascent)
    step = optax_sam.value_and_update(problem.loss_fn, tx)
    step(problem.params, tx.init(problem.params), problem.batch)
    gradient = seen["extra_args"]["pullback"](jnp.ones(16, jnp.float32))
    assert gradient["w0"].dtype == jnp.bfloat16


def line_search():
    return optax.chain(
        optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=9)
    )


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: optax.adam(1e-2),
        lambda: optax.contrib.momo(0.1),
        lambda: optax.polyak_sgd(0.1),
        lambda: optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()),
        lambda: optax.contrib.sophia(1e-2),
        lambda: optax.contrib.schedule_free_sgd(0.1),
        lambda: optax.contrib.sam(
            optax.sgd(0.1), optax.chain(optax.contrib.normalize(), optax.sgd(0.1))
        ),
        lambda: optax.MultiSteps(optax.sgd(0.1), 2),
        lambda: optax.lbfgs(),
        line_search,
    ],
    ids=[
        "adam",
        "momo",
        "polyak_sgd",
        "reduce_on_plateau",
        "sophia",
        "schedule_free_sgd",
        "contrib.sam",
        "MultiSteps",
        "lbfgs",
        "backtracking_linesearch",
    ],
)
@pytest.mark.parametrize("wrap", [False, True], ids=["plain", "sam"])
def test_any_optimizer_gets_what_it_asks_for(optimizer, wrap):
    problem, tx = problems.quadratic(), optimizer()
    tx = optax_sam.sam(tx, rho=0.01) if wrap else tx
    params, _ = problems.train(tx, problem, 30)
    before, after = (problems.mean_loss(problem)(p) for p in (problem.params, params))
    assert jnp.isfinite(after)
    assert after < before


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


def test_the_scale_of_the_loss_changes_no_epsilon():
    points = {}
    for scale in (1.0, 2.0**12):
        tx = optax_sam.sam(optax.sgd(0.1), rho=0.1)
        grads = jax.tree.map(
            lambda g, s=scale: s * g,
            jax.grad(problems.mean_loss(PROBLEM))(PROBLEM.params),
        )
        tx.update(
            grads,
            tx.init(PROBLEM.params),
            PROBLEM.params,
            grad_fn=lambda p, s=scale: points.setdefault(s, p),
        )
    problems.assert_trees_equal(points[1.0], points[2.0**12])


def test_zero_gradient_takes_the_step_of_the_base():
    tx = optax_sam.vasso(optax.sgd(0.1), rho=0.1, theta=0.5)
    params = jnp.ones(3)
    step = jax.jit(optax_sam.value_and_update(lambda w: 0.0 * jnp.sum(w), tx))
    _, updates, state = step(params, tx.init(params))
    np.testing.assert_array_equal(updates, jnp.zeros(3))
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(state))


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
