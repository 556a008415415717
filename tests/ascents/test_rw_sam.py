import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from methods import DTYPES, cover, defaults

import optax_sam
from optax_sam import reweight_by_sharpness
from optax_sam._ascents import rw_sam as rw_sam_module
from optax_sam._base import random

ESTIMATORS = ["finite_difference", "jvp"]


def rw_sam(base, rho=0.1, strength=1.0, key=0, **kwargs):
    link = reweight_by_sharpness(strength, key=key, **kwargs)
    ascent = optax.chain(link, optax_sam.scale_to_radius(rho))
    return optax_sam.sharpness_aware(base, ascent)


def example(problem, i):
    return problem._replace(batch=jax.tree.map(lambda x: x[i : i + 1], problem.batch))


def traced_slopes(problem, count=0, **kwargs):
    """The s_i, by a batch of each example alone: the signs do not depend on it."""
    link = reweight_by_sharpness(1.0, **{"key": 0, **kwargs})

    def of(example):
        state = link.init(problem.params)._replace(count=jnp.int32(count))
        alone = problem._replace(batch=jax.tree.map(lambda x: x[None], example))
        return problems.ascend(link, alone, state)[1].mean_directional_norm

    return jax.vmap(of)(problem.batch)


def slopes(problem, count=0, **kwargs):
    @jax.jit
    def run(batch):
        return traced_slopes(problem._replace(batch=batch), count, **kwargs)

    return np.asarray(run(problem.batch), np.float64)


def lines(slopes, losses=0.0, dtype=jnp.float32):
    """Losses `c_i + a_i w` of a scalar, so that s_i = |a_i|."""
    slopes = np.asarray(slopes, dtype)
    losses = np.full(slopes.shape, losses, dtype)

    def loss_fn(params, batch):
        return batch[0] + batch[1] * params

    return problems.Problem(np.zeros([], dtype), loss_fn, (losses, slopes))


def weights(strength, problem, **kwargs):
    """The weights that the examples get, and the state; derivatives are exact."""
    link = reweight_by_sharpness(strength, **{"key": 0, "estimator": "jvp", **kwargs})

    @jax.jit
    def run(params, batch):
        seen = []
        _, state = link.update(
            params,
            link.init(params),
            params,
            loss_fn=problem.loss_fn,
            batch=batch,
            losses=problem.loss_fn(params, batch),
            pullback=lambda w: seen.append(w) or params,
        )
        return seen[0], state

    return run(problem.params, problem.batch)


def gibbs(exponents):
    p = np.exp(exponents - np.max(exponents))
    return p / p.sum()


@cover(
    kwargs={
        "default": {},
        "num_probes": {"num_probes": 3},
        "estimator": {"estimator": "jvp"},
        "normalize": {"normalize": True},
    },
    default=("default", "normalize"),
)
def test_closed_form(kwargs):
    problem, strength = problems.perceptron(), 0.3
    link = reweight_by_sharpness(strength, key=0, **kwargs)
    gradient, state = problems.ascend(link, problem)
    s = slopes(problem, **kwargs)
    p = gibbs(strength * s / (s.mean() if "normalize" in kwargs else 1.0))
    assert p.max() > 1.5 * p.min()

    def weighted(params):
        return jnp.sum(jnp.asarray(p) * problem.loss_fn(params, problem.batch))

    expected = jax.jit(jax.grad(weighted))(problem.params)
    # The difference of two losses near 2, over 1e-4, is off by up to 1e-2.
    problems.assert_trees_close(gradient, expected, rtol=1e-2, atol=2e-3)
    assert state.effective_sample_size == pytest.approx(1 / np.sum(p**2), rel=1e-2)
    assert state.largest_weight == pytest.approx(p.max(), rel=1e-2)
    assert state.mean_directional_norm == pytest.approx(s.mean(), rel=1e-2)
    assert state.count == 1


