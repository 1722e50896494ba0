"""Weights & Biases gets one run a folder, nothing secret, and never a hold on the training process."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ATTEMPT = """
import math, sys
from pathlib import Path
from farspan.platform.metrics import Sinks, Wandb
from farspan.platform.wandb_sink import WandbSink
folder, first = Path(sys.argv[1]), int(sys.argv[2])
opening = lambda: WandbSink(folder, Wandb(), {"model": {"width": 4242}})
sinks = Sinks({"metrics.wandb": opening}, print)
for step in range(first, first + 3):
    sinks.write({"step": step, "loss": math.nan if step == 2 else 0.5, "mfu": None, "attempt": 0})
sinks.close()
"""

ONLINE = """
import socket, sys, threading, time
from pathlib import Path
from farspan.platform.metrics import Sinks, Wandb
from farspan.platform.wandb_sink import WandbSink
silent = socket.create_server(("127.0.0.1", 0))  # takes connections and never answers
import os
os.environ["WANDB_BASE_URL"] = f"http://127.0.0.1:{silent.getsockname()[1]}"
opening = lambda: WandbSink(Path(sys.argv[1]), Wandb(mode="online"), {})
sinks = Sinks({"metrics.wandb": opening}, print)
begun = time.monotonic()
for step in range(3):
    sinks.write({"step": step, "loss": 0.5, "attempt": 0})
print("trained", time.monotonic() - begun < 0.5)
time.sleep(float(sys.argv[2]))
sinks.close(timeout=1)
print("the end")
"""


def python(code: str, log: Path, *arguments: str, **environment: str) -> str:
    """What a process prints that must end well; it asks nothing and knows no login of this machine.

    It prints into a file: wandb's own process may outlive it, and would hold a pipe open.
    """
    place = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    with log.open("w") as out:
        subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env={**place, "NETRC": os.devnull, **environment},
            stdin=subprocess.DEVNULL,
            stdout=out,
            timeout=60,
            check=True,
        )
    return log.read_text()


def test_two_attempts_of_a_folder_are_one_run_offline(tmp_path: Path) -> None:
    folder = tmp_path / "quick"
    assert python(ATTEMPT, tmp_path / "log", str(folder), "1", "--password=sesame") == ""
    known = (folder / "wandb_id").read_text()
    time.sleep(1)  # folders are named by the second
    assert python(ATTEMPT, tmp_path / "log", str(folder), "2", "--password=sesame") == ""
    first, second = sorted((folder / "wandb").glob("offline-run-*"))
    assert (folder / "wandb_id").read_text() == known and first.name[-16:] == second.name[-16:] == known
    for attempt in (first, second):
        content = (attempt / f"run-{known}.wandb").read_bytes()
        assert known.encode() in content and b"4242" in content and content.count(b"loss") >= 3
        assert b"sesame" not in content


def test_folders_of_one_name_are_different_runs(tmp_path: Path) -> None:
    from farspan.platform.wandb_sink import identity

    for inside in "ab":
        (tmp_path / inside / "same").mkdir(parents=True)
    first, second = (identity(tmp_path / inside / "same") for inside in "ab")
    assert first != second and first == identity(tmp_path / "a" / "same")


def test_online_without_a_key_is_said_with_the_way_out(tmp_path: Path) -> None:
    said = python(ONLINE, tmp_path / "log", str(tmp_path), "2", HOME=str(tmp_path))
    assert "trained True" in said and said.endswith("the end\n")
    assert "metrics.wandb gets no more lines (UsageError: No API key configured" in said and "wandb login" in said


@pytest.mark.laws
@pytest.mark.parametrize("seconds", [0, 4])
def test_online_with_a_server_that_never_answers_holds_nobody(tmp_path: Path, seconds: int) -> None:
    begun = time.monotonic()
    said = python(ONLINE, tmp_path / "log", str(tmp_path), str(seconds), WANDB_API_KEY="a" * 40)
    assert "trained True" in said and "it did not finish within 1 s" in said and said.endswith("the end\n")
    assert time.monotonic() - begun < seconds + 15
