"""Compiles programs side by side, which is where a GPU's first minutes go."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def together(functions: Sequence[Callable[[], T]]) -> list[T]:
    """Calls all, one for every two cores at a time; the first one alone.

    XLA tries out several kernels for each matrix product and convolution, and keeps
    what it finds. After the first program most others have little left to try, and
    do not disturb each other's timings.
    """
    results = [function() for function in functions[:1]]
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        return results + list(pool.map(lambda function: function(), functions[1:]))
