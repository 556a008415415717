"""Batches prepared by Grain's threads: what they hold, and how they begin and end."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import grain
import numpy as np
import pytest
from sam_examples.data import Split, evaluation_batches, prefetched, training_batches

ROOT = Path(__file__).parents[2]
THREADS = "grain-prefetch"


def make_batches(steps=7, transform=None):
    images = np.arange(2 * steps, dtype=np.uint8).reshape(-1, 1, 1, 1)
    split = Split(images, np.arange(2 * steps, dtype=np.int32))
    return training_batches(split, batch_size=2, epochs=1, seed=0, transform=transform)


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def no_threads():
    return not any(t.name.startswith(THREADS) for t in threading.enumerate())


def assert_trees_equal(batch, expected):
    for x, y in zip(batch, expected, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("num_threads", [None, 0, 1, 3])
def test_steps_of_a_call_are_stacked_in_order(num_threads):
    dataset = make_batches()
    assert isinstance(dataset, grain.MapDataset)
    calls = list(prefetched(dataset, steps_per_call=3, num_threads=num_threads))
    assert [call.labels.shape for call in calls] == [(3, 2), (3, 2), (1, 2)]
    assert calls[0].images.shape == (3, 2, 1, 1, 1)
    for field in Split._fields:
        stacked = np.concatenate([getattr(call, field) for call in calls])
        steps = [getattr(dataset[i], field) for i in range(7)]
        np.testing.assert_array_equal(stacked, np.stack(steps))
    assert wait_until(no_threads)


def test_evaluation_batches_are_stacked_with_their_weights():
    split = Split(np.ones((5, 1, 1, 1), np.uint8), np.arange(5, dtype=np.int32))
    calls = list(prefetched(evaluation_batches(split, batch_size=3)))
    assert [weights.tolist() for _, weights in calls] == [[[1, 1, 1]], [[1, 1, 0]]]
    assert calls[1][0].labels.tolist() == [[3, 4, 0]]


@pytest.mark.parametrize("steps", [6, 7])
def test_it_begins_at_any_call(steps):
    dataset = make_batches(steps)
    calls = list(prefetched(dataset, steps_per_call=2))
    for start in range(len(calls) + 1):
        rest = list(prefetched(dataset, steps_per_call=2, start=start))
        assert len(rest) == len(calls) - start
        for call, expected in zip(rest, calls[start:], strict=True):
            assert_trees_equal(call, expected)
    for start in (-1, len(calls) + 1):
        with pytest.raises(ValueError, match=f"start must be from 0 to .*got {start}"):
            prefetched(dataset, steps_per_call=2, start=start)


@pytest.mark.full
@pytest.mark.parametrize("done", [0, 1, 3])
def test_it_goes_on_from_a_state_in_json(done):
    calls = list(prefetched(make_batches(), steps_per_call=2))
    first = prefetched(make_batches(), steps_per_call=2)
    for _ in range(done):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    first.close()
    second = prefetched(make_batches(), steps_per_call=2)
    next(second)  # What was under way is forgotten.
    second.set_state(state)
    rest = list(second)
    assert len(rest) == len(calls) - done
    for call, expected in zip(rest, calls[done:], strict=True):
        assert_trees_equal(call, expected)
    # A start is no other state than that of as many items handed out.
    assert prefetched(make_batches(), steps_per_call=2, start=done).get_state() == state


@pytest.mark.full
@pytest.mark.parametrize(
    ("num_threads", "steps_per_call"), [(0, 2), (1, 1), (3, 1), (2, 4)]
)
def test_it_holds_no_more_than_it_says(num_threads, steps_per_call):
    lock, images = threading.Lock(), []

    def count(image, rng):
        with lock:
            images.append(image)
        return image

    dataset = make_batches(20, transform=count)
    iterator = prefetched(
        dataset, steps_per_call=steps_per_call, num_threads=num_threads
    )
    assert images == []
    next(iterator)
    held = max(num_threads, steps_per_call) if num_threads else 0
    most = 2 * (steps_per_call + held)
    wait_until(lambda: len(images) >= most)
    time.sleep(0.1)  # For those that are too many.
    assert len(images) == most
    iterator.close()
    assert wait_until(no_threads)


def test_closing_ends_the_threads_and_the_iterator():
    iterator = prefetched(make_batches(), num_threads=2)
    next(iterator)
    assert not no_threads()
    iterator.close()
    iterator.close()
    with pytest.raises(ValueError, match="closed"):
        next(iterator)
    assert wait_until(no_threads)


def test_an_iterator_that_is_dropped_ends_its_threads():
    iterator = prefetched(make_batches(), num_threads=2)
    next(iterator)
    del iterator
    assert wait_until(no_threads)


def test_an_error_in_a_thread_is_raised_here():
    def fail(image, rng):
        raise ValueError("no such image")

    iterator = prefetched(make_batches(transform=fail), num_threads=2)
    with pytest.raises(ValueError, match="no such image"):
        next(iterator)
    iterator.close()
    assert wait_until(no_threads)


@pytest.mark.parametrize(
    "given", [{"steps_per_call": 0}, {"num_threads": -1}, {"steps_per_call": -2}]
)
def test_arguments_out_of_range_are_refused(given):
    with pytest.raises(ValueError, match="steps_per_call must be at least 1 and"):
        prefetched(make_batches(), **given)


WAITING = """
import sys, time
import numpy as np
from sam_examples.data import Split, prefetched, training_batches

def slow(image, rng):
    time.sleep({seconds})
    return image

split = Split(np.zeros((64, 1, 1, 1), np.uint8), np.zeros(64, np.int32))
batches = training_batches(split, batch_size=2, epochs=1, seed=0, transform=slow)
iterator = prefetched(batches, num_threads=2)
try:
    print("waiting", flush=True)
    for item in iterator:
        pass
except KeyboardInterrupt:
    print("interrupted", flush=True)
finally:
    iterator.close()
"""


@pytest.mark.full
def test_an_interrupt_ends_the_program_while_it_waits_for_a_batch():
    """An item takes a second; all of them would take half a minute."""
    child = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", WAITING.format(seconds=0.5)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "examples")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with child:
        assert child.stdout.readline() == "waiting\n"
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    assert (child.returncode, out, err) == (0, "interrupted\n", "")
