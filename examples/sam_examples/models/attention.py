"""Attention of several heads (Vaswani et al., 2017, arXiv 1706.03762, section 3.2)."""

import flax.linen as nn
import jax

from sam_examples.models.factories import Layer

# Keys and values, each `[B, S, heads, width / heads]`.
Keys = tuple[jax.Array, jax.Array]


class Attention(nn.Module):
    """What positions read of others, or of those of another sequence.

    Attributes:
      width: of the positions; also that of all heads together.
      num_heads: number of heads; divides the width.
      dense: makes a dense layer, see `models.factories`.
    """

    width: int
    num_heads: int
    dense: Layer = nn.Dense

    def setup(self) -> None:
        """Makes the layers, named as their attributes."""
        self.query = self.dense(self.width)
        self.key = self.dense(self.width)
        self.value = self.dense(self.width)
        self.out = self.dense(self.width)

    def keys(self, memory: jax.Array) -> Keys:
        """What `[B, S, width]` offers to whoever reads it."""
        return self._in_heads(self.key(memory)), self._in_heads(self.value(memory))

    def __call__(
        self,
        x: jax.Array,
        keys: Keys,
        mask: jax.Array | None = None,
        is_causal: bool = False,
    ) -> jax.Array:
        """Maps `[B, T, width]` to what it reads, of the same shape.

        Args:
          x: who reads.
          keys: those of what is read.
          mask: what may be read, bool, `[B or 1, heads or 1, T or 1, S]`; by default
            all may.
          is_causal: whether a position reads those up to its own only.
        """
        query = self._in_heads(self.query(x))
        y = jax.nn.dot_product_attention(query, *keys, mask=mask, is_causal=is_causal)
        out: jax.Array = self.out(y.reshape(x.shape))
        return out

    def _in_heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], self.num_heads, -1)
