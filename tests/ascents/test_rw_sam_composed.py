"""RW-SAM with other ascents, and with other losses than that of the descent."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from methods import defaults

import optax_sam
from optax_sam import reweight_by_sharpness


def test_composes_with_the_other_ascents():
    problem, rho = problems.perceptron(), 0.1

    def matrices(params):
        return jax.tree.map(lambda p: p.ndim > 1, params)

    ascent = optax.chain(
        optax_sam.perturb_only(matrices),
        reweight_by_sharpness(0.5, key=jax.random.key(0), num_probes=2),
        optax_sam.suppress_variance(0.4),
        optax_sam.scale_to_radius(rho),
    )
    epsilon, _ = problems.ascend(ascent, problem)
    assert epsilon["b0"] == optax.MaskedNode()
    assert problems.norm(epsilon) == pytest.approx(rho, rel=1e-5)
    tx = optax_sam.sharpness_aware(optax.adam(1e-2), ascent)
    params, opt_state = problems.train(tx, problem, 30)
    loss = problems.mean_loss(problem)
    assert loss(params) < 0.8 * loss(problem.params)
    size = optax.tree.get(opt_state, "effective_sample_size")
    assert 1 < size < 16
    assert 1 / size <= optax.tree.get(opt_state, "largest_weight") < 1
    assert optax.tree.get(opt_state, "mean_directional_norm") > 0


def only_matrices(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


def everything(params):
    return jax.tree.map(lambda p: True, params)


def masks(pattern):
    return optax_sam.sparsify_by_fisher(pattern, refresh_every=2)


def exchanges(sparsity):
    return optax_sam.sparsify_dynamically(
        sparsity, refresh_every=2, decay_steps=10, key=0
    )


RADIUS = optax_sam.scale_to_radius(0.2)
# The links of an ascent around those of RW-SAM, if any; `on` is the companion, and off
# it is what SAM falls back to.
COMPANIONS = {
    "VaSSO": lambda links, on: (
        *links,
        optax_sam.suppress_variance(0.4 if on else 1.0),
        RADIUS,
    ),
    "Fisher": lambda links, on: (
        *links,
        RADIUS,
        masks(optax_sam.unstructured(0.5 if on else 0.0)),
    ),
    "N:M": lambda links, on: (
        *links,
        RADIUS,
        masks(optax_sam.n_m(2 if on else 4, 4)),
    ),
    "dynamic": lambda links, on: (*links, RADIUS, exchanges(0.5 if on else 0.0)),
    "static": lambda links, on: (
        optax_sam.perturb_only(only_matrices if on else everything),
        *links,
        RADIUS,
    ),
    "VaSSO and Fisher": lambda links, on: (
        *links,
        optax_sam.suppress_variance(0.4 if on else 1.0),
        RADIUS,
        masks(optax_sam.unstructured(0.5 if on else 0.0)),
    ),
}
SHALLOW = problems.perceptron(sizes=(6, 4))


def trained(*links):
    """Parameters after five steps, from many starts: a last bit may agree by chance.

    In optimised code it need not agree: how a product and a sum are rounded depends on
    the program around them.
    """
    base = optax.sgd(0.1, momentum=0.9)
    tx = optax_sam.sharpness_aware(base, optax.chain(*links))
    level = {"xla_backend_optimization_level": 0}
    run = jax.jit(problems.training(tx, SHALLOW, 5), compiler_options=level)
    starts = [
        jax.tree.map(lambda p, k=k: p * np.float32(k / 8), SHALLOW.params)
        for k in range(16)
    ]
    opt_state = tx.init(SHALLOW.params)  # Of whatever parameters.
    return [run(params, opt_state)[0] for params in starts]


@functools.cache
def trained_by_rw_sam():
    return trained(reweight_by_sharpness(0.5, key=0), RADIUS)


@pytest.mark.parametrize("name", defaults(COMPANIONS, ["static"]))
def test_combined_methods_fall_back_to_each_other(name):
    companion = COMPANIONS[name]
    reweight, uniform = (reweight_by_sharpness(s, key=0) for s in (0.5, 0.0))
    alone = trained(*companion((), on=True))
    even = trained(*companion((uniform,), on=True))
    problems.assert_trees_equal(even, alone)
    plain = trained(*companion((reweight,), on=False))
    problems.assert_trees_equal(plain, trained_by_rw_sam())
    combined = trained(*companion((reweight,), on=True))
    for other in (alone, plain):
        difference = jax.tree.map(np.subtract, combined, other)
        assert problems.norm(difference) > 1e-4


def test_the_average_is_that_of_reweighted_gradients():
    problem, theta = problems.perceptron(), 0.4
    link = reweight_by_sharpness(0.5, key=0)
    chained = optax.chain(link, optax_sam.suppress_variance(theta))
    _, state = problems.ascend(chained, problem)
    first, after = problems.ascend(link, problem)
    halved = problem._replace(params=jax.tree.map(lambda p: p / 2, problem.params))
    second, _ = problems.ascend(link, halved, after)
    averaged, _ = problems.ascend(chained, halved, state)
    expected = jax.tree.map(lambda a, b: (1 - theta) * a + theta * b, first, second)
    problems.assert_trees_close(averaged, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.full
def test_a_mask_of_the_reweighted_ascent_is_the_mask_of_the_fisher_information():
    problem = problems.perceptron()
    fisher, radius = masks(optax_sam.unstructured(0.5)), optax_sam.scale_to_radius(0.1)
    link = reweight_by_sharpness(0.5, key=0)
    masked, state = problems.ascend(optax.chain(link, radius, fisher), problem)
    whole, _ = problems.ascend(optax.chain(link, radius), problem)
    _, alone = problems.ascend(fisher, problem)
    problems.assert_trees_equal(state[2].mask, alone.mask)
    expected = jax.tree.map(np.multiply, alone.mask, whole)
    problems.assert_trees_equal(masked, expected)


@pytest.mark.parametrize("size", defaults([16, 5, 1], [5]))
def test_slopes_are_those_of_the_loss_of_the_ascent(size):
    """Another loss, or a part of the batch."""
    problem = problems.perceptron()

    def another_loss(params, batch):
        part = jax.tree.map(lambda x: x[:size], batch)
        return 3 * problem.loss_fn(params, part) + 1

    link = reweight_by_sharpness(0.5, key=0)
    gradient, state = problems.ascend_by(another_loss, link, problem)
    alone = problem._replace(loss_fn=another_loss)
    expected, expected_state = problems.ascend(link, alone)
    problems.assert_trees_close(gradient, expected, rtol=2e-2, atol=1e-3)
    np.testing.assert_allclose(state[2:], expected_state[2:], rtol=1e-2)


def test_a_bad_gradient_of_its_own_reaches_no_state_behind_a_mask():
    """The mask hides the entry that is not finite, but the average has seen it."""
    problem = problems.quadratic()
    leave_out = optax.stateless(
        lambda updates, _: updates | {"scale": jnp.zeros_like(updates["scale"])}
    )
    ascent = optax.chain(
        reweight_by_sharpness(1.0, key=0), optax_sam.suppress_variance(0.5), leave_out
    )
    tx = optax_sam.sharpness_aware(optax.sgd(0.1), ascent)
    before, grads = tx.init(problem.params), problems.gradient(problem)

    @jax.jit
    def update(pulled, state):
        return tx.update(
            grads,
            state,
            problem.params,
            loss_fn=problem.loss_fn,
            batch=problem.batch,
            losses=problem.loss_fn(problem.params, problem.batch),
            pullback=lambda _: pulled,
        )[1]

    bad = grads | {"scale": np.full_like(grads["scale"], np.nan)}
    for pulled, skipped in [(grads, False), (bad, True)]:
        after = update(pulled, before)
        counts = [int(x) for _, x in optax.tree.get_all_with_path(after, "count")]
        assert counts == ([0, 0] if skipped else [1, 1])
        assert np.isfinite(problems.norm(optax.tree.get(after, "direction")))