def test_several_probes_give_the_root_mean_square():
    # |z_1 + z_2| is 0 or 2, so that the mean of four squares is a whole number.
    batch = (jnp.zeros(1), jnp.ones((1, 2)))
    line = problems.Problem(jnp.zeros(2), lambda w, b: b[0] + b[1] @ w, batch)
    kwargs = {"num_probes": 4, "estimator": "jvp"}
    at = jax.jit(jax.vmap(lambda count: traced_slopes(line, count, **kwargs)[0]))
    squares = np.square(at(np.arange(12, dtype=np.int32)))
    np.testing.assert_allclose(squares, np.round(squares), atol=1e-5)
    assert len(set(np.round(squares))) > 2


def test_finite_differences_tend_to_the_derivative():
    problem = problems.perceptron(sizes=(16, 32, 32, 4))
    exact = slopes(problem, estimator="jvp")

    def error(delta):
        return np.abs(slopes(problem, delta=delta) - exact).sum() / exact.sum()

    errors = [error(delta) for delta in (1e-1, 1e-2, 1e-3)]
    # The error is proportional to delta, until rounding takes over.
    for larger, smaller in itertools.pairwise(errors):
        assert 5 < larger / smaller < 20
    assert error(1e-4) < 5e-3


@pytest.mark.full
def test_jvp_works_in_bfloat16_where_differences_do_not():
    problem = problems.perceptron(jnp.bfloat16, sizes=(16, 32, 32, 4))
    wide = problem._replace(
        params=jax.tree.map(lambda x: x.astype(jnp.float32), problem.params)
    )
    exact = slopes(wide, estimator="jvp")
    for estimator in ("jvp", "auto"):
        error = np.abs(slopes(problem, estimator=estimator) - exact).sum()
        assert error < 0.1 * exact.sum()
    differences = slopes(problem, estimator="finite_difference")
    assert np.abs(differences - exact).sum() > 0.5 * exact.sum()


def computing_in(dtype, problem):
    """The problem with float32 parameters and losses, and all between in a dtype."""

    def loss_fn(params, batch):
        half = jax.tree.map(lambda p: p.astype(dtype), params)
        losses = problem.loss_fn(half, (batch[0].astype(dtype), batch[1]))
        return losses.astype(jnp.float32)

    return problem._replace(loss_fn=loss_fn)


def test_the_default_is_right_for_computation_in_bfloat16():
    problem = problems.perceptron(sizes=(16, 64, 64, 4), batch_size=64)
    half = computing_in(jnp.bfloat16, problem)
    link = reweight_by_sharpness(0.1, key=0)
    size = float(problems.ascend(link, half)[1].effective_sample_size)
    expected = float(problems.ascend(link, problem)[1].effective_sample_size)
    assert size == pytest.approx(expected, rel=0.1)
    link = reweight_by_sharpness(0.1, key=0, estimator="finite_difference")
    noise = float(problems.ascend(link, half)[1].effective_sample_size)
    assert noise < 0.3 * expected


def test_the_default_goes_by_the_platform_where_products_do():
    """Of float32: TPUs and GPUs round their factors unless they are told not to."""
    problem = problems.perceptron()
    rest = {"loss_fn": problem.loss_fn, "batch": problem.batch}

    def num_products(platform, **kwargs):
        link = reweight_by_sharpness(1.0, key=0, **kwargs)
        run = jax.jit(lambda p: link.update(p, link.init(p), p, **rest))
        traced = run.trace(problem.params)
        return traced.lower(lowering_platforms=(platform,)).as_text().count("dot_gen")

    def all_of(platform):
        estimators = ("auto", "finite_difference", "jvp")
        return [num_products(platform, estimator=name) for name in estimators]

    auto, differences, exact = all_of("cpu")
    assert auto == differences < exact
    for platform in ("tpu", "cuda"):
        auto, differences, exact = all_of(platform)
        assert differences < exact == auto
        with jax.default_matmul_precision("highest"):
            assert num_products(platform) == differences


def test_losses_that_have_no_exact_slopes():
    @jax.custom_vjp
    def rounded(x):
        return x.astype(jnp.bfloat16).astype(x.dtype)

    rounded.defvjp(lambda x: (rounded(x), None), lambda _, g: (g,))
    problem = problems.perceptron()

    def loss_fn(params, batch):
        return problem.loss_fn(jax.tree.map(rounded, params), batch)

    with pytest.raises(ValueError, match=r"reweight_by_sharpness: .* rounded has a"):
        problems.ascend(
            reweight_by_sharpness(1.0, key=0), problem._replace(loss_fn=loss_fn)
        )


