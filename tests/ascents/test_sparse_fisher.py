import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest

import optax_sam

PROBLEM = problems.perceptron()
GRADS = problems.gradient(PROBLEM)
ABSENT = optax.MaskedNode()
PATTERN = optax_sam.n_m(1, 2)  # The one that compiles fastest.


@functools.cache
def make(pattern=PATTERN, refresh_every=3, **options):
    return optax_sam.sparsify_by_fisher(pattern, refresh_every=refresh_every, **options)


@functools.cache
def compiled(link):
    return jax.jit(functools.partial(link.update, loss_fn=PROBLEM.loss_fn))


def update(link, state=None, grads=GRADS, params=PROBLEM.params, **changes):
    state = link.init(params) if state is None else state
    run = compiled(link)
    if changes:
        arguments = {"loss_fn": PROBLEM.loss_fn} | changes
        run = jax.jit(functools.partial(link.update, **arguments))
    return run(grads, state, params, batch=PROBLEM.batch)


@functools.partial(jax.jit, static_argnames=("pattern", "num_examples"))
def fisher_mask(params, pattern, batch=PROBLEM.batch, num_examples=None):
    fisher = optax_sam.fisher_diagonal(
        PROBLEM.loss_fn, params, batch, num_examples=num_examples
    )
    return pattern(fisher)


def elsewhere(shift=0.3):
    return jax.tree.map(lambda p: p + np.float32(shift), PROBLEM.params)


@pytest.mark.parametrize(
    "pattern",
    [optax_sam.unstructured(0.7), optax_sam.structured(0.5), optax_sam.n_m(1, 2)],
    ids=["unstructured", "structured", "n_m"],
)
def test_keeps_the_updates_of_largest_fisher_information(pattern):
    updates, state = update(make(pattern))
    mask = fisher_mask(PROBLEM.params, pattern)
    problems.assert_trees_equal(state.mask, mask)
    expected = jax.tree.map(np.multiply, GRADS, mask)
    problems.assert_trees_equal(updates, expected)


def test_masks_are_made_anew_every_so_many_steps_and_from_the_first():
    pattern, link = PATTERN, make(refresh_every=3)
    state = link.init(PROBLEM.params)
    first = fisher_mask(PROBLEM.params, pattern)
    second = fisher_mask(elsewhere(), pattern)
    problems.assert_trees_differ(first, second)
    for step in range(5):
        params = PROBLEM.params if step == 0 else elsewhere()
        _, state = update(link, state, params=params)
        problems.assert_trees_equal(state.mask, first if step < 3 else second)
        assert state.since == step - step % 3
        assert state.count == step + 1


def test_scores_the_first_examples_only():
    pattern = PATTERN
    _, state = update(make(num_examples=4))
    expected = fisher_mask(PROBLEM.params, pattern, num_examples=4)
    problems.assert_trees_equal(state.mask, expected)
    problems.assert_trees_differ(expected, fisher_mask(PROBLEM.params, pattern))


@pytest.mark.parametrize("estimator", ["per_example", "probes"])
def test_a_scoring_loss_takes_the_place_of_the_loss(estimator):
    link = make(estimator=estimator)

    def scoring_loss_fn(params, batch):
        return PROBLEM.loss_fn(jax.tree.map(lambda p: 2 * p, params), batch)

    def wrong(*_):
        raise AssertionError

    _, state = update(
        link,
        scoring_loss_fn=scoring_loss_fn,
        loss_fn=wrong,
        losses=jnp.ones(16),
        pullback=wrong,
    )
    _, expected = update(link, loss_fn=scoring_loss_fn)
    problems.assert_trees_equal(state.mask, expected.mask)
    _, plain = update(link)
    problems.assert_trees_differ(state.mask, plain.mask)


def test_value_and_update_passes_the_scoring_loss_and_all_arguments():
    """Scores in evaluation mode, with what comes after the batch."""
    scale = np.float32(3)

    def loss_fn(params, batch, scale):
        return PROBLEM.loss_fn(params, batch)

    def scoring_loss_fn(params, batch, scale):
        return PROBLEM.loss_fn(jax.tree.map(lambda p: p * scale, params), batch)

    tx = optax_sam.sparse_sam(optax.sgd(0.1), 0.1, PATTERN, refresh_every=3)
    step = optax_sam.value_and_update(loss_fn, tx, scoring_loss_fn=scoring_loss_fn)
    state = tx.init(PROBLEM.params)
    _, _, state = jax.jit(step)(PROBLEM.params, state, PROBLEM.batch, scale)
    scaled = jax.tree.map(lambda p: p * scale, PROBLEM.params)
    expected = fisher_mask(scaled, PATTERN)
    problems.assert_trees_equal(optax.tree.get(state, "mask"), expected)


def test_probes_use_the_pullback_that_is_given():
    link = make(estimator="probes", num_probes=2)
    losses = jax.jit(PROBLEM.loss_fn)(PROBLEM.params, PROBLEM.batch)

    def pullback(weights):
        _, vjp = jax.vjp(lambda p: PROBLEM.loss_fn(p, PROBLEM.batch), PROBLEM.params)
        return vjp(weights)[0]

    def wrong(*_):
        raise AssertionError

    _, given = update(link, losses=losses, pullback=pullback, loss_fn=wrong)
    _, own = update(link)
    problems.assert_trees_equal(given.mask, own.mask)
    # But not where these are of another loss, that of the ascent.
    _, other = update(
        link, losses=jnp.ones(16), pullback=wrong, ascent_loss_fn=lambda *_: losses
    )
    problems.assert_trees_equal(other.mask, own.mask)


