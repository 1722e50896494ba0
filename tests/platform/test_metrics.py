"""Whole lines are never lost, a restart rewrites history only as far as it went back, and sinks never matter."""

import json
import math
import re
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from farspan.platform.metrics import (
    FILE,
    Journal,
    Line,
    Metrics,
    Sinks,
    Trace,
    latest,
    next_attempt,
    plain,
    read,
)


def journal(folder: Path, attempt: int, *lines: Line) -> None:
    writer = Journal(folder, attempt)
    for line in lines:
        writer.write(line)
    writer.sync()
    writer.close()


def train(step: int, loss: float = 1.0) -> Line:
    return {"step": step, "loss": loss}


def held_out(step: int, loss: float = 1.0) -> Line:
    return {"step": step, "eval_loss": loss}


@pytest.mark.parametrize("value", [0.1 + 0.2, 5e-324, 1.797e308, -0.0, math.inf, -math.inf, math.nan, None])
def test_a_value_comes_back_bit_for_bit(tmp_path: Path, value: float | None) -> None:
    journal(tmp_path, 3, {"step": 7, "loss": value, "mfu": None})
    (line,) = read(tmp_path)
    assert list(line) == ["step", "loss", "mfu", "attempt"]
    assert (line["step"], line["mfu"], line["attempt"]) == (7, None, 3)
    back = line["loss"]
    assert back is value if value is None else struct.pack("d", back) == struct.pack("d", value)


def test_every_line_is_strict_json(tmp_path: Path) -> None:
    journal(tmp_path, 0, train(1, math.nan), train(2, -math.inf))

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    found = [json.loads(row, parse_constant=refuse) for row in (tmp_path / FILE).read_text().splitlines()]
    assert [row["loss"] for row in found] == ["nan", "-inf"]


def test_a_line_is_readable_before_the_journal_is_closed(tmp_path: Path) -> None:
    writer = Journal(tmp_path / "new" / "run", 0)
    writer.write(train(1))
    assert read(tmp_path / "new" / "run") == [{"step": 1, "loss": 1.0, "attempt": 0}]
    assert writer.note is None
    writer.close()


def test_wherever_a_crash_tears_the_file_whole_lines_survive_and_writing_goes_on(tmp_path: Path) -> None:
    journal(tmp_path, 0, train(1), train(2, 2.5))
    content = (tmp_path / FILE).read_bytes()
    first = content.index(b"\n") + 1
    for cut in range(len(content) + 1):
        (tmp_path / FILE).write_bytes(content[:cut])
        survivors = (cut >= first - 1) + (cut >= len(content) - 1)  # the end of a line may be missing, nothing else
        assert len(read(tmp_path)) == survivors
        again = Journal(tmp_path, 1)
        assert (again.note is None) == (cut in (0, first, len(content)))
        again.write(train(9))
        again.close()
        assert [line["step"] for line in read(tmp_path)] == [*[1, 2][:survivors], 9]


def test_zeros_left_by_a_lost_machine_are_cut(tmp_path: Path) -> None:
    journal(tmp_path, 0, train(1))
    with (tmp_path / FILE).open("ab") as file:
        file.write(bytes(300))
    writer = Journal(tmp_path, 1)
    writer.close()
    assert writer.note is not None and "300 bytes" in writer.note and str(tmp_path / FILE) in writer.note
    assert len(read(tmp_path)) == 1


