import jax.numpy as jnp
import optax
import pytest
import references

import optax_sam

SGD = optax.sgd(0.1, momentum=0.9)


@pytest.mark.parametrize("decay", [0.0, 1e-2])
@pytest.mark.parametrize("decoupled", [False, True])
def test_steps_are_those_of_the_paper(decay, decoupled):
    rho, gamma = 0.5, 0.8
    weight = gamma / (1 - gamma)

    def step(w, g, gradient_at):
        h = gradient_at(w + references.scaled(g, rho)) - g
        if decoupled:
            return g, -references.RATE * weight * h
        return g + weight * h, 0

    rate = references.RATE if decoupled else None
    base = references.Sgd(decay)
    tx = optax_sam.wsam(base.tx, rho, gamma, learning_rate=rate)
    references.assert_replays(tx, step, base)


@pytest.mark.parametrize("rate", [None, 0.1])
def test_gamma_zero_is_the_base(rate):
    references.assert_is(optax_sam.wsam(SGD, 0.1, 0.0, learning_rate=rate), SGD)


def test_gamma_one_half_is_sam():
    references.assert_is(optax_sam.wsam(SGD, 0.1, 0.5), optax_sam.sam(SGD, 0.1))


@pytest.mark.parametrize("rate", [None, 0.1])
def test_rho_zero_is_the_base(rate):
    references.assert_is(optax_sam.wsam(SGD, 0.0, 0.9, learning_rate=rate), SGD)


def test_the_weight_grows_with_gamma_up_to_its_limit():
    p, g = jnp.array([2.0]), jnp.array([1.0])
    for gamma, expected in ((0.25, 1 + 1 / 3), (0.5, 2), (0.9, 10), (0.999, 1000)):
        link = optax_sam.weighted_descent(gamma)
        descent, _ = link.update(p, link.init(p), grad=g)
        assert descent[0] == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ValueError, match=r"wsam: gamma = 1 .*\[0, 0.999\]"):
        optax_sam.wsam(SGD, 0.1, 1.0)


@pytest.mark.parametrize("rate", [None, 0.1])
def test_the_count_stays_at_the_largest_number(rate):
    params, last = jnp.ones(2), 2**31 - 1
    tx = optax_sam.wsam(optax.identity(), 0.1, 0.6, learning_rate=rate)
    state = optax.tree.set(tx.init(params), count=jnp.int32(last))
    _, state = tx.update(params, state, params, grad_fn=lambda p: p)
    assert {int(n) for _, n in optax.tree.get_all_with_path(state, "count")} == {last}


def test_a_gamma_that_is_nan_is_that_of_sam():
    p, g = jnp.array([2.0]), jnp.array([1.0])
    link = optax_sam.weighted_descent(lambda count: jnp.nan)
    assert link.update(p, link.init(p), grad=g)[0] == p


def test_needs_the_clean_gradient():
    link = optax_sam.weighted_descent(0.5)
    with pytest.raises(ValueError, match="weighted_descent: grad, the clean gradient"):
        link.update(jnp.ones(2), link.init(jnp.ones(2)))
