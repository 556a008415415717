"""Aliases in the limits in which they are SAM or their base, and their arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import optax_sam


def sparse(base, rho=0.1, sparsity=0.5, **options):
    pattern = optax_sam.unstructured(sparsity)
    return optax_sam.sparse_sam(base, rho, pattern, refresh_every=3, **options)


def dynamic(base, rho=0.1, sparsity=0.5, **options):
    return optax_sam.dynamic_sparse_sam(
        base, rho, sparsity, refresh_every=3, decay_steps=15, **options
    )


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("method", [sparse, dynamic])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sparsity_zero_is_sam_and_one_is_the_base(method, rescale, dtype):
    problem, base = problems.perceptron(dtype), optax.sgd(0.1, momentum=0.9)
    sam, _ = problems.train(optax_sam.sam(base, rho=0.1), problem, 20)
    plain, _ = problems.train(base, problem, 20)
    nothing, _ = problems.train(
        method(base, sparsity=1.0, rescale=rescale), problem, 20
    )
    problems.assert_trees_equal(nothing, plain)
    everything, _ = problems.train(
        method(base, sparsity=0.0, rescale=rescale), problem, 20
    )
    if rescale:  # To scale what has its length already may change the last bit.
        size = float(jnp.finfo(dtype).eps)
        problems.assert_trees_close(everything, sam, rtol=4 * size, atol=4 * size)
    else:
        problems.assert_trees_equal(everything, sam)


@pytest.mark.parametrize("method", [sparse, dynamic])
def test_rescale_brings_the_radius_back(method):
    problem = problems.perceptron()
    seen = []
    for rescale in (False, True):
        tx = method(optax.sgd(0.1), rescale=rescale, rho=0.25)
        grads = jax.grad(problems.mean_loss(problem))(problem.params)
        tx.update(
            grads,
            tx.init(problem.params),
            problem.params,
            loss_fn=problem.loss_fn,
            batch=problem.batch,
            grad_fn=lambda p, grads=grads: seen.append(p) or grads,
        )
        epsilon = jax.tree.map(jnp.subtract, seen[-1], problem.params)
        zeros = sum(int(jnp.sum(e == 0)) for e in jax.tree.leaves(epsilon))
        size = sum(e.size for e in jax.tree.leaves(epsilon))
        assert zeros == size - size // 2
        length = problems.norm(epsilon)
        assert length == pytest.approx(0.25, rel=1e-5) if rescale else length < 0.24


def test_vasso_with_theta_one_is_sam():
    problem, base = problems.perceptron(), optax.sgd(0.1, momentum=0.9)
    vasso, _ = problems.train(optax_sam.vasso(base, rho=0.1, theta=1.0), problem, 20)
    sam, _ = problems.train(optax_sam.sam(base, rho=0.1), problem, 20)
    problems.assert_trees_equal(vasso, sam)


@pytest.mark.parametrize(
    "tx",
    [
        lambda base: optax_sam.sam(base, rho=0.0),
        lambda base: optax_sam.vasso(base, rho=0.0, theta=0.4),
        lambda base: optax_sam.asam(base, rho=0.0),
        lambda base: sparse(base, rho=0.0),
        lambda base: dynamic(base, rho=0.0),
    ],
    ids=["sam", "vasso", "asam", "sparse", "dynamic"],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_rho_zero_is_the_base(tx, dtype):
    problem, base = problems.perceptron(dtype), optax.adamw(1e-2, eps=1e-4)
    expected, base_state = problems.train(base, problem, 20)
    actual, state = problems.train(tx(base), problem, 20)
    problems.assert_trees_equal(actual, expected)
    problems.assert_trees_equal(state.base_state, base_state)
    assert np.isfinite(problems.norm(actual))


def test_hyperparameters_by_position_and_by_name():
    base = optax.sgd(0.1)
    optax_sam.sam(base, 0.1)
    optax_sam.asam(base, 0.1)
    optax_sam.vasso(base, 0.1, 0.4)
    with pytest.raises(ValueError, match=r"rho = -1 .*>= 0"):
        optax_sam.sam(base, rho=-1)
    with pytest.raises(ValueError, match="eta"):
        optax_sam.asam(base, rho=1.0, eta=-0.1)
    with pytest.raises(ValueError, match="theta"):
        optax_sam.vasso(base, rho=0.1, theta=1.5)
    with pytest.raises(TypeError, match="accumulator_dtype"):
        optax_sam.vasso(base, rho=0.1, theta=0.5, accumulator_dtype=jnp.int32)
    with pytest.raises(ValueError, match=r"rho = -1 .*>= 0"):
        sparse(base, rho=-1)
    with pytest.raises(ValueError, match=r"sparsity = 2 .*in \[0, 1\]"):
        dynamic(base, 0.1, sparsity=2)
