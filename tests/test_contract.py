"""What every method promises around every kind of base optimizer."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from methods import BASES, DTYPES, HALF, METHODS, cover, every_method, every_pair

import optax_sam

SGD = optax.sgd(0.1, momentum=0.9)


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
    params = jax.tree.map(jnp.array, problem.params)
    opt_state = tx.init(params)
    before = structure_of((params, opt_state))
    for _ in range(2):
        params, opt_state, value = step(params, opt_state, problem.batch)
        assert structure_of((params, opt_state)) == before
    assert step._cache_size() == 1
    assert np.isfinite(value)
    assert np.isfinite(problems.norm(params))
    problems.assert_trees_differ(params, problem.params)
    # Counts stay at the largest number, where they would turn negative.
    last = np.int32(2**31 - 1)
    ascent_state = optax.tree.set(opt_state.ascent_state, count=last)
    _, opt_state, _ = step(
        params, opt_state._replace(ascent_state=ascent_state), problem.batch
    )
    counts = optax.tree.get_all_with_path(opt_state.ascent_state, "count")
    assert counts
    assert {int(count) for _, count in counts} == {2**31 - 1}
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


@cover(method=METHODS, base=["sgd momentum", "adamw", "lion"], dtype=DTYPES)
def test_updates_and_states_keep_their_dtypes(method, base, dtype):
    problem = problems.perceptron(dtype)
    tx = method(BASES[base]())
    step = optax_sam.value_and_update(problem.loss_fn, tx)
    opt_state = jax.eval_shape(tx.init, problem.params)
    _, updates, after = jax.eval_shape(step, problem.params, opt_state, problem.batch)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    assert structure_of(after) == structure_of(opt_state)


@cover(
    method=METHODS,
    dtype=HALF,
    default=(
        "sam-bfloat16",
        "asam-float16",
        "vasso-bfloat16",
        "sparse-bfloat16",
        "micro-batches-float16",
    ),
)
def test_trains_in_half_precision(method, dtype):
    problem = problems.perceptron(dtype)
    params, _ = problems.train(method(BASES["adamw"]()), problem, 20)
    loss = problems.mean_loss(problem)
    assert loss(params) < 0.9 * loss(problem.params)


@pytest.mark.usefixtures("x64")
@cover(method=METHODS, default=("sam", "vasso", "sparse"))
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


TREES = {
    "dict": {},
    "list": [],
    "tuple": (),
    "None": {"a": None, "b": np.ones((2, 2), np.float32)},
    "nested": {
        "a": {"b": [np.ones((2, 2), np.float32), (np.ones(3, np.float32), None)]},
        "c": {},
    },
    "array": jnp.ones((2, 2)),
    "scalar": jnp.float32(2.0),
    "host": {"python": 2.0, "numpy": np.ones((2, 3), np.float32)},
    "size 0": {"no entries": jnp.ones((0, 3)), "b": jnp.ones(2)},
}


@cover(method=METHODS, params=TREES)
def test_trees_of_any_form(method, params):
    def loss_fn(params, batch):
        squares = [jnp.sum(jnp.square(x)) for x in jax.tree.leaves(params)]
        return sum(squares, jnp.float32(0)) * batch

    tx = method(SGD)
    step = jax.jit(optax_sam.value_and_update(loss_fn, tx))
    opt_state, batch = tx.init(params), np.ones(4, np.float32)
    value, updates, after = step(params, opt_state, batch)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert jax.tree.structure(after) == jax.tree.structure(opt_state)
    value_after, _, _ = step(optax.apply_updates(params, updates), after, batch)
    assert value_after < value or value == 0


@every_method
def test_state_does_not_alias_the_parameters(method):
    params = jax.tree.map(jnp.array, problems.perceptron().params)
    opt_state = method(SGD).init(params)
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


@cover(method=METHODS, default=("sam", "asam", "vasso"))
def test_inject_hyperparams_around_an_alias(method):
    problem, base = problems.perceptron(), SGD
    values = {**method.hyperparameters, **method.injected}
    scalars = {name: x for name, x in values.items() if isinstance(x, float)}
    values = {**method.static, **values}
    # Whatever else has a default would be traced, and dtypes and patterns refused.
    static = set(inspect.signature(method.alias).parameters) - {"base", *scalars}
    injected_alias = optax.inject_hyperparams(method.alias, static_args=tuple(static))
    plain, _ = problems.train(method.alias(base, **values), problem, 10)
    injected, opt_state = problems.train(injected_alias(base, **values), problem, 10)
    problems.assert_trees_close(injected, plain, rtol=1e-5, atol=1e-6)
    assert set(scalars) <= set(opt_state.hyperparams)
    constant = {name: optax.constant_schedule(x) for name, x in scalars.items()}
    tx = injected_alias(base, **{**values, **constant})
    scheduled, _ = problems.train(tx, problem, 10)
    problems.assert_trees_close(scheduled, plain, rtol=1e-5, atol=1e-6)


@cover(method=METHODS, default=("sam",))
def test_inject_hyperparams_inside(method):
    problem = problems.perceptron()
    inner = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1, momentum=0.9)
    tx = method(inner)
    injected, opt_state = problems.train(tx, problem, 10)
    plain, _ = problems.train(method(SGD), problem, 10)
    problems.assert_trees_close(injected, plain, rtol=1e-5, atol=1e-6)
    assert optax.tree.get(opt_state, "learning_rate") == np.float32(0.1)


@cover(method=METHODS, default=("sam", "look"))
def test_chain_around_changes_the_ascent_only(method):
    """Scaling before a method whose ascent has no scale does nothing at all."""
    problem = problems.perceptron()
    tx = optax.chain(optax.scale(4.0), method(SGD))
    with pytest.warns(UserWarning, match="has changed the gradient"):
        scaled, _ = problems.train(tx, problem, 10)
    plain, _ = problems.train(method(SGD), problem, 10)
    problems.assert_trees_close(scaled, plain, rtol=1e-5, atol=1e-6)


# Not by what follows the momentum, which moves with the steps that are taken.
AT_PARAMETERS = {name: m for name, m in METHODS.items() if not m.needs_momentum}


@cover(method=AT_PARAMETERS, default=("sam", "micro-batches"))
def test_multi_steps_inside_takes_a_step_every_k_batches(method):
    """One ascent per micro-batch, one descent along the mean of their gradients."""
    problem = problems.perceptron()
    batches = jax.tree.map(lambda x: x.reshape(2, 8, *x.shape[1:]), problem.batch)
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
    mean = jax.tree.map(lambda a, b: 0.1 * np.add(a, b) / 2, *gradients)
    problems.assert_trees_close(updates, mean, rtol=1e-4, atol=1e-6)


def test_multi_steps_around_descends_along_the_last_gradient():
    """The documented reason to put it inside: the base sees one micro-batch."""
    problem = problems.perceptron()
    batches = jax.tree.map(lambda x: x.reshape(2, 8, *x.shape[1:]), problem.batch)
    tx = optax.MultiSteps(optax_sam.sam(optax.sgd(1.0), rho=0.0), 2)
    update = jax.jit(functools.partial(tx.update, loss_fn=problem.loss_fn))
    params, opt_state = problem.params, tx.init(problem.params)
    for i in range(2):
        batch = jax.tree.map(lambda x, i=i: x[i], batches)
        grads = problems.gradient(problem._replace(batch=batch))
        updates, opt_state = update(grads, opt_state, params, batch=batch)
    minus_last = jax.tree.map(np.negative, grads)
    problems.assert_trees_close(updates, minus_last, rtol=1e-5, atol=1e-6)


def valley(params):
    """Rosenbrock's, whose floor is bent and nearly flat."""
    x, y = params["x"], params["y"]
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def distance(shapes):
    def squares(params):
        return sum(jnp.sum((w - 1) ** 2) for w in jax.tree.leaves(params))

    rng = np.random.default_rng(0)
    return squares, jax.tree.map(
        lambda shape: np.float32(3 * rng.normal(size=shape)),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


# Functions and starts; the minimum of each is zero, where all parameters are one.
TARGETS = {
    "parabola": distance((3,)),
    "valley": (valley, {"x": np.float32(0), "y": np.float32(0)}),
    "matrix": distance({"w": (4, 3)}),
    "mixed": distance([(), {"b": (3,), "w": (2, 3)}, (2, 2, 2)]),
}
CONVERGING = {
    "sgd": lambda: optax.sgd(1e-3, momentum=0.9),
    "adam": lambda: optax.adam(optax.cosine_decay_schedule(1e-1, 10_000)),
}


@cover(
    method=METHODS,
    base=CONVERGING,
    target=TARGETS,
    default=("sam-adam-valley", "vasso-sgd-mixed", "micro-batches-adam-matrix"),
)
def test_converges(method, base, target):
    """In a ball that shrinks to nothing; examples differ in how much they count."""
    fn, params = target
    weights = np.float32([0.5, 1.5, 0.8, 1.2, 0.9, 1.1, 0.6, 1.4])
    shrinking = optax.linear_schedule(1e-3, 0.0, 5000)
    hyperparameters = {**method.hyperparameters, "rho": shrinking}
    tx = method.alias(base(), **hyperparameters, **method.static)
    problem = problems.Problem(params, lambda p, batch: fn(p) * batch, weights)
    opt_state = optax.tree.map_params(tx, lambda x: x, tx.init(params))
    params, _ = problems.training(tx, problem, 10_000)(params, opt_state)
    ones = jax.tree.map(np.ones_like, params)
    problems.assert_trees_close(params, ones, atol=0.03)
