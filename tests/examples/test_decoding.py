"""Greedy and beam search on a model whose every sequence can be written down."""

import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sam_examples.models.decoding import (
    SpecialTokens,
    beam_search,
    greedy_search,
    length_penalty,
)

SPECIAL = SpecialTokens(pad=0, begin=1, end=2)
WORDS = (3, 4, 5)
ROWS, LENGTH, STATES = 2, 4, 31
LOGITS = np.random.default_rng(0).normal(0, 1.5, (STATES, 6)).astype(np.float32)
# What may not be written is likely.
LOGITS[:, [SPECIAL.pad, SPECIAL.begin]] += 2
# Of each row; what the logits of a position depend on, besides all tokens before it.
STARTS = np.array([0, 3])


def after(state, token):
    return (5 * state + token) % STATES


def next_logits(tokens, position, state):
    del position
    state = after(state, tokens)
    return jnp.asarray(LOGITS)[state], state


@partial(jax.jit, static_argnames=("beams", "alpha"))
def search(beams, alpha=0.6):
    return beam_search(
        next_logits,
        jnp.repeat(jnp.asarray(STARTS), beams),
        SPECIAL,
        rows=ROWS,
        length=LENGTH,
        beams=beams,
        alpha=alpha,
    )


@cache
def log_probs(state):
    logits = LOGITS[state].astype(np.float64)
    total = np.log(np.sum(np.exp(logits)))
    return {token: logits[token] - total for token in (SPECIAL.end, *WORDS)}


def log_prob(start, sequence):
    state, total = after(start, SPECIAL.begin), 0.0
    for token in sequence:
        total += log_probs(state)[token]
        state = after(state, token)
    return total


def score(start, sequence, alpha):
    return log_prob(start, sequence) / length_penalty(len(sequence), alpha)


def padded(sequence):
    return [*sequence, *[SPECIAL.pad] * (LENGTH - len(sequence))]


def every_sequence():
    for size in range(LENGTH):
        for words in itertools.product(WORDS, repeat=size):
            yield (*words, SPECIAL.end)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_wide_beam_finds_all_sequences_in_their_order(alpha):
    sequences = list(every_sequence())
    tokens, scores = map(np.asarray, search(len(sequences), alpha))
    for row, start in enumerate(STARTS):
        ranked = sorted(sequences, key=lambda s, a=start: -score(a, s, alpha))
        np.testing.assert_array_equal(tokens[row], [padded(s) for s in ranked])
        expected = [score(start, s, alpha) for s in ranked]
        np.testing.assert_allclose(scores[row], expected, rtol=1e-4)


def searched(start, beams, alpha):
    """Beam search of one sequence, in lists."""
    found, alive = [], [((), 0.0)]
    for position in range(LENGTH):
        candidates = sorted(
            (
                ((*words, token), log_prob(start, (*words, token)))
                for words, _ in alive
                for token in (SPECIAL.end, *WORDS)
                if position < LENGTH - 1 or token == SPECIAL.end
            ),
            key=lambda candidate: -candidate[1],
        )
        found += [c for c in candidates[:beams] if c[0][-1] == SPECIAL.end]
        alive = [c for c in candidates if c[0][-1] != SPECIAL.end][:beams]
        if len(found) >= beams:
            break
    found = [(total / length_penalty(len(s), alpha), s) for s, total in found]
    return sorted(found, reverse=True)[:beams]


@pytest.mark.parametrize("beams", [2, 3])
def test_beams_are_those_of_a_search_in_lists(beams):
    tokens, scores = map(np.asarray, search(beams))
    for row, start in enumerate(STARTS):
        expected = searched(start, beams, 0.6)
        assert len(expected) == beams
        np.testing.assert_allclose(scores[row], [s for s, _ in expected], rtol=1e-4)
        np.testing.assert_array_equal(tokens[row], [padded(s) for _, s in expected])


def test_one_beam_is_greedy():
    @jax.jit
    def greedy():
        state = jnp.asarray(STARTS)
        return greedy_search(next_logits, state, SPECIAL, rows=ROWS, length=LENGTH)

    expected = []
    for start in STARTS:
        state, sequence = after(start, SPECIAL.begin), []
        while SPECIAL.end not in sequence:
            likeliest = max(log_probs(state), key=log_probs(state).get)
            last = len(sequence) == LENGTH - 1
            sequence.append(SPECIAL.end if last else likeliest)
            state = after(state, sequence[-1])
        expected.append(padded(sequence))
    np.testing.assert_array_equal(greedy(), expected)
    np.testing.assert_array_equal(search(1).tokens[:, 0], expected)
