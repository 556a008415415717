"""Losses of sentences: the mean over tokens, and yet one loss for each sentence."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import problems
import pytest
from sam_examples.training.sequences import mean_length, sentence_losses

import optax_sam

RNG = np.random.default_rng(0)
LENGTHS = np.array([9, 1, 4, 2, 7, 3, 0, 5])  # The empty one fills up a batch.
X = RNG.normal(size=(8, 9, 6)).astype(np.float32)
Y = RNG.integers(4, size=(8, 9), dtype=np.int32)
IS_TOKEN = np.arange(9)[None] < LENGTHS[:, None]
BATCH = X, Y, IS_TOKEN, np.asarray(mean_length(jnp.asarray(IS_TOKEN)))
PARAMS = problems.perceptron(sizes=(6, 8, 4)).params


def of_tokens(params, x, y):
    h = jnp.tanh(jnp.einsum("btm,mn->btn", x, params["w0"]) + params["b0"][None, None])
    logits = jnp.einsum("btm,mn->btn", h, params["w1"]) + params["b1"][None, None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y)


def losses(params, batch):
    x, y, is_token, length = batch
    return sentence_losses(of_tokens(params, x, y), is_token, length)


def token_mean(params, batch):
    x, y, is_token, _ = batch
    return jnp.mean(of_tokens(params, x, y), where=is_token)


PROBLEM = problems.Problem(PARAMS, losses, BATCH)
TOKEN_MEAN = PROBLEM._replace(loss_fn=token_mean)


def test_their_mean_is_that_over_tokens():
    np.testing.assert_allclose(BATCH[3], [LENGTHS.mean()] * 8)
    found = np.asarray(losses(PARAMS, BATCH))
    assert found.shape == (8,)
    assert found[6] == 0
    np.testing.assert_allclose(found.mean(), token_mean(PARAMS, BATCH), rtol=1e-6)
    each = np.asarray(of_tokens(PARAMS, X, Y))
    expected = [each[i, :n].sum() for i, n in enumerate(LENGTHS)] / LENGTHS.mean()
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_what_fills_up_does_not_count():
    x, y, is_token, length = BATCH
    filled = np.where(is_token[..., None], x, 7)
    found = sentence_losses(of_tokens(PARAMS, filled, y), is_token, length)
    np.testing.assert_array_equal(found, losses(PARAMS, BATCH))
    nothing = np.zeros_like(is_token)
    none = sentence_losses(of_tokens(PARAMS, x, y), nothing, mean_length(nothing))
    np.testing.assert_array_equal(none, np.zeros(8))


def test_sam_is_that_of_the_mean_over_tokens():
    tx = optax_sam.sam(optax.sgd(0.1, momentum=0.9), 0.1)
    problems.assert_trees_close(
        problems.train(tx, PROBLEM, 5),
        problems.train(tx, TOKEN_MEAN, 5),
        rtol=1e-5,
        atol=1e-6,
    )


def gradient_by_micro_batches(batch):
    tx = optax_sam.m_sam(optax.sgd(1.0), 0.0, micro_batch_size=2)
    step = jax.jit(optax_sam.value_and_update(losses, tx))
    value, updates, _ = step(PARAMS, tx.init(PARAMS), batch)
    return value, jax.tree.map(jnp.negative, updates)


def test_micro_batches_of_other_lengths_add_up_to_the_mean_over_tokens():
    value, gradient = gradient_by_micro_batches(BATCH)
    np.testing.assert_allclose(value, token_mean(PARAMS, BATCH), rtol=1e-6)
    expected = problems.gradient(TOKEN_MEAN)
    problems.assert_trees_close(gradient, expected, rtol=1e-5, atol=1e-6)
    # With a length of their own, micro-batches would count alike, and tokens not.
    lengths = LENGTHS.reshape(4, 2).mean(1).repeat(2)
    own = (*BATCH[:3], lengths.astype(np.float32))
    value, gradient = gradient_by_micro_batches(own)
    assert abs(float(value) - float(token_mean(PARAMS, BATCH))) > 1e-2


def test_scores_of_weights_are_over_sentences():
    """Also of a sentence by itself, which has the mean length of all."""
    found = optax_sam.fisher_diagonal(losses, PARAMS, BATCH)
    of_each = jax.jit(jax.jacrev(lambda p: losses(p, BATCH)))(PARAMS)
    expected = jax.tree.map(lambda g: (g**2).mean(0), of_each)
    problems.assert_trees_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("strength", [0.0, 2.0])
def test_weights_of_rw_sam_are_of_sentences(strength):
    tx = optax_sam.rw_sam(optax.sgd(0.1), 0.1, strength, estimator="jvp")
    step = jax.jit(optax_sam.value_and_update(losses, tx))
    _, updates, state = step(PARAMS, tx.init(PARAMS), BATCH)
    size = float(optax.tree.get(state, "effective_sample_size"))
    assert size == pytest.approx(8) if strength == 0 else 1 <= size < 7.5
    # What fills them up has no part in it.
    wider = (np.pad(X, ((0, 0), (0, 3), (0, 0))), np.pad(Y, ((0, 0), (0, 3))))
    wider = (*wider, np.pad(IS_TOKEN, ((0, 0), (0, 3))), BATCH[3])
    _, others, _ = step(PARAMS, tx.init(PARAMS), wider)
    problems.assert_trees_close(updates, others, rtol=1e-5, atol=1e-7)
