"""One failure ends the gang; what can go on goes on from the last checkpoint, and what cannot says why."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from farspan.launch.agent import Spec
from farspan.launch.exit import Exit, NodeExit
from farspan.launch.on_local import Local, LocalNode, Node, NodeLost, Placement
from farspan.launch.on_ray import Ray
from farspan.launch.runner import device, handed_on, run, world
from farspan.launch.supervisor import Plan, Supervisor
from processes import alive, within

PREAMBLE = """
import os, pathlib, signal, subprocess, sys, time
from farspan.launch.pulse import beat, farewell
rank, attempt, marker = int(os.environ["RANK"]), int(os.environ["FARSPAN_ATTEMPT"]), sys.argv[1]
folder = pathlib.Path(os.environ["FARSPAN_EXIT"]).parents[1]
def durable(step): (folder / "durable").write_text(str(step))
def stop(number, frame):
    farewell(85, 12, "saved")
    sys.exit(85)
"""
# A worker that saves when told to stop, and tells the test when it can be told.
PATIENT = """
signal.signal(signal.SIGTERM, stop); signal.signal(signal.SIGUSR1, stop)
beat(11); (folder / f"ready-{rank}").touch(); time.sleep(60)
"""
STUBBORN = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
beat(11); (folder / f"ready-{rank}").touch(); time.sleep(60)
"""


@dataclass
class Bench:
    folder: Path
    marker: str
    heard: list[str] = field(default_factory=list)

    def command(self, program: str) -> list[str]:
        return ["python", "-c", PREAMBLE + program, self.marker]

    def run(self, program: str, *, ranks: int = 2, retries: int = 3, watch: Callable[[], None] | None = None) -> int:
        launch = Local(ranks=ranks, retries=retries, device="cpu")
        command = self.command(program)
        return run(
            launch, command=command, folder=self.folder, say=self.heard.append, watch=watch, progress=self.durable
        )

    def durable(self) -> int | None:
        path = self.folder / "durable"
        return int(path.read_text()) if path.exists() else None

    @property
    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads((self.folder / "status.json").read_text())
        return status


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    bench = Bench(tmp_path / "run", uuid.uuid4().hex)
    yield bench
    within(3.0, lambda: alive(bench.marker) == [])
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]


def send(bench: Bench, *numbers: signal.Signals, ranks: int = 2) -> Callable[[], None]:
    """A watch that sends this process one signal a poll, once every rank is ready."""
    left = list(numbers)

    def watch() -> None:
        if left and all((bench.folder / f"ready-{rank}").exists() for rank in range(ranks)):
            os.kill(os.getpid(), left.pop(0))

    return watch


def test_done(bench: Bench) -> None:
    assert bench.run("beat(20)") == Exit.DONE
    assert bench.status == {"state": "done", "exit_code": 0, "step": 20, "reason": "", "attempt": 1}
    assert bench.heard == []


def test_restart_in_place_then_success(bench: Bench) -> None:
    program = """
rank == 0 and sys.exit(0)
print(os.environ["MASTER_PORT"]); durable(attempt * 10); sys.exit(9 if attempt < 3 else 0)
"""
    assert bench.run(program, retries=1) == Exit.DONE  # every attempt made progress, so that one retry is enough
    assert (bench.status["state"], bench.status["attempt"], bench.status["step"]) == ("done", 3, 30)
    assert len(bench.heard) == 2
    assert "rank 1 ended with exit code 9; restarting from step 10" in bench.heard[0]
    log = (bench.folder / "logs" / "rank-1.log").read_text().split("---")
    assert len({part.strip() for part in log if part.strip().isdigit()}) == 3  # a new port for every attempt


def test_a_crash_loop_stops_with_its_reason_and_the_log(bench: Bench) -> None:
    program = "print('attempt', attempt, 'hit a wall', flush=True); sys.exit(9) if rank == 1 else time.sleep(60)"
    assert bench.run(program, retries=2) == Exit.RETRY
    status = bench.status
    assert (status["state"], status["exit_code"], status["attempt"]) == ("failed", 75, 3)
    assert "no progress beyond the start in 3 attempts: rank 1 ended with exit code 9" in status["reason"]
    assert "attempt 3 hit a wall" in status["reason"] and "attempt 2 hit a wall" not in status["reason"]


