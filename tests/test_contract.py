"""What every method promises around every kind of base optimizer."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import optax_sam

METHODS = {
    "sam": lambda base: optax_sam.sam(base, rho=0.1),
    "asam": lambda base: optax_sam.asam(base, rho=0.5),
    "vasso": lambda base: optax_sam.vasso(base, rho=0.1, theta=0.4),
    "vasso scheduled": lambda base: optax_sam.vasso(
        base,
        rho=optax.linear_schedule(0.0, 0.1, 5),
        theta=optax.cosine_decay_schedule(1.0, 5),
        accumulator_dtype=jnp.bfloat16,
    ),
    "sparse": lambda base: optax_sam.sparse_sam(
        base, 0.1, optax_sam.n_m(2, 4), refresh_every=2, num_examples=8
    ),
    "dynamic sparse": lambda base: optax_sam.dynamic_sparse_sam(
        base, 0.1, 0.5, refresh_every=2, decay_steps=10
    ),
    "reweighted": lambda base: optax_sam.rw_sam(base, 0.1, 0.05, estimator="jvp"),
    "micro-batches": lambda base: optax_sam.m_sam(base, 0.1, 4),
    "sam on matrices": lambda base: optax_sam.sharpness_aware(
        base,
        optax.chain(
            optax_sam.perturb_only(
                lambda p: jax.tree.map(lambda x: jnp.ndim(x) > 1, p)
            ),
            optax_sam.scale_to_radius(0.1),
        ),
    ),
}
BASES = {
    "sgd momentum": lambda: optax.sgd(0.05, momentum=0.9),
    # The default eps of 1e-8 is zero in float16.
    "adamw": lambda: optax.adamw(1e-2, eps=1e-4),
    "lion": lambda: optax.lion(1e-3),
    "schedule": lambda: optax.sgd(optax.cosine_decay_schedule(0.1, 50)),
    "schedule free": lambda: optax.contrib.schedule_free_sgd(0.05),
    "needs value": lambda: optax.contrib.momo(0.05),
    "prng key": lambda: optax.noisy_sgd(0.05, eta=1e-4, key=0),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(1e-2), 3),
    "multi steps": lambda: optax.MultiSteps(optax.contrib.momo(0.05), 2),
    "partition": lambda: optax.partition(
        {"move": optax.adam(1e-2), "stay": optax.set_to_zero()},
        lambda p: jax.tree.map(lambda x: "move" if jnp.ndim(x) else "stay", p),
    ),
    "masked": lambda: optax.chain(
        optax.masked(
            optax.add_decayed_weights(1e-3),
            lambda p: jax.tree.map(lambda x: jnp.ndim(x) > 1, p),
        ),
        optax.sgd(0.05),
    ),
}

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
SLOW = ("sparse", "dynamic sparse")  # To compile.
# Every base with two methods, and every method with the bases that ask the most.
PAIRS = [
    pytest.param(METHODS[method], BASES[base], id=f"{method}-{base}")
    for method in METHODS
    for base in BASES
    if method in ("sam", "vasso")
    or base == "adamw"
    or (base in ("needs value", "prng key") and method not in SLOW)
]
every_pair = pytest.mark.parametrize(("method", "base"), PAIRS)


def structure_of(tree):
    """Structure, shapes, dtypes and weak types: what a scan asks to stay the same."""
    leaves = jax.tree.leaves(tree)
    # Typed PRNG keys have no weak type.
    types = [(x.shape, x.dtype, getattr(x, "weak_type", None)) for x in leaves]
    return jax.tree.structure(tree), types


def make_step(tx, problem):
    step = optax_sam.value_and_update(problem.loss_fn, tx)

    def take(params, opt_state, batch):
        value, updates, opt_state = step(params, opt_state, batch)
        return optax.apply_updates(params, updates), opt_state, value

    return take


@every_pair
def test_state_is_stable_and_nothing_recompiles(method, base):
    problem = problems.perceptron()
    tx = method(base())
    step = jax.jit(make_step(tx, problem), donate_argnums=(0, 1))
    params = jax.tree.map(jnp.copy, problem.params)
    opt_state = tx.init(params)
    before = structure_of((params, opt_state))
    for _ in range(2):
        params, opt_state, value = step(params, opt_state, problem.batch)
        assert structure_of((params, opt_state)) == before
    assert step._cache_size() == 1
    assert np.isfinite(value)
    assert np.isfinite(problems.norm(params))
    problems.assert_trees_differ(params, problem.params)
    # A scan refuses, as it is traced, a carry whose types change.
    jax.eval_shape(lambda: problems.train(tx, problem, 2))


@every_pair
def test_unknown_extra_arguments_are_accepted(method, base):
    problem = problems.perceptron()
    tx = method(base())

    def update(grads):
        extra_args = {"value": 1.0, "something_else": object()}
        return tx.update(
            grads,
            tx.init(problem.params),
            problem.params,
            loss_fn=problem.loss_fn,
            batch=problem.batch,
            **extra_args,
        )[0]

    updates = jax.eval_shape(update, problem.params)
    assert jax.tree.structure(updates) == jax.tree.structure(problem.params)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("base", ["sgd momentum", "adamw", "lion"])
@every_method
def test_updates_and_states_keep_their_dtypes(method, base, dtype):
    problem = problems.perceptron(dtype)
    tx = method(BASES[base]())
    step = optax_sam.value_and_update(problem.loss_fn, tx)
    opt_state = tx.init(problem.params)
    _, updates, after = jax.eval_shape(step, problem.params, opt_state, problem.batch)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    assert structure_of(after) == structure_of(opt_state)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@every_method
def test_trains_in_half_precision(method, dtype):
    problem = problems.perceptron(dtype)
    params, _ = problems.train(method(BASES["adamw"]()), problem, 20)
    loss = problems.mean_loss(problem)
    assert loss(params) < 0.9 * loss(problem.params)


@pytest.mark.usefixtures("x64")
@every_method
def test_x64(method):
    problem = problems.perceptron(jnp.float64)
    params = problem.params | {"w0": problem.params["w0"].astype(jnp.float32)}
    tx = method(optax.adam(1e-2))
    step = jax.jit(optax_sam.value_and_update(problem.loss_fn, tx))
    opt_state = tx.init(params)
    value, updates, after = step(params, opt_state, problem.batch)
    assert value.dtype == jnp.float64
    for name, update in updates.items():
        assert update.dtype == params[name].dtype
        assert np.isfinite(problems.norm(update))
    assert structure_of(after) == structure_of(opt_state)


@pytest.mark.parametrize(
    "params",
    [
        {},
        [],
        (),
        {"a": None, "b": jnp.ones((2, 2))},
        {"a": {"b": [jnp.ones((2, 2)), (jnp.ones(3), None)]}, "c": {}},
        jnp.ones((2, 2)),
        jnp.float32(2.0),
        {"python": 2.0, "numpy": np.ones((2, 3), np.float32)},
        {"no entries": jnp.ones((0, 3)), "b": jnp.ones(2)},
    ],
    ids=[
        "dict",
        "list",
        "tuple",
        "None",
        "nested",
        "array",
        "scalar",
        "host",
        "size 0",
    ],
)
@every_method
def test_trees_of_any_form(method, params):
    def loss_fn(params, batch):
        squares = [jnp.sum(jnp.square(x)) for x in jax.tree.leaves(params)]
        return sum(squares, jnp.float32(0)) * batch

    tx = method(optax.sgd(0.1, momentum=0.9))
    step = jax.jit(optax_sam.value_and_update(loss_fn, tx))
    opt_state = tx.init(params)
    value, updates, after = step(params, opt_state, jnp.ones(4))
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert jax.tree.structure(after) == jax.tree.structure(opt_state)
    value_after, _, _ = step(optax.apply_updates(params, updates), after, jnp.ones(4))
    assert value_after < value or value == 0


@every_method
def test_state_does_not_alias_the_parameters(method):
    params = jax.tree.map(jnp.copy, problems.perceptron().params)
    opt_state = method(optax.sgd(0.1, momentum=0.9)).init(params)
    owned = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(params)}
    assert owned.isdisjoint(
        x.unsafe_buffer_pointer() for x in jax.tree.leaves(opt_state)
    )


@every_method
def test_init_works_abstractly_and_with_tree_map_params(method):
    params, tx = problems.perceptron().params, method(optax.adam(1e-2))
    abstract = jax.eval_shape(tx.init, params)
    assert jax.tree.structure(abstract) == jax.tree.structure(tx.init(params))
    doubled = optax.tree.map_params(tx, lambda x: x + 1, tx.init(params))
    assert jax.tree.structure(doubled) == jax.tree.structure(abstract)
    assert structure_of(jax.jit(tx.init)(params)) == structure_of(tx.init(params))


HYPERPARAMETERS = {
    optax_sam.sam: {"rho": 0.1},
    optax_sam.m_sam: {"rho": 0.1},
    optax_sam.asam: {"rho": 0.5, "eta": 0.01},
    optax_sam.vasso: {"rho": 0.1, "theta": 0.4},
    optax_sam.sparse_sam: {"rho": 0.1},
    optax_sam.dynamic_sparse_sam: {"rho": 0.1, "drop_fraction": 0.5},
    optax_sam.rw_sam: {"rho": 0.1, "strength": 0.05, "delta": 1e-3},
}
STATIC = {
    optax_sam.m_sam: {"micro_batch_size": 4, "micro_batches_at_once": None},
    optax_sam.sparse_sam: {"pattern": optax_sam.n_m(2, 4), "refresh_every": 2},
    optax_sam.dynamic_sparse_sam: {
        "sparsity": 0.5,
        "refresh_every": 2,
        "decay_steps": 10,
    },
}
# Arguments with defaults that inject_hyperparams would trace.
TRACED = ("num_examples", "chunk_size", "num_probes", "key", "rescale", "normalize")


@pytest.mark.parametrize(
    "alias", HYPERPARAMETERS, ids=[alias.__name__ for alias in HYPERPARAMETERS]
)
def test_inject_hyperparams_around_an_alias(alias):
    problem, values = problems.perceptron(), HYPERPARAMETERS[alias]
    static = STATIC.get(alias, {})
    names = set(inspect.signature(alias).parameters) & {*TRACED, *static}
    injected_alias = optax.inject_hyperparams(alias, static_args=tuple(names))
    base = optax.sgd(0.1)
    plain, _ = problems.train(alias(base, **values, **static), problem, 10)
    tx = injected_alias(base, **values, **static)
    injected, opt_state = problems.train(tx, problem, 10)
    problems.assert_trees_close(injected, plain, rtol=1e-5, atol=1e-6)
    assert set(values) <= set(opt_state.hyperparams)
    constant = {name: optax.constant_schedule(v) for name, v in values.items()}
    tx = injected_alias(base, **constant, **static)
    scheduled, _ = problems.train(tx, problem, 10)
    problems.assert_trees_close(scheduled, plain, rtol=1e-5, atol=1e-6)


@every_method
def test_inject_hyperparams_inside(method):
    problem = problems.perceptron()
    tx = method(optax.inject_hyperparams(optax.sgd)(learning_rate=0.1))
    injected, opt_state = problems.train(tx, problem, 10)
    plain, _ = problems.train(method(optax.sgd(0.1)), problem, 10)
    problems.assert_trees_close(injected, plain, rtol=1e-5, atol=1e-6)
    assert optax.tree.get(opt_state, "learning_rate") == np.float32(0.1)


@every_method
def test_chain_around_changes_the_ascent_only(method):
    """Scaling before a method whose ascent has no scale does nothing at all."""
    problem = problems.perceptron()
    tx = optax.chain(optax.scale(4.0), method(optax.sgd(0.1)))
    scaled, _ = problems.train(tx, problem, 10)
    plain, _ = problems.train(method(optax.sgd(0.1)), problem, 10)
    problems.assert_trees_close(scaled, plain, rtol=1e-5, atol=1e-6)


@every_method
def test_multi_steps_inside_takes_a_step_every_k_batches(method):
    """One ascent per micro-batch, one descent along the mean of their gradients."""
    problem = problems.perceptron()
    batches = jax.tree.map(
        lambda x: jnp.reshape(x, (2, 8, *x.shape[1:])), problem.batch
    )
    tx = method(optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation())
    seen = optax_sam.value_and_update(problem.loss_fn, method(optax.sgd(1.0)))
    gradients, params = [], problem.params
    opt_state, reference_state = tx.init(params), method(optax.sgd(1.0)).init(params)
    seen, step = jax.jit(seen), jax.jit(optax_sam.value_and_update(problem.loss_fn, tx))
    for i in range(2):
        batch = jax.tree.map(lambda x, i=i: x[i], batches)
        _, minus_gradient, reference_state = seen(params, reference_state, batch)
        gradients.append(minus_gradient)
        _, updates, opt_state = step(params, opt_state, batch)
        if i == 0:
            assert problems.norm(updates) == 0
    mean = jax.tree.map(lambda a, b: 0.1 * (a + b) / 2, *gradients)
    problems.assert_trees_close(updates, mean, rtol=1e-4, atol=1e-6)


def test_multi_steps_around_descends_along_the_last_gradient():
    """The documented reason to put it inside: the base sees one micro-batch."""
    problem = problems.perceptron()
    batches = jax.tree.map(
        lambda x: jnp.reshape(x, (2, 8, *x.shape[1:])), problem.batch
    )
    tx = optax.MultiSteps(optax_sam.sam(optax.sgd(1.0), rho=0.0), 2)
    params, opt_state = problem.params, tx.init(problem.params)
    for i in range(2):
        batch = jax.tree.map(lambda x, i=i: x[i], batches)
        grads = jax.grad(lambda p, b=batch: jnp.mean(problem.loss_fn(p, b)))(params)
        updates, opt_state = tx.update(
            grads, opt_state, params, loss_fn=problem.loss_fn, batch=batch
        )
    minus_last = jax.tree.map(jnp.negative, grads)
    problems.assert_trees_close(updates, minus_last, rtol=1e-5, atol=1e-6)
