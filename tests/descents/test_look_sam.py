import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
import references

import optax_sam

SGD = optax.sgd(0.1, momentum=0.9)


@pytest.mark.parametrize("every", [3, 5])
@pytest.mark.parametrize("decay", [0.0, 1e-2])
def test_steps_are_those_of_the_paper(decay, every):
    rho, alpha, across = 0.5, 0.4, []

    def step(w, g, gradient_at):
        length, number = np.sqrt(g @ g), len(across)
        if number % every == 0:
            p = gradient_at(w + references.scaled(g, rho))
            across.append(p - (p @ g) / (g @ g) * g)
            return p, 0
        across.append(across[-1])
        return g + references.scaled(across[-1], alpha * length), 0

    base = references.Sgd(decay)
    tx = optax_sam.look_sam(base.tx, rho, every, alpha)
    references.assert_replays(tx, step, base)


def sam_every(k, rho):
    return optax_sam.sharpness_aware(
        SGD, optax_sam.scale_to_radius(rho), ascend_when=optax_sam.every(k)
    )


def test_limits_are_sam_in_every_kth_step_and_the_base():
    look_sam = optax_sam.look_sam
    references.assert_is(look_sam(SGD, 0.1, every=3, alpha=0.0), sam_every(3, 0.1))
    references.assert_is(look_sam(SGD, 0.1, every=1), optax_sam.sam(SGD, 0.1))
    references.assert_is(look_sam(SGD, 0.0, every=3), SGD)


def reused(link, pairs):
    """Descents and the state after ascents from `g` to `p`, one reused in the end."""
    state = link.init(pairs[0][0])
    for p, g in pairs:
        descent, state = link.update(p, state, grad=g, ascended=True)
        problems.assert_trees_equal(descent, p)
    descent, _ = link.update(g, state, grad=g, ascended=False)
    return descent, state


