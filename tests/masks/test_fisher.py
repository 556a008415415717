import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest

import optax_sam
from optax_sam._base import losses
from optax_sam._masks import fisher


def per_example(problem, num_examples):
    """The diagonal by its definition, one gradient after the other."""

    def square(i):
        example = jax.tree.map(lambda x: x[i : i + 1], problem.batch)
        _, grads = problems.value_and_grad(problem.loss_fn, problem.params, example)
        return jax.tree.map(lambda g: np.asarray(g, np.float64) ** 2, grads)

    squares = [square(i) for i in range(num_examples)]
    return jax.tree.map(lambda *s: sum(s) / num_examples, *squares)


@pytest.mark.parametrize(
    ("num_examples", "chunk_size"), [(None, 4), (16, 1), (7, 4), (3, 4), (99, 16)]
)
def test_fisher_is_the_mean_of_squared_gradients(num_examples, chunk_size):
    problem = problems.perceptron()
    diagonal = partial(
        optax_sam.fisher_diagonal,
        problem.loss_fn,
        num_examples=num_examples,
        chunk_size=chunk_size,
    )
    fisher = jax.jit(diagonal)(problem.params, problem.batch)
    expected = per_example(problem, min(num_examples or 16, 16))
    problems.assert_trees_close(fisher, expected, rtol=1e-4, atol=1e-8)


def test_fisher_of_half_precision_does_not_overflow():
    def loss_fn(params, batch):
        return 1000 * batch * params

    batch = jnp.ones(8, jnp.float16)
    fisher = optax_sam.fisher_diagonal(loss_fn, jnp.float16(1), batch)
    assert fisher.dtype == jnp.float32
    assert fisher == 1e6


def test_probes_are_exact_over_all_signs(monkeypatch):
    """The mean over all 2^n draws is the diagonal: theory, E (sum s_i g_i)^2."""
    problem = problems.perceptron(batch_size=5)
    n = 4
    # The fifth example is beyond num_examples: its sign must not matter.
    draws = [(*signs, 1) for signs in itertools.product([-1, 1], repeat=n)]

    def probe(signs):
        monkeypatch.setattr(jax.random, "rademacher", lambda *_: signs)
        clean = losses.linearise(
            lambda p: problem.loss_fn(p, problem.batch), problem.params
        )
        return fisher.fisher_from_probes(*clean, n, 1, jax.random.key(0))

    probes = jax.jit(jax.vmap(probe))(np.asarray(draws, np.float32))
    mean = jax.tree.map(lambda x: np.mean(x, axis=0), probes)
    problems.assert_trees_close(mean, per_example(problem, n), rtol=1e-4, atol=1e-8)


def test_probes_estimate_the_diagonal():
    problem, num_probes = problems.perceptron(), 400

    @jax.jit
    def probe(params):
        clean = losses.linearise(lambda p: problem.loss_fn(p, problem.batch), params)
        return fisher.fisher_from_probes(*clean, 16, num_probes, jax.random.key(1))

    estimate = probe(problem.params)
    exact = per_example(problem, 16)
    # The variance of the sum is that of 164 dependent estimates, each with a relative
    # deviation of at most sqrt(2 / probes).
    total, expected = (
        sum(float(np.sum(x)) for x in jax.tree.leaves(t)) for t in (estimate, exact)
    )
    assert total == pytest.approx(expected, rel=4 * (2 / num_probes) ** 0.5)
    for name, e in exact.items():
        np.testing.assert_allclose(estimate[name], e, rtol=0.5, atol=1e-3 * e.max())


def test_arguments_out_of_range():
    problem = problems.perceptron()
    arguments = problem.loss_fn, problem.params, problem.batch
    for name in ("num_examples", "chunk_size"):
        with pytest.raises(ValueError, match=f"{name} = 0 is out of range"):
            optax_sam.fisher_diagonal(*arguments, **{name: 0})
        with pytest.raises(TypeError, match=f"{name} must be an integer"):
            optax_sam.fisher_diagonal(*arguments, **{name: 2.5})


def test_batches_without_one_axis_of_examples():
    problem = problems.perceptron()
    x, y = problem.batch
    for batch, message in [
        ((x, y[:3]), r"one axis of examples in common.*\[3, 16\]"),
        ((x, y, jnp.float32(0)), r"batch\[2\] is a scalar"),
        ((), "no batch was passed"),
    ]:
        with pytest.raises(ValueError, match=message):
            optax_sam.fisher_diagonal(problem.loss_fn, problem.params, batch)


def test_losses_that_are_not_per_example():
    problem = problems.perceptron()

    def mean_loss(params, batch):
        return problem.loss_fn(params, batch).mean()

    with pytest.raises(ValueError, match="needs the loss of each example"):
        optax_sam.fisher_diagonal(mean_loss, problem.params, problem.batch)
