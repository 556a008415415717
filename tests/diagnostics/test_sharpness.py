"""Sharpness, noise and surfaces of losses for which they can be worked out."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from hessians import SPECTRA, D, loss_fn, problem
from jax.flatten_util import ravel_pytree
from methods import defaults

import optax_sam
from optax_sam import diagnostics
from optax_sam.diagnostics import _loop

NETWORK = problems.perceptron(sizes=(4, 5, 3))


def quadratic_model(params, batch):
    """Gradient and Hessian of the mean loss, in float64."""
    H, b = (np.asarray(x, np.float64).mean(axis=0) for x in batch)
    w = np.asarray(ravel_pytree(params)[0], np.float64)
    return H @ w + b, H


def trust_region(g, H, rho):
    """The maximum of g.e + e.H e / 2 over |e| <= rho, by its secular equation."""
    values, V = np.linalg.eigh(H)
    g = V.T @ g

    def length(mu):
        return np.linalg.norm(g / (mu - values))

    low = max(values.max(), 0) + 1e-12
    if values.max() < 0 and length(0) <= rho:
        low = high = 0.0
    else:
        high = low + np.linalg.norm(g) / rho
        for _ in range(200):
            mu = (low + high) / 2
            low, high = (mu, high) if length(mu) > rho else (low, mu)
    e = g / (high - values)
    return g @ e + e @ (values * e) / 2


@partial(jax.jit, static_argnames=("steps", "adaptive"))
def worst(params, batch, rho, steps=300, adaptive=False, eta=0.0):
    return diagnostics.worst_case_sharpness(
        loss_fn, params, batch, rho=rho, steps=steps, adaptive=adaptive, eta=eta
    )


@pytest.mark.parametrize("rho", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("spectrum", ["distinct", "negative", "repeated", "zero"])
def test_worst_case_of_a_quadratic_solves_the_trust_region_problem(x64, spectrum, rho):
    (params, batch), _ = problem(SPECTRA[spectrum])
    expected = trust_region(*quadratic_model(params, batch), rho)
    assert worst(params, batch, rho) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("step_size", [0.1, 0.5, 3.0])
def test_steps_of_the_ascent_after_the_first_have_their_length(x64, step_size):
    """The first leads to the sphere, the second along it or through the ball."""
    (params, batch), _ = problem(SPECTRA["distinct"])
    g, H = quadratic_model(params, batch)
    e = g / np.linalg.norm(g)
    slope = g + H @ e
    e2 = e + step_size * slope / np.linalg.norm(slope)
    e2 /= max(np.linalg.norm(e2), 1)
    expected = max(g @ x + x @ H @ x / 2 for x in (e, e2))
    actual = diagnostics.worst_case_sharpness(
        loss_fn, params, batch, rho=1.0, steps=2, step_size=step_size
    )
    assert actual == pytest.approx(expected, rel=1e-9)


def test_worst_case_inside_the_ball(x64):
    """A concave quadratic has its maximum where the gradient vanishes."""
    (params, batch), _ = problem(-SPECTRA["distinct"])
    g, H = quadratic_model(params, batch)
    peak = -g @ np.linalg.solve(H, g) / 2
    assert worst(params, batch, 100.0) == pytest.approx(peak, rel=1e-6)
    assert worst(params, batch, 0.0) == 0


def test_adaptive_worst_case_is_that_in_scaled_parameters(x64):
    (params, batch), _ = problem(SPECTRA["negative"])
    g, H = quadratic_model(params, batch)
    T = np.abs(np.asarray(ravel_pytree(params)[0])) + 0.01
    expected = trust_region(T * g, T[:, None] * H * T, 0.5)
    found = worst(params, batch, 0.5, adaptive=True, eta=0.01)
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("adaptive", defaults([False, True], [True]))
def test_one_step_is_that_of_the_ascent(x64, adaptive):
    (params, batch), _ = problem(SPECTRA["negative"])
    make = optax_sam.adapt_to_scale if adaptive else optax_sam.scale_to_radius
    ascent = make(0.3)

    @jax.jit
    def rise(params, batch):
        loss, grads = problems.value_and_grad(loss_fn, params, batch)
        epsilon, _ = ascent.update(grads, ascent.init(params), params)
        at = jax.tree.map(jnp.add, params, epsilon)
        return jnp.mean(loss_fn(at, batch)) - loss

    found = worst(params, batch, 0.3, steps=1, adaptive=adaptive)
    assert found == pytest.approx(float(rise(params, batch)), rel=1e-10)
    assert worst(params, batch, 0.3, steps=3, adaptive=adaptive) > found


def test_more_steps_never_find_less():
    """Steps that are too long lead lower, here at first below the start."""
    (params, batch), _ = problem(-10 * SPECTRA["distinct"])
    found = [float(worst(params, batch, 30.0, steps=n)) for n in (1, 5, 20)]
    assert found[0] == 0
    assert 0 < found[1] < found[2]


def at_a_minimum(w, h):
    return 0.5 * jnp.sum(h * w**2)


def test_a_random_start_leaves_a_stationary_point(x64):
    h, w = np.array([1.0, 5.0, 2.0, -1.0]), np.zeros(4)

    @partial(jax.jit, static_argnames=("key", "steps"))
    def measure(w, **options):
        return diagnostics.worst_case_sharpness(at_a_minimum, w, h, rho=0.2, **options)

    assert measure(w) == 0
    assert measure(w, key=0, steps=100) == pytest.approx(0.5 * 0.2**2 * 5, rel=1e-9)
    # Elsewhere the better of two starts counts.
    w = np.array([1e-3, 0.0, 0.0, 0.0])
    assert measure(w) == pytest.approx(0.2 * 1e-3 + 0.02, rel=1e-9)
    assert measure(w, key=0) > 0.09


m_sharpness = partial(
    diagnostics.worst_case_sharpness, NETWORK.loss_fn, NETWORK.params, rho=0.3, steps=4
)


@pytest.mark.parametrize("at_once", defaults([1, 2, None], [2]))
def test_m_sharpness_is_the_mean_of_that_of_micro_batches(at_once):
    alone = jax.jit(m_sharpness)
    parts = [
        jax.tree.map(lambda x, i=i: x[i : i + 4], NETWORK.batch)
        for i in range(0, 16, 4)
    ]
    expected = np.mean([float(alone(part)) for part in parts])
    found = jax.jit(
        partial(m_sharpness, micro_batch_size=4, micro_batches_at_once=at_once)
    )(NETWORK.batch)
    assert found == pytest.approx(expected, rel=1e-5)
    assert expected > float(alone(NETWORK.batch))


def test_arguments_that_are_refused():
    for arguments, message in [
        ({"micro_batch_size": 5}, "5 does not divide the 16 examples"),
        ({"micro_batch_size": 4, "micro_batches_at_once": 3}, "3 does not divide the"),
        ({"rho": -1.0}, "rho = -1 is out of range"),
        ({"step_size": 0.0}, "step_size = 0 is out of range"),
        ({"steps": 0}, "steps = 0 is out of range"),
    ]:
        with pytest.raises(ValueError, match=message):
            m_sharpness(NETWORK.batch, **arguments)
    with pytest.raises(TypeError, match="rho must be a real scalar, got <func"):
        m_sharpness(NETWORK.batch, rho=lambda count: 0.1)


@pytest.mark.full
def test_a_sweep_of_radii_by_vmap(x64):
    (params, batch), _ = problem(SPECTRA["distinct"])
    radii = jnp.asarray([0.0, 0.1, 1.0])
    swept = jax.vmap(lambda rho: worst(params, batch, rho, steps=20))(radii)
    single = [float(worst(params, batch, rho, steps=20)) for rho in radii]
    np.testing.assert_allclose(swept, single, rtol=1e-9)


@pytest.mark.parametrize("adaptive", defaults([False, True], [True]))
def test_average_sharpness_of_a_quadratic(x64, adaptive):
    (params, batch), H = problem(SPECTRA["negative"] + 3)
    found = jax.jit(
        partial(
            diagnostics.average_sharpness,
            loss_fn,
            rho=0.7,
            num_samples=1000,
            adaptive=adaptive,
            eta=0.5,
            key=0,
        )
    )(params, batch)
    T = np.abs(np.asarray(ravel_pytree(params)[0])) + 0.5 if adaptive else np.ones(D)
    A = 0.7**2 / 2 * T[:, None] * H * T
    assert abs(found.mean - np.trace(A) / D) < 4 * found.standard_error
    # Of u.A u, for u uniform on the sphere.
    variance = 2 * (np.trace(A @ A) - np.trace(A) ** 2 / D) / (D * (D + 2))
    assert found.standard_error == pytest.approx((variance / 1000) ** 0.5, rel=0.15)


def test_average_sharpness_without_chance(x64):
    """Of the same curvature all around, whatever the slope, and without any."""
    options = {"rho": 2.0, "num_samples": 3, "key": 0}
    measure = jax.jit(partial(diagnostics.average_sharpness, at_a_minimum, **options))
    w = np.array([1.0, -50.0, 3.0, 4.0])
    found = measure(w, np.full(4, 3.0))
    np.testing.assert_allclose(found, (6, 0), atol=1e-9)
    found = measure(w, np.zeros(4))
    np.testing.assert_array_equal(found, (0, 0))


def steep(w, _):
    return jnp.sum(w) * 2000


@pytest.mark.parametrize("dtype", defaults([jnp.float16, jnp.bfloat16], [jnp.bfloat16]))
def test_half_precision(dtype):
    w, h = jnp.asarray([1.0, -0.5, 2.0]), jnp.asarray([1.0, 4.0, 2.0])

    @jax.jit
    def measure(w, h):
        x = jnp.stack([300 * h, -300 * h]).astype(w.dtype)
        return (
            diagnostics.worst_case_sharpness(at_a_minimum, w, h, rho=1.0, steps=5),
            # The square of this gradient is beyond float16.
            diagnostics.worst_case_sharpness(steep, w, h, rho=1.0, steps=1),
            diagnostics.gradient_covariance_trace(lambda w, x: x @ w, w, x),
            diagnostics.average_sharpness(
                at_a_minimum, jnp.zeros_like(w), h, rho=1.0, num_samples=200, key=0
            ),
        )

    worst, slope, noise, average = measure(w.astype(dtype), h.astype(dtype))
    for found in (worst, slope, noise, average.mean):
        assert found.dtype == jnp.float32
    assert worst == pytest.approx(float(measure(w, h)[0]), rel=0.05)
    assert slope == pytest.approx(2000 * 3**0.5, rel=0.02)
    assert noise == pytest.approx(2 * 300**2 * 21, rel=1e-2)
    assert abs(average.mean - 7 / 6) < 4 * average.standard_error + 0.01


@pytest.mark.parametrize("chunk_size", defaults([1, 5, 99], [5]))
def test_trace_of_the_gradient_covariance(chunk_size):
    rows = jax.jit(jax.jacobian(NETWORK.loss_fn))(NETWORK.params, NETWORK.batch)
    rows = np.concatenate([g.reshape(16, -1) for g in jax.tree.leaves(rows)], axis=1)
    found = jax.jit(
        partial(
            diagnostics.gradient_covariance_trace,
            NETWORK.loss_fn,
            chunk_size=chunk_size,
        )
    )(NETWORK.params, NETWORK.batch)
    expected = np.trace(np.cov(rows.astype(np.float64).T))
    assert found == pytest.approx(expected, rel=1e-5)


def test_gradients_that_differ_by_little():
    """The squares of these gradients are 1e8 times their variance."""
    rng = np.random.default_rng(0)
    x = (1000 + 0.1 * rng.normal(size=(64, 3))).astype(np.float32)

    def linear(w, x):
        return jnp.sum(x * w[None], axis=-1)

    trace = jax.jit(partial(diagnostics.gradient_covariance_trace, linear))
    found = trace(np.zeros(3, np.float32), x)
    expected = np.trace(np.cov(x.astype(np.float64).T))
    assert found == pytest.approx(expected, rel=1e-2)
    same = np.ones((5, 3), np.float32)
    assert trace(np.zeros(3, np.float32), same) == 0
    with pytest.raises(ValueError, match="has 1 example"):
        diagnostics.gradient_covariance_trace(linear, jnp.zeros(3), x[:1])
    with pytest.raises(ValueError, match="needs the loss of each example"):
        diagnostics.gradient_covariance_trace(
            lambda w, x: jnp.mean(linear(w, x)), jnp.zeros(3), x
        )


def test_surface_of_a_quadratic(x64):
    (params, batch), _ = problem(SPECTRA["negative"])
    g, H = quadratic_model(params, batch)
    rng = np.random.default_rng(1)
    plane = [jax.tree.map(lambda p: rng.normal(size=p.shape), params) for _ in range(2)]
    xs, ys = np.linspace(-1, 1, 4), np.linspace(0, 2, 3)
    surface = jax.jit(partial(diagnostics.loss_surface, loss_fn))
    found = surface(params, batch, plane, xs, ys)
    start = float(problems.value_and_grad(loss_fn, params, batch)[0])
    vectors = [np.asarray(ravel_pytree(d)[0]) for d in plane]

    def loss(e):
        return start + g @ e + e @ H @ e / 2

    expected = [[loss(x * vectors[0] + y * vectors[1]) for x in xs] for y in ys]
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    line = surface(params, batch, plane[:1], xs)
    np.testing.assert_allclose(line, expected[0], rtol=1e-10)
    with pytest.raises(ValueError, match=r"directions must be 1 tree\(s\)"):
        surface(params, batch, plane, xs)
    with pytest.raises(ValueError, match=r"ys has shape \(1, 3\)"):
        surface(params, batch, plane, xs, ys[None])


@pytest.mark.parametrize("orthogonal", defaults([False, True], [True]))
def test_filters_of_directions_are_as_long_as_those_of_the_weights(orthogonal):
    rng = np.random.default_rng(0)
    params = {
        "conv": np.asarray(rng.normal(size=(3, 3, 2, 5)), jnp.bfloat16),
        "dense": np.float32(rng.normal(size=(4, 3)) * [1, 0, 1]),
        "narrow": np.ones((1, 3), np.float32),
        "pair": np.float32(rng.normal(size=(2, 3))),  # As many as directions.
        "bias": np.ones(3, np.float32),
        "scale": np.float32(2),
    }
    directions = jax.jit(
        partial(
            diagnostics.filter_normalized_directions,
            key=0,
            count=2,
            orthogonal=orthogonal,
        )
    )(params)
    for i, d in enumerate(directions):
        assert not np.any(d["bias"])
        assert not np.any(d["scale"])
        for name, rows in (
            ("conv", 18),
            ("dense", 4),
            ("narrow", 1),
            ("pair", 2),
        ):
            lengths, expected = (
                np.linalg.norm(
                    np.asarray(x[name], np.float64).reshape(rows, -1), axis=0
                )
                for x in (d, params)
            )
            if orthogonal and name == "narrow" and i:
                expected = 0
            np.testing.assert_allclose(lengths, expected, rtol=1e-5)
        for other in directions[:i]:
            products = {
                k: np.sum(np.multiply(d[k], other[k]).reshape(-1, d[k].shape[-1]), 0)
                for k in ("conv", "dense", "narrow", "pair")
            }
            if orthogonal:
                for x in products.values():
                    np.testing.assert_allclose(x, 0, atol=1e-5)
            else:
                assert np.abs(products["conv"]).min() > 1e-3
    again = jax.jit(partial(diagnostics.filter_normalized_directions, key=0, count=1))(
        params
    )
    problems.assert_trees_close(again[0], directions[0], rtol=1e-6)


def test_directions_without_an_orthogonal_one_left_are_zero():
    """Rather than what rounding leaves."""
    params = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    *_, second, third = diagnostics.filter_normalized_directions(
        params, key=0, count=3, orthogonal=True
    )
    assert np.all(np.any(second, axis=0))
    assert not np.any(third)


OUTSIDE = {
    "eigenvalues": lambda *at: (
        diagnostics.top_eigenvalues(*at, iterations=6, key=0).values
    ),
    "density": lambda *at: diagnostics.spectral_density(
        *at, iterations=3, num_probes=2, key=0
    ),
    "worst": lambda *at: diagnostics.worst_case_sharpness(
        *at, rho=0.3, steps=9, micro_batch_size=4, key=0
    ),
    "average": lambda *at: diagnostics.average_sharpness(
        *at, rho=0.3, num_samples=3, key=0
    ),
}


@pytest.mark.parametrize("measure", defaults(OUTSIDE, ["average"]))
def test_outside_of_jit_results_are_the_same(measure):
    """There every step is a program, which is compiled once and traced as often."""
    traced, measure = [], OUTSIDE[measure]

    def counted(params, batch):
        traced.append(batch)
        return NETWORK.loss_fn(params, batch)

    # Of NumPy, which is not to be traced, nor to go to a device each time.
    found = measure(counted, NETWORK.params, NETWORK.batch)
    assert 0 < len(traced) < 8
    expected = jax.jit(partial(measure, NETWORK.loss_fn))(NETWORK.params, NETWORK.batch)
    problems.assert_trees_close(found, expected, rtol=1e-3, atol=1e-5)


def test_outside_of_jit_a_step_is_compiled_for_each_kind_of_argument():
    step = _loop.compiled(lambda tree: sum(jnp.mean(x) for x in jax.tree.leaves(tree)))
    assert step({"a": jnp.ones(3)}) == 1
    assert step({"a": 2 * jnp.ones(6), "b": jnp.ones(2)}) == 3
    assert step([jnp.ones(3, jnp.int32)]) == 1
    found = _loop.over(lambda x: 2 * x, jnp.zeros(0))
    assert found.shape == (0,)


def test_a_loss_that_is_not_finite_on_the_way_is_never_left():
    def loss_fn(p, batch):
        return -jnp.square(p - 0.3) + jnp.where(p > 0.9, jnp.nan, 0.0)

    for steps in (1, 3, 6):
        worst = diagnostics.worst_case_sharpness(
            loss_fn, jnp.zeros([]), (), rho=1.0, steps=steps, step_size=0.5
        )
        assert jnp.isnan(worst)
