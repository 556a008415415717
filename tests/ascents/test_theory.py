"""What the papers prove, on problems where both sides can be worked out."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from methods import defaults

import optax_sam
from optax_sam import reweight_by_sharpness
from optax_sam._ascents import rw_sam

pytestmark = pytest.mark.usefixtures("x64")
DIMENSION, EXAMPLES, RHO = 4, 5, 0.1


def linear():
    """Losses `g_i . w`, whose gradients are the rows of the batch everywhere."""
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.normal(size=(EXAMPLES, DIMENSION)))
    return problems.Problem(jnp.zeros(DIMENSION), lambda w, g: g @ w, rows)


def quadratics():
    """Losses `w.A_i w / 2 - b_i.w` whose curvatures A_i differ."""

    def loss_fn(params, batch):
        A, b = batch
        return 0.5 * jnp.einsum("i,bij,j->b", params, A, params) - b @ params

    rng = np.random.default_rng(0)
    root = rng.normal(size=(EXAMPLES, DIMENSION, DIMENSION))
    A = jnp.asarray(root @ root.transpose(0, 2, 1) / DIMENSION)
    b = jnp.asarray(rng.normal(size=(EXAMPLES, DIMENSION)))
    params = jnp.asarray(rng.normal(size=DIMENSION))
    return problems.Problem(params, loss_fn, (A, b))


def gradients(problem, params):
    """The gradients of the examples, `[B, d]`."""
    return jax.jacobian(problem.loss_fn)(params, problem.batch)


def take(problem, indices):
    return problem._replace(batch=jax.tree.map(lambda x: x[indices], problem.batch))


def direction(ascent, problem):
    """The output of an ascent in its first step."""

    @jax.jit
    def ascend(params, batch):
        return ascent.update(
            jax.grad(lambda p: jnp.mean(problem.loss_fn(p, batch)))(params),
            ascent.init(params),
            params,
            loss_fn=problem.loss_fn,
            batch=batch,
        )[0]

    return ascend(problem.params, problem.batch)


def micro_batch_gradient(ascent, problem, m):
    """The gradient that a base sees whose micro-batches of `m` ascend each alone."""
    tx = optax_sam.sharpness_aware(
        optax.sgd(1.0), ascent, micro_batch_size=m, micro_batches_at_once=None
    )
    step = jax.jit(optax_sam.value_and_update(problem.loss_fn, tx))
    return -step(problem.params, tx.init(problem.params), problem.batch)[1]


# Item 1: what a directional derivative along random signs says about a norm.


def slopes(problem, steps=1):
    """s_i by `reweight_by_sharpness`, `[steps, B]`: of a batch of one, the mean."""
    link = reweight_by_sharpness(1.0, key=0, delta=0.5)

    def slope(count, example):
        _, state = link.update(
            problem.params,
            link.init(problem.params)._replace(count=count),
            problem.params,
            loss_fn=problem.loss_fn,
            batch=example[None],
        )
        return state.mean_directional_norm

    over_batch = jax.vmap(slope, in_axes=(None, 0))
    over_steps = jax.jit(jax.vmap(over_batch, in_axes=(0, None)))
    return over_steps(jnp.arange(steps, dtype=jnp.int32), problem.batch)


def test_squared_slope_over_all_signs_is_the_squared_norm(monkeypatch):
    problem = linear()
    signs = jnp.array(list(itertools.product([-1.0, 1.0], repeat=DIMENSION)))

    def with_signs(z):
        monkeypatch.setattr(rw_sam, "_signs", lambda words, like: z)
        return slopes(problem)[0]

    s = np.asarray(jax.vmap(with_signs)(signs), np.float64)
    g = np.asarray(problem.batch)
    squared = np.sum(g**2, axis=1)
    variance = 2 * (squared**2 - np.sum(g**4, axis=1))
    # The state has float32 scalars.
    np.testing.assert_allclose(np.mean(s**2, axis=0), squared, rtol=1e-6)
    np.testing.assert_allclose(np.var(s**2, axis=0), variance, rtol=1e-6)
    assert np.all(variance < 2 * squared**2)  # Of Gaussian directions.
    assert np.all(np.mean(s, axis=0) < np.sqrt(squared))


def test_slope_along_the_signs_that_are_drawn():
    steps, problem = 20_000, linear()
    g = np.asarray(problem.batch)
    squared = np.sum(g**2, axis=1)
    deviation = np.sqrt(2 * (squared**2 - np.sum(g**4, axis=1)))
    s = np.asarray(slopes(problem, steps), np.float64)
    error = np.abs(np.mean(s**2, axis=0) - squared)
    assert np.all(error < 4 * deviation / np.sqrt(steps))


def test_mean_slope_in_many_dimensions_is_below_the_norm():
    """E|z.g| tends to sqrt(2/pi) |g|, about 0.80 |g|."""
    steps, d = 4000, 500
    row = jax.random.normal(jax.random.key(1), (1, d))
    problem = problems.Problem(jnp.zeros(d), lambda w, g: g @ w, row)
    ratio = np.asarray(slopes(problem, steps), np.float64) / np.linalg.norm(row)
    # Of |normal|, whose variance is 1 - 2/pi; the limit in d is reached to 1/d.
    error = 4 * np.sqrt((1 - 2 / np.pi) / steps) + 1 / d
    assert abs(ratio.mean() - np.sqrt(2 / np.pi)) < error


# Item 2: the Gibbs weights.


@pytest.mark.parametrize("strength", [0.3, 2.0])
def test_weights_maximise_slope_plus_entropy_over_the_simplex(strength):
    problem, seen = linear(), []
    link = reweight_by_sharpness(strength, key=0, estimator="jvp")
    link.update(
        problem.params,
        link.init(problem.params),
        problem.params,
        loss_fn=problem.loss_fn,
        batch=problem.batch,
        losses=problem.loss_fn(problem.params, problem.batch),
        pullback=lambda p: seen.append(p) or problem.params,
    )
    s = np.asarray(slopes(problem)[0], np.float64)

    def objective(p):
        return p @ s - np.sum(p * np.log(p), axis=-1) / strength

    best = objective(np.asarray(seen[0]))
    log_mean = np.log(np.sum(np.exp(strength * s))) / strength
    assert best == pytest.approx(log_mean, rel=1e-6)
    others = np.random.default_rng(0).dirichlet(np.ones(EXAMPLES), size=1000)
    near = 0.99 * np.asarray(seen[0]) + 0.01 * others
    assert np.all(objective(others) < best)
    assert np.all(objective(near) < best)


def test_gibbs_weights_go_from_sam_to_the_steepest_example():
    problem = linear()
    steepest = int(np.argmax(slopes(problem)[0]))
    scale = optax_sam.scale_to_radius(RHO)

    def epsilon(strength):
        link = reweight_by_sharpness(strength, key=0)
        return direction(optax.chain(link, scale), problem)

    sam = direction(scale, problem)
    np.testing.assert_allclose(epsilon(0.0), sam, rtol=1e-12)
    alone = direction(scale, take(problem, jnp.array([steepest])))
    gaps = [float(jnp.linalg.norm(epsilon(s) - alone)) for s in (0.0, 1.0, 10.0, 1e6)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 0.5 * RHO
    assert gaps[-1] < 1e-12


# Item 3: SAM without normalisation penalises the variance of the gradient.


def penalised_gradient(problem, rho, weight):
    """The gradient of f + rho/2 |grad f|^2 + rho/2 weight tr V, at the parameters."""

    def objective(params):
        g = gradients(problem, params)
        mean = jnp.mean(g, axis=0)
        trace = jnp.mean(jnp.sum((g - mean[None]) ** 2, axis=1))
        f = jnp.mean(problem.loss_fn(params, problem.batch))
        return f + rho / 2 * jnp.sum(mean**2) + rho / 2 * weight * trace

    return jax.grad(objective)(problem.params)


@pytest.mark.parametrize("m", defaults([1, 2, 3], [2]))
def test_variance_penalty_of_batches_drawn_with_replacement(m):
    problem = quadratics()
    draws = np.array(list(itertools.product(range(EXAMPLES), repeat=m)))
    got = micro_batch_gradient(optax.scale(RHO), take(problem, draws.ravel()), m)
    expected = penalised_gradient(problem, RHO, 1 / m)
    np.testing.assert_allclose(got, expected, rtol=1e-10)


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5])
def test_variance_penalty_of_batches_drawn_without_replacement(m):
    problem, n = quadratics(), EXAMPLES
    draws = np.array(list(itertools.combinations(range(n), m)))
    got = micro_batch_gradient(optax.scale(RHO), take(problem, draws.ravel()), m)
    # Nothing is left of it where the micro-batch is the whole batch.
    expected = penalised_gradient(problem, RHO, (n - m) / (n - 1) / m)
    np.testing.assert_allclose(got, expected, rtol=1e-10)
    if m < n:
        assert np.abs(got - penalised_gradient(problem, RHO, 0)).max() > 1e-3


# Item 4: smaller batches have steeper gradients.


def test_expected_norm_does_not_increase_with_the_batch():
    problem = quadratics()
    ascent = optax_sam.scale_to_radius(RHO)
    g = np.asarray(gradients(problem, problem.params))

    def mean_rise(size):
        """E[epsilon . g] / rho, which is E|g|, over all batches of a size."""
        total = []
        for indices in itertools.combinations(range(EXAMPLES), size):
            batch = g[list(indices)].mean(axis=0)
            epsilon = ascent.update(batch, ascent.init(batch))[0]
            total.append(float(epsilon @ batch) / RHO)
            assert total[-1] == pytest.approx(np.linalg.norm(batch), rel=1e-12)
        return np.mean(total)

    norms = [mean_rise(size) for size in range(1, EXAMPLES + 1)]
    assert np.all(np.diff(norms) < 0)


# Item 5: VaSSO at a fixed point.


@pytest.mark.parametrize("theta", [0.2, 0.4, 0.9, 1.0])
def test_mean_squared_error_of_the_average(theta):
    """d_t is linear in the gradients: unit vectors for them give its coefficients."""
    steps = 60
    link = optax_sam.suppress_variance(theta)
    state, coefficients = link.init(jnp.zeros(steps)), []
    update = jax.jit(link.update)
    for unit in jnp.eye(steps):
        d, state = update(unit, state)
        coefficients.append(np.asarray(d))
    np.testing.assert_allclose(np.sum(coefficients, axis=1), 1, rtol=1e-12)
    mse = np.sum(np.square(coefficients), axis=1)  # In units of sigma^2.
    decay = (1 - theta) ** (2 * np.arange(steps))
    limit = theta / (2 - theta)
    np.testing.assert_allclose(mse, decay + limit * (1 - decay), rtol=1e-12)
    assert mse[-1] == pytest.approx(limit, rel=1e-4)
    assert limit <= theta


def test_error_of_the_sharpness_that_vasso_sees():
    """As f + rho |d_t| against f + rho |grad f|, over all draws of the noise."""
    theta, sigma, steps = 0.4, 0.3, 5
    mean = jnp.array([1.0, -0.5])
    noise = sigma * jnp.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    link, scale = optax_sam.suppress_variance(theta), optax_sam.scale_to_radius(RHO)

    def rises(draw):
        def step(state, g):
            d, state = link.update(g, state)
            return state, jnp.vdot(d, scale.update(d, scale.init(d))[0])

        return jax.lax.scan(step, link.init(mean), mean[None] + noise[draw])[1]

    draws = jnp.array(list(itertools.product(range(4), repeat=steps)))
    errors = np.asarray(jax.vmap(rises)(draws)) - RHO * np.linalg.norm(mean)
    decay = (1 - theta) ** (2 * np.arange(steps))
    mse = sigma**2 * (decay + theta / (2 - theta) * (1 - decay))
    size = np.sqrt(np.mean(errors**2, axis=0))
    assert np.all(size <= RHO * np.sqrt(mse))
    assert np.all(size > 0.5 * RHO * np.sqrt(mse))


# Item 8: m-SAM.


@pytest.mark.parametrize("m", [1, 2, 3, 6])
def test_micro_batches_ascend_each_alone(m):
    problem = take(quadratics(), jnp.array([0, 1, 2, 3, 4, 0]))
    got = micro_batch_gradient(optax_sam.scale_to_radius(RHO), problem, m)

    expected = np.zeros(DIMENSION)
    A, b = (np.asarray(x).reshape(-1, m, *x.shape[1:]) for x in problem.batch)
    for A_j, b_j in zip(A.mean(axis=1), b.mean(axis=1), strict=True):
        g = A_j @ problem.params - b_j
        expected += A_j @ (problem.params + RHO * g / np.linalg.norm(g)) - b_j
    expected /= len(A)
    np.testing.assert_allclose(got, expected, rtol=1e-10)
    whole = micro_batch_gradient(optax_sam.scale_to_radius(RHO), problem, 6)
    assert (np.abs(got - whole).max() > 1e-3) == (m < 6)
