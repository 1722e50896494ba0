"""Weights & Biases as a listener: it gets the lines of `metrics.jsonl` and is never asked for anything."""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import final

import wandb

from farspan.platform.metrics import Line, Wandb

ID = "wandb_id"

PATIENCE = 60
"""Seconds that Weights & Biases may take to answer an online run at its start."""


@final
class WandbSink:
    """A sink that writes below `folder`/wandb. The run is opened with the first line, in the thread that writes it.

    All attempts of a run folder share the id in `folder`/wandb_id, and so are one run there. Only `config` and the
    metrics are handed over: command lines, environment, source code, console output and repository addresses may hold
    secrets.
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

    def abandon(self) -> None:
        wandb.teardown()  # takes back, before it waits, wandb's claim to wait at the end of the process

    def _open(self) -> "wandb.Run":
        # wandb's reports of its own errors are nobody's business here, and may wait for a server when the process ends.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self._folder.mkdir(parents=True, exist_ok=True)
        run = wandb.init(
            project=self._settings.project,
            name=self._folder.name,
            id=identity(self._folder),
            resume="allow",
            mode=self._settings.mode,
            dir=str(self._folder),
            config=self._config,
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_code=True,
                disable_git=True,
                save_code=False,
                x_disable_meta=True,
                init_timeout=PATIENCE,
                login_timeout=PATIENCE,
            ),
        )
        run.define_metric("*", step_metric="step")  # our step may go back after a restart, wandb's own may not
        return run


def identity(folder: Path) -> str:
    """The id of the run in `folder`: random at first, so that equal names never meet in one project, then kept."""
    path = folder / ID
    if not path.is_file():
        aside = folder / f".{ID}"
        aside.write_text(secrets.token_hex(8), encoding="utf-8")
        aside.replace(path)  # a crash in between leaves no empty id
    return path.read_text(encoding="utf-8").strip()
