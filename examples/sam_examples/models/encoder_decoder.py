"""The encoder-decoder Transformer (Vaswani et al., 2017, arXiv 1706.03762).

One table embeds the tokens of both languages and gives the logits; positions are
sinusoids. Dropout follows the embeddings and each part of a layer. Where the layer
normalisation is: after each shortcut as published, or before each part of a layer and
once more after the last layer (pre-normalisation), as later code has it.

The decoder reads the source as keys and values that are computed once, and keeps its
own of earlier positions while it writes: `step` gives the logits of `__call__`, a
position at a time.
"""

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sam_examples.models.attention import Attention, Keys

_xavier = nn.initializers.xavier_uniform()


class Memory(NamedTuple):
    """What a decoder reads of the sources.

    Attributes:
      keys: those for each of its layers, `[B, S, ...]`.
      present: which positions are no padding, bool, `[B, S]`.
    """

    keys: tuple[Keys, ...]
    present: jax.Array


class EncoderLayer(nn.Module):
    """Attention and a perceptron, each around a shortcut.

    Attributes:
      width: of the positions.
      num_heads: attention heads; divides the width.
      hidden: width of the perceptron's hidden layer.
      pre_norm: whether normalisations come first, and not after the shortcuts.
      dropout_rate: dropout at the end of each part, off at 0.
      dtype: type of the computation; parameters stay in float32.
    """

    width: int
    num_heads: int
    hidden: int
    pre_norm: bool = False
    dropout_rate: float = 0.0
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        """Makes the parts that encoder and decoder have."""
        dense = partial(nn.Dense, kernel_init=_xavier, dtype=self.dtype)
        self.self_attention = Attention(self.width, self.num_heads, dense)
        self.self_attention_norm = nn.LayerNorm(dtype=self.dtype)
        self.up, self.down = dense(self.hidden), dense(self.width)
        self.perceptron_norm = nn.LayerNorm(dtype=self.dtype)
        self.dropout = nn.Dropout(self.dropout_rate)

    def __call__(self, x: jax.Array, mask: jax.Array, train: bool) -> jax.Array:
        """Maps `[B, T, width]` to the same shape; the mask `[B, T]` is of positions."""
        norm = self.self_attention_norm
        y = self._enter(norm, x)
        keys = self.self_attention.keys(y)
        y = self.self_attention(y, keys, mask[:, None, None])
        return self._perceptron(self._leave(norm, x, y, train), train)

    def _perceptron(self, x: jax.Array, train: bool) -> jax.Array:
        y = self.down(nn.relu(self.up(self._enter(self.perceptron_norm, x))))
        return self._leave(self.perceptron_norm, x, y, train)

    def _enter(self, norm: Any, x: jax.Array) -> jax.Array:
        """What a part sees of its input."""
        return norm(x) if self.pre_norm else x

    def _leave(self, norm: Any, x: jax.Array, y: jax.Array, train: bool) -> jax.Array:
        """The input of a part and its output, together."""
        x = x + self.dropout(y, deterministic=not train)
        return x if self.pre_norm else norm(x)


