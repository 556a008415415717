"""Diagnostics on eight simulated devices as on one, of parameters that stay put."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from meshes import DEVICES, PROBLEM, REPLICATED, SPLIT, collectives, fully_sharded, mesh
from methods import cover, defaults

import optax_sam
from optax_sam import diagnostics
from optax_sam.diagnostics import _lanczos

ITERATIONS = 4
ASCENT = optax.chain(optax_sam.suppress_variance(0.4), optax_sam.scale_to_radius(0.1))


def curvature(loss_fn, params, batch):
    at = loss_fn, params, batch
    return {
        "eigenpairs": diagnostics.top_eigenvalues(
            *at, iterations=ITERATIONS, return_vectors=True, key=0
        ),
        "trace": diagnostics.hessian_trace(*at, num_probes=2, key=1),
    }


def sharpness(loss_fn, params, batch):
    at = loss_fn, params, batch
    plane = diagnostics.filter_normalized_directions(params, key=3)
    steps = jnp.array([-0.5, 1.0])
    return {
        "worst": diagnostics.worst_case_sharpness(*at, rho=0.1, steps=3),
        "average": diagnostics.average_sharpness(
            *at, rho=0.5, num_samples=2, adaptive=True, key=5
        ),
        "plane": plane,
        "surface": diagnostics.loss_surface(*at, plane, steps, steps),
    }


def of_ascents(loss_fn, params, batch):
    measure = diagnostics.ascent_metrics(loss_fn, ASCENT)
    batches = jax.tree.map(lambda x: jnp.stack([x, x**2]), batch)
    state = ASCENT.init(params)
    return {
        "metrics": measure(params, state, batch),
        "stability": diagnostics.ascent_stability(
            loss_fn, ASCENT, params, state, batches
        ),
    }


def of_examples(loss_fn, params, batch):
    at = loss_fn, params, batch
    return {
        "noise": diagnostics.gradient_covariance_trace(*at, chunk_size=24),
        "m-sharpness": diagnostics.worst_case_sharpness(
            *at,
            rho=0.1,
            steps=2,
            micro_batch_size=4,
            micro_batches_at_once=DEVICES,
        ),
    }


@pytest.mark.parametrize(
    "measures",
    defaults([curvature, sharpness, of_ascents, of_examples], [of_ascents]),
)
def test_results_are_those_of_one_device(measures):
    """Of a network, with everything sharded that can be: random numbers are the same.

    Vectors of Lanczos are compared up to what the steps make of rounding.
    """
    measure = jax.jit(partial(measures, PROBLEM.loss_fn))
    expected = measure(PROBLEM.params, PROBLEM.batch)
    found = measure(fully_sharded(PROBLEM.params), fully_sharded(PROBLEM.batch))
    problems.assert_trees_close(found, expected, rtol=2e-4, atol=2e-4)


def separate(params, batch):
    """Losses in which no parameter meets another: nothing has to be gathered."""
    terms = jax.tree.map(lambda p: jnp.mean(p**2 * (1 + jnp.cos(p))), params)
    return sum(jax.tree.leaves(terms)) * batch


def parameters(kind=None):
    """On one device, or spread over all along axes of a kind."""
    rng = np.random.default_rng(0)
    params = {
        "w": np.asarray(rng.normal(size=(64, 24)), np.float32),
        "b": np.asarray(rng.normal(size=24), np.float32),
    }
    if kind is None:
        return params
    return jax.device_put(params, NamedSharding(mesh(kind), SPLIT))


@functools.cache
def on_one_device(measures, shape):
    return jax.jit(partial(measures, separate))(parameters(), jnp.ones(shape))


@cover(
    kind={"Auto": AxisType.Auto, "Explicit": AxisType.Explicit},
    measures=[curvature, sharpness, of_ascents],
    default=("Auto-curvature", "Explicit-of_ascents"),
)
def test_no_parameter_is_gathered(measures, kind):
    """Devices tell each other numbers only; of directions, how long filters are."""
    params, batch = parameters(kind), jnp.ones(2)
    with jax.set_mesh(params["w"].sharding.mesh):
        compiled = jax.jit(partial(measures, separate)).lower(params, batch).compile()
        found = compiled(params, batch)
    expected = on_one_device(measures, 2)
    problems.assert_trees_close(found, expected, rtol=2e-4, atol=2e-4)
    kinds, entries = zip(*collectives(compiled), strict=True)
    assert set(kinds) == {"all-reduce"}
    assert max(entries) < params["w"].size / DEVICES
    for x in jax.tree.leaves(found):
        if x.shape[-2:] == (64, 24):
            assert x.addressable_shards[0].data.shape[-2:] == (8, 24)


@pytest.mark.full
def test_examples_on_a_mesh_of_explicit_axes():
    """Parameters are everywhere: one axis cannot go along examples and entries."""
    over = mesh(AxisType.Explicit)
    with jax.set_mesh(over):
        params = jax.device_put(parameters(), NamedSharding(over, REPLICATED))
        batch = jax.device_put(jnp.ones(32), NamedSharding(over, SPLIT))
        found = jax.jit(partial(of_examples, separate))(params, batch)
    expected = on_one_device(of_examples, 32)
    problems.assert_trees_close(found, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_krylov_space_lies_like_the_parameters(kind):
    params = parameters(kind)

    @jax.jit
    def basis(params):
        start = jax.tree.map(jnp.sin, params)
        decompose = _lanczos.process(
            lambda v: jax.tree.map(jnp.multiply, v, params), ITERATIONS
        )
        return decompose(start).basis

    over = params["w"].sharding.mesh
    with jax.set_mesh(over):
        found = basis(params)
    for name, q in found.items():
        expected = NamedSharding(over, PartitionSpec(None, "data"))
        assert q.sharding.is_equivalent_to(expected, q.ndim), name


@pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="the compiler of jax 0.9 plans 2.3 bases"
)
def test_the_memory_of_a_krylov_space_is_shared():
    width, iterations = 1024, 32
    params = fully_sharded({"w": jnp.ones((width, width))})
    measure = jax.jit(
        lambda params: (
            diagnostics.top_eigenvalues(
                separate, params, jnp.ones(1), iterations=iterations, key=0
            ).values
        )
    )
    memory = measure.lower(params).compile().memory_analysis()
    part = iterations * 4 * width**2 / DEVICES
    assert part <= memory.temp_size_in_bytes < 2 * part
