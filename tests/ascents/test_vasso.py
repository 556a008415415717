import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
import references

import optax_sam

SGD = optax.sgd(0.1, momentum=0.9)


def directions(link, grads, params=None):
    state = link.init(grads[0] if params is None else params)
    for g in grads:
        d, state = link.update(g, state)
        yield d, state


def test_recursion():
    theta, rng = 0.4, np.random.default_rng(0)
    grads = [jnp.asarray(rng.normal(size=3), jnp.float32) for _ in range(6)]
    expected = np.asarray(grads[0], np.float64)
    for t, (d, state) in enumerate(
        directions(optax_sam.suppress_variance(theta), grads)
    ):
        if t:
            expected = (1 - theta) * expected + theta * np.asarray(grads[t], np.float64)
        np.testing.assert_allclose(d, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(d, state.direction)
        assert state.count == t + 1


def test_theta_one_gives_the_gradient_bit_for_bit():
    rng = np.random.default_rng(0)
    grads = [jnp.asarray(rng.normal(size=3), jnp.float32) for _ in range(4)]
    for g, (d, _) in zip(
        grads, directions(optax_sam.suppress_variance(1.0), grads), strict=True
    ):
        np.testing.assert_array_equal(d, g)


def test_schedule_of_theta():
    link = optax_sam.suppress_variance(lambda t: jnp.where(t < 2, 1.0, 0.0))
    grads = [jnp.full(2, float(t)) for t in range(5)]
    got = [float(d[0]) for d, _ in directions(link, grads)]
    assert got == [0.0, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("dtype", "accumulator", "expected"),
    [
        (jnp.float32, None, jnp.float32),
        (jnp.bfloat16, None, jnp.float32),
        (jnp.float16, None, jnp.float32),
        (jnp.float32, jnp.bfloat16, jnp.bfloat16),
        (jnp.float32, "float16", jnp.float16),
    ],
)
def test_accumulator_dtype(dtype, accumulator, expected):
    link = optax_sam.suppress_variance(0.1, accumulator_dtype=accumulator)
    for _, state in directions(link, [jnp.ones(3, dtype)] * 2):
        assert state.direction.dtype == expected


@pytest.mark.usefixtures("x64")
def test_accumulates_in_float64_under_x64():
    link = optax_sam.suppress_variance(0.1)
    assert link.init(jnp.ones(2, jnp.float64)).direction.dtype == jnp.float64


def test_average_moves_where_a_bfloat16_one_would_not():
    # From 1 towards 2 by 0.001 of the way: 1.001 rounds to 1 in bfloat16.
    grads = [jnp.ones(1, jnp.bfloat16)] + [jnp.full(1, 2.0, jnp.bfloat16)] * 500
    *_, (d, _) = directions(optax_sam.suppress_variance(1e-3), grads)
    np.testing.assert_allclose(d, 2 - 0.999**500, rtol=1e-4)


def test_variance_at_a_fixed_point():
    """MSE_t = (1-θ)^{2t} σ² + θ/(2-θ) (1 - (1-θ)^{2t}) σ², over 200k draws."""
    theta, steps, draws = 0.4, 6, 200_000
    noise = jax.random.normal(jax.random.key(0), (steps, draws))
    link = optax_sam.suppress_variance(theta)
    _, mse = jax.lax.scan(
        lambda s, g: link.update(1.0 + g, s)[::-1], link.init(noise[0]), noise
    )
    mse = jnp.mean((mse - 1.0) ** 2, axis=1)
    decay = (1 - theta) ** (2 * np.arange(steps))
    expected = decay + theta / (2 - theta) * (1 - decay)
    # The estimate of a variance from n draws has a relative deviation of sqrt(2/n).
    np.testing.assert_allclose(mse, expected, rtol=5 * np.sqrt(2 / draws))


def test_bad_accumulator_dtype():
    # The last is what inject_hyperparams makes of a dtype that is not in static_args.
    for dtype in (jnp.int32, "no dtype", bool, jnp.zeros([], jnp.bfloat16)):
        with pytest.raises(TypeError, match="accumulator_dtype must be a floating"):
            optax_sam.suppress_variance(0.1, accumulator_dtype=dtype)


def test_leaves_absent_from_the_gradient_keep_their_average():
    link = optax_sam.suppress_variance(0.5)
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    state = link.init(params)
    grads = {"a": jnp.ones(2), "b": optax.MaskedNode()}
    d, state = link.update(grads, state)
    assert d["b"] == optax.MaskedNode()
    problems.assert_trees_equal(state.direction, {"a": jnp.ones(2), "b": jnp.zeros(2)})


@pytest.mark.parametrize("decay", [0.0, 1e-2])
@pytest.mark.parametrize("make", [references.Sgd, references.AdamW])
def test_one_pass_ascends_along_what_steps_before_have_found(make, decay):
    rho, theta, average = 0.5, 0.4, []

    def step(w, g, gradient_at):
        d = average[-1] if average else np.zeros(7)
        p = gradient_at(w + references.scaled(d, rho))
        average.append((1 - theta) * d + theta * p if average else p)
        return p, 0

    base = make(decay)
    tx = optax_sam.vasso(base.tx, rho, theta, one_pass=True)
    references.assert_replays(tx, step, base)


def test_one_pass_of_no_radius_or_no_average_yet_is_the_base():
    def one_pass(rho):
        return optax_sam.vasso(SGD, rho, 0.4, one_pass=True)

    references.assert_is(one_pass(0.0), SGD)
    references.assert_is(one_pass(0.5), SGD, steps=1)


def test_one_pass_of_theta_one_is_along_the_last_perturbed_gradient():
    link = optax_sam.keep_average(1.0)
    grads = [jnp.array([0.1 * t, 1.0 / (t + 1)]) for t in range(4)]
    state = link.init(grads[0])
    for g in grads:
        handed_on, state = link.update(g, state)
        np.testing.assert_array_equal(handed_on, g)
        np.testing.assert_array_equal(state.average, g)


def test_a_gradient_that_is_not_finite_is_in_no_average():
    link, good = optax_sam.keep_average(0.5), jnp.ones(2)
    _, state = link.update(good, link.init(good))
    for bad in (jnp.array([1.0, jnp.nan]), jnp.array([jnp.inf, 1.0])):
        handed_on, after = link.update(bad, state)
        np.testing.assert_array_equal(handed_on, bad)
        problems.assert_trees_equal(after, state)


def test_the_kept_average_is_in_the_dtype_asked_for():
    tx = optax_sam.vasso(SGD, 0.1, 0.4, accumulator_dtype=jnp.bfloat16, one_pass=True)
    kept = tx.init(jnp.ones(2)).base_state[0]
    assert kept.average.dtype == jnp.bfloat16
    assert kept.count == 0


def test_one_pass_needs_an_average_that_the_base_keeps():
    ascent = optax.chain(optax_sam.follow_average(), optax_sam.scale_to_radius(0.1))
    tx = optax_sam.sharpness_aware(SGD, ascent)
    message = r"^sharpness_aware: base must keep.*average.*keep_average\(theta\), sgd"
    with pytest.raises(ValueError, match=message):
        tx.init(jnp.ones(2))
    link, g = optax_sam.follow_average(), jnp.ones(2)
    with pytest.raises(
        ValueError, match=r"^follow_average: .*state of the base.* missing"
    ):
        link.update(g, link.init(g), g)


def test_one_pass_refuses_what_another_link_has_made_of_the_gradient():
    links = optax_sam.suppress_variance(0.4), optax_sam.follow_average()
    ascent = optax.chain(*links, optax_sam.scale_to_radius(0.1))
    base, g = optax.chain(optax_sam.keep_average(0.4), SGD), jnp.ones(2)
    tx = optax_sam.sharpness_aware(base, ascent)
    with pytest.raises(ValueError, match=r"^follow_average: a link before it.*first"):
        tx.update(g, tx.init(g), g, grad_fn=lambda p: p)


def test_one_pass_must_be_a_bool():
    with pytest.raises(TypeError, match=r"^vasso: one_pass must be True or"):
        optax_sam.vasso(SGD, 0.1, 0.4, one_pass=1)
