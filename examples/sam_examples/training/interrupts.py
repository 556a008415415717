"""Lets a training end at a point of its own choosing when it is told to."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupt:
    """Whether a training was told to end.

    Attributes:
      signal: the number of the signal that said so, None without any.
    """

    signal: int | None = None

    def __bool__(self) -> bool:
        """Whether it was."""
        return self.signal is not None


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Notes Ctrl-C and SIGTERM, and leaves it to the block to end.

    Whoever gives such a signal again gets what it does by default.
    """
    interrupt = Interrupt()
    earlier: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in earlier.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        interrupt.signal = number
        restore()

    for number in (signal.SIGINT, signal.SIGTERM):
        earlier[number] = signal.signal(number, note)
    try:
        yield interrupt
    finally:
        restore()