BASE = optax.sgd(0.1, momentum=0.9)


@functools.cache
def trained_by_sam(batch_size):
    problem = problems.perceptron(batch_size=batch_size)
    return problems.train(optax_sam.sam(BASE, 0.1), problem, 10)[0]


@cover(
    batch_size=[7, 16],
    kwargs={
        "default": {},
        "num_probes": {"num_probes": 2},
        "estimator": {"estimator": "jvp"},
        "normalize": {"normalize": True},
    },
    default=("7-default", "16-estimator"),
)
def test_strength_zero_is_sam_bit_for_bit(kwargs, batch_size):
    problem, base = problems.perceptron(batch_size=batch_size), BASE
    expected = trained_by_sam(batch_size)
    params, _ = problems.train(rw_sam(base, strength=0.0, **kwargs), problem, 10)
    problems.assert_trees_equal(params, expected)


@cover(
    size=[1, 3, 7, 16, 100],
    dtype=DTYPES,
    default=("1-float16", "7-float32", "100-bfloat16"),
)
def test_weights_are_uniform_where_that_is_sam(size, dtype):
    equal, flat, varied = (
        lines(slopes, 1.0, dtype)
        for slopes in (np.full(size, 3.0), np.zeros(size), np.arange(size) + 1)
    )
    for strength, lined in ((0.0, varied), (2.0, equal), (1e30, equal), (1.0, flat)):
        p, state = weights(strength, lined, normalize=strength == 2.0)
        np.testing.assert_array_equal(p, np.full(size, 1 / size, dtype))
        assert state.effective_sample_size == pytest.approx(size, rel=1e-2)
    assert weights(0.0, varied)[1].mean_directional_norm == pytest.approx(
        (size + 1) / 2
    )


@cover(
    strength={"1e30": 1e30, "1e300": 1e300, "3e38": lambda count: 3e38},
    estimator=ESTIMATORS,
    default=("3e38-finite_difference", "1e300-jvp"),
)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # NumPy's, of 1e300.
def test_unbounded_strength_is_the_ascent_of_the_sharpest_example(strength, estimator):
    problem = problems.perceptron()
    link = reweight_by_sharpness(strength, key=0, estimator=estimator)
    ascent = optax.chain(link, optax_sam.scale_to_radius(0.1))
    epsilon, state = problems.ascend(ascent, problem)
    sharpest = int(np.argmax(slopes(problem, estimator=estimator)))
    grads = problems.gradient(example(problem, sharpest))
    alone = optax_sam.scale_to_radius(0.1)
    expected = alone.update(grads, alone.init(grads))[0]
    problems.assert_trees_close(epsilon, expected, rtol=1e-4, atol=1e-6)
    assert optax.tree.get(state, "largest_weight") == 1
    assert optax.tree.get(state, "effective_sample_size") == 1


def test_normalize_takes_the_scale_of_the_loss_out():
    a = np.array([1.0, 2.0, 4.0])
    plain, _ = weights(0.7, lines(a), normalize=True)
    scaled, state = weights(0.7, lines(1e6 * a), normalize=True)
    np.testing.assert_allclose(plain, gibbs(0.7 * a / a.mean()), rtol=1e-6)
    np.testing.assert_allclose(scaled, plain, rtol=1e-6)
    assert state.mean_directional_norm == pytest.approx(1e6 * a.mean())