def test_products_and_norms_are_of_the_whole_tree():
    rng = np.random.default_rng(0)
    p, g = ({"a": rng.normal(size=(3, 4)), "b": rng.normal(size=2)} for _ in range(2))
    p, g = (optax.tree.cast(t, jnp.float32) for t in (p, g))
    descent, state = reused(optax_sam.reuse_ascent(0.5), [(p, g)])
    np.testing.assert_allclose(problems.norm(state.direction), 1, rtol=1e-6)
    np.testing.assert_allclose(optax.tree.vdot(state.direction, g), 0, atol=1e-6)
    # Across one leaf alone it need not be.
    assert abs(float(jnp.vdot(state.direction["b"], g["b"]))) > 1e-2
    added = optax.tree.sub(descent, g)
    expected = optax.tree.scale(0.5 * problems.norm(g), state.direction)
    problems.assert_trees_close(added, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_may_overflow(scale):
    p, g = jnp.array([4.0, 1.0]) * scale, jnp.array([3.0, 0.0]) * scale
    descent, state = reused(optax_sam.reuse_ascent(0.5), [(p, g)])
    np.testing.assert_allclose(state.direction, [0, 1], atol=1e-6)
    np.testing.assert_allclose(descent / scale, [3.0, 1.5], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_part_that_is_only_rounding_is_no_direction(dtype):
    g = np.random.default_rng(0).normal(size=1000).astype(dtype)
    for p in (g, 3 * g, -g):
        descent, state = reused(optax_sam.reuse_ascent(0.5), [(p, g)])
        np.testing.assert_array_equal(state.direction, 0)
        np.testing.assert_array_equal(descent, g)


def test_the_direction_is_in_float32_and_the_descent_in_the_gradients_dtype():
    p, g = (jnp.array(x, jnp.bfloat16) for x in ([4.0, 1.0], [3.0, 0.0]))
    descent, state = reused(optax_sam.reuse_ascent(0.5), [(p, g)])
    assert (descent.dtype, state.direction.dtype) == (jnp.bfloat16, jnp.float32)


ASCENT, G = (jnp.array([4.0, 1.0]), jnp.array([3.0, 0.0])), jnp.array([2.0, 0.0])


@pytest.mark.parametrize(
    ("p", "kept"),
    [
        (jnp.array([jnp.nan, 1.0]), [0.0, 1.0]),
        (jnp.array([0.0, -jnp.inf]), [0.0, 1.0]),
        (jnp.zeros(2), [0.0, 0.0]),
    ],
)
def test_a_perturbed_gradient_that_is_not_finite_leaves_the_direction(p, kept):
    link = optax_sam.reuse_ascent(0.5)
    _, state = link.update(ASCENT[0], link.init(G), grad=ASCENT[1], ascended=True)
    _, state = link.update(p, state, grad=G, ascended=True)
    np.testing.assert_array_equal(state.direction, kept)


def test_a_tree_without_entries_is_one_too():
    descent, state = reused(optax_sam.reuse_ascent(0.5), [({}, {})])
    assert (descent, state.direction) == ({}, {})


def test_a_clean_gradient_of_zero_is_no_nan():
    """Of no length, it has no direction, and all of the other is across it."""
    zero = jnp.zeros(2)
    descent, state = reused(optax_sam.reuse_ascent(0.5), [(ASCENT[0], zero)])
    np.testing.assert_allclose(state.direction, np.array([4, 1]) / 17**0.5, rtol=1e-6)
    np.testing.assert_array_equal(descent, zero)


def test_a_step_that_is_not_finite_did_not_ascend():
    """Its direction stays, and no NaN is in the state."""
    tx = optax_sam.look_sam(SGD, 0.1, every=2)
    params = jnp.array([1.0, 2.0])
    scale = jnp.array([[1.0, 3.0]])

    @jax.jit
    def step(params, opt_state, factor):
        def loss_fn(params, batch):
            return factor * jnp.sum(batch * params[None] ** 2, -1)

        step = optax_sam.value_and_update(loss_fn, tx)
        return step(params, opt_state, scale)[1:]

    _, state = step(params, tx.init(params), 1.0)
    before = state.base_state[0].direction
    assert np.any(before)
    _, state = step(params, state._replace(step=jnp.int32(2)), jnp.nan)
    np.testing.assert_array_equal(state.base_state[0].direction, before)


def test_the_count_stays_at_the_largest_number():
    link, p = optax_sam.reuse_ascent(0.5), jnp.ones(2)
    state = link.init(p)._replace(count=jnp.int32(2**31 - 1))
    assert link.update(p, state, grad=p, ascended=True)[1].count == 2**31 - 1


def test_schedule_of_alpha_counts_steps():
    link = optax_sam.reuse_ascent(lambda count: jnp.where(count < 2, 0.5, 1.0))
    _, state = link.update(ASCENT[0], link.init(G), grad=ASCENT[1], ascended=True)
    for added in (1.0, 2.0):
        descent, state = link.update(G, state, grad=G, ascended=False)
        np.testing.assert_allclose(descent, [2.0, added])


def test_needs_what_the_engine_tells():
    link, p = optax_sam.reuse_ascent(0.5), jnp.ones(2)
    with pytest.raises(ValueError, match=r"^reuse_ascent: grad, the clean gradient"):
        link.update(p, link.init(p), ascended=True)
    with pytest.raises(ValueError, match=r"^reuse_ascent: ascended.*ascend_when"):
        link.update(p, link.init(p), grad=p)
    tx = optax_sam.sharpness_aware(
        optax.chain(link, SGD), optax_sam.scale_to_radius(0.1)
    )
    with pytest.raises(ValueError, match=r"ascended, whether.*ascend_when=every\(5\)"):
        tx.update(p, tx.init(p), p, grad_fn=lambda p: p)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every = 0 .*integer >= 1"),
        ({"alpha": -1.0}, "alpha = -1 .*>= 0"),
        ({"rho": -1.0}, "rho = -1 .*>= 0"),
    ],
)
def test_refuses_hyperparameters(options, message):
    with pytest.raises(ValueError, match=f"^look_sam: {message}"):
        optax_sam.look_sam(SGD, **{"rho": 0.1} | options)
