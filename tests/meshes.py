"""Eight simulated devices, what lies on them how, and what they tell each other."""

import functools
import math
import re

import jax
import optax
import problems
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_sam

BATCH, DEVICES = 64, 8
PROBLEM = problems.perceptron(sizes=(8, 16, 8), batch_size=BATCH)
REPLICATED, SPLIT = PartitionSpec(), PartitionSpec("data")
RADIUS = optax_sam.scale_to_radius(0.1)
ASCENTS = {
    "sam": RADIUS,
    "asam": optax_sam.adapt_to_scale(0.5),
    "vasso": optax.chain(optax_sam.suppress_variance(0.4), RADIUS),
    "friendly": optax.chain(optax_sam.remove_common_direction(0.8, 0.9), RADIUS),
    "momentum": optax_sam.follow_momentum(0.1),
    # Of 20 examples, 12 are on other devices than the first.
    "fisher": optax.chain(
        RADIUS,
        optax_sam.sparsify_by_fisher(
            optax_sam.unstructured(0.5), refresh_every=3, num_examples=20
        ),
    ),
    "fisher by probes": optax.chain(
        RADIUS,
        optax_sam.sparsify_by_fisher(
            optax_sam.n_m(2, 4), refresh_every=3, num_examples=20, estimator="probes"
        ),
    ),
    "dynamic": optax.chain(
        RADIUS,
        optax_sam.sparsify_dynamically(
            0.5, refresh_every=3, decay_steps=20, drop_by="weight", key=0
        ),
    ),
    "reweighted": optax.chain(
        optax_sam.reweight_by_sharpness(
            0.5, key=0, estimator="jvp", num_probes=2, normalize=True
        ),
        RADIUS,
    ),
}
checks = pytest.mark.parametrize("check_vma", [True, False])


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(kind,))


def data_parallel(tree):
    """A whole copy on every device."""
    return jax.device_put(tree, NamedSharding(mesh(), REPLICATED))


def fully_sharded(tree):
    """Every device has a part of every array whose first axis can be divided."""

    def put(x):
        divides = x.ndim and x.shape[0] % DEVICES == 0
        return jax.device_put(
            x, NamedSharding(mesh(), SPLIT if divides else REPLICATED)
        )

    return jax.tree.map(put, tree)


LAYOUTS = [data_parallel, fully_sharded]


def over_devices(step, *, check_vma=True):
    """`shard_map` of a step that returns what is the same on all devices."""
    return jax.shard_map(
        step,
        mesh=mesh(),
        in_specs=(REPLICATED, REPLICATED, SPLIT),
        out_specs=REPLICATED,
        check_vma=check_vma,
    )


def train_in_pmap(tx, steps=7):
    """Parameters and state after some steps of `pmap`, kept by the host in between."""
    step = jax.pmap(
        make_step(tx, axis_name="data"),
        axis_name="data",
        in_axes=(None, None, 0),
        out_axes=None,
    )
    batch = jax.tree.map(lambda x: x.reshape(DEVICES, -1, *x.shape[1:]), PROBLEM.batch)
    params, state = PROBLEM.params, tx.init(PROBLEM.params)
    for _ in range(steps):
        _, updates, state = step(params, state, batch)
        params = jax.device_get(optax.apply_updates(params, updates))
    return params, state


def base():
    return optax.sgd(0.1, momentum=0.9)


def make_step(tx, **options):
    return optax_sam.value_and_update(PROBLEM.loss_fn, tx, **options)


def train(step, tx, steps=20):
    """Parameters and state after some steps, and the value before each."""

    def body(carry, _):
        params, opt_state = carry
        value, updates, opt_state = step(params, opt_state, PROBLEM.batch)
        return (optax.apply_updates(params, updates), opt_state), value

    @jax.jit
    def run(params):
        return jax.lax.scan(body, (params, tx.init(params)), length=steps)

    return run(PROBLEM.params)


@functools.cache
def on_one_device(ascent, micro_batch_size=None):
    tx = optax_sam.sharpness_aware(
        base(),
        ASCENTS[ascent],
        micro_batch_size=micro_batch_size,
        micro_batches_at_once=None,
    )
    return train(make_step(tx), tx)


def mean_gradient(params, batch):
    return jax.grad(lambda p: PROBLEM.loss_fn(p, batch).mean())(params)


def collectives(compiled):
    """Kind and number of entries of every collective in a program."""
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    found = re.findall(rf"= (.*) ({kinds})(?:-start)?\(", compiled.as_text())
    return [(kind, sum(math.prod(dims) for dims in shapes(x))) for x, kind in found]


def shapes(text):
    for dims in re.findall(r"\w\d+\[([\d,]*)\]", text):
        yield [int(d) for d in dims.split(",") if d]