class DecoderLayer(EncoderLayer):
    """Causal attention, attention to the source and a perceptron, around shortcuts.

    The attributes are those of an `EncoderLayer`.
    """

    def setup(self) -> None:
        """Makes all parts."""
        super().setup()
        dense = partial(nn.Dense, kernel_init=_xavier, dtype=self.dtype)
        self.memory_attention = Attention(self.width, self.num_heads, dense)
        self.memory_norm = nn.LayerNorm(dtype=self.dtype)

    def memory_keys(self, memory: jax.Array) -> Keys:
        """What `[B, S, width]` offers to the layer."""
        return self.memory_attention.keys(memory)

    def __call__(  # type: ignore[override]
        self, x: jax.Array, memory: Keys, present: jax.Array, train: bool
    ) -> jax.Array:
        """Maps `[B, T, width]` to the same shape, all positions at once."""
        norm = self.self_attention_norm
        y = self._enter(norm, x)
        y = self.self_attention(y, self.self_attention.keys(y), is_causal=True)
        return self._rest(self._leave(norm, x, y, train), memory, present, train)

    def step(
        self,
        x: jax.Array,
        position: jax.Array,
        memory: Keys,
        present: jax.Array,
        past: Keys,
    ) -> tuple[jax.Array, Keys]:
        """Maps one position, `[B K, 1, width]`, to the same shape.

        Args:
          x: of each of `K` candidates for each of `B` sources.
          position: of `x`, an integer scalar.
          memory: the keys of the sources, `[B, S, ...]`.
          present: which of these are no padding, `[B, S]`.
          past: keys of the positions up to here, `[B K, N, ...]`.

        Returns:
          The output, and the past with this position's keys.
        """
        norm = self.self_attention_norm
        y = self._enter(norm, x)
        write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=position)
        keys, values = (
            write(old, new, axis=1)
            for old, new in zip(past, self.self_attention.keys(y), strict=True)
        )
        written = jnp.arange(keys.shape[1]) <= position
        y = self.self_attention(y, (keys, values), written[None, None, None])
        x = self._leave(norm, x, y, train=False)
        return self._rest(x, memory, present, train=False), (keys, values)

    def _rest(
        self, x: jax.Array, memory: Keys, present: jax.Array, train: bool
    ) -> jax.Array:
        y = self._enter(self.memory_norm, x)
        # Candidates for one source read the same keys, as if they were its positions.
        y = y.reshape(len(present), -1, self.width)
        y = self.memory_attention(y, memory, present[:, None, None]).reshape(x.shape)
        return self._perceptron(self._leave(self.memory_norm, x, y, train), train)


class EncoderDecoder(nn.Module):
    """A Transformer that translates.

    Attributes:
      vocabulary: number of tokens, of both languages together.
      width: of the positions; even.
      num_layers: number of layers of the encoder, and of the decoder.
      num_heads: attention heads of each; divides the width.
      hidden: width of the perceptrons' hidden layers.
      pad: the token that fills sequences up; as if it were not there.
      pre_norm: whether normalisations come before the parts of a layer.
      dropout_rate: dropout after the embeddings and each part of a layer.
      dtype: type of the computation; parameters and logits are float32.
    """

    vocabulary: int
    width: int = 512
    num_layers: int = 6
    num_heads: int = 8
    hidden: int = 2048
    pad: int = 0
    pre_norm: bool = False
    dropout_rate: float = 0.0
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        """Makes the table of the tokens and all layers."""
        self.tokens = self.param(
            "tokens",
            nn.initializers.normal(self.width**-0.5),
            (self.vocabulary, self.width),
        )
        layer: dict[str, Any] = {
            "width": self.width,
            "num_heads": self.num_heads,
            "hidden": self.hidden,
            "pre_norm": self.pre_norm,
            "dropout_rate": self.dropout_rate,
            "dtype": self.dtype,
        }
        numbers = range(self.num_layers)
        self.encoder = [EncoderLayer(**layer) for _ in numbers]
        self.decoder = [DecoderLayer(**layer) for _ in numbers]
        self.dropout = nn.Dropout(self.dropout_rate)
        if self.pre_norm:
            self.encoder_norm = nn.LayerNorm(dtype=self.dtype)
            self.decoder_norm = nn.LayerNorm(dtype=self.dtype)

    def __call__(
        self, sources: jax.Array, written: jax.Array, train: bool
    ) -> jax.Array:
        """Gives the logits of the next tokens, float32, `[B, T, vocabulary]`.

        Args:
          sources: tokens `[B, S]`.
          written: tokens `[B, T]` that each next one follows, the first that of the
            beginning.
          train: whether to drop out.
        """
        return self.decode(written, self.encode(sources, train), train)

    def encode(self, sources: jax.Array, train: bool = False) -> Memory:
        """Maps tokens `[B, S]` to what the decoder reads of them."""
        present = sources != self.pad
        x = self._embed(sources, jnp.arange(sources.shape[1]), train)
        for layer in self.encoder:
            x = layer(x, present, train)
        if self.pre_norm:
            x = self.encoder_norm(x)
        return Memory(tuple(layer.memory_keys(x) for layer in self.decoder), present)

    def decode(
        self, written: jax.Array, memory: Memory, train: bool = False
    ) -> jax.Array:
        """Maps tokens `[B, T]` to the logits of the next ones, float32."""
        x = self._embed(written, jnp.arange(written.shape[1]), train)
        for layer, keys in zip(self.decoder, memory.keys, strict=True):
            x = layer(x, keys, memory.present, train)
        return self._logits(x)

    def step(
        self,
        tokens: jax.Array,
        position: jax.Array,
        memory: Memory,
        past: tuple[Keys, ...],
    ) -> tuple[jax.Array, tuple[Keys, ...]]:
        """Maps the tokens at one position to the logits of the next ones.

        Args:
          tokens: `[B K]`, of `K` candidates for each source.
          position: of the tokens, an integer scalar.
          memory: that of the `B` sources.
          past: what the steps up to here made of `no_past`.

        Returns:
          Logits `[B K, vocabulary]` in float32, and the past of the next step.
        """
        x = self._embed(tokens[:, None], jnp.reshape(position, 1), train=False)
        layers = zip(self.decoder, memory.keys, past, strict=True)
        now = []
        for layer, keys, earlier in layers:
            x, later = layer.step(x, position, keys, memory.present, earlier)
            now.append(later)
        return self._logits(x)[:, 0], tuple(now)

    def no_past(self, num_candidates: int, length: int) -> tuple[Keys, ...]:
        """The past of the first step, for so many candidates and positions."""
        size = self.width // self.num_heads
        zeros = jnp.zeros((num_candidates, length, self.num_heads, size), self.dtype)
        return ((zeros, zeros),) * self.num_layers

    def _embed(self, tokens: jax.Array, at: jax.Array, train: bool) -> jax.Array:
        x = jnp.sqrt(float(self.width)) * self.tokens[tokens]
        x += sinusoids(at, self.width)[None]
        dropped: jax.Array = self.dropout(x, deterministic=not train)
        return dropped.astype(self.dtype)

    def _logits(self, x: jax.Array) -> jax.Array:
        if self.pre_norm:
            x = self.decoder_norm(x)
        table = jnp.asarray(self.tokens, self.dtype)
        return jnp.einsum("btw,vw->btv", x, table, preferred_element_type=jnp.float32)