def test_probes_draw_by_key_and_count():
    masks = [update(make(estimator="probes", key=key))[1].mask for key in (0, 0, 1)]
    problems.assert_trees_equal(masks[0], masks[1])
    problems.assert_trees_differ(masks[0], masks[2])
    link = make(estimator="probes", refresh_every=1)
    _, state = update(link)
    _, again = update(link, state)
    problems.assert_trees_differ(state.mask, again.mask)


def test_absent_leaves_are_neither_scored_nor_counted():
    grads = GRADS | {"w1": ABSENT, "b0": ABSENT}
    updates, state = update(make(optax_sam.unstructured(0.5)), grads=grads)
    assert updates["w1"] == updates["b0"] == ABSENT
    present = [name for name, g in grads.items() if g is not ABSENT]
    kept = sum(int(state.mask[name].sum()) for name in present)
    assert kept == sum(GRADS[name].size for name in present) // 2
    assert not state.mask["w1"].any()
    assert jax.tree.structure(state.mask) == jax.tree.structure(PROBLEM.params)


def test_a_bad_gradient_neither_perturbs_nor_counts():
    tx = optax_sam.sparse_sam(optax.sgd(0.1), 0.1, PATTERN, refresh_every=2)
    seen = []
    before = tx.init(PROBLEM.params)
    bad = GRADS | {"b0": problems.replaced(GRADS["b0"], 0, np.nan)}
    _, after = tx.update(
        bad,
        before,
        PROBLEM.params,
        loss_fn=PROBLEM.loss_fn,
        batch=PROBLEM.batch,
        grad_fn=lambda p: seen.append(p) or GRADS,
    )
    problems.assert_trees_equal(seen[0], PROBLEM.params)
    problems.assert_trees_equal(after.ascent_state, before.ascent_state)


@pytest.mark.parametrize("name", ["loss_fn", "batch", "params"])
def test_missing_arguments(name):
    link = make()
    arguments = {"loss_fn": PROBLEM.loss_fn, "batch": PROBLEM.batch}
    arguments.pop(name, None)
    params = None if name == "params" else PROBLEM.params
    with pytest.raises(ValueError, match=f"sparsify_by_fisher: {name} is missing"):
        link.update(GRADS, link.init(PROBLEM.params), params, **arguments)


@pytest.mark.parametrize("estimator", ["per_example", "probes"])
def test_scalar_losses(estimator):
    with pytest.raises(ValueError, match="needs the loss of each example"):
        update(make(estimator=estimator), loss_fn=lambda p, b: jnp.sum(p["b0"]))


def step(loss_fn, *args):
    tx = optax_sam.sparse_sam(optax.sgd(0.1), 0.1, PATTERN, refresh_every=1)
    state = jax.eval_shape(tx.init, PROBLEM.params)
    made = optax_sam.value_and_update(loss_fn, tx)
    return jax.eval_shape(made, PROBLEM.params, state, *args)


def test_errors_of_losses_say_that_examples_are_scored_alone():
    x, y = PROBLEM.batch

    def loss_fn(params, x, y):
        return PROBLEM.loss_fn(params, (x, y))

    with pytest.raises(
        (TypeError, ValueError),
        match=r"sparse_sam: loss_fn was called with 4 of the 16 .*\(x, y\)",
    ):
        step(loss_fn, x, y)
    with pytest.raises(ValueError, match="sparse_sam: no batch was passed"):
        step(lambda params: PROBLEM.loss_fn(params, PROBLEM.batch))
    with pytest.raises(
        ValueError, match=r"sparse_sam: .*\[1\], and loss_fn returned .*\[10\]; only"
    ):
        step(lambda p, b: jnp.broadcast_to(p["b0"][0], 10), PROBLEM.batch)


def test_masks_that_do_not_fit():
    state = make().init(PROBLEM.params)
    wrong_shape = state._replace(mask=state.mask | {"b0": jnp.ones(3, bool)})
    with pytest.raises(ValueError, match=r"state.mask\['b0'\] has shape \(3,\)"):
        update(make(), wrong_shape)
    with pytest.raises(ValueError, match=r"state.mask must have the tree structure"):
        update(make(), state._replace(mask={"b0": state.mask["b0"]}))
    no_mask = make(lambda scores: scores)
    with pytest.raises(TypeError, match=r"pattern\(scores\)\['b0'\] has dtype float32"):
        update(no_mask)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "pattern must be a function", {"pattern": 0.5}),
        (ValueError, "refresh_every = 0 is out of range", {"refresh_every": 0}),
        (TypeError, "refresh_every must be an integer", {"refresh_every": 1.5}),
        (ValueError, "num_examples = 0", {"num_examples": 0}),
        (ValueError, "chunk_size = -1", {"chunk_size": -1}),
        (ValueError, "num_probes = 0", {"num_probes": 0}),
        (
            ValueError,
            "estimator = 'exact' is unknown.*'probes'",
            {"estimator": "exact"},
        ),
        (TypeError, "key must be an integer or one PRNG key", {"key": "seed"}),
    ],
)
def test_bad_arguments(error, message, options):
    with pytest.raises(error, match=message):
        make(**options)
