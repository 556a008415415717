"""The same steps on eight simulated devices as on one."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import methods
import optax
import problems
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from meshes import (
    BATCH,
    DEVICES,
    LAYOUTS,
    PROBLEM,
    collectives,
    data_parallel,
    fully_sharded,
    mesh,
)
from methods import cover, defaults

import optax_sam


def all_in_one(base):
    return optax_sam.sharpness_aware(
        base,
        optax.chain(
            optax_sam.reweight_by_sharpness(0.05, key=0, estimator="jvp"),
            optax_sam.suppress_variance(0.4),
            optax_sam.scale_to_radius(0.1),
            optax_sam.sparsify_by_fisher(optax_sam.n_m(2, 4), refresh_every=3),
        ),
        micro_batch_size=4,
        micro_batches_at_once=DEVICES,
    )


METHODS = methods.METHODS | {"all in one": all_in_one}


def on_devices(tx, layout):
    """The state before a step on many devices, and the step, compiled."""
    step = optax_sam.value_and_update(PROBLEM.loss_fn, tx)
    params = layout(PROBLEM.params)
    inputs = params, jax.jit(tx.init)(params), fully_sharded(PROBLEM.batch)
    return inputs, jax.jit(step).lower(*inputs).compile()


@cover(
    method=METHODS,
    layout=LAYOUTS,
    default=(
        "sam-data_parallel",
        "vasso-fully_sharded",
        "sparse-data_parallel",
        "reweighted-fully_sharded",
        "micro-batches-data_parallel",
        "look-fully_sharded",
    ),
)
def test_twenty_steps_on_many_devices_are_those_on_one(method, layout):
    tx = method(optax.sgd(0.1, momentum=0.9))
    (params, state, batch), step = on_devices(tx, layout)
    single = PROBLEM.params, tx.init(PROBLEM.params)
    alone = jax.jit(optax_sam.value_and_update(PROBLEM.loss_fn, tx))
    for _ in range(20):
        value, updates, new_state = step(params, state, batch)
        # It stays where it is, and with it masks and averages.
        jax.tree.map(assert_placed_alike, new_state, state)
        params, state = layout(optax.apply_updates(params, updates)), new_state
        loss, updates, new_state = alone(*single, PROBLEM.batch)
        single = optax.apply_updates(single[0], updates), new_state
        assert value == pytest.approx(float(loss), rel=2e-5)
    problems.assert_trees_close((params, state), single, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_states_that_belong_to_no_parameter_are_left_alone(kind):
    """Whatever their names and shapes: here those of a parameter that is sharded."""

    def init_fn(params):
        del params
        return {"w": jnp.arange(16), "note": jnp.zeros(3)}

    odd = optax.GradientTransformation(init_fn, lambda u, s, p=None: (u, s))
    tx = optax_sam.rw_sam(optax.chain(odd, optax.adam(0.1)), 0.1, 0.1)
    across = jax.make_mesh(
        (2,), ("data",), axis_types=(kind,), devices=jax.devices()[:2]
    )
    for params in ({"w": jnp.ones(16)}, jnp.ones(2)):  # A key is of shape [2].
        expected = tx.init(params)
        with jax.set_mesh(across):
            sharded = jax.device_put(
                params, NamedSharding(across, PartitionSpec("data"))
            )
            state = jax.jit(tx.init)(sharded)
        problems.assert_trees_equal(jax.device_get(state), jax.device_get(expected))
    text = optax.GradientTransformation(lambda p: {"note": "hello"}, odd.update)
    assert optax_sam.sam(text, 0.1).init(params).base_state == {"note": "hello"}


def assert_placed_alike(a, b):
    assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


def test_zeros_of_which_every_device_has_one_entry_stay_zeros():
    zeros, ascent = fully_sharded(jnp.zeros(DEVICES)), optax_sam.scale_to_radius(0.1)
    epsilon, _ = jax.jit(ascent.update)(zeros, ascent.init(zeros))
    problems.assert_trees_equal(epsilon, jnp.zeros(DEVICES))


@cover(method=METHODS, layout=LAYOUTS)
def test_compiled_state_is_placed_like_the_parameters(method, layout):
    matrices = {name: name.startswith("w") for name in PROBLEM.params}
    base = optax.masked(optax.adam(0.1), matrices)
    tx = method(base)
    params = layout(PROBLEM.params)
    state = jax.jit(tx.init)(params)
    assert optax.tree.get(state, "mu")["w1"].sharding == params["w1"].sharding
    named = {path[-1:]: x for path, x in jax.tree.leaves_with_path(params)}
    for path, x in jax.tree.leaves_with_path(state):
        if path[-1:] in named:
            assert_placed_alike(x, named[path[-1:]])
    # Draws are the same wherever they are made.
    problems.assert_trees_equal(jax.device_get(state), tx.init(PROBLEM.params))


@cover(
    layout=LAYOUTS,
    sizes=[(2, 1), (2, DEVICES), (8, 1), (8, None), (32, 1), (32, None)],
    default=("data_parallel-(2, 8)", "fully_sharded-(32, None)"),
)
def test_micro_batches_do_not_depend_on_the_devices(sizes, layout):
    """Smaller than the part of a device, that part, and spread over four devices."""
    size, at_once = sizes
    tx = optax_sam.m_sam(optax.sgd(1.0), 0.1, size, micro_batches_at_once=at_once)
    inputs, step = on_devices(tx, layout)
    _, updates, _ = step(*inputs)
    one = jax.jit(optax_sam.value_and_update(PROBLEM.loss_fn, tx))
    _, expected, _ = one(PROBLEM.params, tx.init(PROBLEM.params), PROBLEM.batch)
    problems.assert_trees_close(updates, expected, rtol=1e-5, atol=1e-7)


def test_a_micro_batch_on_each_device_halves_the_traffic():
    entries = sum(x.size for x in jax.tree.leaves(PROBLEM.params))

    def reduced(tx):
        _, step = on_devices(tx, data_parallel)
        kinds, sizes = zip(*collectives(step), strict=True)
        assert set(kinds) == {"all-reduce"}
        return sum(size for size in sizes if size > 1) / entries

    # Scalars, such as the value, may travel with them.
    assert reduced(optax_sam.sam(optax.sgd(0.1), 0.1)) == pytest.approx(2, abs=0.02)
    per_device = BATCH // DEVICES
    for size in (per_device, per_device // 2):
        for at_once in (None, DEVICES):
            tx = optax_sam.m_sam(
                optax.sgd(0.1), 0.1, size, micro_batches_at_once=at_once
            )
            assert reduced(tx) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    "method", defaults(["vasso", "dynamic sparse", "reweighted"], ["vasso"])
)
def test_state_and_masks_cause_no_traffic(method):
    def arrays(method):
        tx = METHODS[method](optax.sgd(0.1))
        _, step = on_devices(tx, data_parallel)
        return [(kind, size) for kind, size in collectives(step) if size > DEVICES]

    of_sam = arrays("sam")
    assert len(of_sam) == 2
    assert arrays(method) == of_sam


@pytest.mark.full
def test_fully_sharded_state_and_masks_are_not_gathered():
    """Models gather their parameters for a pass; counts gather one number a device."""

    def gathered(tx):
        text = on_devices(tx, fully_sharded)[1].as_text()
        found = re.findall(r"= (\w+)\[([\d,]*)\]\S* all-gather\(", text)
        sizes = [(kind, math.prod(map(int, shape.split(",")))) for kind, shape in found]
        return sorted(x for x in sizes if x[1] > DEVICES)

    base = optax.adam(0.1)
    of_sam = gathered(optax_sam.sam(base, 0.1))
    assert len(of_sam) == 2 * len(gathered(base))
    for method in ("vasso", "dynamic sparse"):
        assert gathered(METHODS[method](base)) == of_sam
    probes = optax_sam.sparse_sam(
        base, 0.1, optax_sam.unstructured(0.5), refresh_every=2, estimator="probes"
    )
    assert {kind for kind, _ in gathered(probes)} == {"f32"}


def fisher(base, **options):
    return optax_sam.sparse_sam(
        base, 0.1, optax_sam.unstructured(0.5), refresh_every=2, **options
    )


EXPLICIT = {name: METHODS[name] for name in ("vasso", "dynamic sparse", "reweighted")}
for size, at_once in itertools.product([2, BATCH // DEVICES, 32, BATCH], [1, None]):
    EXPLICIT[f"micro-batches of {size}, {at_once} at once"] = functools.partial(
        optax_sam.m_sam, rho=0.1, micro_batch_size=size, micro_batches_at_once=at_once
    )
# In chunks that all devices share, or not, and a rest.
for num_examples, chunk_size in ((BATCH, 4), (24, 8), (20, 8), (24, 5)):
    EXPLICIT[f"fisher of {num_examples} by {chunk_size}"] = functools.partial(
        fisher, num_examples=num_examples, chunk_size=chunk_size
    )
EXPLICIT["fisher by probes"] = functools.partial(fisher, estimator="probes")


DEFAULT = ("vasso", "micro-batches of 2, 1 at once", "fisher by probes")


@pytest.mark.parametrize("method", defaults(EXPLICIT, DEFAULT))
def test_a_mesh_of_explicit_axes(method):
    explicit = mesh(AxisType.Explicit)
    tx = EXPLICIT[method](optax.sgd(1.0))
    step = jax.jit(optax_sam.value_and_update(PROBLEM.loss_fn, tx))
    state = tx.init(PROBLEM.params)
    _, expected, _ = step(PROBLEM.params, state, PROBLEM.batch)
    with jax.set_mesh(explicit):
        everywhere = jax.device_put(
            (PROBLEM.params, state), NamedSharding(explicit, PartitionSpec())
        )
        batch = jax.device_put(
            PROBLEM.batch, NamedSharding(explicit, PartitionSpec("data"))
        )
        _, updates, _ = step(*everywhere, batch)
    problems.assert_trees_close(updates, expected, rtol=1e-5, atol=1e-7)


@cover(
    sizes=[(2, 1), (2, DEVICES), (8, None), (32, 1), (32, None)],
    kind=[AxisType.Auto, AxisType.Explicit],
    default=("(2, 8)-AxisType.Explicit",),
)
def test_draws_and_auxiliary_data_do_not_depend_on_the_devices(sizes, kind):
    size, at_once = sizes
    tx = optax_sam.m_sam(optax.sgd(1.0), 0.1, size, micro_batches_at_once=at_once)

    def loss_fn(params, batch, key):
        losses = PROBLEM.loss_fn(params, batch)
        losses *= jax.random.uniform(key) + 0.5
        return losses, (losses, jnp.max(losses))

    step = jax.jit(optax_sam.value_and_update(loss_fn, tx, has_aux=True))
    args = PROBLEM.params, tx.init(PROBLEM.params), PROBLEM.batch, jax.random.key(0)
    expected = step(*args)
    across = mesh(kind)
    with jax.set_mesh(across):
        params, state, key = jax.device_put(
            (*args[:2], args[3]), NamedSharding(across, PartitionSpec())
        )
        batch = jax.device_put(
            PROBLEM.batch, NamedSharding(across, PartitionSpec("data"))
        )
        actual = step(params, state, batch, key)
    problems.assert_trees_close(actual, expected, rtol=1e-5, atol=1e-7)


def test_micro_batches_of_each_device_by_itself():
    """In `shard_map`, with parameters that may differ between the devices."""
    tx = optax_sam.m_sam(optax.sgd(1.0), 0.1, 2)
    step = optax_sam.value_and_update(PROBLEM.loss_fn, tx)
    state = tx.init(PROBLEM.params)

    def local(params, batch):
        params = jax.lax.pcast(params, "data", to="varying")
        _, updates, _ = step(params, jax.lax.pcast(state, "data", to="varying"), batch)
        return jax.lax.pmean(updates, "data")

    spec = PartitionSpec("data")
    mapped = jax.shard_map(
        local, mesh=mesh(), in_specs=(PartitionSpec(), spec), out_specs=PartitionSpec()
    )
    _, expected, _ = jax.jit(step)(PROBLEM.params, state, PROBLEM.batch)
    updates = jax.jit(mapped)(PROBLEM.params, PROBLEM.batch)
    problems.assert_trees_close(updates, expected, rtol=1e-5, atol=1e-7)