def sinusoids(positions: jax.Array, width: int) -> jax.Array:
    """Sines and cosines of positions `[T]`, in turn: `[T, width]`, section 3.5.

    `PE(p, 2i) = sin(p / 10000^(2i / width))`, and its cosine at `2i + 1`.
    """
    rates = 10_000.0 ** (-jnp.arange(0, width, 2) / width)
    angles = positions[:, None] * rates[None]
    pairs = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return pairs.reshape(len(positions), width)


# `base` as published; `iwslt` is that of other code for the small data sets of IWSLT
# (transformer_iwslt_de_en of fairseq); `small` suits tens of thousands of short
# sentences.
TRANSLATORS: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "base": {"width": 512, "num_layers": 6, "num_heads": 8, "hidden": 2048},
        "iwslt": {"width": 512, "num_layers": 6, "num_heads": 4, "hidden": 1024},
        "small": {"width": 256, "num_layers": 3, "num_heads": 4, "hidden": 1024},
    }
)


def make_translator(name: str, vocabulary: int, **options: Any) -> EncoderDecoder:
    """Builds a model by name.

    Args:
      name: out of `TRANSLATORS`.
      vocabulary: number of tokens.
      **options: other attributes of an `EncoderDecoder`; None leaves one as it is.

    Raises:
      ValueError: if there is no such model, or an attribute is out of range.
    """
    if name not in TRANSLATORS:
        raise ValueError(
            f"unknown model {name!r}; choose from {', '.join(TRANSLATORS)}."
        )
    given = {key: value for key, value in options.items() if value is not None}
    model = EncoderDecoder(vocabulary, **{**TRANSLATORS[name], **given})
    for attribute in ("vocabulary", "width", "num_layers", "num_heads", "hidden"):
        if (value := getattr(model, attribute)) < 1:
            raise ValueError(f"{attribute} must be at least 1, got {value}.")
    if model.width % (2 * model.num_heads):
        raise ValueError(
            f"width must be a multiple of twice the {model.num_heads} heads, got "
            f"{model.width}."
        )
    if not 0 <= model.dropout_rate < 1:
        raise ValueError(
            f"dropout must be at least 0 and below 1, got {model.dropout_rate}."
        )
    return model