def test_a_damaged_line_amid_others_is_an_error_with_its_place(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b'{"step": 1, "attempt": 4}\n\xff\xfe\n{"step": 3, "attempt": 4}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: .*xff.*delete that line"):
        read(tmp_path)
    assert next_attempt(tmp_path) == 5  # a restart must not die of it


def test_three_attempts_make_one_history(tmp_path: Path) -> None:
    journal(tmp_path, 0, *(train(s, 0.0) for s in range(1, 11)), held_out(4, 0.0), held_out(8, 0.0))
    journal(tmp_path, 1, *(train(s, 1.0) for s in range(6, 10)), held_out(8, 1.0))  # resumed from step 5
    journal(tmp_path, 2, train(8, 2.0))  # resumed from step 7, and has not come to step 9 yet
    lines = latest(read(tmp_path))
    assert {line["step"]: line["loss"] for line in lines if "loss" in line} == {
        1: 0.0,
        2: 0.0,
        3: 0.0,
        4: 0.0,
        5: 0.0,
        6: 1.0,
        7: 1.0,
        8: 2.0,
    }
    assert [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line] == [(4, 0.0)]
    assert [line["step"] for line in lines] == sorted(int(line["step"] or 0) for line in lines)


def test_going_back_twice_drops_what_the_middle_attempt_did(tmp_path: Path) -> None:
    journal(tmp_path, 0, *(train(s) for s in range(1, 7)))
    journal(tmp_path, 1, *(train(s) for s in range(5, 9)))
    journal(tmp_path, 2, train(3))
    assert [(line["step"], line["attempt"]) for line in latest(read(tmp_path))] == [(1, 0), (2, 0), (3, 2)]


def test_an_evaluation_at_the_start_of_an_attempt_supersedes_no_training_of_its_step(tmp_path: Path) -> None:
    journal(tmp_path, 0, train(1), train(2), held_out(2, 9.0), train(3))
    journal(tmp_path, 1, held_out(2, 5.0))  # resumed from step 2, evaluates first
    assert latest(read(tmp_path)) == [
        {"step": 1, "loss": 1.0, "attempt": 0},
        {"step": 2, "loss": 1.0, "attempt": 0},
        {"step": 2, "eval_loss": 5.0, "attempt": 1},
    ]


def test_next_attempt_counts_from_the_file(tmp_path: Path) -> None:
    assert next_attempt(tmp_path) == 0
    journal(tmp_path, 0, train(1))
    assert next_attempt(tmp_path) == 1
    journal(tmp_path, 6, train(1))
    journal(tmp_path, 2, train(1))
    assert next_attempt(tmp_path) == 7


def test_plain_lines() -> None:
    assert (
        plain(
            {
                "step": 20,
                "loss": 3.21539,
                "grad_norm": 1.234,
                "rate": 2e-3,
                "tokens": 5,
                "tokens_per_second": 12345.4,
                "step_seconds": 0.5,
                "mfu": None,
                "memory_gb": 1.25,
            }
        )
        == "step     20  loss 3.2154  norm 1.23  rate 2.0e-03  12,345 tok/s  1.2 GB"
    )
    assert plain({"step": 20, "loss": math.nan, "mfu": 0.412}) == "step     20  loss nan  mfu 41.2%"
    assert plain(held_out(1200, 2.5)) == "step   1200  held-out loss 2.5000"


def test_metrics_refuse_what_makes_no_sense() -> None:
    assert Metrics(every=1).wandb is None and Trace(first=10, steps=3).last == 12
    with pytest.raises(ValueError, match="every=0"):
        Metrics(every=0)
    for wrong in ({"first": 0}, {"steps": 0}, {"ranks": ()}, {"ranks": (-1,)}, {"ranks": (1, 1)}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.*trace: null for none"):
            Trace(**wrong)


def test_tensorboard_that_is_not_installed_is_an_error_of_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not Metrics().tensorboard
    with pytest.raises(ValueError, match=r"tensorboard=true: .* pip install farspan\[report\]"):
        Metrics(tensorboard=True)


class Listener:
    def __init__(self, fails_at: int = -1) -> None:
        self.steps: list[object] = []
        self.closed = self.abandoned = False
        self._fails_at = fails_at

    def write(self, line: Line) -> None:
        self.steps.append(line["step"])
        if line["step"] == self._fails_at:
            raise RuntimeError("no network")

    def close(self) -> None:
        self.closed = True

    def abandon(self) -> None:
        self.abandoned = True


def test_a_failing_sink_is_reported_once_and_the_others_hear_everything() -> None:
    said: list[str] = []
    good, bad = Listener(), Listener(fails_at=2)
    sinks = Sinks({"bad": lambda: bad, "good": lambda: good}, said.append)
    for step in range(1, 100):
        sinks.write(train(step))
    sinks.close()
    assert good.steps == list(range(1, 100)) and good.closed and not good.abandoned
    assert bad.steps == [1, 2] and not bad.closed and bad.abandoned
    assert len(said) == 1 and "bad gets no more lines (RuntimeError: no network)" in said[0]


@pytest.mark.parametrize("error", [ImportError("libfoo.so"), SystemExit(3), KeyboardInterrupt()])
def test_a_sink_that_cannot_be_opened_is_said_whatever_it_raises(error: BaseException) -> None:
    def refuse() -> Listener:
        raise error

    said: list[str] = []
    sinks = Sinks({"metrics.wandb": refuse}, said.append)
    sinks.write(train(1))
    sinks.close()
    assert len(said) == 1 and f"metrics.wandb gets no more lines ({type(error).__name__}: {error}" in said[0]


class Stuck(Listener):
    """Hangs for ever in one method, as far as a test can tell."""

    def __init__(self, place: str, release: threading.Event) -> None:
        super().__init__()
        self._place, self._release = place, release
        self.pause("open")

    def pause(self, place: str) -> None:
        if place == self._place:
            self._release.wait(20)

    def write(self, line: Line) -> None:
        self.pause("write")
        super().write(line)

    def close(self) -> None:
        self.pause("close")
        super().close()

    def abandon(self) -> None:
        super().abandon()
        self.pause("write")  # whatever hung before may hang here too


@pytest.mark.parametrize("place", ["open", "write", "close"])
def test_a_sink_that_hangs_delays_nobody_and_its_lost_lines_are_counted(place: str) -> None:
    said: list[str] = []
    release = threading.Event()
    good = Listener()
    sinks = Sinks({"stuck": lambda: Stuck(place, release), "good": lambda: good}, said.append, depth=5)
    begun = time.monotonic()
    for step in range(50):
        sinks.write(train(step))
        while good.steps[-1:] != [step]:
            time.sleep(0.001)
    assert time.monotonic() - begun < 2
    sinks.close(timeout=0.2)
    assert time.monotonic() - begun < 5
    release.set()
    assert good.closed
    if place == "close":
        assert len(said) == 1 and "stuck gets no more lines (it did not finish within 0.2 s)" in said[0]
        return
    behind, ended = said  # the line in hand and five behind it, or five where nothing was ever taken
    assert re.search(r"stuck is 5 lines behind at step [56] and misses lines", behind)
    assert re.search(r"did not finish within 0.2 s; at least (49|50) lines did not reach it", ended)


def test_a_sink_that_was_slow_for_a_while_goes_on_and_says_what_it_missed() -> None:
    said: list[str] = []
    gate = threading.Event()
    slow = Listener()

    def opening() -> Listener:
        gate.wait(20)
        return slow

    sinks = Sinks({"slow": opening}, said.append, depth=3)
    for step in range(10):
        sinks.write(train(step))
    gate.set()
    while len(slow.steps) < 3:
        time.sleep(0.001)
    sinks.write(train(10))
    sinks.close()
    assert slow.steps == [0, 1, 2, 10] and slow.closed
    assert len(said) == 2 and "slow is 3 lines behind at step 3" in said[0] and "slow missed 7 lines" in said[1]


HANGS = """
import sys, threading, time
from farspan.platform.metrics import Sinks
class Stuck:
    def write(self, line): threading.Event().wait()
    def close(self): pass
    def abandon(self): threading.Event().wait()
sinks = Sinks({"stuck": Stuck}, print)
sinks.write({"step": 1})
sinks.close(timeout=0.1)
print("the end")
"""


def test_a_process_ends_though_a_sink_hangs_in_everything() -> None:
    said = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=20)
    assert said.returncode == 0 and "did not finish within 0.1 s" in said.stdout and "the end" in said.stdout
