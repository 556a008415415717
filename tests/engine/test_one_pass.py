"""Ascents that read nothing of the clean pass: steps of one gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from meshes import (
    DEVICES,
    PROBLEM,
    checks,
    collectives,
    make_step,
    mesh,
    over_devices,
    train,
    train_in_pmap,
)
from methods import cover, defaults

import optax_sam

BASE = optax.sgd(0.1, momentum=0.9)
RADIUS = optax_sam.scale_to_radius(0.3)
MOMENTUM = optax_sam.follow_momentum(0.3)
KEEPING = optax.chain(optax_sam.keep_average(0.4), BASE)
AVERAGE = optax.chain(optax_sam.follow_average(), RADIUS)
SMALL = problems.perceptron()


def momentum(base=BASE, **options):
    return optax_sam.sharpness_aware(base, MOMENTUM, **options)


def average(base=BASE, **options):
    base = optax.chain(optax_sam.keep_average(0.4), base)
    return optax_sam.sharpness_aware(base, AVERAGE, **options)


def directed(update, base=BASE, **options):
    """An ascent by a function of what an update gets, which keeps the count."""

    def update_fn(updates, state, params, **extra_args):
        return update(updates, count=state, **extra_args), state + 1

    ascent = optax.GradientTransformationExtraArgs(
        lambda params: jnp.zeros([], jnp.int32), update_fn
    )
    return optax_sam.sharpness_aware(base, ascent, **options)


def at_random(updates, count, **extra_args):
    key = jax.random.fold_in(jax.random.key(3), count)
    return jax.tree.map(
        lambda g: 0.1 * jax.random.rademacher(key, g.shape, g.dtype), updates
    )


METHODS = {
    "momentum": momentum,
    "average": average,
    "at random": functools.partial(directed, at_random),
}
every_method = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)


ONES = jax.tree.map(np.ones_like, SMALL.params)


def following(tx, momentum):
    """A state in which the base has a momentum."""
    return optax.tree.set(tx.init(SMALL.params), trace=momentum)


def loss_and_aux(params, batch):
    losses = SMALL.loss_fn(params, batch)
    aux = {"of examples": losses, "statistics": losses.mean(), "note": 3}
    return losses, aux | {"count": jnp.sum(losses > 1)}


def moved(params, kept, length):
    scale = length / problems.norm(kept)
    return jax.tree.map(lambda p, v: p + scale * v, params, kept)


@pytest.mark.parametrize("size", defaults([None, 4], [None]))
@pytest.mark.parametrize(("name", "sign"), [("momentum", -1), ("average", 1)])
def test_value_and_auxiliary_data_are_those_at_the_perturbed_parameters(
    name, sign, size
):
    tx = METHODS[name](micro_batch_size=size, micro_batches_at_once=None)
    step = jax.jit(optax_sam.value_and_update(loss_and_aux, tx, has_aux=True))
    params, state = SMALL.params, tx.init(SMALL.params)
    (value, _), updates, state = step(params, state, SMALL.batch)
    # There is nothing to follow in the first step.
    assert value == pytest.approx(float(problems.mean_loss(SMALL)(params)), rel=1e-6)
    params = optax.apply_updates(params, updates)
    kept = optax.tree.get(state, "trace" if sign < 0 else "average")
    (value, aux), updates, after = step(params, state, SMALL.batch)
    point = moved(params, kept, sign * 0.3)
    losses, expected = loss_and_aux(point, SMALL.batch)
    problems.assert_trees_close(aux["of examples"], losses, rtol=1e-5)
    assert aux["statistics"] == pytest.approx(float(losses.mean()), rel=1e-5)
    if size is None:  # Of several micro-batches a count is that of the clean pass.
        assert int(aux["count"]) == int(expected["count"])
    assert int(aux["note"]) == 3
    for loss in (value, after.clean_loss, after.perturbed_loss):
        assert loss == pytest.approx(float(losses.mean()), rel=1e-5)
    _, gradient = problems.value_and_grad(SMALL.loss_fn, point, SMALL.batch)
    trace = optax.tree.get(state, "trace")
    expected = jax.tree.map(lambda g, v: -0.1 * (g + 0.9 * v), gradient, trace)
    problems.assert_trees_close(updates, expected, rtol=1e-4, atol=1e-6)


WIDE = problems.perceptron(sizes=(64, 64, 64), batch_size=4096)


def compiled(tx, **options):
    step = jax.jit(optax_sam.value_and_update(WIDE.loss_fn, tx, **options))
    return step.lower(WIDE.params, tx.init(WIDE.params), WIDE.batch).compile()


@functools.cache
def flops_of_the_base():
    return compiled(BASE).cost_analysis()["flops"]


def gradients(tx, **options):
    return compiled(tx, **options).cost_analysis()["flops"] / flops_of_the_base()


@every_method
def test_a_step_costs_one_gradient(make):
    assert 0.99 < gradients(make()) < 1.01


@pytest.mark.full
@every_method
def test_micro_batches_cost_one_gradient(make):
    tx = make(micro_batch_size=128, micro_batches_at_once=None)
    assert 0.99 < gradients(tx) < 1.01


def test_no_condition_is_needed_where_a_step_does_not_ascend():
    always = compiled(momentum())
    every_third = compiled(momentum(ascend_when=optax_sam.every(3)))
    assert every_third.cost_analysis()["flops"] < 1.01 * flops_of_the_base()
    # The norm has one on the CPU.
    conditions = [x.as_text().count(" conditional(") for x in (always, every_third)]
    assert conditions[0] == conditions[1]


def along(scale, like):
    return jax.tree.map(lambda g: jnp.full(g.shape, 0.1 * scale), like)


READS = {
    "losses": lambda u, *, losses, **_: along(losses[0], u),
    "value": lambda u, *, value, **_: along(value, u),
    "grad": lambda u, *, grad, **_: along(jnp.sign(grad["b0"][0]), u),
    "pullback": lambda u, *, pullback, losses, **_: pullback(
        jnp.ones(len(SMALL.batch[1]))
    ),
    "one leaf": lambda u, **_: along(jnp.sign(u["b1"][0]), u),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_an_ascent_that_reads_anything_of_the_clean_pass_makes_two(read):
    tx = directed(read)
    step = jax.jit(optax_sam.value_and_update(SMALL.loss_fn, tx))
    value, _, state = step(SMALL.params, tx.init(SMALL.params), SMALL.batch)
    clean = float(problems.mean_loss(SMALL)(SMALL.params))
    assert value == pytest.approx(clean, rel=1e-6)
    assert state.clean_loss == pytest.approx(clean, rel=1e-6)
    assert abs(float(state.perturbed_loss) - clean) > 1e-3


@pytest.mark.parametrize("when", [None, lambda count: count < 0])
def test_a_base_that_reads_the_clean_gradient_makes_it_be_computed(when):
    alpha = 0.5
    base = optax.chain(optax_sam.gap_descent(alpha), optax.sgd(1.0, momentum=0.0))
    tx = momentum(base, ascend_when=when)
    assert 1.99 < gradients(tx) < 2.01
    step = jax.jit(optax_sam.value_and_update(SMALL.loss_fn, tx))
    value, updates, _ = step(SMALL.params, following(tx, ONES), SMALL.batch)
    point = moved(SMALL.params, ONES, -0.3 if when is None else 0.0)
    loss, p = problems.value_and_grad(SMALL.loss_fn, point, SMALL.batch)
    g = problems.gradient(SMALL)
    length = optax.tree.vdot(g, p) / optax.tree.vdot(p, p)
    expected = jax.tree.map(lambda g, p: alpha * (g - length * p) - p, g, p)
    problems.assert_trees_close(updates, expected, rtol=1e-4, atol=1e-6)
    assert value == pytest.approx(float(loss), rel=1e-6)


def test_a_clean_gradient_that_is_not_finite_is_none_for_the_base_either():
    """Nothing but the base reads it; that at the perturbed parameters is finite."""
    base = optax.chain(optax_sam.gap_descent(0.5), optax.sgd(1.0))
    tx = directed(lambda u, **_: jax.tree.map(jnp.ones_like, u), base)
    step = jax.jit(optax_sam.value_and_update(lambda w, x: jnp.sqrt(w[0]) * x, tx))
    params = jnp.zeros(1)
    value, updates, _ = step(params, tx.init(params), jnp.ones(4))
    assert value == 1
    np.testing.assert_allclose(updates, [-0.5])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_followed_may_not_be_finite(bad):
    kept = ONES | {"b0": problems.replaced(ONES["b0"], 3, bad)}
    state = following(momentum(), kept)
    step = jax.jit(optax_sam.value_and_update(SMALL.loss_fn, momentum()))
    value, _, after = step(SMALL.params, state, SMALL.batch)
    clean = float(problems.mean_loss(SMALL)(SMALL.params))
    assert value == pytest.approx(clean, rel=1e-6)
    assert after.ascent_state.count == 0


@every_method
def test_a_step_that_does_not_ascend_is_the_base_and_reports_the_clean_pass(make):
    when = optax_sam.between(1)
    tx = make(ascend_when=when)
    step = jax.jit(optax_sam.value_and_update(loss_and_aux, tx, has_aux=True))
    plain = jax.jit(optax_sam.value_and_update(loss_and_aux, BASE, has_aux=True))
    state = following(tx, ONES)
    found, updates, after = step(SMALL.params, state, SMALL.batch)
    expected = plain(SMALL.params, following(BASE, ONES), SMALL.batch)[:2]
    problems.assert_trees_close((found, updates), expected, rtol=1e-6, atol=1e-7)
    assert after.clean_loss == after.perturbed_loss == found[0]
    # The next one does.
    (value, _), _, _ = step(SMALL.params, after, SMALL.batch)
    assert abs(float(value - found[0])) > 1e-3


@functools.cache
def on_one_device(name):
    tx = METHODS[name]()
    return train(make_step(tx), tx, steps=7)


@cover(
    name=METHODS.keys(),
    sync=[True, False],
    check_vma=[True, False],
    default=("momentum-True-True", "average-False-False"),
)
def test_inside_shard_map(name, sync, check_vma):
    """Whether devices ascend together or not, since all follow the same."""
    tx = METHODS[name](sync_ascent=sync)
    step = over_devices(make_step(tx, axis_name="data"), check_vma=check_vma)
    actual = train(step, tx, steps=7)
    problems.assert_trees_close(actual, on_one_device(name), rtol=2e-5, atol=2e-5)


@cover(
    name=METHODS.keys(),
    sizes=[(4, 1), (4, DEVICES), (32, None)],
    default=("momentum-(4, 1)",),
)
def test_micro_batches(name, sizes):
    size, at_once = sizes
    tx = METHODS[name](micro_batch_size=size, micro_batches_at_once=at_once)
    actual = train(make_step(tx), tx, steps=7)
    problems.assert_trees_close(actual, on_one_device(name), rtol=2e-5, atol=2e-5)


@cover(
    name=METHODS.keys(),
    kind=[AxisType.Auto, AxisType.Explicit],
    default=("momentum-AxisType.Auto", "average-AxisType.Explicit"),
)
def test_sharded_arrays(name, kind):
    tx = METHODS[name]()
    across = mesh(kind)
    with jax.set_mesh(across):
        everywhere = NamedSharding(across, PartitionSpec())
        params, state = jax.device_put(
            (PROBLEM.params, tx.init(PROBLEM.params)), everywhere
        )
        batch = jax.device_put(
            PROBLEM.batch, NamedSharding(across, PartitionSpec("data"))
        )
        step = jax.jit(make_step(tx)).lower(params, state, batch).compile()
        for _ in range(7):
            _, updates, state = step(params, state, batch)
            updates, state = jax.device_put((updates, state), everywhere)
            params = jax.tree.map(jnp.add, params, updates)
    expected, _ = on_one_device(name)
    problems.assert_trees_close((params, state), expected, rtol=2e-5, atol=2e-5)
    entries = sum(x.size for x in jax.tree.leaves(PROBLEM.params))
    reduced = sum(size for _, size in collectives(step) if size > 1)
    assert reduced == pytest.approx(entries, rel=0.02)


@checks
def test_devices_reduce_one_gradient(check_vma):
    tx = momentum()
    step = over_devices(make_step(tx, axis_name="data"), check_vma=check_vma)
    inputs = PROBLEM.params, tx.init(PROBLEM.params), PROBLEM.batch
    found = collectives(jax.jit(step).lower(*inputs).compile())
    entries = sum(x.size for x in jax.tree.leaves(PROBLEM.params))
    assert sum(size for _, size in found if size > 1) == pytest.approx(
        entries, rel=0.05
    )


@pytest.mark.full
def test_inside_pmap():
    actual = train_in_pmap(momentum())
    expected, _ = on_one_device("momentum")
    problems.assert_trees_close(actual, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.filterwarnings("ignore:.*MultiSteps around")
def test_from_a_branch_the_value_is_that_of_the_clean_pass():
    tx = optax.MultiSteps(momentum(), 1)
    step = jax.jit(optax_sam.value_and_update(SMALL.loss_fn, tx))
    params, state = SMALL.params, tx.init(SMALL.params)
    for _ in range(2):
        clean = float(problems.mean_loss(SMALL)(params))
        value, updates, state = step(params, state, SMALL.batch)
        assert value == pytest.approx(clean, rel=1e-5)
        params = optax.apply_updates(params, updates)
    assert abs(float(optax.tree.get(state, "perturbed_loss")) - clean) > 1e-3


DRAWN = optax_sam.sparsify_dynamically(
    0.5, refresh_every=2, decay_steps=10, drop_by="weight", key=0
)
SCORED = optax_sam.sparsify_by_fisher(optax_sam.unstructured(0.5), refresh_every=2)


@pytest.mark.parametrize(
    ("link", "passes"),
    [(DRAWN, 1), pytest.param(SCORED, 2, marks=pytest.mark.full)],
    ids=["drawn", "scored"],
)
def test_masks_need_the_clean_pass_where_their_scores_are_of_it(link, passes):
    tx = optax_sam.sharpness_aware(BASE, optax.chain(MOMENTUM, link))
    step = jax.jit(optax_sam.value_and_update(SMALL.loss_fn, tx))
    value, _, after = step(SMALL.params, following(tx, ONES), SMALL.batch)
    clean = float(problems.mean_loss(SMALL)(SMALL.params))
    perturbed = float(after.perturbed_loss)
    assert abs(perturbed - clean) > 1e-3
    assert value == pytest.approx(clean if passes == 2 else perturbed, rel=1e-6)


def test_the_loss_of_the_ascent_is_not_needed():
    def no_loss(params, batch):
        return 1e3 * SMALL.loss_fn(params, batch)

    tx = momentum()
    steps = [
        jax.jit(optax_sam.value_and_update(SMALL.loss_fn, tx, ascent_loss_fn=other))
        for other in (None, no_loss)
    ]
    state = following(tx, ONES)
    problems.assert_trees_close(
        *(step(SMALL.params, state, SMALL.batch) for step in steps), rtol=1e-6
    )
