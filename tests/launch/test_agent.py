"""However a node's ranks end, the agent says why and leaves no process behind."""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from farspan.launch.agent import Spec
from farspan.launch.exit import Exit, NodeExit, worst
from farspan.launch.on_local import LocalNode, free_port
from farspan.launch.pulse import beat, farewell, last_beat, last_words
from processes import alive, within

PREAMBLE = """
import faulthandler, os, pathlib, signal, subprocess, sys, time
from farspan.launch.pulse import beat, farewell
rank, marker = int(os.environ["RANK"]), sys.argv[1]
def child(**how):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", marker], **how)
"""


@dataclass
class Bench:
    """One node in a fresh run folder; everything it starts carries `marker` on its command line."""

    folder: Path
    marker: str
    node: LocalNode

    def start(self, program: str, *, ranks: int = 2, **rest: float) -> None:
        command = (sys.executable, "-c", PREAMBLE + program, self.marker)
        spec = Spec(
            command=command,
            folder=str(self.folder),
            node=0,
            nodes=1,
            ranks=ranks,
            address="127.0.0.1",
            port=free_port(),
        )
        self.node.start(Spec(**{**vars(spec), **rest}))

    def finish(self, limit: float = 20.0) -> NodeExit:
        deadline = time.monotonic() + limit
        while (told := self.node.poll()) is None:
            assert time.monotonic() < deadline, "the agent did not end"
            time.sleep(0.02)
        return told

    def log(self, rank: int) -> str:
        return (self.folder / "logs" / f"rank-{rank}.log").read_text()

    def await_log(self, text: str, *ranks: int) -> None:
        within(10.0, lambda: all(text in self.log(rank) for rank in ranks))


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path, uuid.uuid4().hex, LocalNode())
    yield bench
    bench.node.destroy()
    assert alive(bench.marker) == []


def test_normal_end_reports_every_rank(bench: Bench) -> None:
    bench.start("beat(6); farewell(0, 7, 'finished'); print('hello from', rank)", ranks=3)
    told = bench.finish()
    assert (told.code, told.step, told.culprit) == (Exit.DONE, 7, None)
    assert list(told.ranks) == [0, 1, 2]
    assert all((end.code, end.signal, end.reason) == (0, None, "finished") for end in told.ranks.values())
    assert told.reason == "finished"
    assert "hello from 2" in bench.log(2)
    assert json.loads((bench.folder / "agents" / "node-0.exit.json").read_text())["code"] == 0


def test_ranks_find_the_contract_in_their_environment(bench: Bench) -> None:
    bench.start("import json; print(json.dumps(dict(os.environ)))", ranks=2, node=1, nodes=2, threads=3, attempt=5)
    assert bench.finish().code is Exit.DONE
    found = json.loads(bench.log(3).splitlines()[-1])
    expected = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "FARSPAN_NODE": "1"}
    expected |= {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "3", "FARSPAN_ATTEMPT": "5"}
    expected |= {"MASTER_ADDR": "127.0.0.1", "FARSPAN_EXIT": str(bench.folder / "agents" / "rank-3.exit.json")}
    assert {name: found[name] for name in expected} == expected
    assert found.get("CUDA_VISIBLE_DEVICES") == os.environ.get("CUDA_VISIBLE_DEVICES")


def test_a_crash_kills_the_others_and_all_grandchildren(bench: Bench) -> None:
    bench.start(
        """
child(); child(start_new_session=True)
def log(n): return pathlib.Path(os.environ["FARSPAN_EXIT"]).parents[1] / "logs" / f"rank-{n}.log"
print("ready")
if rank == 1:
    while not all(log(n).exists() and "ready" in log(n).read_text() for n in (0, 2)): time.sleep(0.02)
    sys.exit(17)
time.sleep(60)
""",
        ranks=3,
    )
    told = bench.finish()
    assert (told.code, told.culprit) == (Exit.RETRY, 1)
    assert "rank 1 ended with exit code 17" in told.reason
    assert (told.ranks[1].code, told.ranks[0].signal, told.ranks[2].signal) == (17, signal.SIGKILL, signal.SIGKILL)
    assert alive(bench.marker) == []


def test_kill_9_of_a_rank_is_a_crash(bench: Bench) -> None:
    bench.start("beat(4); print('pid', os.getpid()); time.sleep(60)")
    bench.await_log("pid", 0, 1)
    os.kill(int(bench.log(0).split()[-1]), signal.SIGKILL)
    told = bench.finish()
    assert (told.code, told.culprit, told.ranks[0].code, told.ranks[0].signal) == (Exit.RETRY, 0, None, signal.SIGKILL)
    assert told.step == 4
    assert alive(bench.marker) == []


@pytest.mark.parametrize(
    ("codes", "verdict"),
    [
        ((0, 85), Exit.PREEMPTED),
        ((0, 2), Exit.CONFIG),
        ((85, 76), Exit.NOT_FINITE),
        ((0, 1), Exit.RETRY),
        ((75, 75), Exit.RETRY),
    ],
)
def test_the_node_ends_with_the_worst_of_its_ranks(bench: Bench, codes: tuple[int, int], verdict: Exit) -> None:
    bench.start(f"sys.exit({codes}[rank])")
    told = bench.finish()
    assert told.code is verdict
    assert told.culprit is not None and told.ranks[told.culprit].verdict is verdict


