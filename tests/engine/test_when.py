"""Steps that do not ascend: when they are, what they are, and what they cost."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from meshes import (
    BATCH,
    DEVICES,
    PROBLEM,
    make_step,
    mesh,
    over_devices,
    train,
    train_in_pmap,
)
from methods import cover, defaults

import optax_sam

BASE = optax.sgd(0.1, momentum=0.9)
RADIUS = optax_sam.scale_to_radius(0.1)
EVERY = optax_sam.every(3)
SMALL = problems.perceptron()


def never(count):
    return count < 0


def always_static(count):
    return True


def never_static(count):
    return False


def sam(when, **options):
    return optax_sam.sharpness_aware(BASE, RADIUS, ascend_when=when, **options)


@functools.partial(jax.jit, static_argnums=(0, 1))
def counts(when, steps):
    """Of the first steps, those that ascend."""
    return jax.vmap(when)(jnp.arange(steps))


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        (optax_sam.every(1), [0, 1, 2, 3, 4, 5, 6, 7]),
        (optax_sam.every(3), [0, 3, 6]),
        (optax_sam.every(np.int32(20)), [0]),
        (optax_sam.between(0), [0, 1, 2, 3, 4, 5, 6, 7]),
        (optax_sam.between(5), [5, 6, 7]),
        (optax_sam.between(2, 4), [2, 3, 4]),
        (optax_sam.between(2, 2), [2]),
    ],
)
def test_steps_that_ascend(when, expected):
    assert list(np.flatnonzero(counts(when, 8))) == expected
    assert [t for t in range(8) if when(t)] == expected


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: optax_sam.every(0), ValueError, r"every: k = 0 is out of range; pass"),
        (lambda: optax_sam.every(-1), ValueError, "every: k = -1 is out"),
        (lambda: optax_sam.every(2.0), TypeError, "every: k must be an integer >= 1,"),
        (lambda: optax_sam.every(True), TypeError, "every: k must be an integer >= 1,"),
        (lambda: optax_sam.every(np.arange(2)), TypeError, "every: k must be an int"),
        (lambda: optax_sam.between(-1), ValueError, "between: first = -1 is out of"),
        (lambda: optax_sam.between(1.0), TypeError, "between: first must be an int"),
        (lambda: optax_sam.between(0, 2.5), TypeError, "between: last must be an int"),
        (
            lambda: optax_sam.between(3, 2),
            ValueError,
            r"between: last must be at least first, which is 3, got 2; pass the counts",
        ),
        (
            lambda: sam(5),
            TypeError,
            r"sharpness_aware: ascend_when must be a function or None, got 5.*every\(2",
        ),
        (lambda: sam(True), TypeError, "ascend_when must be a function or None"),
        (
            lambda: optax_sam.look_sam(BASE, 0.1, every=0),
            ValueError,
            "look_sam: every = 0 is out of range",
        ),
    ],
)
def test_what_is_no_condition_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def traced(when):
    """Traces a step."""
    tx = sam(when)
    step = optax_sam.value_and_update(SMALL.loss_fn, tx)
    jax.eval_shape(step, SMALL.params, tx.init(SMALL.params), SMALL.batch)


@pytest.mark.parametrize(
    "when",
    [
        lambda count: 1.0,
        lambda count: 1,
        lambda count: None,
        lambda count: count % 2,
        lambda count: 0.5 * count,
        lambda count: jnp.ones(2, bool),
        lambda count: np.ones(1, bool),
    ],
)
def test_what_decides_nothing_is_refused_in_the_step(when):
    message = r"sharpness_aware: ascend_when must return a bool scalar, got .*every\(2"
    with pytest.raises(ValueError, match=message):
        traced(when)


@pytest.mark.parametrize(
    "when",
    [
        lambda count: True if count < 5 else count % 2 == 0,
        lambda count: 2 < count < 5,
        lambda count: not count < 5,
    ],
)
def test_what_has_to_know_the_count_is_refused_in_the_step(when):
    message = r"sharpness_aware: ascend_when has to know the count.* &, \| and ~, or "
    with pytest.raises(TypeError, match=message):
        traced(when)


def compiled(step):
    """In code that is not optimised, where a product is always rounded alone."""
    return jax.jit(step, compiler_options={"xla_backend_optimization_level": 0})


def batch_at(t):
    x, labels = SMALL.batch
    return np.roll(x, t, axis=1), labels


def taken(tx, steps=7, **options):
    """The value of each step, and the parameters and the state after the last."""
    step = compiled(optax_sam.value_and_update(SMALL.loss_fn, tx, **options))
    params, state, values = SMALL.params, tx.init(SMALL.params), []
    for t in range(steps):
        value, updates, state = step(params, state, batch_at(t))
        params = jax.device_get(optax.apply_updates(params, updates))
        values.append(value)
    return np.stack(values), params, state


def by_turns(tx, base, when, steps=7):
    """The same of two optimizers that take turns, of which one does not ascend."""
    ascending, plain = (
        compiled(optax_sam.value_and_update(SMALL.loss_fn, t)) for t in (tx, base)
    )
    params, state, values = SMALL.params, tx.init(SMALL.params), []
    for t in range(steps):
        if when(t):
            value, updates, state = ascending(params, state, batch_at(t))
        else:
            value, updates, base_state = plain(params, state.base_state, batch_at(t))
            state = state.after(state.ascent_state, base_state, value, value)
        params = jax.device_get(optax.apply_updates(params, updates))
        values.append(value)
    return np.stack(values), params, state


@pytest.mark.parametrize(
    "when",
    [EVERY, optax_sam.between(2, 4), always_static, never_static],
    ids=["every third", "a range", "always", "never"],
)
def test_a_step_is_that_of_sam_or_of_the_base_to_the_last_bit(when):
    values, params, state = taken(sam(when))
    expected = by_turns(optax_sam.sam(BASE, 0.1), BASE, when)
    problems.assert_trees_equal((values, params), expected[:2])
    problems.assert_trees_equal(state.base_state, expected[2].base_state)
    losses = [(s.clean_loss, s.perturbed_loss) for s in (state, expected[2])]
    problems.assert_trees_equal(*losses)
    assert int(state.step) == 7


def test_an_average_is_that_of_all_clean_gradients_and_schedules_count_all_steps():
    theta, rhos = 0.4, jnp.linspace(0.3, 0.1, 7)
    average = optax_sam.suppress_variance(theta)
    tx = optax_sam.sharpness_aware(
        optax.sgd(0.1),
        optax.chain(average, optax_sam.scale_to_radius(lambda t: rhos[t])),
        ascend_when=EVERY,
    )
    step = jax.jit(optax_sam.value_and_update(SMALL.loss_fn, tx))
    params, state, d = SMALL.params, tx.init(SMALL.params), None
    for t in range(7):
        _, g = problems.value_and_grad(SMALL.loss_fn, params, batch_at(t))
        weight = 1.0 if d is None else theta
        before = g if d is None else d
        d = jax.tree.map(lambda d, g, w=weight: d + w * (g - d), before, g)
        _, updates, state = step(params, state, batch_at(t))
        length = float(rhos[t]) / problems.norm(d) if t % 3 == 0 else 0.0
        point = jax.tree.map(lambda p, d, c=length: p + c * d, params, d)
        _, p = problems.value_and_grad(SMALL.loss_fn, point, batch_at(t))
        expected = jax.tree.map(lambda p: -0.1 * p, p)
        problems.assert_trees_close(updates, expected, rtol=1e-4, atol=1e-6)
        params = optax.apply_updates(params, updates)
    problems.assert_trees_close(
        optax.tree.get(state, "direction"), d, rtol=1e-5, atol=1e-6
    )
    assert {int(n) for _, n in optax.tree.get_all_with_path(state, "count")} == {7}


@pytest.mark.full
def test_masks_are_made_when_they_are_due_also_where_the_step_does_not_ascend():
    ascent = optax.chain(
        RADIUS,
        optax_sam.sparsify_dynamically(0.5, refresh_every=2, decay_steps=10, key=0),
    )
    masks = []
    for when in (None, never):
        tx = optax_sam.sharpness_aware(optax.set_to_zero(), ascent, ascend_when=when)
        masks.append(taken(tx, steps=4)[2].ascent_state)
    problems.assert_trees_equal(*masks)


METHODS = {
    "sam": sam,
    "vasso": lambda when, **options: optax_sam.sharpness_aware(
        BASE,
        optax.chain(optax_sam.suppress_variance(0.4), RADIUS),
        ascend_when=when,
        **options,
    ),
    "look_sam": lambda when, **options: optax_sam.sharpness_aware(
        optax.chain(optax_sam.reuse_ascent(0.5), BASE),
        RADIUS,
        ascend_when=when,
        **options,
    ),
}


@functools.cache
def on_one_device(method, size=None):
    tx = METHODS[method](EVERY, micro_batch_size=size, micro_batches_at_once=None)
    return train(make_step(tx), tx, steps=7)


def assert_trains_like(expected, step, tx):
    actual = train(step, tx, steps=7)
    problems.assert_trees_close(actual, expected, rtol=2e-5, atol=2e-5)


@cover(
    method=METHODS.keys(),
    check_vma=[True, False],
    sync=[True, False],
    default=("look_sam-True-True", "vasso-False-False"),
)
def test_inside_shard_map(method, check_vma, sync):
    tx = METHODS[method](EVERY, sync_ascent=sync)
    step = over_devices(make_step(tx, axis_name="data"), check_vma=check_vma)
    expected = on_one_device(method, None if sync else BATCH // DEVICES)
    assert_trains_like(expected, step, tx)


@pytest.mark.parametrize("method", defaults(METHODS, ["look_sam"]))
@pytest.mark.parametrize("at_once", [1, 4])
def test_micro_batches_one_after_the_other_and_side_by_side(method, at_once):
    tx = METHODS[method](EVERY, micro_batch_size=8, micro_batches_at_once=at_once)
    assert_trains_like(on_one_device(method, 8), make_step(tx), tx)


def test_micro_batches_ascend_each_for_itself_or_are_the_whole_batch():
    values, params, _ = taken(sam(EVERY, micro_batch_size=4))
    expected = by_turns(optax_sam.m_sam(BASE, 0.1, 4), BASE, EVERY)
    problems.assert_trees_close((values, params), expected[:2], rtol=2e-5, atol=2e-6)


@cover(
    kind=[AxisType.Auto, AxisType.Explicit],
    method=METHODS.keys(),
    default=("AxisType.Auto-sam", "AxisType.Explicit-look_sam"),
)
def test_sharded_arrays(kind, method):
    tx = METHODS[method](EVERY)
    across = mesh(kind)
    step = jax.jit(make_step(tx))
    with jax.set_mesh(across):
        params, state = jax.device_put(
            (PROBLEM.params, tx.init(PROBLEM.params)),
            NamedSharding(across, PartitionSpec()),
        )
        batch = jax.device_put(
            PROBLEM.batch, NamedSharding(across, PartitionSpec("data"))
        )
        for _ in range(7):
            _, updates, state = step(params, state, batch)
            params = jax.tree.map(jnp.add, params, updates)
    expected, _ = on_one_device(method)
    problems.assert_trees_close((params, state), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.full
def test_inside_pmap():
    actual = train_in_pmap(METHODS["look_sam"](EVERY))
    expected, _ = on_one_device("look_sam")
    problems.assert_trees_close(actual, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.full
@pytest.mark.usefixtures("x64")
def test_seeds_side_by_side():
    """The condition is then one of each, and both branches run."""
    tx = METHODS["look_sam"](EVERY)
    run = problems.training(tx, SMALL, 5)
    # In float64, since LookSAM's direction magnifies the rounding of a small part.
    params = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]).astype(float), SMALL.params)
    found = jax.jit(jax.vmap(lambda p: run(p, tx.init(p))))(params)
    for i in range(2):
        one, actual = (jax.tree.map(lambda x, i=i: x[i], t) for t in (params, found))
        expected = run(one, tx.init(one))
        problems.assert_trees_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("x64")  # As for seeds side by side.
def test_in_a_scan_with_donated_state():
    tx = METHODS["look_sam"](EVERY)
    run = problems.training(tx, SMALL, 7)
    params = jax.tree.map(lambda x: jnp.asarray(x, float), SMALL.params)
    expected = run(params, tx.init(params))
    step = jax.jit(optax_sam.value_and_update(SMALL.loss_fn, tx), donate_argnums=1)
    state = jax.jit(tx.init)(params)
    for _ in range(7):
        before = state
        _, updates, state = step(params, state, SMALL.batch)
        assert all(x.is_deleted() for x in jax.tree.leaves(before) if x.ndim)
        params = optax.apply_updates(params, updates)
    problems.assert_trees_close((params, state), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("x64")  # As for seeds side by side.
def test_hyperparameters_that_are_injected():
    """As arrays that are traced, the period of LookSAM among them."""
    given = {"rho": 0.1, "every": 3, "alpha": 0.5}
    tx = optax.inject_hyperparams(optax_sam.look_sam)(BASE, **given)
    params = jax.tree.map(lambda x: jnp.asarray(x, float), SMALL.params)
    problem = SMALL._replace(params=params)
    actual, state = problems.train(tx, problem, 7)
    plain = optax_sam.look_sam(BASE, **given)
    expected = problems.train(plain, problem, 7)
    problems.assert_trees_close(
        (actual, state.inner_state), expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.full
def test_the_base_may_accumulate_gradients():
    """Over steps that ascend and others."""
    tx = optax_sam.sharpness_aware(
        optax.MultiSteps(optax.sgd(0.1), 3), RADIUS, ascend_when=EVERY
    )
    _, params, _ = taken(tx, 3)
    gradients = []
    for t in range(3):
        one = optax_sam.sam(optax.sgd(1.0), 0.1 if t == 0 else 0.0)
        step = jax.jit(optax_sam.value_and_update(SMALL.loss_fn, one))
        gradients.append(step(SMALL.params, one.init(SMALL.params), batch_at(t))[1])
    expected = jax.tree.map(
        lambda p, *u: p + 0.1 * sum(u) / 3, SMALL.params, *gradients
    )
    problems.assert_trees_close(params, expected, rtol=1e-5, atol=1e-6)


def test_auxiliary_data_are_those_of_the_clean_pass():
    def loss_fn(params, batch):
        losses = SMALL.loss_fn(params, batch)
        return losses, {"of examples": losses, "note": 3, "count": jnp.sum(losses > 1)}

    for when in (EVERY, never):
        tx = sam(when)
        step = jax.jit(optax_sam.value_and_update(loss_fn, tx, has_aux=True))
        state = tx.init(SMALL.params)
        (value, aux), _, _ = step(SMALL.params, state, SMALL.batch)
        losses = SMALL.loss_fn(SMALL.params, SMALL.batch)
        np.testing.assert_allclose(aux["of examples"], losses, rtol=1e-5)
        assert value == pytest.approx(float(losses.mean()), rel=1e-6)
        assert (int(aux["note"]), int(aux["count"])) == (3, int((losses > 1).sum()))


def of_a_quarter(params, batch):
    return SMALL.loss_fn(params, jax.tree.map(lambda x: x[:4], batch))


def test_whatever_loss_the_ascent_reads_the_base_descends_along_that_of_the_step():
    tx = optax_sam.sharpness_aware(optax.sgd(1.0), RADIUS, ascend_when=never)
    step = jax.jit(
        optax_sam.value_and_update(SMALL.loss_fn, tx, ascent_loss_fn=of_a_quarter)
    )
    _, updates, _ = step(SMALL.params, tx.init(SMALL.params), SMALL.batch)
    expected = jax.tree.map(np.negative, problems.gradient(SMALL))
    problems.assert_trees_close(updates, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("given", ["grad_fn", "loss_fn", "value"])
def test_updates_by_hand(given):
    tx = sam(EVERY)
    grad_fn = jax.grad(problems.mean_loss(SMALL))
    arguments = {"grad_fn": grad_fn}
    if given != "grad_fn":
        arguments = {"loss_fn": SMALL.loss_fn, "batch": SMALL.batch}
    if given == "value":
        arguments["value"] = problems.mean_loss(SMALL)(SMALL.params)
    step = jax.jit(
        functools.partial(
            tx.update, **{k: v for k, v in arguments.items() if callable(v)}
        )
    )
    rest = {k: v for k, v in arguments.items() if not callable(v)}
    params, state = SMALL.params, tx.init(SMALL.params)
    for _ in range(5):
        updates, state = step(grad_fn(params), state, params, **rest)
        params = optax.apply_updates(params, updates)
    expected = problems.train(tx, SMALL, 5)
    problems.assert_trees_close(
        *map(problems.without_losses, ((params, state), expected)),
        rtol=1e-5,
        atol=1e-6,
    )


def test_parameters_of_half_precision():
    problem = problems.perceptron(jnp.bfloat16)
    tx = METHODS["look_sam"](EVERY)
    params, state = problems.train(tx, problem, 5)
    kinds = [
        [x.dtype for x in jax.tree.leaves(t)]
        for t in ((params, state), (problem.params, tx.init(problem.params)))
    ]
    assert kinds[0] == kinds[1]
    assert all(np.isfinite(np.asarray(x, "f")).all() for x in jax.tree.leaves(params))


# A link of the base that keeps what it is told.
TOLD = optax.GradientTransformationExtraArgs(
    lambda params: jnp.array(True),
    lambda updates, state, params=None, *, ascended, **_: (updates, ascended),
)


@pytest.mark.parametrize("when", [EVERY, never], ids=["ascends", "does not"])
def test_a_clean_gradient_that_is_not_finite(when):
    tx = optax_sam.sharpness_aware(
        optax.chain(
            optax_sam.reuse_ascent(0.5),
            optax.apply_if_finite(optax.sgd(1.0), 3),
            TOLD,
        ),
        optax.chain(optax_sam.suppress_variance(0.4), RADIUS),
        ascend_when=when,
    )
    step = jax.jit(optax_sam.value_and_update(SMALL.loss_fn, tx))
    state = tx.init(SMALL.params)
    x, labels = SMALL.batch
    bad = problems.replaced(x, (3, 2), np.nan), labels
    value, updates, after = step(SMALL.params, state, bad)
    assert np.isnan(value)
    assert problems.norm(updates) == 0
    problems.assert_trees_equal(after.ascent_state, state.ascent_state)
    problems.assert_trees_equal(
        after.base_state[0].direction, state.base_state[0].direction
    )
    assert int(after.step) == 1
    assert not after.base_state[2]
    # With steps that go on as if it had not been.
    for _ in range(3):
        _, updates, after = step(SMALL.params, after, SMALL.batch)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, after)))


def own_gradient(updates, state, params=None, *, pullback, losses, **extra_args):
    """An average of the gradients of the steepest example, and that as direction."""
    del updates, params, extra_args
    own = pullback(jnp.where(losses == losses.max(), 1.0, 0.0))
    average = jax.tree.map(lambda d, g: (d + g) / 2, state, own)
    return average, average


@pytest.mark.parametrize("size", [None, 8])
@pytest.mark.parametrize("when", [EVERY, never], ids=["ascends", "does not"])
def test_a_gradient_of_the_ascents_own_that_is_not_finite(when, size):
    """In which one example counts, that overflows where the mean does not."""
    own = optax.GradientTransformationExtraArgs(
        lambda params: jax.tree.map(jnp.zeros_like, params), own_gradient
    )
    tx = optax_sam.sharpness_aware(
        optax.sgd(1.0),
        optax.chain(own, RADIUS),
        ascend_when=when,
        micro_batch_size=size,
    )
    step = jax.jit(optax_sam.value_and_update(lambda w, x: 4 * (x @ w), tx))
    params = np.full(2, 1e-3, np.float16)
    batch = np.ones((16, 2), np.float16)
    _, _, state = step(params, tx.init(params), batch)
    steepest = problems.replaced(batch, (9, 1), 6e4)
    _, updates, after = step(params, state, steepest)
    np.testing.assert_allclose(updates, [-4, -0.25 * 6e4], rtol=1e-2)
    problems.assert_trees_equal(after.ascent_state, state.ascent_state)
    # One that is finite is seen.
    _, _, after = step(params, state, batch)
    problems.assert_trees_differ(after.ascent_state[0], state.ascent_state[0])


def flops_and_program(tx):
    problem = problems.perceptron(sizes=(64, 64, 64), batch_size=512)
    step = jax.jit(optax_sam.value_and_update(problem.loss_fn, tx))
    lowered = step.lower(problem.params, tx.init(problem.params), problem.batch)
    program = lowered.compile()
    return program.cost_analysis()["flops"], program.as_text()


def test_a_step_that_does_not_ascend_costs_one_gradient():
    base, _ = flops_and_program(BASE)
    for when, gradients in ((never_static, 1), (always_static, 2), (None, 2)):
        flops, program = flops_and_program(sam(when))
        assert gradients - 0.01 < flops / base < gradients + 0.01
        assert not branches(program)


def products(program, name):
    """How many matrix products a computation makes, and those that it calls."""
    bodies = dict(
        re.findall(r"^(?:ENTRY )?(%[\w.-]+) .*?\{\n(.*?)^\}", program, re.M | re.S)
    )
    called = [x for x in re.findall(r"%[\w.-]+", bodies[name]) if x in bodies]
    own = len(re.findall(r" dot\(|custom-call\(.*matmul", bodies[name]))
    return own + sum(products(program, x) for x in called)


def branches(program):
    """The products in the branches of each condition that has any."""
    found = re.findall(r" conditional\(.*branch_computations=\{(.*?)\}", program)
    numbers = [
        sorted(products(program, x) for x in names.split(", ")) for names in found
    ]
    return list(filter(any, numbers))


def test_a_pass_that_is_not_made_is_in_a_branch_of_its_own():
    _, base = flops_and_program(BASE)
    _, program = flops_and_program(sam(EVERY))
    entries = [re.search(r"ENTRY (%\S+)", x)[1] for x in (base, program)]
    one, both = map(products, (base, program), entries)
    assert one > 0
    assert both == 2 * one
    assert branches(program) == [[0, one]]
