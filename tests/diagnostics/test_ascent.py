"""What ascents do, measured, beside what the engine does and what theory says."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import optax_sam
from optax_sam import diagnostics

RADIUS = optax_sam.scale_to_radius(0.3)
NETWORK = problems.perceptron(sizes=(4, 5, 3))
LAYERS = optax_sam.select_layers("w0", "b0")
PROBLEM = problems.quadratic()
ENTRIES = 6 + 2 + 1  # Of the parameters of this problem.


def measure(ascent, params, batch, *, state=None, loss_fn=PROBLEM.loss_fn, **options):
    state = ascent.init(params) if state is None else state
    return jax.jit(diagnostics.ascent_metrics(loss_fn, ascent, **options))(
        params, state, batch
    )


@pytest.mark.parametrize(
    ("ascent", "density"),
    [
        (RADIUS, 1),
        (optax_sam.adapt_to_scale(0.3), 1),
        (optax.chain(optax_sam.perturb_only({"layer": True, "scale": False}), RADIUS),
         8 / ENTRIES),
        (optax.chain(RADIUS, optax_sam.sparsify_by_fisher(
            optax_sam.unstructured(0.5), refresh_every=2)), 4 / ENTRIES),
        (optax.chain(RADIUS, optax_sam.sparsify_dynamically(
            0.3, refresh_every=1, decay_steps=9, key=0)), 6 / ENTRIES),
        (optax.chain(
            optax_sam.perturb_only({"layer": {"w": True, "b": False}, "scale": False}),
            optax_sam.sparsify_by_fisher(optax_sam.n_m(1, 3, axis=1), refresh_every=1),
            RADIUS), 2 / ENTRIES),
    ],
    ids=["sam", "asam", "static", "fisher", "dynamic", "static and n_m"],
)  # fmt: skip
def test_metrics_are_those_of_the_perturbation(ascent, density):
    params, loss_fn, batch = PROBLEM
    loss = problems.mean_loss(PROBLEM)
    ascend = jax.jit(partial(ascent.update, loss_fn=loss_fn))
    epsilon, _ = ascend(
        problems.gradient(PROBLEM), ascent.init(params), params, batch=batch
    )
    perturbed = jax.tree.map(
        lambda e, p: p if isinstance(e, optax.MaskedNode) else p + e,
        epsilon,
        params,
        is_leaf=lambda e: isinstance(e, optax.MaskedNode),
    )
    metrics = measure(ascent, params, batch)
    assert all(x.dtype == jnp.float32 and x.shape == () for x in metrics)
    assert metrics.clean_loss == pytest.approx(float(loss(params)), rel=1e-6)
    assert metrics.perturbed_loss == pytest.approx(float(loss(perturbed)), rel=1e-6)
    rise = float(loss(perturbed) - loss(params))
    assert metrics.gap == pytest.approx(rise, rel=1e-4)
    assert metrics.perturbation_norm == pytest.approx(problems.norm(epsilon), rel=1e-6)
    assert metrics.mask_density == pytest.approx(density, rel=1e-6)
    assert metrics.effective_sample_size == 8


@pytest.mark.full
def test_masks_combine_and_are_those_in_use():
    """Two random masks, both exchanged after the step, and one made before it."""
    masks = [
        optax_sam.sparsify_dynamically(0.3, refresh_every=1, decay_steps=9, key=key)
        for key in (1, 2)
    ]
    fisher = optax_sam.sparsify_by_fisher(optax_sam.unstructured(0.3), refresh_every=3)
    ascent = optax.chain(RADIUS, optax.chain(*masks), fisher)
    params, loss_fn, batch = PROBLEM
    ascend = jax.jit(partial(ascent.update, loss_fn=loss_fn))
    measured = jax.jit(diagnostics.ascent_metrics(loss_fn, ascent))
    grads = problems.gradient(PROBLEM)
    state, seen = ascent.init(params), []
    for _ in range(3):
        epsilon, new = ascend(grads, state, params, batch=batch)
        seen.append(sum(np.count_nonzero(e) for e in jax.tree.leaves(epsilon)))
        metrics = measured(params, state, batch)
        assert metrics.mask_density == pytest.approx(seen[-1] / ENTRIES)
        state = new
    assert 0 < min(seen) < max(seen) < 6


def test_what_is_called_mask_but_is_none():
    class State(NamedTuple):
        mask: jax.Array
        direction: dict

    odd = optax.GradientTransformation(
        lambda p: State(jnp.ones(3, bool), {"mask": jnp.zeros(2)}),
        lambda u, s, p=None: (u, s),
    )
    metrics = measure(optax.chain(odd, RADIUS), PROBLEM.params, PROBLEM.batch)
    assert metrics.mask_density == 1


def test_metrics_follow_the_engine():
    """After steps of VaSSO with dropout and auxiliary data, in the next step."""
    ascent = optax.chain(optax_sam.suppress_variance(0.3), RADIUS)
    params, _, batch = NETWORK

    def loss_fn(params, batch, statistics, key):
        x, labels = batch
        x = jnp.where(jax.random.bernoulli(key, 0.7, x.shape), x, 0)
        return NETWORK.loss_fn(params, (x, labels)), statistics + jnp.mean(x)

    @jax.jit
    def loss_along(params, direction, *args):
        perturbed = jax.tree.map(
            lambda p, d: p + 0.3 * d / optax.tree.norm(direction), params, direction
        )
        return jnp.mean(loss_fn(perturbed, *args)[0])

    tx = optax_sam.sharpness_aware(optax.sgd(0.1), ascent)
    step = jax.jit(optax_sam.value_and_update(loss_fn, tx, has_aux=True))
    measured = jax.jit(diagnostics.ascent_metrics(loss_fn, ascent, has_aux=True))
    opt_state = tx.init(params)
    for i in range(2):
        args = batch, jnp.zeros([]), jax.random.key(i)
        (value, _), _, new_state = step(params, opt_state, *args)
        metrics = measured(params, opt_state.ascent_state, *args)
        assert metrics.clean_loss == pytest.approx(float(value), rel=1e-6)
        loss = loss_along(params, new_state.ascent_state[0].direction, *args)
        assert metrics.perturbed_loss == pytest.approx(float(loss), rel=1e-5)
        opt_state = new_state
    # The whole state will do as well.
    problems.assert_trees_equal(
        measured(params, opt_state, *args), measured(params, opt_state[0], *args)
    )


def test_ascents_along_what_the_base_keeps_need_the_whole_state():
    params, loss_fn, batch = NETWORK
    ascent = optax_sam.follow_momentum(0.3)
    tx = optax_sam.sharpness_aware(optax.sgd(0.1, momentum=0.9), ascent)
    step = jax.jit(optax_sam.value_and_update(loss_fn, tx))
    _, updates, opt_state = step(params, tx.init(params), batch)
    params = optax.apply_updates(params, updates)
    metrics = measure(ascent, params, batch, state=opt_state, loss_fn=loss_fn)
    assert metrics.perturbation_norm == pytest.approx(0.3, rel=1e-5)
    clean = problems.mean_loss(NETWORK)(params)
    assert metrics.clean_loss == pytest.approx(float(clean), rel=1e-6)
    value, _, _ = step(params, opt_state, batch)
    assert metrics.perturbed_loss == pytest.approx(float(value), rel=1e-6)

    batches = jax.tree.map(lambda x: x.reshape(4, 4, *x.shape[1:]), batch)
    found = stability(ascent, loss_fn, params, opt_state, batches)
    assert found.variance == pytest.approx(0, abs=1e-6)
    assert found.mean_norm == pytest.approx(0.3, rel=1e-5)

    for alone in (opt_state.ascent_state, ascent.init(params)):
        with pytest.raises(ValueError, match=r"follow_momentum: .*pass the whole stat"):
            measure(ascent, params, batch, state=alone, loss_fn=loss_fn)
    with pytest.raises(TypeError, match="state is not of this ascent"):
        measure(optax.chain(ascent), params, batch, state=opt_state, loss_fn=loss_fn)


def test_a_gradient_that_is_not_finite_or_zero():
    def loss_fn(params, batch):
        return jnp.sqrt(params) * batch  # Of infinite slope at zero.

    params, batch = jnp.zeros([]), jnp.ones(4)
    metrics = measure(RADIUS, params, batch, loss_fn=loss_fn)
    np.testing.assert_array_equal(metrics, (0, 0, 0, 0, 1, 4))
    metrics = measure(RADIUS, params, batch, loss_fn=lambda p, b: 2 * b + 0 * p)
    np.testing.assert_array_equal(metrics, (2, 2, 0, 0, 1, 4))


def test_effective_sample_sizes():
    params, _, batch = NETWORK
    on = partial(measure, params=params, batch=batch, loss_fn=NETWORK.loss_fn)
    ascent = optax.chain(
        optax_sam.reweight_by_sharpness(2.0, key=0, estimator="jvp"), RADIUS
    )
    clean = NETWORK.loss_fn(params, batch)
    ascend = jax.jit(partial(ascent.update, loss_fn=NETWORK.loss_fn))
    _, state = ascend(params, ascent.init(params), params, batch=batch)
    expected = float(state[0].effective_sample_size)
    assert 1 < expected < 15
    assert on(ascent).effective_sample_size == pytest.approx(expected, rel=1e-5)

    def of_a_quarter(params, batch):
        return NETWORK.loss_fn(params, jax.tree.map(lambda x: x[:4], batch))

    metrics = on(RADIUS, ascent_loss_fn=of_a_quarter)
    assert metrics.effective_sample_size == 4
    assert metrics.clean_loss == pytest.approx(float(jnp.mean(clean)), rel=1e-6)

    def mean_loss(params, batch):
        return jnp.mean(NETWORK.loss_fn(params, batch))

    assert on(RADIUS, loss_fn=mean_loss).effective_sample_size == 16


def linear(w, batch):
    return batch @ w


def batches_of(k=6, size=5, d=4):
    rng = np.random.default_rng(0)
    return jnp.asarray(1 + rng.normal(size=(k, size, d)))


@partial(jax.jit, static_argnums=(0, 1))
def stability(ascent, loss_fn, params, state, batches, *args):
    return diagnostics.ascent_stability(loss_fn, ascent, params, state, batches, *args)


def test_stability_of_the_gradient_and_of_its_direction(x64):
    batches, w = batches_of(), jnp.zeros(4)
    g = np.mean(batches, axis=1)
    for ascent, d in (
        (optax.identity(), g),
        (RADIUS, 0.3 * g / np.linalg.norm(g, axis=1, keepdims=True)),
    ):
        d = np.asarray(d)
        found = stability(ascent, linear, w, ascent.init(w), batches)
        variance = np.trace(np.cov(d.T))
        assert found.variance == pytest.approx(variance, rel=1e-9)
        relative = variance / np.sum(d.mean(axis=0) ** 2)
        assert found.relative_variance == pytest.approx(relative, rel=1e-9)
        units = d / np.linalg.norm(d, axis=1, keepdims=True)
        cosines = (units @ units.T)[~np.eye(6, dtype=bool)]
        assert found.mean_cosine == pytest.approx(cosines.mean(), rel=1e-9)
        norms = np.linalg.norm(d, axis=1)
        assert found.mean_norm == pytest.approx(norms.mean(), rel=1e-9)


def test_variance_suppression_suppresses_variance(x64):
    """From one state, the direction of VaSSO has theta^2 of the variance."""
    w, theta, batches = jnp.zeros(4), 0.3, batches_of(k=40)
    ascent = optax_sam.suppress_variance(theta)
    _, state = ascent.update(jnp.ones(4), ascent.init(w), w)
    raw = stability(optax.identity(), linear, w, optax.EmptyState(), batches)
    averaged = stability(ascent, linear, w, state, batches)
    assert averaged.variance == pytest.approx(theta**2 * float(raw.variance), rel=1e-9)
    assert averaged.mean_cosine > raw.mean_cosine
    # In the first step there is nothing to average.
    first = stability(ascent, linear, w, ascent.init(w), batches)
    np.testing.assert_allclose(first, raw, rtol=1e-9)


def test_stability_where_nothing_moves_or_only_some_leaves_do():
    w, batches = jnp.zeros(4), jnp.zeros((3, 2, 4))
    found = stability(RADIUS, linear, w, RADIUS.init(w), batches)
    np.testing.assert_array_equal(found, (0, 0, 0, 0))
    # Opposite directions, whose mean is zero.
    batches = jnp.stack([jnp.ones((2, 4)), -jnp.ones((2, 4))])
    found = stability(RADIUS, linear, w, RADIUS.init(w), batches)
    np.testing.assert_allclose(found, (2 * 0.09, np.inf, -1, 0.3), rtol=1e-6)
    params, loss_fn, batch = NETWORK
    batches = jax.tree.map(lambda x: x.reshape(4, 4, *x.shape[1:]), batch)
    ascent = optax.chain(optax_sam.perturb_only(LAYERS), RADIUS)
    found = stability(ascent, loss_fn, params, ascent.init(params), batches)
    assert found.mean_norm == pytest.approx(0.3, rel=1e-5)
    with pytest.raises(ValueError, match="got 1 batch"):
        stability(RADIUS, linear, w, RADIUS.init(w), jnp.zeros((1, 2, 4)))


def test_the_module_is_an_attribute_of_the_package():
    assert optax_sam.diagnostics is diagnostics
    for name in diagnostics.__all__:
        assert getattr(diagnostics, name).__doc__


def test_a_loss_of_one_number_may_be_of_anything():
    ascent = optax_sam.scale_to_radius(0.5)
    measure = diagnostics.ascent_metrics(lambda w, _: jnp.sum(w**2), ascent)
    metrics = measure(jnp.ones(4), ascent.init(jnp.ones(4)), None)
    assert metrics.clean_loss == 4
    assert jnp.isnan(metrics.effective_sample_size)


def test_the_state_of_another_ascent_is_refused():
    vasso = optax.chain(optax_sam.suppress_variance(0.4), optax_sam.scale_to_radius(1))
    params, batch = jnp.ones(4), jnp.ones((2, 4))
    measure = diagnostics.ascent_metrics(lambda w, x: x @ w, vasso)
    state = optax_sam.scale_to_radius(1).init(params)
    message = "a ScaleToRadiusState of 1 arrays, where it has a tuple of 3; pass the"
    with pytest.raises(TypeError, match=message):
        measure(params, state, batch)
    other = diagnostics.ascent_metrics(lambda w, x: x @ w, optax_sam.scale_to_radius(1))
    with pytest.raises(TypeError, match="is not of this ascent"):
        other(params, vasso.init(params), batch)