@cover(
    normalize=[False, True],
    strength=[1.0, 1e30],
    slopes=[
        [1.0, np.inf, 2.0],
        [1.0, np.nan, 2.0],
        [3e38, 1.0, 3e38, 2e38],
        [0.0, 0.0],
        [1e-40, 0.0],
        [np.nan, np.inf],
        [np.nan],
        [1e30, np.inf, -np.inf, np.nan, 0.0],
    ],
)
def test_weights_of_any_slopes(slopes, strength, normalize):
    p, state = weights(strength, lines(slopes), normalize=normalize)
    finite = np.isfinite(slopes)
    assert np.all(np.isfinite(p))
    assert np.sum(p) == pytest.approx(1.0)
    if finite.any():
        assert np.all(np.asarray(p)[~finite] == 0)
    else:
        np.testing.assert_array_equal(p, np.full(len(slopes), 1 / len(slopes), "f"))
    scalars = optax.tree.map_params(lambda _: state, lambda x: x, state)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(scalars))
    assert 1 - 1e-6 <= state.effective_sample_size <= len(slopes) + 1e-5


def test_an_example_whose_probe_overflows_gets_no_weight():
    def loss_fn(w, x):  # The second example is on the brink whatever the signs.
        return jnp.where(jnp.arange(3) == 1, jnp.where(w == 0, 0.0, jnp.inf), x * w)

    wall = problems.Problem(jnp.zeros([]), loss_fn, jnp.array([1.0, 2.0, 3.0]))
    p, state = weights(1.0, wall, estimator="finite_difference")
    np.testing.assert_allclose(p, np.insert(gibbs([1.0, 3.0]), 1, 0), rtol=1e-6)
    assert state.mean_directional_norm == pytest.approx(2.0)
    p, _ = weights(0.0, wall, estimator="finite_difference")
    np.testing.assert_array_equal(p, np.full(3, 1 / 3, np.float32))


@cover(bad=[np.inf, np.nan], estimator=ESTIMATORS, default=("inf-finite_difference",))
def test_a_bad_example_leaves_the_ascent_as_it_was(bad, estimator):
    problem = problems.perceptron()
    ascent = optax.chain(
        reweight_by_sharpness(1.0, key=0, estimator=estimator),
        optax_sam.suppress_variance(0.4),
        optax_sam.scale_to_radius(0.1),
    )
    tx = optax_sam.sharpness_aware(optax.apply_if_finite(optax.sgd(0.1), 9), ascent)
    step = jax.jit(optax_sam.value_and_update(problem.loss_fn, tx))
    _, _, before = step(problem.params, tx.init(problem.params), problem.batch)
    x, labels = problem.batch
    spoilt = problems.replaced(x, (3, 0), bad), labels
    _, updates, after = step(problem.params, before, spoilt)
    problems.assert_trees_equal(after.ascent_state, before.ascent_state)
    assert problems.norm(updates) == 0
    assert after.base_state.notfinite_count == 1
    _, updates, _ = step(problem.params, after, problem.batch)
    assert 0 < problems.norm(updates) < np.inf


@pytest.mark.parametrize("scale", defaults([0.0, 1e30], [1e30]))
def test_losses_of_any_size_keep_parameters_finite(scale):
    problem = problems.perceptron()
    scaled = problem._replace(loss_fn=lambda p, b: scale * problem.loss_fn(p, b))
    params, opt_state = problems.train(rw_sam(optax.sgd(1e-33)), scaled, 3)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((params, opt_state)))
    assert optax.tree.get(opt_state.ascent_state[0], "count") == 3


def test_without_a_pullback_the_result_is_the_same():
    problem = problems.perceptron()
    tx = rw_sam(optax.sgd(0.1), estimator="jvp", num_probes=2)
    step = jax.jit(optax_sam.value_and_update(problem.loss_fn, tx))
    _, expected, state = step(problem.params, tx.init(problem.params), problem.batch)
    updates, by_hand = problems.ascend(tx, problem)
    problems.assert_trees_close(updates, expected, rtol=1e-4, atol=1e-6)
    states = map(problems.without_losses, (by_hand, state))
    problems.assert_trees_close(*states, rtol=1e-4)


