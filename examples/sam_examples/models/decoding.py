"""Writes sequences a token at a time: greedily, or by beam search.

What is searched is a function `next_logits(tokens, position, state) -> logits, state`:
given the tokens `[R]` at a position, an integer scalar, and what it keeps of those
before, the logits `[R, V]` of the next. Every leaf of the state has `R` rows.

A sequence ends with the token of the end, which has to be the last one of the longest
allowed; what follows is padding. Neither padding nor a beginning is ever written.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sam_examples.models.encoder_decoder import EncoderDecoder

NextLogits = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]


class SpecialTokens(NamedTuple):
    """The tokens that mean something else than text.

    Attributes:
      pad: fills up.
      begin: what the first token follows.
      end: ends a sequence.
    """

    pad: int
    begin: int
    end: int


class Hypotheses(NamedTuple):
    """Sequences that a search found, the best first.

    Attributes:
      tokens: `[B, K, length]`.
      scores: `[B, K]`; minus infinity for those that there are not.
    """

    tokens: jax.Array
    scores: jax.Array


def translate(
    model: EncoderDecoder,
    params: Any,
    sources: jax.Array,
    special: SpecialTokens,
    *,
    length: int,
    beams: int = 1,
    alpha: float = 0.6,
) -> jax.Array:
    """Writes the best translation found of each source.

    Args:
      model: what translates.
      params: its parameters.
      sources: tokens `[B, S]`.
      special: the tokens that are no text.
      length: the most tokens of a translation, that of the end included.
      beams: searches greedily with 1.
      alpha: see `beam_search`.

    Returns:
      Tokens `[B, length]`.
    """
    apply = partial(model.apply, {"params": params})
    memory: Any = apply(sources, method="encode")

    def next_logits(tokens: jax.Array, position: jax.Array, past: Any) -> Any:
        return apply(tokens, position, memory, past, method="step")

    rows = len(sources)
    past = model.no_past(rows * beams, length)
    search: dict[str, Any] = {"rows": rows, "length": length}
    if beams == 1:
        return greedy_search(next_logits, past, special, **search)
    found = beam_search(next_logits, past, special, **search, beams=beams, alpha=alpha)
    return found.tokens[:, 0]


def greedy_search(
    next_logits: NextLogits,
    state: Any,
    special: SpecialTokens,
    *,
    rows: int,
    length: int,
) -> jax.Array:
    """Takes the likeliest token at each position.

    Args:
      next_logits: see above; traced once.
      state: that of the first position.
      special: the tokens that are no text.
      rows: how many sequences to write, `R`.
      length: the most tokens of one, that of the end included.

    Returns:
      Tokens `[R, length]`.
    """

    def unfinished(search: Any) -> jax.Array:
        position, _, _, done, _ = search
        more: jax.Array = (position < length) & ~jnp.all(done)
        return more

    def write(search: Any) -> Any:
        position, latest, sequences, done, state = search
        logits, state = next_logits(latest, position, state)
        logits = _allowed(logits, special, position == length - 1)
        latest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        latest = jnp.where(done, special.pad, latest)
        sequences = sequences.at[:, position].set(latest)
        return position + 1, latest, sequences, done | (latest == special.end), state

    first = jnp.full(rows, special.begin, jnp.int32)
    sequences = jnp.full((rows, length), special.pad, jnp.int32)
    done = jnp.zeros(rows, bool)
    search = (jnp.int32(0), first, sequences, done, state)
    written: jax.Array = jax.lax.while_loop(unfinished, write, search)[2]
    return written


def length_penalty(length: Any, alpha: float) -> Any:
    """What a log-probability is divided by, `((5 + length) / 6) ** alpha`.

    Wu et al. (2016, arXiv 1609.08144), eq. 14; 1 for `alpha = 0`.
    """
    return ((5.0 + length) / 6.0) ** alpha


def beam_search(
    next_logits: NextLogits,
    state: Any,
    special: SpecialTokens,
    *,
    rows: int,
    length: int,
    beams: int,
    alpha: float = 0.6,
) -> Hypotheses:
    """Keeps the likeliest beginnings at each position.

    A continuation by the end is a hypothesis if it is among the `beams` likeliest; a
    sequence is done when it has so many hypotheses. One beam is greedy search.

    Args:
      next_logits: see above; traced once. Its rows are `beams` beginnings of each of
        the sequences, next to each other.
      state: that of the first position, of `rows * beams` rows.
      special: the tokens that are no text.
      rows: how many sequences to write, `B`.
      length: the most tokens of one, that of the end included.
      beams: `K`.
      alpha: scores are log-probabilities over `length_penalty(..., alpha)`.
    """
    search = _start(state, special, rows, length, beams)

    def unfinished(search: _Search) -> jax.Array:
        return (search.position < length) & ~jnp.all(_done(search.found))

    def extend(search: _Search) -> _Search:
        latest = search.sequences[:, :, search.position].reshape(-1)
        logits, state = next_logits(latest, search.position, search.state)
        log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
        log_probs = _allowed(log_probs, special, search.position == length - 1)
        log_probs = log_probs.reshape(rows, beams, -1)
        scores, beam, token = _likeliest(search.scores[..., None] + log_probs, beams)
        sequences = _take(search.sequences, beam)
        sequences = sequences.at[:, :, search.position + 1].set(token)
        ends = token == special.end
        found = _collect(
            search.found,
            Hypotheses(
                sequences[..., 1:],
                jnp.where(ends, scores, -jnp.inf)
                / length_penalty(search.position + 1, alpha),
            ),
            beams,
        )
        scores, order = jax.lax.top_k(jnp.where(ends, -jnp.inf, scores), beams)
        beam = _take(beam, order)
        row = (jnp.arange(rows)[:, None] * beams + beam).reshape(-1)
        state = jax.tree.map(lambda leaf: leaf[row], state)
        sequences = _take(sequences, order)
        return _Search(search.position + 1, sequences, scores, found, state)

    found: Hypotheses = jax.lax.while_loop(unfinished, extend, search).found
    return found


def _allowed(
    scores: jax.Array, special: SpecialTokens, is_last: jax.Array
) -> jax.Array:
    """Scores `[R, V]` of what may come next, and minus infinity for all else."""
    token = jnp.arange(scores.shape[-1])
    is_text = (token != special.pad) & (token != special.begin)
    allowed = jnp.where(is_last, token == special.end, is_text)
    return jnp.where(allowed[None], scores, -jnp.inf)


class _Search(NamedTuple):
    """A beam search under way.

    Attributes:
      position: how many tokens are written.
      sequences: the beginnings `[B, K, 1 + length]`, from the token of the beginning.
      scores: their log-probabilities `[B, K]`, minus infinity for what is none.
      found: what ended so far.
      state: what `next_logits` keeps.
    """

    position: jax.Array
    sequences: jax.Array
    scores: jax.Array
    found: Hypotheses
    state: Any


def _start(
    state: Any, special: SpecialTokens, rows: int, length: int, beams: int
) -> _Search:
    sequences = jnp.full((rows, beams, 1 + length), special.pad, jnp.int32)
    none = jnp.full((rows, beams), -jnp.inf)
    return _Search(
        jnp.int32(0),
        sequences.at[:, :, 0].set(special.begin),
        none.at[:, 0].set(0.0),  # One beginning, once.
        Hypotheses(sequences[..., 1:], none),
        state,
    )


def _done(found: Hypotheses) -> jax.Array:
    return jnp.all(found.scores > -jnp.inf, axis=-1)


def _likeliest(scores: jax.Array, beams: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The best of `[B, K, V]`, at least `beams` of which are no ends.

    Returns:
      Scores, beams and tokens, each `[B, min(2 K, K V)]`.
    """
    size = scores.shape[-1]
    flat = scores.reshape(len(scores), -1)
    best, index = jax.lax.top_k(flat, min(2 * beams, flat.shape[-1]))
    return best, index // size, (index % size).astype(jnp.int32)


def _collect(found: Hypotheses, more: Hypotheses, beams: int) -> Hypotheses:
    """The best of what was found, and of what ended among the likeliest `beams`."""
    among = jnp.arange(more.scores.shape[-1]) < beams
    counts = among[None] & ~_done(found)[:, None]
    both = [found, more._replace(scores=jnp.where(counts, more.scores, -jnp.inf))]
    tokens, scores = (jnp.concatenate(x, axis=1) for x in zip(*both, strict=True))
    scores, order = jax.lax.top_k(scores, beams)
    return Hypotheses(_take(tokens, order), scores)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """Of each row the entries of these indices, `[B, K, ...]`."""
    taken: jax.Array = jax.vmap(lambda row, chosen: row[chosen])(x, index)
    return taken
