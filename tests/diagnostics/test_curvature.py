"""Eigenvalues, trace and density of Hessians that are known."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from hessians import SPECTRA, D, loss_fn, problem
from jax.flatten_util import ravel_pytree
from methods import defaults

from optax_sam import diagnostics


def columns(vectors):
    """The vectors, whose first axis counts them, as the columns of a matrix."""
    leaves = [np.asarray(x) for x in jax.tree.leaves(vectors)]
    return np.concatenate([x.reshape(len(x), -1) for x in leaves], axis=1).T


@partial(jax.jit, static_argnames=("count", "iterations"))
def top(params, batch, count=D, iterations=D + 3):
    return diagnostics.top_eigenvalues(
        loss_fn,
        params,
        batch,
        count=count,
        iterations=iterations,
        return_vectors=True,
        key=0,
    )


def test_product_is_that_of_the_matrix(x64):
    (params, batch), H = problem(SPECTRA["negative"])
    v = jax.tree.map(lambda p: np.cos(np.arange(p.size)).reshape(p.shape), params)
    product = diagnostics.hessian_vector_product(loss_fn, params, batch, v)
    assert jax.tree.structure(product) == jax.tree.structure(params)
    np.testing.assert_allclose(
        ravel_pytree(product)[0], H @ ravel_pytree(v)[0], rtol=1e-12
    )
    with pytest.raises(ValueError, match=r"vector\['a'\] has shape \(3,\)"):
        diagnostics.hessian_vector_product(
            loss_fn, params, batch, v | {"a": jnp.zeros(3)}
        )


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_all_eigenvalues_of_known_spectra(x64, spectrum):
    """More iterations than dimensions, and invariant subspaces on the way."""
    (params, batch), H = problem(SPECTRA[spectrum])
    found = top(params, batch)
    size = np.abs(SPECTRA[spectrum]).max()
    expected = np.linalg.eigvalsh(H)[::-1]
    np.testing.assert_allclose(found.values, expected, rtol=1e-9, atol=1e-12 * size)
    np.testing.assert_allclose(found.residuals, 0, atol=1e-9 * size)
    V = columns(found.vectors)
    np.testing.assert_allclose(V.T @ V, np.eye(D), atol=1e-9)
    np.testing.assert_allclose(H @ V, V * expected, atol=1e-9 * size)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_eigenvalues_in_single_precision(spectrum):
    (params, batch), H = problem(SPECTRA[spectrum])
    found = top(params, batch)
    assert found.values.dtype == jnp.float32
    size = np.abs(SPECTRA[spectrum]).max()
    expected = np.linalg.eigvalsh(H)[::-1]
    np.testing.assert_allclose(found.values, expected, atol=1e-5 * size)
    V = columns(found.vectors)
    np.testing.assert_allclose(V.T @ V, np.eye(D), atol=1e-5)


def test_residuals_before_convergence(x64):
    (params, batch), H = problem(SPECTRA["distinct"] ** 2)
    found = top(params, batch, count=3, iterations=5)
    V = columns(found.vectors)
    actual = np.linalg.norm(H @ V - V * np.asarray(found.values), axis=0)
    assert actual.min() > 1e-3
    np.testing.assert_allclose(found.residuals, actual, rtol=1e-9)
    distances = np.abs(np.linalg.eigvalsh(H) - np.asarray(found.values)[:, None])
    assert np.all(distances.min(axis=1) <= found.residuals)


@pytest.mark.full
def test_hessian_of_a_network():
    network = problems.perceptron(sizes=(4, 5, 3))
    w, unravel = ravel_pytree(network.params)
    loss = problems.mean_loss(network)
    H = np.asarray(jax.jit(jax.hessian(lambda w: loss(unravel(w))))(w), np.float64)

    @jax.jit
    def measure(params, batch):
        at = network.loss_fn, params, batch
        return (
            diagnostics.top_eigenvalues(*at, count=3, iterations=30, key=1).values,
            diagnostics.spectral_density(*at, iterations=9, num_probes=64, key=2),
            diagnostics.hessian_trace(*at, num_probes=64, key=3),
        )

    values, density, trace = measure(network.params, network.batch)
    expected = np.linalg.eigvalsh(H)
    np.testing.assert_allclose(values, expected[::-1][:3], rtol=1e-4)
    assert abs(trace.mean - np.trace(H)) < 4 * trace.standard_error
    for power in (1, 2, 3):
        moments = np.sum(density.weights * density.nodes**power, axis=1)
        error = moments.std(ddof=1) / len(moments) ** 0.5
        assert abs(moments.mean() - np.mean(expected**power)) < 4 * error + 1e-7


def test_trace_and_its_standard_error(x64):
    (params, batch), H = problem(SPECTRA["negative"])
    n = 4000
    trace = jax.jit(partial(diagnostics.hessian_trace, loss_fn, num_probes=n, key=0))(
        params, batch
    )
    # The variance of z.H z over signs, from the entries off the diagonal.
    deviation = (2 * np.sum((H - np.diag(np.diag(H))) ** 2)) ** 0.5
    assert trace.standard_error == pytest.approx(deviation / n**0.5, rel=0.1)
    assert abs(trace.mean - np.trace(H)) < 4 * trace.standard_error
    probe = jax.jit(partial(diagnostics.hessian_trace, loss_fn, num_probes=1))
    one = probe(params, batch, key=0)
    assert one.standard_error == np.inf
    keys = jax.random.key(0), jax.random.PRNGKey(0), 0
    means = {float(probe(params, batch, key=key).mean) for key in keys}
    assert means == {float(one.mean)}


def diagonal_loss(params, h):
    return 0.5 * jnp.sum(h * params**2)[None]


def test_quadrature_is_exact_for_polynomials(x64):
    """Signs see every eigenvalue of a diagonal matrix alike: so do the moments."""
    h = np.array([-2.0, -2.0, 0.0, 0.5, 1.0, 1.0, 3.0, 8.0])
    density = jax.jit(
        partial(
            diagnostics.spectral_density,
            diagonal_loss,
            iterations=4,
            num_probes=3,
            key=0,
        )
    )(np.zeros(8), h)
    assert density.nodes.shape == density.weights.shape == (3, 4)
    np.testing.assert_allclose(density.weights.sum(axis=1), 1, rtol=1e-12)
    for power in range(2 * 4):
        moments = np.sum(density.weights * density.nodes**power, axis=1)
        np.testing.assert_allclose(moments, np.mean(h**power), rtol=1e-9)


def test_density_of_an_exhausted_space(x64):
    h = np.array([-2.0, -2.0, 0.0, 1.0, 1.0, 1.0, 1.0, 8.0])
    density = jax.jit(
        partial(
            diagnostics.spectral_density,
            diagonal_loss,
            iterations=50,
            num_probes=2,
            key=0,
        )
    )(np.zeros(8), h)
    assert density.nodes.shape == (2, 8)
    for value, share in ((-2, 2), (0, 1), (1, 4), (8, 1)):
        near = np.abs(density.nodes - value) < 1e-6
        np.testing.assert_allclose(np.sum(near * density.weights, axis=1), share / 8)


def test_smooth_density():
    rng = np.random.default_rng(0)
    nodes = rng.normal(size=(3, 5))
    weights = rng.dirichlet(np.ones(5), size=3)
    density = diagnostics.SpectralDensity(jnp.asarray(nodes), jnp.asarray(weights))
    grid = np.linspace(-6, 6, 2001)
    curve = diagnostics.smooth_density(density, jnp.asarray(grid), width=0.2)
    bells = np.exp(-((grid[:, None, None] - nodes) ** 2) / (2 * 0.2**2))
    expected = np.mean(np.sum(weights * bells, axis=2), axis=1)
    expected /= (2 * np.pi) ** 0.5 * 0.2
    np.testing.assert_allclose(curve, expected, rtol=1e-4, atol=1e-6)
    default = diagnostics.smooth_density(density, jnp.asarray(grid))
    spread = 0.01 * (nodes.max() - nodes.min())
    same = diagnostics.smooth_density(density, jnp.asarray(grid), width=spread)
    np.testing.assert_allclose(default, same, rtol=1e-3, atol=1e-5)
    # All eigenvalues are zero.
    line = diagnostics.SpectralDensity(jnp.zeros((1, 2)), jnp.full((1, 2), 0.5))
    curve = diagnostics.smooth_density(line, jnp.linspace(-0.1, 0.1, 101))
    assert np.sum(curve) * 0.002 == pytest.approx(1, abs=1e-3)
    # All are the same: a hundredth of it, of either sign, or of one.
    for value, width in ((0.0, 0.01), (4.0, 0.04), (-4.0, 0.04)):
        peak = jnp.full(1, value)
        height = diagnostics.smooth_density(
            line._replace(nodes=line.nodes + value), peak
        )
        np.testing.assert_allclose(height, 1 / ((2 * np.pi) ** 0.5 * width), rtol=1e-5)
    with pytest.raises(ValueError, match=r"width = 0 is out of range.*> 0"):
        diagnostics.smooth_density(line, grid, width=0.0)
    with pytest.raises(ValueError, match=r"grid has shape \(\)"):
        diagnostics.smooth_density(line, 0.0)


@pytest.mark.parametrize("dtype", defaults([jnp.float16, jnp.bfloat16], [jnp.bfloat16]))
def test_half_precision(dtype):
    h = np.float32([3.0, -2.0, 1.0, 0.0, 0.5, 2.0, 1.0, 1.0])
    params = np.ones(8, dtype)

    @jax.jit
    def measure(params, h):
        at = lambda w, h: diagonal_loss(w, h.astype(dtype)), params, h
        return (
            diagnostics.top_eigenvalues(*at, count=2, key=0),
            diagnostics.hessian_trace(*at, num_probes=2, key=0),
        )

    found, trace = measure(params, h)
    assert found.values.dtype == jnp.float32
    np.testing.assert_allclose(found.values, [3, 2], rtol=0.02)
    assert trace.mean == pytest.approx(6.5, rel=0.01)


def test_arguments_that_are_refused():
    (params, batch), _ = problem(SPECTRA["zero"])
    at = loss_fn, params, batch
    with pytest.raises(ValueError, match="count = 11 is more than the 10 eigenvalues"):
        diagnostics.top_eigenvalues(*at, count=11, key=0)
    with pytest.raises(ValueError, match="count = 3 is more than the 2 eigenvalues"):
        diagnostics.top_eigenvalues(*at, count=3, iterations=2, key=0)
    with pytest.raises(ValueError, match="num_probes = 0 is out of range"):
        diagnostics.hessian_trace(*at, num_probes=0, key=0)
    with pytest.raises(TypeError, match="spectral_density: key must be"):
        diagnostics.spectral_density(*at, key=0.5)
    with pytest.raises(ValueError, match=r"no parameters has no spectrum, got \{\};"):
        diagnostics.spectral_density(loss_fn, {}, batch, key=0)
    integer = params | {"a": jnp.zeros((2, 3), int)}
    with pytest.raises(TypeError, match=r"params\['a'\] has dtype int32"):
        diagnostics.hessian_trace(loss_fn, integer, batch, key=0)
