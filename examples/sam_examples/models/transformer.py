"""A decoder-only transformer for training steps that are sharded over many devices.

Pre-normalisation and learned positions, as in GPT-2 (Radford et al., 2019), without
biases. The layers are one layer scanned over stacked parameters, which compiles once
for all, and are computed again in the backward pass, so that of each only its input is
kept.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from sam_examples.models.attention import Attention

# Says where activations `[B, T, width]` lie; without it, the compiler decides.
Place = Callable[[jax.Array], jax.Array]


def anywhere(x: jax.Array) -> jax.Array:
    """Leaves it to the compiler."""
    return x


class Layer(nn.Module):
    """Causal attention and a perceptron, each around a shortcut.

    Attributes:
      num_heads: attention heads; divides the width.
      hidden: width of the perceptron's hidden layer.
      place: see `Place`.
    """

    num_heads: int
    hidden: int
    place: Place = anywhere

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """Maps `[B, T, width]` to the same shape; `nn.scan` wants the rest."""
        x = self.place(x)
        width = x.shape[-1]
        attention = Attention(width, self.num_heads, partial(nn.Dense, use_bias=False))
        nn.share_scope(self, attention)
        y = nn.LayerNorm(use_bias=False)(x)
        x += attention(y, attention.keys(y), is_causal=True)
        y = nn.LayerNorm(use_bias=False)(self.place(x))
        y = nn.gelu(nn.Dense(self.hidden, use_bias=False, name="up")(y))
        x += nn.Dense(width, use_bias=False, name="down")(y)
        return self.place(x), None


class Transformer(nn.Module):
    """A causal language model.

    Attributes:
      vocabulary: number of tokens.
      width: of the residual stream.
      num_layers: number of layers.
      num_heads: attention heads of each layer; divides the width.
      hidden: width of the perceptrons' hidden layers.
      place: see `Place`.
    """

    vocabulary: int
    width: int
    num_layers: int
    num_heads: int
    hidden: int
    place: Place = anywhere

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens `[B, T]` to the logits of the next ones, `[B, T, vocabulary]`."""
        # A matrix product in place of a look-up, whose gradient would be scattered into
        # zeros the size of the table: XLA keeps those of one pass for the next.
        one_hot = jax.nn.one_hot(tokens, self.vocabulary)
        x = nn.Dense(self.width, use_bias=False, name="tokens")(one_hot)
        positions = self.param(
            "positions", nn.initializers.normal(0.02), (tokens.shape[1], self.width)
        )
        x = self.place(x + positions[None])
        layers = nn.scan(
            nn.remat(Layer, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.num_layers,
        )
        x, _ = layers(self.num_heads, self.hidden, self.place, name="layers")(x, None)
        x = nn.LayerNorm(use_bias=False)(x)
        return nn.Dense(self.vocabulary, use_bias=False, name="logits")(x)


def make_language_loss_fn(model: nn.Module) -> Callable[[Any, jax.Array], jax.Array]:
    """Makes `loss_fn(params, tokens) -> losses`, from tokens `[B, T + 1]`.

    The losses `[B]` are the mean cross-entropies of the sequences.
    """

    def loss_fn(params: Any, tokens: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, tokens[:, :-1])
        losses: jax.Array = optax.softmax_cross_entropy_with_integer_labels(
            logits, tokens[:, 1:]
        )
        return jnp.mean(losses, axis=-1)

    return loss_fn
