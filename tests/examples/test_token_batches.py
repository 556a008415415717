"""Batches of tokens in a few shapes: whole, seeded, resumable."""

import itertools

import numpy as np
import pytest
from sam_examples.data.prefetch import prefetched
from sam_examples.data.token_batches import (
    EncodedPairs,
    Sequences,
    Shape,
    choose_shapes,
    evaluation_order,
    training_batches,
)


def make_pairs(size=200, seed=0, longest=30):
    """Sentences of different lengths; the source's first token tells which it is."""
    rng = np.random.default_rng(seed)

    def sequences():
        lengths = rng.integers(1, longest + 1, size)
        return Sequences.of(
            [np.full(n, 10 + i, np.int32) for i, n in enumerate(lengths)]
        )

    return EncodedPairs(sequences(), sequences())


def numbers(batch):
    return (batch.sources[:, 0] - 10).tolist()


PAIRS = make_pairs()
SHAPES = choose_shapes(PAIRS.lengths, tokens=240, count=4, rows_divisible_by=2)


def test_shapes_hold_about_as_many_tokens_each():
    assert len(SHAPES) == 4
    assert SHAPES[-1].length >= PAIRS.lengths.max()
    for shape in SHAPES:
        assert shape.rows % 2 == 0
        assert 240 - 2 * shape.length < shape.rows * shape.length <= 240
        assert shape.length % 4 == 0
    with pytest.raises(ValueError, match="must be at least 64, for 2 of the longest"):
        choose_shapes(np.array([30]), tokens=63, rows_divisible_by=2)


def test_no_other_shapes_leave_less_padding():
    lengths = np.minimum(np.random.default_rng(3).geometric(0.08, 300), 40)
    candidates = sorted({-(-int(n) // 4) * 4 for n in lengths})

    def padded_to(shapes):
        return sum(min(s for s in shapes if s >= n) for n in lengths)

    for count in (1, 2, 3):
        chosen = [s.length for s in choose_shapes(lengths, tokens=40, count=count)]
        least = min(
            padded_to([*shorter, candidates[-1]])
            for shorter in itertools.combinations(candidates[:-1], count - 1)
        )
        assert len(chosen) == count
        assert padded_to(chosen) == least


def test_an_epoch_has_each_pair_once_but_for_the_rest_of_a_batch():
    batches = training_batches(PAIRS, SHAPES, epochs=3, seed=1)
    steps = len(batches) // 3
    orders = []
    for epoch in range(3):
        seen = []
        for step in range(epoch * steps, (epoch + 1) * steps):
            batch = batches[step]
            assert Shape(*batch.sources.shape) in SHAPES
            assert batch.targets.shape == batch.sources.shape
            for row, number in enumerate(numbers(batch)):
                length = PAIRS.sources.lengths[number]
                assert np.all(batch.sources[row, :length] == 10 + number)
                assert not np.any(batch.sources[row, length:])
                length = PAIRS.targets.lengths[number]
                assert np.all(batch.targets[row, :length] == 10 + number)
                assert not np.any(batch.targets[row, length:])
            seen += numbers(batch)
        assert len(set(seen)) == len(seen) > 200 - SHAPES[0].rows
        # The shortest alone may wait.
        waiting = set(range(200)) - set(seen)
        assert all(PAIRS.lengths[i] <= SHAPES[0].length for i in waiting)
        orders.append(seen)
    assert orders[0] != orders[1]


def test_batches_follow_from_the_seed_and_the_step():
    batches, again, other = (
        training_batches(PAIRS, SHAPES, epochs=2, seed=seed) for seed in (1, 1, 2)
    )
    iterator = prefetched(batches)
    for _ in range(len(batches) // 2 + 3):
        next(iterator)
    resumed = prefetched(again)
    resumed.set_state(iterator.get_state())
    left = [np.asarray(batch.sources) for batch in resumed]
    assert len(left) == len(batches) - len(batches) // 2 - 3
    for ours, theirs in zip(left, iterator, strict=True):
        np.testing.assert_array_equal(ours, theirs.sources)
    assert any(
        numbers(batches[i]) != numbers(other[i]) for i in range(len(batches) // 2)
    )


def test_too_few_pairs_for_a_batch_are_refused():
    with pytest.raises(ValueError, match="small enough for 3 training pairs to fill"):
        training_batches(make_pairs(3), (Shape(8, 32),), epochs=1, seed=0)


def test_evaluation_has_all_in_batches_of_the_shapes():
    order = evaluation_order(PAIRS.lengths, SHAPES)
    rows = np.concatenate([rows for _, rows in order])
    assert sorted(rows) == list(range(200))
    for shape, own in order:
        assert 0 < len(own) <= shape.rows
        batch = PAIRS.batch(own, shape)
        assert batch.sources.shape == shape
        np.testing.assert_array_equal(numbers(batch)[: len(own)], own)
        assert not np.any(batch.sources[len(own) :])
    # What is too long for all shapes is cut off, but for its end.
    long = Sequences.of([np.arange(1, 9, dtype=np.int32), np.array([7], np.int32)])
    assert long.padded(np.array([0, 1]), 4).tolist() == [[1, 2, 3, 8], [7, 0, 0, 0]]
    assert long.padded(np.array([1, 0]), 8).tolist()[1] == list(range(1, 9))
    assert evaluation_order(long.lengths, (Shape(2, 4),))[0][1].tolist() == [0, 1]


def test_pairs_can_be_chosen():
    chosen = np.array([7, 3])
    pairs = PAIRS.take(chosen)
    np.testing.assert_array_equal(pairs.lengths, PAIRS.lengths[chosen])
    np.testing.assert_array_equal(
        pairs.targets.padded(np.arange(2), 30), PAIRS.targets.padded(chosen, 30)
    )
