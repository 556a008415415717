"""The recipes for large batches and for float16 do what is said of them."""

import itertools

import documents
import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import optax_sam

IN_PARTS = documents.python("docs/recipes/accumulation.md")[
    "A batch that does not fit into memory"
]
FLOAT16 = documents.python("docs/recipes/precision.md")["float16 with a loss scale"]
PROBLEM = problems.perceptron()
METHODS = {
    "sam": lambda base: optax_sam.sam(base, 0.1),
    "vasso": lambda base: optax_sam.vasso(base, 0.1, 0.4),
    "reweighted": lambda base: optax_sam.rw_sam(base, 0.1, 0.5, estimator="jvp"),
    "sparse": lambda base: optax_sam.sparse_sam(
        base, 0.1, optax_sam.n_m(2, 4), refresh_every=2, estimator="probes"
    ),
}
SLOW = {"reweighted", "sparse"}  # To compile.
all_methods = pytest.mark.parametrize(
    "method",
    [
        pytest.param(method, id=name, marks=[pytest.mark.full] * (name in SLOW))
        for name, method in METHODS.items()
    ],
)


def scope_of(recipe, tx=None, loss_fn=PROBLEM.loss_fn):
    scope = {"jax": jax, "jnp": jnp, "optax": optax, "optax_sam": optax_sam}
    scope |= {"loss_fn": loss_fn, "tx": tx}
    exec(recipe, scope)
    return scope


def jitted_step(loss_fn, tx):
    return jax.jit(optax_sam.value_and_update(loss_fn, tx))


@all_methods
def test_a_batch_in_parts_ascends_as_a_whole(method):
    tx = method(optax.sgd(0.1, momentum=0.9))
    in_parts = scope_of(IN_PARTS, tx)["in_parts"]
    for num_parts in (1, 4):
        problem = PROBLEM._replace(loss_fn=in_parts(PROBLEM.loss_fn, num_parts))
        problems.assert_trees_close(
            problems.train(tx, problem, 5),
            problems.train(tx, PROBLEM, 5),
            rtol=1e-5,
            atol=2e-6,
        )


def test_parts_take_the_memory_of_one():
    problem = problems.perceptron(sizes=(64, 256, 256, 8), batch_size=4096)
    tx = optax_sam.sam(optax.sgd(0.1), 0.1)
    in_parts = scope_of(IN_PARTS, tx)["in_parts"]

    def temporaries(loss_fn):
        step = jax.jit(optax_sam.value_and_update(loss_fn, tx))
        inputs = problem.params, tx.init(problem.params), problem.batch
        return step.lower(*inputs).compile().memory_analysis().temp_size_in_bytes

    whole = temporaries(problem.loss_fn)
    assert temporaries(in_parts(problem.loss_fn, 16)) < 0.25 * whole


@pytest.mark.full
def test_ascents_per_part_and_for_all_parts_differ():
    """The two meanings of accumulation: m-SAM, and the SAM of the whole batch."""
    base = optax.sgd(1.0)
    whole = optax_sam.sam(base, 0.5)
    in_parts = scope_of(IN_PARTS, whole)["in_parts"]
    _, of_whole, _ = jitted_step(in_parts(PROBLEM.loss_fn, 4), whole)(
        PROBLEM.params, whole.init(PROBLEM.params), PROBLEM.batch
    )
    per_part = optax_sam.m_sam(base, 0.5, 4)
    _, of_parts, _ = jitted_step(PROBLEM.loss_fn, per_part)(
        PROBLEM.params, per_part.init(PROBLEM.params), PROBLEM.batch
    )
    # As by hand, where batches come one by one and the base accumulates.
    one_by_one = optax_sam.sam(optax.MultiSteps(base, 4), 0.5)
    state = one_by_one.init(PROBLEM.params)
    step = jitted_step(PROBLEM.loss_fn, one_by_one)
    for i in range(4):
        part = jax.tree.map(lambda x, i=i: x[4 * i : 4 * i + 4], PROBLEM.batch)
        _, updates, state = step(PROBLEM.params, state, part)
    problems.assert_trees_close(of_parts, updates, rtol=1e-5, atol=1e-7)
    distance = problems.norm(jax.tree.map(jnp.subtract, of_whole, of_parts))
    assert distance > 0.02 * problems.norm(of_whole)


def start(tx, scale):
    return PROBLEM.params, tx.init(PROBLEM.params), PROBLEM.batch, scale, jnp.int32(0)


