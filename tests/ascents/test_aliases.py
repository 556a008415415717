"""Aliases in the limits in which they are SAM or their base, and their arguments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from methods import DTYPES, cover

import optax_sam


def sparse(base, rho=0.1, sparsity=0.5, **options):
    pattern = optax_sam.unstructured(sparsity)
    return optax_sam.sparse_sam(base, rho, pattern, refresh_every=3, **options)


def dynamic(base, rho=0.1, sparsity=0.5, **options):
    return optax_sam.dynamic_sparse_sam(
        base, rho, sparsity, refresh_every=3, decay_steps=15, **options
    )


BASE = optax.sgd(0.1, momentum=0.9)


@functools.cache
def trained(tx, dtype):
    """Parameters after twenty steps."""
    return problems.train(tx, problems.perceptron(dtype), 20)[0]


SAM = optax_sam.sam(BASE, rho=0.1)


@cover(
    rescale=[False, True],
    method=[sparse, dynamic],
    dtype={"float32": jnp.float32, "bfloat16": jnp.bfloat16},
    default=("False-sparse-float32",),
)
def test_sparsity_zero_is_sam_and_one_is_the_base(method, rescale, dtype):
    sam, plain = trained(SAM, dtype), trained(BASE, dtype)
    nothing = trained(method(BASE, sparsity=1.0, rescale=rescale), dtype)
    problems.assert_trees_equal(nothing, plain)
    everything = trained(method(BASE, sparsity=0.0, rescale=rescale), dtype)
    if rescale:  # To scale what has its length already may change the last bit.
        size = float(jnp.finfo(dtype).eps)
        problems.assert_trees_close(everything, sam, rtol=4 * size, atol=4 * size)
    else:
        problems.assert_trees_equal(everything, sam)


@pytest.mark.parametrize("method", [sparse, dynamic])
def test_rescale_brings_the_radius_back(method):
    params, loss_fn, batch = problem = problems.perceptron()
    grads = problems.gradient(problem)
    for rescale in (False, True):
        tx = method(optax.identity(), rescale=rescale, rho=0.25)

        @jax.jit
        def perturbed(grads, params, tx=tx):
            return tx.update(
                grads,
                tx.init(params),
                params,
                loss_fn=loss_fn,
                batch=batch,
                grad_fn=lambda p: p,
            )[0]

        epsilon = jax.tree.map(np.subtract, perturbed(grads, params), params)
        zeros = sum(int(np.sum(e == 0)) for e in jax.tree.leaves(epsilon))
        size = sum(e.size for e in jax.tree.leaves(epsilon))
        assert zeros == size - size // 2
        length = problems.norm(epsilon)
        assert length == pytest.approx(0.25, rel=1e-5) if rescale else length < 0.24


def test_vasso_with_theta_one_is_sam():
    vasso = optax_sam.vasso(BASE, rho=0.1, theta=1.0)
    problems.assert_trees_equal(trained(vasso, jnp.float32), trained(SAM, jnp.float32))


@cover(
    tx={
        "sam": optax_sam.sam,
        "vasso": functools.partial(optax_sam.vasso, theta=0.4),
        "asam": optax_sam.asam,
        "sparse": sparse,
        "dynamic": dynamic,
    },
    dtype=DTYPES,
    default=("sam-float32", "asam-bfloat16", "dynamic-float16"),
)
def test_rho_zero_is_the_base(tx, dtype):
    problem, base = problems.perceptron(dtype), optax.adamw(1e-2, eps=1e-4)
    expected, base_state = problems.train(base, problem, 20)
    actual, state = problems.train(tx(base, rho=0.0), problem, 20)
    problems.assert_trees_equal(actual, expected)
    problems.assert_trees_equal(state.base_state, base_state)
    assert np.isfinite(problems.norm(actual))


def test_limits_are_exact_at_the_compilers_own_level_of_optimisation():
    """Which fuses, and hence rounds, in another way than that of the other tests."""
    problem = problems.perceptron()

    def train(tx):
        run = problems.training(tx, problem, 20)
        level = {"xla_backend_optimization_level": 3}
        compiled = jax.jit(run, compiler_options=level)
        return compiled(problem.params, tx.init(problem.params))[0]

    def neutral(rho):
        links = (
            optax_sam.reweight_by_sharpness(0.0, key=0, estimator="jvp"),
            optax_sam.suppress_variance(1.0),
            optax_sam.scale_to_radius(rho),
        )
        ascent = optax.chain(*links)
        return optax_sam.sharpness_aware(BASE, ascent, micro_batch_size=16)

    problems.assert_trees_equal(train(neutral(0.1)), train(SAM))
    problems.assert_trees_equal(train(neutral(0.0)), train(BASE))


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