def test_no_retries_means_one_attempt_even_with_progress(bench: Bench) -> None:
    assert bench.run("rank and time.sleep(60); durable(5); sys.exit(1)", retries=0) == Exit.RETRY
    assert (bench.status["attempt"], bench.status["step"]) == (1, 5)


@pytest.mark.parametrize("code", [Exit.CONFIG, Exit.NOT_FINITE])
def test_what_would_only_happen_again_is_not_retried(bench: Bench, code: Exit) -> None:
    program = (
        f"farewell({int(code)}, 3, 'loss is nan at step 3') if rank == 0 else time.sleep(60); sys.exit({int(code)})"
    )
    assert bench.run(program) == code
    status = bench.status
    assert (status["state"], status["exit_code"], status["attempt"], status["step"]) == ("failed", code, 1, 3)
    assert status["reason"].startswith("loss is nan at step 3")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_the_driver_saves_and_ends_preempted(bench: Bench, number: signal.Signals) -> None:
    assert bench.run(PATIENT, watch=send(bench, number)) == Exit.PREEMPTED
    assert bench.status == {"state": "preempted", "exit_code": 85, "step": 12, "reason": "saved", "attempt": 1}
    assert bench.heard == ["stopping: saving a checkpoint; press Ctrl-C again to kill"]


def test_the_second_ctrl_c_kills(bench: Bench) -> None:
    assert bench.run(STUBBORN, watch=send(bench, signal.SIGINT, signal.SIGINT)) == Exit.RETRY
    assert (bench.status["state"], bench.status["reason"]) == ("failed", "killed by a second Ctrl-C")
    assert alive(bench.marker) == []


def test_a_rank_that_crashes_while_stopping_is_not_restarted(bench: Bench) -> None:
    program = PATIENT.replace(
        "signal.signal(signal.SIGTERM, stop)", "signal.signal(signal.SIGTERM, lambda *_: os._exit(3))"
    )
    assert bench.run(program, watch=send(bench, signal.SIGTERM)) == Exit.RETRY
    assert (bench.status["state"], bench.status["attempt"]) == ("failed", 1)


def test_an_error_in_the_driver_leaves_nothing(bench: Bench) -> None:
    def watch() -> None:
        if (bench.folder / "ready-0").exists():
            raise ZeroDivisionError("in the view")

    with pytest.raises(ZeroDivisionError):
        bench.run(PATIENT, watch=watch)
    assert alive(bench.marker) == []
    assert (bench.status["state"], bench.status["exit_code"]) == ("failed", 75)


def test_attempts_go_on_counting_when_a_run_is_resumed(bench: Bench) -> None:
    bench.run("")
    bench.run("")
    assert bench.status["attempt"] == 2


