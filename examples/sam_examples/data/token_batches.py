"""Batches of about as many tokens each, in a few shapes, by Grain.

Each shape is compiled for once. Sentences of a pair are padded to the length of the
shortest shape that both fit in; the more tokens that is, the fewer pairs a batch has.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import grain
import numpy as np


class Sequences(NamedTuple):
    """Tokens of many sentences, one after the other.

    Attributes:
      tokens: int32.
      ends: where each sentence ends, `[N]`.
    """

    tokens: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, sentences: Sequence[np.ndarray]) -> "Sequences":
        """Of sentences, each `[length]`."""
        tokens = np.concatenate([np.zeros(0, np.int32), *sentences])
        return cls(tokens, np.cumsum([len(s) for s in sentences], dtype=np.int64))

    @property
    def lengths(self) -> np.ndarray:
        """How many tokens each sentence has, `[N]`."""
        return np.diff(self.ends, prepend=0)

    def padded(self, rows: np.ndarray, length: int) -> np.ndarray:
        """Sentences as `[len(rows), length]`, with zeros at their ends.

        Of a longer one the beginning stays, and its last token.
        """
        ends, sizes = self.ends[rows, None], self.lengths[rows, None]
        column = np.arange(length)[None]
        cut_off = (sizes > length) & (column == length - 1)
        index = np.where(cut_off, ends, np.minimum(ends, ends - sizes + column + 1)) - 1
        return np.where(column < sizes, self.tokens[index], 0)


class EncodedPairs(NamedTuple):
    """Sentences and their translations in tokens, as many of each.

    Attributes:
      sources: each ends with the token of the end.
      targets: the same.
    """

    sources: Sequences
    targets: Sequences

    @property
    def lengths(self) -> np.ndarray:
        """Those of the longer sentence of each pair, `[N]`."""
        longest: np.ndarray = np.maximum(self.sources.lengths, self.targets.lengths)
        return longest

    def take(self, rows: np.ndarray) -> "EncodedPairs":
        """The pairs of these indices."""
        return EncodedPairs(*(_take(sequences, rows) for sequences in self))

    def batch(self, rows: np.ndarray, shape: "Shape") -> "TokenBatch":
        """Pairs as a batch of a shape, filled up by empty sentences."""
        empty = ((0, shape.rows - len(rows)), (0, 0))
        return TokenBatch(*(np.pad(s.padded(rows, shape.length), empty) for s in self))

    def cut_off(self, length: int) -> "EncodedPairs":
        """The pairs with at most so many tokens of each sentence, the last included."""
        return EncodedPairs(*(_cut_off(sequences, length) for sequences in self))


def _cut_off(sequences: Sequences, length: int) -> Sequences:
    sizes = sequences.lengths
    if np.all(sizes <= length):
        return sequences
    rows = sequences.padded(np.arange(len(sizes)), length)
    shorter = np.minimum(sizes, length)
    return Sequences.of([row[:size] for row, size in zip(rows, shorter, strict=True)])


def _take(sequences: Sequences, rows: np.ndarray) -> Sequences:
    starts, ends = sequences.ends - sequences.lengths, sequences.ends
    return Sequences.of([sequences.tokens[starts[r] : ends[r]] for r in rows])


class TokenBatch(NamedTuple):
    """Sentences and their translations, filled up by zeros.

    Attributes:
      sources: `[B, length]`, int32.
      targets: `[B, length]`, int32.
    """

    sources: np.ndarray
    targets: np.ndarray


class Shape(NamedTuple):
    """The shape of a batch.

    Attributes:
      rows: how many pairs.
      length: how many tokens of each sentence.
    """

    rows: int
    length: int


def choose_shapes(
    lengths: np.ndarray,
    *,
    tokens: int,
    count: int = 5,
    rows_divisible_by: int = 1,
) -> tuple[Shape, ...]:
    """Shapes for sentences of these lengths, the shortest first.

    They are those that leave the least padding, with lengths in steps of 4 tokens.

    Args:
      lengths: `[N]`, each that of the longer sentence of a pair.
      tokens: of the sources of a batch, padding included, and of the targets.
      count: how many shapes at most.
      rows_divisible_by: what has to divide the rows, such as the number of devices.

    Raises:
      ValueError: if a batch of so many tokens has no room for the longest sentences.
    """
    chosen = _least_padding(-(-lengths // 4) * 4, count)
    divisor = rows_divisible_by
    if tokens < divisor * chosen[-1]:
        raise ValueError(
            f"--batch-tokens must be at least {divisor * chosen[-1]:,}, for "
            f"{divisor:,} of the longest sentences, got {tokens:,}."
        )
    return tuple(
        Shape(tokens // length // divisor * divisor, length) for length in chosen
    )


def _least_padding(lengths: np.ndarray, count: int) -> list[int]:
    """The lengths, at most so many, that all fit in with the least padding."""
    sizes, numbers = np.unique(lengths, return_counts=True)
    below = np.concatenate([[0], np.cumsum(numbers)])
    # The best choices for the shortest sentences, by how many sizes they have: tokens
    # and lengths. One more choice is made of those with one length less.
    best: list[tuple[int, list[int]]] = [(0, [])]
    for last in range(len(sizes)):
        best.append((int(below[last + 1] * sizes[last]), [int(sizes[last])]))
    for _ in range(count - 1):
        best = [
            min(
                [
                    (cost + int((below[end] - below[start]) * sizes[end - 1]), chosen)
                    for start, (cost, few) in enumerate(best[:end])
                    for chosen in [[*few, int(sizes[end - 1])]]
                ],
                default=(0, []),
            )
            for end in range(len(best))
        ]
    return best[-1][1]


def training_batches(
    pairs: EncodedPairs, shapes: Sequence[Shape], *, epochs: int, seed: int
) -> grain.MapDataset:
    """The batches of a training; item `i` is the `TokenBatch` of step `i`.

    Each epoch has all pairs in another order and other batches, as many as any other.
    Where the sentences of a shape do not fill its last batch, shorter ones do; the
    shortest that are then left over wait for another epoch. All follows from the seed
    and the step alone, so that a run can go on at any step.

    Args:
      pairs: none longer than the longest shape.
      shapes: from the shortest to the longest.
      epochs: passes over the pairs.
      seed: draws the order, 0 or more.

    Raises:
      ValueError: if there are too few pairs for a single batch.
    """
    fitting = _fitting(pairs.lengths, shapes)

    # Threads may be at the end of an epoch and at the start of the next.
    @functools.lru_cache(maxsize=2)
    def plan(epoch: int) -> list[tuple[Shape, np.ndarray]]:
        sequence = np.random.SeedSequence(seed, spawn_key=(epoch,))
        rng = np.random.default_rng(sequence)
        order = rng.permutation(len(fitting))
        batches = list(_filled(order, fitting, shapes))
        return [batches[i] for i in rng.permutation(len(batches))]

    steps = len(plan(0))
    if not steps:
        raise ValueError(
            f"--batch-tokens must be small enough for {len(fitting):,} training pairs "
            f"to fill a batch, such as one of {shapes[-1].rows:,} pairs of "
            f"{shapes[-1].length:,} tokens each."
        )

    def batch(step: int) -> TokenBatch:
        epoch, step = divmod(step, steps)
        shape, rows = plan(epoch)[step]
        return pairs.batch(rows, shape)

    return grain.MapDataset.range(epochs * steps).map(batch)


def evaluation_order(
    lengths: np.ndarray, shapes: Sequence[Shape]
) -> list[tuple[Shape, np.ndarray]]:
    """The batches that all sentences are in once: shapes, and at most `rows` indices.

    Args:
      lengths: `[N]`; longer ones than the longest shape are in that.
      shapes: from the shortest to the longest.
    """
    fitting = _fitting(lengths, shapes)
    return [
        (shape, own[first : first + shape.rows])
        for number, shape in enumerate(shapes)
        for own in [np.flatnonzero(fitting == number)]
        for first in range(0, len(own), shape.rows)
    ]


def _fitting(lengths: np.ndarray, shapes: Sequence[Shape]) -> np.ndarray:
    """The number of the shortest shape that each sentence fits in, or the last."""
    index = np.searchsorted([shape.length for shape in shapes], lengths)
    return np.minimum(index, len(shapes) - 1)


def _filled(
    order: np.ndarray, fitting: np.ndarray, shapes: Sequence[Shape]
) -> Iterable[tuple[Shape, np.ndarray]]:
    """Whole batches of the sentences in this order, the longest first."""
    waiting = [order[fitting[order] == number] for number in range(len(shapes))]
    for number in reversed(range(len(shapes))):
        shape = shapes[number]
        own = waiting[number]
        for shorter in reversed(range(number)):
            missing = -len(own) % shape.rows
            own = np.concatenate([own, waiting[shorter][:missing]])
            waiting[shorter] = waiting[shorter][missing:]
        for last in range(shape.rows, len(own) + 1, shape.rows):
            yield shape, own[last - shape.rows : last]