@pytest.mark.full
def test_draws_depend_on_key_and_count_only():
    problem, key = problems.perceptron(), jax.random.key(5)
    expected = slopes(problem, 3, key=5)
    for other in (key, jax.random.key_data(key), np.asarray(jax.random.PRNGKey(5))):
        np.testing.assert_array_equal(slopes(problem, 3, key=other), expected)
    assert np.all(slopes(problem, 4, key=5) != expected)
    assert np.all(slopes(problem, 3, key=6) != expected)
    link = reweight_by_sharpness(1.0, key=5)
    _, state = problems.ascend(link, problem)
    np.testing.assert_array_equal(state.key, jax.random.key_data(key))
    rbg = jax.random.key(5, impl="rbg")
    assert np.all(np.isfinite(slopes(problem, 3, key=rbg)))


def test_signs_are_fair_and_independent():
    draws, shape = 4000, (3, 70)
    like = jnp.zeros(shape, jnp.bfloat16)
    words = random.words(jax.random.key(0), draws)
    z = jax.jit(jax.vmap(lambda pair: rw_sam_module._signs(pair, like)))(words)
    assert z.dtype == jnp.bfloat16
    z = np.asarray(z, np.float32).reshape(draws, -1)
    assert set(np.unique(z)) == {-1.0, 1.0}
    assert np.abs(z.mean(0)).max() < 5 / np.sqrt(draws)
    correlation = z.T @ z / draws - np.eye(z.shape[1])
    # Six deviations: there are 22 thousand pairs.
    assert np.abs(correlation).max() < 6 / np.sqrt(draws)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (31, 2), (2, 32), (1, 33)])
def test_signs_of_any_shape(shape):
    z = rw_sam_module._signs(random.words(jax.random.key(0), 1)[0], jnp.zeros(shape))
    assert z.shape == shape
    assert np.all(np.abs(z) == 1)


def test_leaves_that_are_absent_are_neither_probed_nor_returned():
    def loss_fn(params, batch):
        return batch @ params["b"] + 100 * params["a"].sum() * batch[:, 0]

    rng = np.random.default_rng(0)
    batch = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
    params = {"a": jnp.ones(4), "b": jnp.ones(3)}
    both = problems.Problem(params, loss_fn, batch)
    only_b = problems.Problem(params, lambda p, x: x @ p["b"], batch)
    for estimator in ("finite_difference", "jvp"):
        link = reweight_by_sharpness(0.5, key=0, estimator=estimator, delta=0.5)
        out, state = problems.ascend(
            link, both, grads={"a": optax.MaskedNode(), "b": params["b"]}
        )
        assert out["a"] == optax.MaskedNode()
        # The signs of "b" are those that it has when "a" is probed too.
        expected, expected_state = problems.ascend(link, only_b)
        # Losses near 400 are rounded.
        np.testing.assert_allclose(out["b"], expected["b"], rtol=1e-3, atol=1e-3)
        assert state.mean_directional_norm == pytest.approx(
            float(expected_state.mean_directional_norm), rel=1e-3
        )
        nothing, _ = problems.ascend(
            link, both, grads=dict.fromkeys(params, optax.MaskedNode())
        )
        assert jax.tree.leaves(nothing) == []


def test_schedules_see_the_count_of_steps():
    def strength(count):
        return jnp.where(count == 1, 1e30, 0.0)

    problem = lines([1.0, 2.0])
    link = reweight_by_sharpness(strength, key=0, delta=lambda count: 0.5 + count)
    state, out = link.init(problem.params), []
    for _ in range(3):
        gradient, state = problems.ascend(link, problem, state)
        out.append(float(gradient))
    assert out == [1.5, 2.0, 1.5]
    assert state.count == 3


def test_injected_hyperparameters():
    problem = problems.perceptron()
    static = ("key", "num_probes", "estimator", "normalize")
    values = {"strength": 0.5, "delta": 1e-3, "key": 3, "num_probes": 2}
    injected = optax.inject_hyperparams(reweight_by_sharpness, static_args=static)
    (out, state), (expected, _) = (
        problems.ascend(link, problem)
        for link in (injected(**values), reweight_by_sharpness(**values))
    )
    problems.assert_trees_close(out, expected, rtol=1e-5, atol=1e-7)
    assert set(state.hyperparams) == {"strength", "delta"}
    forgotten = optax.inject_hyperparams(reweight_by_sharpness)
    with pytest.raises(TypeError, match=r"num_probes must be.*static_args"):
        forgotten(**values).init(problem.params)