@all_methods
def test_a_loss_scale_changes_gradients_by_rounding_only(method):
    tx = method(optax.sgd(1.0))
    half_loss_fn = scope_of(FLOAT16, tx)["half_loss_fn"]
    step = jitted_step(half_loss_fn, tx)
    inputs = PROBLEM.params, tx.init(PROBLEM.params), PROBLEM.batch
    expected = jitted_step(PROBLEM.loss_fn, tx)(*inputs)
    for scale in (1.0, 1024.0):
        value, updates, _ = step(*inputs, jnp.float32(scale))
        assert value == pytest.approx(float(expected[0]), rel=2e-3)
        problems.assert_trees_close(updates, expected[1], rtol=0.05, atol=2e-3)


@pytest.mark.full
def test_small_gradients_need_the_scale():
    tx = optax_sam.sam(optax.sgd(1.0), 0.1)
    tiny = scope_of(FLOAT16, loss_fn=lambda p, b: 1e-7 * PROBLEM.loss_fn(p, b))
    step = optax_sam.value_and_update(tiny["half_loss_fn"], tx)
    inputs = PROBLEM.params, tx.init(PROBLEM.params), PROBLEM.batch
    norms = [
        problems.norm(step(*inputs, jnp.float32(scale))[1]) for scale in (1.0, 2.0**15)
    ]
    expected = optax_sam.value_and_update(tiny["loss_fn"], tx)(*inputs)[1]
    assert norms[0] < 0.9 * problems.norm(expected)
    assert norms[1] == pytest.approx(problems.norm(expected), rel=0.01)


def test_overflow_skips_the_step_and_halves_the_scale():
    scope = scope_of(FLOAT16)
    half_step, tx = scope["half_step"], scope["tx"]
    inputs = start(tx, jnp.float32(1024.0))
    _, params, opt_state, scale, num_good = half_step(*inputs)
    assert (scale, num_good) == (1024, 1)
    before = opt_state
    for _ in range(2):
        _, new_params, opt_state, scale, num_good = half_step(
            params, opt_state, PROBLEM.batch, jnp.float32(2.0**22), num_good
        )
        problems.assert_trees_equal(new_params, params)
        assert (scale, num_good) == (2.0**21, 0)
    problems.assert_trees_equal(opt_state.ascent_state, before.ascent_state)
    problems.assert_trees_equal(
        opt_state.base_state.inner_state, before.base_state.inner_state
    )
    assert opt_state.base_state.total_notfinite == 2


@pytest.mark.full
def test_overflow_at_the_perturbed_weights_alone_skips_the_step():
    def loss_fn(params, batch):
        steep = jnp.where(params["w"] > 1.01, 2e4 * params["w"], params["w"])
        return jnp.sum(batch * steep, axis=-1)

    scope = scope_of(FLOAT16, loss_fn=loss_fn)
    params, batch = {"w": jnp.ones((1, 2))}, jnp.ones((4, 2))
    opt_state, scale = scope["tx"].init(params), jnp.float32(64.0)
    clean = jax.grad(lambda p: jnp.mean(scope["half_loss_fn"](p, batch, scale)))(params)
    np.testing.assert_array_equal(clean["w"], jnp.ones((1, 2)))
    _, new_params, new_state, scale, _ = scope["half_step"](
        params, opt_state, batch, scale, jnp.int32(7)
    )
    assert scale == 32
    problems.assert_trees_equal(new_params, params)
    problems.assert_trees_equal(new_state.ascent_state, opt_state.ascent_state)
    problems.assert_trees_equal(
        new_state.base_state.inner_state, opt_state.base_state.inner_state
    )


def test_a_scale_that_is_far_too_large_comes_down_and_grows_again():
    scope = scope_of(FLOAT16.replace("2000", "20"))
    inputs = start(scope["tx"], jnp.float32(2.0**24))
    losses, scales = [], []
    for _ in range(60):
        loss, *others = scope["half_step"](*inputs)
        params, opt_state, scale, num_good = others
        inputs = params, opt_state, PROBLEM.batch, scale, num_good
        losses.append(float(loss))
        scales.append(float(scale))
    assert losses[0] == losses[2]  # The first steps were skipped.
    assert losses[-1] < 0.5 * losses[0]
    assert min(scales) < 2.0**20
    assert any(b > a for a, b in itertools.pairwise(scales))
    assert np.isfinite(losses).all()
