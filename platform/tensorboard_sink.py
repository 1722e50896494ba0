"""TensorBoard as a listener: event files that a restart continues where the run went back to."""

from pathlib import Path
from typing import final

from torch.utils.tensorboard import SummaryWriter

from farspan.platform.metrics import Line, is_evaluation, step_of

FOLDER = "tensorboard"


@final
class TensorboardSink:
    """A sink that writes a new event file in `folder`/tensorboard, opened with the first line.

    A scalar a key of the metrics. Each file tells TensorBoard to forget what earlier ones hold from its first step on:
    a run that went back to a checkpoint shows every step once.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / FOLDER
        self._writer: SummaryWriter | None = None

    def write(self, line: Line) -> None:
        step = step_of(line)
        if self._writer is None:
            again = step + is_evaluation(line)  # an evaluation first: the training line of its step still counts
            self._writer = SummaryWriter(str(self._folder), purge_step=again, flush_secs=10)
        for key, value in line.items():
            if key != "step" and value is not None:
                self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def abandon(self) -> None:
        """Nothing to do: its threads end with the process."""
