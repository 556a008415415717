"""Batches that Grain's threads prepare while a step runs."""

import os

import grain

MAX_THREADS = 16


def prefetched(
    dataset: grain.MapDataset,
    *,
    steps_per_call: int = 1,
    num_threads: int | None = None,
    start: int = 0,
) -> grain.DatasetIterator:
    """Iterates over batches that Grain's threads prepare in the background.

    It holds `max(num_threads, steps_per_call)` batches that are ready or being made,
    besides those handed out. Its state, `get_state()`, is that of what was handed out,
    and JSON; `set_state` goes there. `close()` ends the threads, which else live as
    long as the iterator. An exception, Ctrl-C included, loses what was under way: make
    a new one, from the state after the last whole item.

    Args:
      dataset: the batches, from `training_batches` or `evaluation_batches`.
      steps_per_call: how many batches are stacked, `K`.
      num_threads: threads, each of which makes one batch at a time; by default one for
        each core, up to 16. With 0 batches are made as they are asked for.
      start: how many items to skip, without making them.

    Returns:
      An iterator whose items have leaves `[K, B, ...]`; the last item has fewer than
      `K` batches where `K` does not divide their number.

    Raises:
      ValueError: if an argument is out of range.
    """
    if num_threads is None:
        num_threads = min(os.cpu_count() or 1, MAX_THREADS)
    if steps_per_call < 1 or num_threads < 0:
        raise ValueError(
            "steps_per_call must be at least 1 and num_threads at least 0, got "
            f"{steps_per_call} and {num_threads}."
        )
    num_calls = -(-len(dataset) // steps_per_call)
    if not 0 <= start <= num_calls:
        raise ValueError(f"start must be from 0 to {num_calls}, got {start}.")
    buffer_size = max(num_threads, steps_per_call) if num_threads else 0
    options = grain.ReadOptions(num_threads, buffer_size)
    iterator = iter(dataset.to_iter_dataset(options).batch(steps_per_call))
    whole_calls = len(dataset) // steps_per_call
    grain.experimental.set_next_index(iterator, min(start, whole_calls))
    if start > whole_calls:
        next(iterator)  # Grain has no index for what comes after an incomplete item.
    return iterator