def test_state_keeps_its_types_and_its_own_buffers():
    problem, key = problems.perceptron(), jax.random.PRNGKey(0)
    link = reweight_by_sharpness(1.0, key=key)
    first, second = link.init(problem.params), link.init(problem.params)
    _, after = problems.ascend(link, problem, first)
    for old, new in zip(first, after, strict=True):
        assert (old.shape, old.dtype) == (new.shape, new.dtype)
        assert old.weak_type == new.weak_type
    leaves = [key, *jax.tree.leaves((first, second))]
    assert len({x.unsafe_buffer_pointer() for x in leaves}) == len(leaves)


@pytest.mark.usefixtures("x64")
def test_x64_takes_differences_in_float64():
    problem = problems.perceptron(jnp.float64)
    exact = slopes(problem, estimator="jvp")
    np.testing.assert_allclose(slopes(problem, delta=1e-7), exact, rtol=1e-4)
    _, state = problems.ascend(reweight_by_sharpness(1.0, key=0), problem)
    assert {x.dtype.name for x in state} == {"uint32", "int32", "float32"}


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"strength": -1.0}, ValueError, "strength = -1 is out of range"),
        ({"strength": "1"}, TypeError, "strength must be a real scalar"),
        ({"delta": 0.0}, ValueError, "delta = 0 is out of range"),
        ({"delta": np.inf}, ValueError, "delta = inf is out of range"),
        ({"delta": jnp.ones(2)}, ValueError, "delta must be a scalar"),
        ({"num_probes": 0}, ValueError, "num_probes = 0 is out of range"),
        ({"num_probes": 2.0}, TypeError, "num_probes must be .* got 2.0"),
        (
            {"estimator": "exact"},
            ValueError,
            "estimator = 'exact' is unknown",
        ),
        ({"normalize": 1}, TypeError, "normalize must be .* got 1"),
        ({"key": 1.5}, TypeError, "key must be an integer or one PRNG key, got 1.5"),
        ({"key": None}, TypeError, "key must be an integer or one PRNG key"),
        ({"key": jnp.zeros(2)}, TypeError, "key must be an integer or one PRNG key"),
        ({"key": jax.random.split(jax.random.key(0))}, TypeError, "one PRNG key"),
    ],
    ids=str,
)
def test_bad_arguments(kwargs, error, match):
    with pytest.raises(error, match=f"^reweight_by_sharpness: .*{match}"):
        reweight_by_sharpness(**{"strength": 1.0, "key": 0, **kwargs})


@pytest.mark.parametrize("missing", ["params", "loss_fn", "batch"])
def test_missing_arguments(missing):
    problem, link = problems.perceptron(), reweight_by_sharpness(1.0, key=0)
    kwargs = problem._asdict()
    del kwargs[missing]
    match = f"^reweight_by_sharpness: {missing} is missing.*tx.update.*value_and_update"
    with pytest.raises(ValueError, match=match):
        link.update(problem.params, link.init(problem.params), **kwargs)


def test_a_gradient_function_alone_is_not_enough():
    problem, tx = problems.perceptron(), rw_sam(optax.sgd(0.1))
    grad_fn = jax.grad(problems.mean_loss(problem))
    with pytest.raises(ValueError, match="reweight_by_sharpness: loss_fn is missing"):
        tx.update(
            grad_fn(problem.params),
            tx.init(problem.params),
            problem.params,
            grad_fn=grad_fn,
        )


def test_a_scalar_loss_is_refused():
    problem, tx = problems.perceptron(), rw_sam(optax.sgd(0.1))
    scalar = problem._replace(loss_fn=lambda p, b: jnp.mean(problem.loss_fn(p, b)))
    with pytest.raises(
        ValueError, match="reweight_by_sharpness: needs the loss of each example"
    ):
        problems.train(tx, scalar, 1)
    with pytest.raises(
        ValueError, match="reweight_by_sharpness: needs the loss of each example"
    ):
        problems.ascend(tx, scalar)
