"""Weights & Biases as a listener: it gets the lines of `metrics.jsonl` and is never asked for anything."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import final

import wandb

from farspan.platform.metrics import Line, Wandb


@final
class WandbSink:
    """A sink that writes below `folder`/wandb. The run is opened with the first line, in the thread that writes it.

    The id comes from the name of the run folder, so that restarts belong to one run. Only `config` and the metrics are
    handed over: command lines, environment, source code, console output and repository addresses may hold secrets.
    """

    def __init__(self, folder: Path, settings: Wandb, config: Mapping[str, object]) -> None:
        self._folder, self._settings, self._config = folder.resolve(), settings, dict(config)
        self._run: wandb.Run | None = None

    def write(self, line: Line) -> None:
        if self._run is None:
            self._run = self._open()
        self._run.log({key: value for key, value in line.items() if value is not None})

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            wandb.teardown()  # waits for its writer, a process that may lag behind `finish`

    def _open(self) -> "wandb.Run":
        self._folder.mkdir(parents=True, exist_ok=True)
        run = wandb.init(
            project=self._settings.project,
            name=self._folder.name,
            id=hashlib.sha256(self._folder.name.encode()).hexdigest()[:16],
            resume="allow",
            mode=self._settings.mode,
            dir=str(self._folder),
            config=self._config,
            settings=wandb.Settings(
                console="off", silent=True, disable_code=True, disable_git=True, save_code=False, x_disable_meta=True
            ),
        )
        run.define_metric("*", step_metric="step")  # our step may go back after a restart, wandb's own may not
        return run
