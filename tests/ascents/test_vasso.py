import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import optax_sam


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
