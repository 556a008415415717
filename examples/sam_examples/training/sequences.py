"""Losses of sentences, whose mean is the mean over tokens."""

import jax
import jax.numpy as jnp


def mean_length(is_token: jax.Array) -> jax.Array:
    """How many tokens a sentence of a batch has on average, once for each sentence.

    As a part of the batch, a micro-batch or a device gets it of the whole batch.

    Args:
      is_token: bools `[B, T]`, False where a sentence is filled up.

    Returns:
      Equal numbers `[B]`, float32, more than 0.
    """
    mean = jnp.mean(jnp.sum(is_token, axis=1, dtype=jnp.float32))
    return jnp.full(is_token.shape[:1], jnp.where(mean > 0, mean, 1))


def sentence_losses(
    token_losses: jax.Array, is_token: jax.Array, mean_length: jax.Array
) -> jax.Array:
    """The losses of sentences, each the sum over its tokens over the mean length.

    Their mean over the batch is the mean of the losses of tokens, whatever the lengths.

    Args:
      token_losses: `[B, T]`.
      is_token: bools `[B, T]`, False where a sentence is filled up; losses there count
        nothing.
      mean_length: of the batch that makes a step, `[B]`, as of :func:`mean_length`.

    Returns:
      Losses `[B]`.
    """
    return jnp.sum(token_losses, axis=1, where=is_token) / mean_length