def test_a_verdict_said_on_purpose_outranks_a_crash_in_any_order() -> None:
    order = [Exit.DONE, Exit.PREEMPTED, Exit.RETRY, Exit.NOT_FINITE, Exit.CONFIG]
    for many in itertools.product(order, repeat=3):
        assert worst(many) is max(many, key=order.index)
    assert worst([]) is Exit.DONE


def test_a_rank_that_outstays_the_grace_is_killed_and_named(bench: Bench) -> None:
    bench.start("rank == 1 and time.sleep(60)", grace=0.3)
    told = bench.finish()
    assert (told.code, told.culprit, told.ranks[0].code, told.ranks[1].signal) == (Exit.RETRY, 1, 0, signal.SIGKILL)
    assert "rank 1 still ran 0.3 s" in told.reason


@pytest.mark.parametrize(
    ("sent", "heard"),
    [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "SIGTERM"), (signal.SIGUSR1, "SIGUSR1")],
)
def test_a_stop_reaches_the_ranks_which_save(bench: Bench, sent: signal.Signals, heard: str) -> None:
    bench.start(
        """
def stop(number, frame):
    farewell(85, 12, signal.Signals(number).name)
    sys.exit(85)
signal.signal(signal.SIGTERM, stop); signal.signal(signal.SIGUSR1, stop)
beat(11); print("ready"); time.sleep(60)
"""
    )
    bench.await_log("ready", 0, 1)
    bench.node.signal(sent)
    told = bench.finish()
    assert (told.code, told.step) == (Exit.PREEMPTED, 12)
    assert [end.reason for end in told.ranks.values()] == [heard, heard]


@pytest.mark.parametrize(
    "program", ["time.sleep(60)", "rank and signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"]
)
def test_a_stop_before_the_first_step_is_never_lost_and_has_nothing_to_save(bench: Bench, program: str) -> None:
    bench.start(program)
    bench.node.signal(signal.SIGTERM)  # the agent's interpreter has hardly started
    told = bench.finish()
    assert told.code is Exit.PREEMPTED
    assert "nothing to save" in told.reason


def test_kill_9_of_the_agent_leaves_nothing(bench: Bench) -> None:
    bench.start("child(); child(start_new_session=True); print('agent', os.getppid()); time.sleep(60)")
    bench.await_log("agent", 0, 1)
    os.kill(int(bench.log(0).split()[-1]), signal.SIGKILL)
    within(2.0, lambda: alive(bench.marker) == [])  # before anyone asks: its launcher may be gone as well
    told = bench.finish()
    assert told.code is Exit.RETRY
    assert "the agent of node 0 ended by signal 9" in told.reason


def test_a_silent_rank_is_named_dumped_and_ended(bench: Bench) -> None:
    bench.start(
        """
faulthandler.register(signal.SIGUSR2)
beat(7)
def stuck_here(): time.sleep(60)
while rank == 0: beat(8); time.sleep(0.05)
stuck_here()
""",
        timeout=0.6,
    )
    told = bench.finish()
    assert (told.code, told.culprit, told.ranks[1].signal) == (Exit.RETRY, 1, signal.SIGABRT)
    assert "rank 1 gave no heartbeat" in told.reason and "last at step 7" in told.reason
    assert "stuck_here" in bench.log(1)


def test_a_rank_that_never_beat_is_not_called_silent(bench: Bench) -> None:
    bench.start("time.sleep(1.0)", timeout=0.1)
    assert bench.finish().code is Exit.DONE


def test_signs_of_an_earlier_attempt_are_forgotten(bench: Bench) -> None:
    bench.start("beat(3); farewell(0, 3, 'first')")
    assert bench.finish().step == 3
    bench.start("print('second')", attempt=2)
    told = bench.finish()
    assert (told.code, told.step) == (Exit.DONE, None)
    assert bench.log(0).splitlines() == ["--- attempt 1 ---", "--- attempt 2 ---", "second"]


def test_a_command_that_does_not_exist_is_reported(bench: Bench) -> None:
    bench.node.start(
        Spec(command=("/no/such/program",), folder=str(bench.folder), node=0, nodes=1, ranks=1, address="::1", port=1)
    )
    told = bench.finish()
    assert told.code is Exit.RETRY and "/no/such/program" in told.reason


def test_pulse_is_silent_without_an_agent_and_tolerates_garbage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FARSPAN_HEARTBEAT", raising=False)
    monkeypatch.delenv("FARSPAN_EXIT", raising=False)
    beat(1)
    farewell(0, 1)
    assert list(tmp_path.iterdir()) == []
    for garbage in ("", "[]", '{"step": "x", "time": 1}', '{"step": 1'):
        (tmp_path / "garbage").write_text(garbage)
        assert last_beat(tmp_path / "garbage") is None and last_words(tmp_path / "garbage") is None
    monkeypatch.setenv("FARSPAN_HEARTBEAT", str(tmp_path / "beat"))
    beat(41)
    told = last_beat(tmp_path / "beat")
    assert told is not None and told.step == 41 and abs(told.time - time.time()) < 5
