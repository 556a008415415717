"""Checkpoints of a training, written and read by Orbax.

Each is a directory named by the steps done. Orbax writes it under another name and
renames it when it is whole, so that a killed run leaves whole checkpoints behind.
"""

import dataclasses
import gc
import logging
import sys
import textwrap
import time
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a checkpoint holds besides the state, as JSON.

    Attributes:
      steps: how many are done.
      settings: what the training depends on, by name.
      curves: figures of each epoch, lists by name.
      calls: means over the steps of each call, of the epoch that is not done.
      step_seconds: wall time of a step, in each call of the compiled function.
      data: where in the data the training is.
    """

    steps: int
    settings: dict[str, Any]
    curves: dict[str, list[float | None]]
    calls: list[list[float]]
    step_seconds: list[float]
    data: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run.

    Attributes:
      directory: where they are.
      keep: how many stay; older ones are deleted.
    """

    directory: Path
    keep: int

    def steps(self) -> list[int]:
        """The steps of the checkpoints, in order."""
        if not self.directory.exists():
            return []
        with _quietly(), self._manager(create=False) as manager:
            return sorted(manager.all_steps())

    def save(self, state: Any, progress: Progress) -> None:
        """Writes a checkpoint, and returns when it is whole."""
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            progress=ocp.args.JsonSave(dataclasses.asdict(progress)),
            checksum=ocp.args.JsonSave({"crc32": _checksum_of(state, progress)}),
        )
        with self._manager(cleanup_tmp_directories=True) as manager:
            manager.save(progress.steps, args=items, force=True)

    def latest(
        self, settings: Mapping[str, Any], may_grow: Collection[str] = ()
    ) -> Progress | None:
        """The progress of the latest checkpoint, None where there is none.

        Args:
          settings: what the training depends on, by name.
          may_grow: names of settings that may be more than those of the checkpoint.

        Raises:
          ValueError: if it cannot be read, or is of other settings.
        """
        steps = self.steps()
        if not steps:
            return None
        path = self._path(steps[-1])
        with self._refused_if_unreadable(steps[-1]):
            read = self._read(steps[-1], progress=ocp.args.JsonRestore())
            progress = Progress(**read["progress"])
            if progress.steps != steps[-1]:
                raise ValueError(f"it was written after step {progress.steps}")
        _check_settings(path, progress.settings, settings, may_grow)
        return progress

    def restore(self, progress: Progress, like: Any) -> Any:
        """Reads the state of a checkpoint.

        Args:
          progress: that of the checkpoint.
          like: a state of the same structure, placed as the one read is to be.

        Raises:
          ValueError: if it cannot be read, is of another structure or has changed.
        """
        target = jax.tree.map(ocp.tree.to_shape_dtype_struct, like)
        with self._refused_if_unreadable(progress.steps):
            read = self._read(
                progress.steps,
                state=ocp.args.StandardRestore(target),
                checksum=ocp.args.JsonRestore(),
            )
            if read["checksum"] != {"crc32": _checksum_of(read["state"], progress)}:
                raise ValueError("its checksum is not that of its contents")
        return read["state"]

    def _manager(self, **options: Any) -> ocp.CheckpointManager:
        # Writing in the background would leave the last checkpoint to the exit, and
        # cost memory for a copy.
        return ocp.CheckpointManager(
            self.directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(self.keep),
                enable_async_checkpointing=False,
                **options,
            ),
        )

    def _read(self, step: int, **items: Any) -> Any:
        with self._manager(create=False) as manager:
            return manager.restore(step, args=ocp.args.Composite(**items))

    def _path(self, step: int) -> Path:
        return self.directory / str(step)

    @contextmanager
    def _refused_if_unreadable(self, step: int) -> Iterator[None]:
        reason = ""
        with _quietly():
            try:
                yield
            # What Orbax and TensorStore raise depends on which part is damaged.
            except Exception as error:
                reason = _reason(error)
            if reason:
                # What `_quietly` tells of, ends now.
                time.sleep(0.5)
                gc.collect()
        if reason:
            earlier = [other for other in self.steps() if other < step]
            remedy = f"go on from step {earlier[-1]}" if earlier else "begin anew"
            raise ValueError(
                f"{self._path(step)} is damaged or no checkpoint of this training "
                f"({reason}); delete that directory to {remedy}."
            )


def checksum(tree: Any) -> int:
    """CRC-32 of the values, types, shapes and names of all leaves."""
    crc = 0
    for path, leaf in jax.tree.leaves_with_path(tree):
        array = np.asarray(leaf)
        name = f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}"
        crc = zlib.crc32(array.tobytes(), zlib.crc32(name.encode(), crc))
    return crc


def _checksum_of(state: Any, progress: Progress) -> int:
    return checksum((state, progress.curves, progress.calls, progress.step_seconds))


def _reason(error: BaseException) -> str:
    """What went wrong at first, in short."""
    while error.__cause__:
        error = error.__cause__
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300)


def _check_settings(
    path: Path,
    saved: Mapping[str, Any],
    given: Mapping[str, Any],
    may_grow: Collection[str],
) -> None:
    differences = [
        f"{name} is {saved.get(name, 'absent')} there and "
        f"{given.get(name, 'absent')} here"
        for name in {**saved, **given}
        if saved.get(name) != given.get(name)
        and not (name in may_grow and saved[name] < given[name])
    ]
    if differences:
        raise ValueError(
            f"--resume goes on with the settings of {path}, but "
            f"{'; '.join(differences)}; give those, or another --out."
        )


@contextmanager
def _quietly() -> Iterator[None]:
    """Keeps Orbax from printing what an exception says in one line.

    It logs what is missing. And when one array cannot be read, it closes the event loop
    in which others are still being read: TensorStore's threads miss the loop, the
    coroutines raise when they are thrown away, and each prints a traceback.
    """
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    disabled = [logger.disabled for logger in loggers]

    def drop(*_: Any) -> None:
        pass

    hooks = sys.excepthook, sys.unraisablehook
    for logger in loggers:
        logger.disabled = True
    sys.excepthook, sys.unraisablehook = drop, drop
    try:
        yield
    finally:
        sys.excepthook, sys.unraisablehook = hooks
        for logger, value in zip(loggers, disabled, strict=True):
            logger.disabled = value
