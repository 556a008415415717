"""The metrics of a run, as CSV and for TensorBoard."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import tensorboardX


class MetricsWriter:
    """Writes the metrics of a run into its directory, in files that grow as it goes.

    metrics.csv has a line for each epoch; where one was not measured, its field is
    empty. The files of TensorBoard have the same, and means over every few steps.
    """

    def __init__(
        self, directory: Path, settings: Mapping[str, Any], first_step: int
    ) -> None:
        """Opens the files.

        Args:
          directory: where they go.
          settings: those of the run, for TensorBoard's text page.
          first_step: how many steps are done; what an earlier run wrote of later
            ones is void.
        """
        self._csv = directory / "metrics.csv"
        self._board = tensorboardX.SummaryWriter(
            str(directory / "tensorboard"), purge_step=first_step + 1, flush_secs=10
        )
        text = json.dumps(settings, indent=1, default=str)
        self._board.add_text("settings", f"```\n{text}\n```", first_step)

    def __enter__(self) -> "MetricsWriter":
        """Enters a block, whose end closes the files."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes the files."""
        self._board.close()

    def write_steps(self, step: int, means: Mapping[str, float]) -> None:
        """Writes means over some steps, by name, of which `step` is the last."""
        for name, mean in means.items():
            self._board.add_scalar(f"steps/train_{name}", mean, step)

    def write_epoch(self, curves: Mapping[str, Sequence[float | None]]) -> None:
        """Writes the last epoch of some curves, by name, of which one is `step`."""
        step = int(curves["step"][-1] or 0)
        for name, curve in curves.items():
            if name != "step" and curve[-1] is not None:
                self._board.add_scalar(f"epochs/{name}", curve[-1], step)
        # Anew: it is short, and an earlier run may have written epochs that are void.
        with self._csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["epoch", *curves])
            for epoch, row in enumerate(zip(*curves.values(), strict=True), start=1):
                writer.writerow([epoch, *row])
