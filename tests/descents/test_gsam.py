import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references

import optax_sam

SGD = optax.sgd(0.1, momentum=0.9)


@pytest.mark.parametrize("decay", [0.0, 1e-2])
def test_steps_are_those_of_the_paper(decay):
    rho, alpha = 0.5, 0.4

    def step(w, g, gradient_at):
        p = gradient_at(w + references.scaled(g, rho))
        across = g - (g @ p) / (p @ p) * p
        return p - alpha * across, 0

    base = references.Sgd(decay)
    tx = optax_sam.gsam(base.tx, rho, alpha)
    references.assert_replays(tx, step, base)


def test_alpha_zero_is_sam():
    references.assert_is(optax_sam.gsam(SGD, 0.1, 0.0), optax_sam.sam(SGD, 0.1))


def test_nothing_of_a_gradient_is_across_itself():
    link = optax_sam.gap_descent(2.0)
    p = {"a": jnp.array([3.0, 4.0]), "b": jnp.array(12.0)}
    descent, _ = link.update(p, link.init(p), grad=p)
    np.testing.assert_allclose(descent["a"], p["a"], rtol=1e-6)


def test_what_is_taken_away_is_across_the_whole_tree():
    rng = np.random.default_rng(0)
    p, g = ({"a": rng.normal(size=(3, 4)), "b": rng.normal(size=2)} for _ in range(2))
    p, g = (optax.tree.cast(t, jnp.float32) for t in (p, g))
    link = optax_sam.gap_descent(1.0)
    descent, _ = link.update(p, link.init(p), grad=g)
    taken = optax.tree.sub(p, descent)
    np.testing.assert_allclose(optax.tree.vdot(taken, p), 0, atol=1e-5)
    # Across one leaf alone it need not be.
    assert abs(float(jnp.vdot(taken["b"], p["b"]))) > 1e-2


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_may_overflow(scale):
    p, g = jnp.array([2.0, 0.0]) * scale, jnp.array([3.0, 4.0]) * scale
    link = optax_sam.gap_descent(0.5)
    descent, _ = link.update(p, link.init(p), grad=g)
    np.testing.assert_allclose(descent / scale, [2.0, -2.0], rtol=1e-6)


def test_a_perturbed_gradient_of_zero_is_no_nan():
    link = optax_sam.gap_descent(0.5)
    zero, g = jnp.zeros(2), jnp.array([3.0, 4.0])
    descent, _ = link.update(zero, link.init(zero), grad=g)
    np.testing.assert_array_equal(descent, [-1.5, -2.0])


def test_the_count_stays_at_the_largest_number():
    link, p = optax_sam.gap_descent(0.5), jnp.ones(2)
    state = link.init(p)._replace(count=jnp.int32(2**31 - 1))
    assert link.update(p, state, grad=p)[1].count == 2**31 - 1


def test_needs_the_clean_gradient():
    link = optax_sam.gap_descent(0.5)
    with pytest.raises(
        ValueError, match=r"gap_descent: grad, the clean gradient.*base"
    ):
        link.update(jnp.ones(2), link.init(jnp.ones(2)))