DRIVER = """
import sys
from pathlib import Path
from farspan.launch.on_local import Local
from farspan.launch.runner import run
folder, *command = sys.argv[1:]
sys.exit(run(Local(ranks=2, device="cpu"), command=command, folder=Path(folder), say=print))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_the_end_of_the_driver_leaves_nothing(bench: Bench, number: signal.Signals) -> None:
    program = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)', marker], start_new_session=True)"
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(bench.folder), *bench.command(program + PATIENT)], start_new_session=True
    )
    try:
        within(20.0, lambda: all((bench.folder / f"ready-{rank}").exists() for rank in range(2)))
        assert len(alive(bench.marker)) == 5  # the driver, two ranks, a grandchild each
        os.killpg(driver.pid, number)  # as a terminal does
        assert driver.wait(10) == (Exit.PREEMPTED if number is signal.SIGINT else -number)
        within(5.0, lambda: alive(bench.marker) == [])
    finally:
        driver.kill()


@dataclass
class Fake:
    """A node that ends as scripted: one NodeExit, None (runs until killed) or NodeLost for each attempt."""

    script: list[NodeExit | NodeLost | None]
    address: str = "10.0.0.1"
    specs: list[Spec] = field(default_factory=list)
    signals: list[int] = field(default_factory=list)
    killed: bool = False

    def free_port(self) -> int:
        return 4000 + len(self.specs)

    def start(self, spec: Spec) -> None:
        self.specs.append(spec)
        self.killed = False

    def poll(self) -> NodeExit | None:
        if self.killed:
            return NodeExit(code=Exit.RETRY, reason="killed")
        now = self.script[len(self.specs) - 1]
        if isinstance(now, NodeLost):
            raise now
        return now

    def signal(self, number: int) -> None:
        self.signals.append(number)

    def kill(self) -> None:
        self.killed = True


DONE = NodeExit(code=Exit.DONE)


def supervise(bench: Bench, nodes: list[Node], restore: Callable[[int], Node | None] = lambda index: None) -> int:
    plan = Plan(command=("x",), folder=bench.folder, ranks=8, retries=1, grace=0.5)
    return Supervisor(plan, Placement(nodes, restore), say=bench.heard.append).run()


def test_one_failed_node_takes_the_others_along_and_all_restart(bench: Bench) -> None:
    nodes = [Fake([None, DONE]), Fake([NodeExit(code=Exit.RETRY, reason="bang"), DONE], address="10.0.0.2")]
    assert supervise(bench, list(nodes)) == Exit.DONE
    assert [spec.node for node in nodes for spec in node.specs] == [0, 0, 1, 1]
    assert {(spec.address, spec.nodes) for node in nodes for spec in node.specs} == {("10.0.0.1", 2)}
    assert [spec.port for spec in nodes[1].specs] == [4000, 4001]
    assert bench.heard[0].startswith("bang; restarting")


def test_a_lost_node_is_awaited_and_replaced(bench: Bench) -> None:
    first, spare = Fake([None, DONE]), Fake([DONE])
    answers: list[Node | None] = [None, None, spare]
    asked: list[int] = []

    def restore(index: int) -> Node | None:
        asked.append(index)
        return answers.pop(0)

    assert supervise(bench, [first, Fake([NodeLost("no answer")])], restore) == Exit.DONE
    assert asked == [1, 1, 1]
    assert (len(first.specs), spare.specs[0].node, spare.specs[0].attempt) == (2, 1, 2)
    assert "node 1 was lost: no answer" in bench.heard[0]
    assert bench.heard[1] == "waiting for node 1 to come back"


def test_a_node_that_outstays_the_others_is_killed(bench: Bench) -> None:
    slow = Fake([None, None])
    assert supervise(bench, [Fake([DONE, DONE]), slow]) == Exit.RETRY
    assert slow.killed and "a node still ran 0.5 s after another had ended" in bench.status["reason"]


def test_a_verdict_on_purpose_outranks_a_crash_elsewhere(bench: Bench) -> None:
    nodes = [Fake([NodeExit(code=Exit.RETRY)]), Fake([NodeExit(code=Exit.NOT_FINITE, reason="nan")])]
    assert supervise(bench, list(nodes)) == Exit.NOT_FINITE
    assert bench.status["reason"] == "nan"


def test_the_world_and_what_it_is_told() -> None:
    assert world(Local(ranks=3)) == 3
    assert world(Ray(nodes=2, ranks=4, address="auto")) == 8
    assert world(Local(device="cpu")) == 1
    assert device(Local(device="cuda")) == "cuda"
    told = handed_on({"NCCL_DEBUG": "INFO", "WANDB_MODE": "offline", "WANDB_API_KEY": "secret", "HF_TOKEN": "secret"})
    assert told == {"NCCL_DEBUG": "INFO", "WANDB_MODE": "offline"}


def test_more_ranks_than_gpus_are_refused_before_anything_starts(bench: Bench) -> None:
    code = run(Local(ranks=4096, device="cuda"), command=["x"], folder=bench.folder, say=bench.heard.append)
    assert code == Exit.CONFIG
    assert "launch.ranks=4096" in bench.status["reason"] and bench.heard[0].startswith("cannot launch")


@pytest.mark.parametrize("wrong", [{"ranks": 0}, {"retries": -1}, {"threads": 0}, {"timeout": 0.0}])
def test_settings_that_cannot_work_are_refused(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name}="):
        Local(**wrong)
    with pytest.raises(ValueError, match=f"{name}="):
        Ray(**wrong)


def test_an_agent_that_does_not_obey_is_killed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farspan.launch.on_local._PATIENCE", 0.3)
    node = LocalNode()
    command = (sys.executable, *bench.command(PATIENT)[1:])
    node.start(Spec(command=command, folder=str(bench.folder), node=0, nodes=1, ranks=1, address="127.0.0.1", port=1))
    within(5.0, lambda: (bench.folder / "ready-0").exists())
    rank = alive(bench.marker)[0]
    agent = int(Path(f"/proc/{rank}/stat").read_text().rsplit(")", 1)[1].split()[1])
    os.kill(agent, signal.SIGSTOP)
    node.kill()
    within(3.0, lambda: node.poll() is not None)
