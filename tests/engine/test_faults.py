"""Long runs in which losses and gradients of either pass now and then go wrong."""

import functools

import jax
import meshes
import numpy as np
import optax
import problems
import pytest
from jax.sharding import PartitionSpec
from methods import METHODS, defaults

import optax_sam

STEPS = 500
PROBLEM = problems.perceptron()
BATCH = len(PROBLEM.batch[1])
# What is added to a loss, and what its gradient is multiplied by.
FINITE = {"zero gradient": (0, 0), "huge": (1e30, 1e30), "huge and down": (1e30, -1e30)}
FAULTS = FINITE | {
    "NaN": (np.nan, np.nan),
    "infinite": (np.inf, np.inf),
    "NaN loss": (np.nan, 1),
    "infinite loss": (np.inf, 1),
    "NaN gradient": (0, np.nan),
    "infinite gradient": (0, -np.inf),
}
RADIUS, STATIC = optax_sam.scale_to_radius(0.1), optax_sam.select_layers("w1", "b2")
FISHER = optax_sam.sparsify_by_fisher(
    optax_sam.unstructured(0.5), refresh_every=3, num_examples=BATCH
)
DYNAMIC = optax_sam.sparsify_dynamically(0.5, refresh_every=3, decay_steps=400, key=0)
REWEIGHT = optax_sam.reweight_by_sharpness(0.5, key=0, num_probes=2)
AVERAGE = optax_sam.suppress_variance(0.4)
CHAINS = {
    "four links": optax.chain(REWEIGHT, AVERAGE, RADIUS, FISHER),
    "mask first": optax.chain(DYNAMIC, AVERAGE, optax_sam.adapt_to_scale(0.5)),
    "static": optax.chain(optax_sam.perturb_only(STATIC), REWEIGHT, AVERAGE, RADIUS),
}


@jax.custom_jvp
def disturbed(losses, offset, factor):
    del factor
    return losses + offset


@disturbed.defjvp
def _(primals, tangents):
    return disturbed(*primals), primals[2] * tangents[0]


def clean_losses(params, batch):
    examples, clean, _ = batch
    return disturbed(problems.perceptron_losses(params, examples), *clean)


def perturbed_losses(params, batch):
    examples, _, perturbed = batch
    return disturbed(problems.perceptron_losses(params, examples), *perturbed)


def draw_faults(seed, kinds):
    """Offsets and factors, [steps, B] each: of all examples at times, else of one."""
    rng = np.random.default_rng(seed)
    offsets, factors = np.zeros((STEPS, BATCH)), np.ones((STEPS, BATCH))
    for step in np.flatnonzero(rng.random(STEPS - 20) < 0.1):
        examples = slice(None) if rng.random() < 0.3 else rng.integers(BATCH)
        fault = kinds[rng.choice(list(kinds))]
        offsets[step, examples], factors[step, examples] = fault
    return np.float32(offsets), np.float32(factors)


def guarded():
    """Gradients that are huge are clipped, to zero if their norm is infinite."""
    return optax.apply_if_finite(unguarded(), STEPS)


def unguarded():
    return optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.05, momentum=0.9))


def train(tx, clean, perturbed, over_devices=False):
    """The values, the parameters and the state of a run in one scan."""
    step = optax_sam.value_and_update(
        perturbed_losses,
        tx,
        ascent_loss_fn=clean_losses,
        scoring_loss_fn=clean_losses,
        axis_name="data" if over_devices else None,
    )

    def take(params, opt_state, batch):
        value, updates, opt_state = step(params, opt_state, batch)
        return value, optax.apply_updates(params, updates), opt_state

    if over_devices:
        whole = PartitionSpec()
        specs = (whole, whole, PartitionSpec("data"))
        take = jax.shard_map(take, mesh=meshes.mesh(), in_specs=specs, out_specs=whole)

    def body(carry, faults):
        value, *carry = take(*carry, (PROBLEM.batch, *faults))
        return tuple(carry), value

    @jax.jit
    def run(params):
        start = params, tx.init(params)
        return jax.lax.scan(body, start, (clean, perturbed))

    (params, opt_state), values = run(PROBLEM.params)
    return values, params, opt_state


def check(run, clean, perturbed, is_guarded):
    values, params, opt_state = run
    for x in jax.tree.leaves((params, opt_state)):
        assert np.all(np.isfinite(x))
    loss = problems.mean_loss(PROBLEM)
    assert loss(params) < 0.5 * loss(PROBLEM.params)
    np.testing.assert_array_equal(
        np.isfinite(values), np.all(np.isfinite(clean[0]), axis=1)
    )
    # An ascent does not count the steps that it leaves out; the base's wrapper does.
    left_out = np.sum(~np.all(np.isfinite(clean[1]), axis=1))
    counts = optax.tree.get_all_with_path(opt_state.ascent_state, "count")
    assert {int(count) for _, count in counts} == {STEPS - left_out}
    assert left_out > 5
    if is_guarded:
        skipped = np.sum(~np.all(np.isfinite(perturbed[1]), axis=1))
        assert optax.tree.get(opt_state, "total_notfinite") == skipped > 5


@functools.cache
def faults(is_guarded):
    return draw_faults(0, FAULTS), draw_faults(1, FAULTS if is_guarded else FINITE)


# Others descend along what goes wrong in the clean pass, or make none.
TWO_PASSES = [name for name, m in METHODS.items() if m.is_always_of_two_passes]


@pytest.mark.parametrize("name", defaults([*TWO_PASSES, *CHAINS], ("vasso", "static")))
@pytest.mark.parametrize("is_guarded", defaults([True, False], (True,)))
def test_training_goes_on(name, is_guarded):
    base = guarded() if is_guarded else unguarded()
    if name in METHODS:
        tx = METHODS[name](base)
    else:
        tx = optax_sam.sharpness_aware(base, CHAINS[name])
    disturbances = faults(is_guarded)
    check(train(tx, *disturbances), *disturbances, is_guarded)


ON_DEVICES = {
    "vasso": {"ascent": optax.chain(AVERAGE, RADIUS)},
    "micro-batches": {"ascent": RADIUS, "micro_batch_size": BATCH // 8},
    "each device": {"ascent": optax.chain(AVERAGE, RADIUS), "sync_ascent": False},
} | {name: {"ascent": ascent} for name, ascent in CHAINS.items()}


@pytest.mark.full
@pytest.mark.parametrize("options", ON_DEVICES.values(), ids=ON_DEVICES)
def test_training_goes_on_over_eight_devices(options):
    """Whatever device an example that fails is on."""
    tx = optax_sam.sharpness_aware(guarded(), **options)
    disturbances = faults(True)
    run = train(tx, *disturbances, over_devices=True)
    check(run, *disturbances, True)
