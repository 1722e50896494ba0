"""One agent a node starts its ranks, passes signals on, and leaves no process behind, however it ends.

A rank dies with its agent (PR_SET_PDEATHSIG, which follows the thread that forked it: the agent has only one), and the
agent dies with whoever started it. It imports nothing heavy, so that a restart costs what the ranks cost.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import final

from farspan.launch.exit import Exit, NodeExit, RankExit, worst
from farspan.launch.pulse import FAREWELL, HEARTBEAT, last_beat, last_words, publish

ATTEMPT = "FARSPAN_ATTEMPT"
HANG_UP = signal.SIGHUP  # the launcher's order to kill every rank and end; the kernel sends it when the launcher dies
PASSED_ON = {signal.SIGTERM: signal.SIGTERM, signal.SIGUSR1: signal.SIGUSR1, signal.SIGINT: signal.SIGTERM}
_PR_SET_PDEATHSIG = 1
_PAUSE = 0.05  # seconds between two looks at the ranks
_DUMP = 2.0  # seconds a late rank gets to write its stacks
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What an agent is told: `ranks` processes of `command`, numbered from node * ranks in a world of nodes * ranks.

    `command[0] == "python"` stands for the node's own interpreter. `environment` goes to the ranks on top of what the
    agent inherits. `timeout` is the age (seconds) at which a heartbeat is too old; `grace` the time between the first
    rank's clean end and the last's. `parent` is the process that the agent must not outlive (None: no check).
    """

    command: tuple[str, ...]
    folder: str
    node: int
    nodes: int
    ranks: int
    address: str
    port: int
    attempt: int = 1
    threads: int | None = None
    environment: dict[str, str] = field(default_factory=dict)
    directory: str | None = None
    timeout: float = 600.0
    grace: float = 120.0
    parent: int | None = None

    @property
    def numbers(self) -> range:
        return range(self.node * self.ranks, (self.node + 1) * self.ranks)

    def heartbeat(self, rank: int) -> Path:
        return Path(self.folder, "agents", f"rank-{rank}.heartbeat")

    def farewell(self, rank: int) -> Path:
        return Path(self.folder, "agents", f"rank-{rank}.exit.json")

    def log(self, rank: int) -> Path:
        return Path(self.folder, "logs", f"rank-{rank}.log")

    @property
    def exit(self) -> Path:
        return Path(self.folder, "agents", f"node-{self.node}.exit.json")

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Spec:
        told = json.loads(text)
        return cls(**{**told, "command": tuple(told["command"])})


def die_with(parent: int | None, number: signal.Signals) -> None:
    """Have the kernel send `number` to this process when the parent thread ends; at once if it already has."""
    if _libc is not None and _libc.prctl(_PR_SET_PDEATHSIG, int(number)) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), number)


def sweep(spec: Spec) -> None:
    """Kill this attempt's ranks on this node and all that descends from them; their environment gives them away."""
    attempt = f"{ATTEMPT}={spec.attempt}".encode()
    marks = {f"{FAREWELL}={spec.farewell(rank)}".encode() for rank in spec.numbers}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            found = set((entry / "environ").read_bytes().split(b"\0"))
            if attempt in found and marks & found:
                os.kill(int(entry.name), signal.SIGKILL)


def outlived_by_sweep(spec: Spec) -> int:
    """Fork a process that does nothing but sweep once this one is gone; returns its number.

    Ranks die with a killed agent, but what they started in sessions of their own would not; and Ray kills the children
    of an actor that ends, the agent among them, before it could clean up.
    """
    held, end = os.pipe()
    sweeper = os.fork()
    if sweeper == 0:
        try:
            os.setsid()
            for number in (*PASSED_ON, HANG_UP):
                signal.signal(number, signal.SIG_IGN)
            os.close(end)
            os.read(held, 1)  # ends when no process holds the other end, which the agent alone does
            sweep(spec)
        finally:
            os._exit(0)
    os.close(held)
    return sweeper


@final
class Agent:
    """The ranks of one node from start to end. Make it in the main thread: it takes over the process's signals."""

    def __init__(self) -> None:
        self._asked: list[signal.Signals] = []
        self._passed: set[int] = set()
        self._hung_up = False
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._ended: dict[int, RankExit] = {}
        self._culprit: int | None = None
        self._since: float | None = None  # when the first rank ended cleanly
        self._listen()

    def run(self, spec: Spec) -> Exit:
        """Start the ranks, see them through, kill what is left, write node-K.exit.json."""
        die_with(spec.parent, HANG_UP)
        sweeper = outlived_by_sweep(spec)
        reason = f"the agent of node {spec.node} failed: see logs/agent-{spec.node}.log"
        try:
            self._start(spec)
            reason = self._attend(spec)
        except OSError as error:
            reason = f"node {spec.node} could not start its ranks: {error}"
        finally:
            told = self._close(spec, reason)
            os.kill(sweeper, signal.SIGKILL)
            os.waitpid(sweeper, 0)
        return told.code

    def _listen(self) -> None:
        # The launcher starts us with these signals blocked, so that none is lost before the handlers stand; Ray blocks
        # SIGINT in all it starts and may ignore SIGCHLD, without which no exit status could be read.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number in PASSED_ON:
            signal.signal(number, self._ask)
        signal.signal(HANG_UP, self._hang_up)
        signal.pthread_sigmask(signal.SIG_SETMASK, set())

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked.append(signal.Signals(number))

    def _hang_up(self, number: int, frame: FrameType | None) -> None:
        self._hung_up = True

    def _start(self, spec: Spec) -> None:
        Path(spec.folder, "agents").mkdir(parents=True, exist_ok=True)
        Path(spec.folder, "logs").mkdir(parents=True, exist_ok=True)
        spec.exit.unlink(missing_ok=True)
        for rank in spec.numbers:
            spec.heartbeat(rank).unlink(missing_ok=True)
            spec.farewell(rank).unlink(missing_ok=True)
        me = os.getpid()
        command = [sys.executable, *spec.command[1:]] if spec.command[0] == "python" else list(spec.command)
        directory = spec.directory if spec.directory and Path(spec.directory).is_dir() else None
        for rank in spec.numbers:
            with spec.log(rank).open("ab", buffering=0) as log:
                log.write(headline(spec.attempt).encode() + b"\n")
                self._running[rank] = subprocess.Popen(
                    command,
                    env=environment(spec, rank),
                    cwd=directory,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=lambda: die_with(me, signal.SIGKILL),
                )

    def _attend(self, spec: Spec) -> str:
        """Watch until no rank runs or one has failed; returns why the node fails, empty where its ranks' ends tell."""
        look = 0.0
        while self._running:
            if self._hung_up or (spec.parent is not None and os.getppid() != spec.parent):
                return f"node {spec.node} was told to kill its ranks"
            self._pass_on()
            self._collect(spec)
            if self._culprit is not None:
                return ""
            if self._since is not None and time.monotonic() - self._since > spec.grace:
                return self._overstay(spec)
            if time.monotonic() >= look:
                if late := self._late(spec):
                    return self._abort(late, spec)
                look = time.monotonic() + min(1.0, spec.timeout / 4)
            time.sleep(_PAUSE)
        return ""

    def _pass_on(self) -> None:
        while self._asked:
            number = PASSED_ON[self._asked.pop(0)]
            self._passed.add(number)
            for process in self._running.values():
                process.send_signal(number)  # the rank alone: what it started, it stops itself

    def _collect(self, spec: Spec) -> None:
        for rank, process in list(self._running.items()):
            if process.poll() is None:
                continue
            _kill_group(process.pid)
            del self._running[rank]
            told = self._ended[rank] = self._account(rank, process.returncode, spec)
            # A signal with a clean verdict is a stop before the first step: the others cannot save without it.
            cut_short = told.signal is not None
            if not told.verdict.clean or cut_short:
                self._culprit = rank if self._culprit is None else self._culprit
            elif self._since is None:
                self._since = time.monotonic()

    def _account(self, rank: int, status: int, spec: Spec) -> RankExit:
        words, beat = last_words(spec.farewell(rank)), last_beat(spec.heartbeat(rank))
        step = words.step if words and words.step is not None else beat.step if beat else None
        if status >= 0:
            plain = f"rank {rank} ended with exit code {status}" if status else ""
            return RankExit(code=status, step=step, reason=words.reason if words and words.reason else plain)
        if -status in self._passed and beat is None:
            reason = f"rank {rank} was stopped by {_name(-status)} before its first step: nothing to save"
            return RankExit(code=Exit.PREEMPTED, signal=-status, step=step, reason=reason)
        hint = " (out of memory?)" if -status == signal.SIGKILL else ""
        return RankExit(code=None, signal=-status, step=step, reason=f"rank {rank} was ended by {_name(-status)}{hint}")

    def _overstay(self, spec: Spec) -> str:
        first, *_ = left = sorted(self._running)
        reason = f"rank {first} still ran {spec.grace:g} s after another rank had ended"
        for rank in left:
            self._kill(rank, reason, spec)
        self._culprit = first
        return reason

    def _late(self, spec: Spec) -> list[int]:
        """Ranks whose last beat is too old, the one furthest behind first: the rest most likely wait for it."""
        beats = {rank: last_beat(spec.heartbeat(rank)) for rank in self._running}
        late = {rank: beat for rank, beat in beats.items() if beat and time.time() - beat.time > spec.timeout}
        return sorted(late, key=lambda rank: (late[rank].step, late[rank].time))

    def _abort(self, late: list[int], spec: Spec) -> str:
        """Ask the late ranks for their stacks, then end them."""
        beat = last_beat(spec.heartbeat(late[0]))
        age = time.time() - beat.time if beat else spec.timeout
        at = f" (last at step {beat.step})" if beat else ""
        others = f"; also late: {', '.join(map(str, late[1:]))}" if late[1:] else ""
        where = f"its stacks are in logs/rank-{late[0]}.log"
        reason = f"rank {late[0]} gave no heartbeat for {age:.0f} s{at}{others}; {where}"
        for number, wait in ((signal.SIGUSR2, _DUMP), (signal.SIGABRT, 1.0)):
            for rank in late:
                self._running[rank].send_signal(number)
            until = time.monotonic() + wait
            while time.monotonic() < until and any(self._running[rank].poll() is None for rank in late):
                time.sleep(_PAUSE)
        for rank in late:
            self._kill(rank, reason, spec)
        self._culprit = late[0]
        return reason

    def _kill(self, rank: int, reason: str, spec: Spec) -> None:
        process = self._running.pop(rank)
        _kill_group(process.pid)
        status = process.wait()
        told = self._account(rank, status, spec)
        self._ended[rank] = RankExit(code=None, signal=-status if status < 0 else None, step=told.step, reason=reason)

    def _close(self, spec: Spec, reason: str) -> NodeExit:
        """Kill what still runs, decide and say so: ranks that end here only share another's fate and have no vote."""
        votes = {rank: told.verdict for rank, told in self._ended.items()}
        code = worst([*votes.values(), *([Exit.RETRY] if reason else [])])
        for process in self._running.values():
            _kill_group(process.pid)
        for rank in list(self._running):
            self._kill(rank, "killed: it cannot go on without the others", spec)
        sweep(spec)
        speaker = self._culprit
        if not reason and (speaker is None or votes[speaker] is not code):
            speaker = next((rank for rank, vote in sorted(votes.items()) if vote is code), None)
        if not reason and speaker is not None:
            reason = self._ended[speaker].reason
        culprit = None if code is Exit.DONE else speaker
        told = NodeExit(code=code, ranks=dict(sorted(self._ended.items())), reason=reason, culprit=culprit)
        publish(spec.exit, told.to_json())
        return told


def environment(spec: Spec, rank: int) -> dict[str, str]:
    """What rank `rank` finds in its environment; CUDA_VISIBLE_DEVICES stays as it is, ranks pick by LOCAL_RANK."""
    local = rank - spec.node * spec.ranks
    threads = spec.threads or max(1, _cores() // spec.ranks)
    given = spec.environment if spec.threads is None else {}
    return {
        **os.environ,
        **spec.environment,
        "RANK": str(rank),
        "WORLD_SIZE": str(spec.nodes * spec.ranks),
        "LOCAL_RANK": str(local),
        "LOCAL_WORLD_SIZE": str(spec.ranks),
        "MASTER_ADDR": spec.address,
        "MASTER_PORT": str(spec.port),
        "FARSPAN_NODE": str(spec.node),
        ATTEMPT: str(spec.attempt),
        HEARTBEAT: str(spec.heartbeat(rank)),
        FAREWELL: str(spec.farewell(rank)),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": given.get("OMP_NUM_THREADS", str(threads)),
    }


def headline(attempt: int) -> str:
    """The line that parts one attempt from the next in a log."""
    return f"--- attempt {attempt} ---"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _kill_group(leader: int) -> None:
    # PermissionError: on some systems the answer for a group of which only a zombie is left.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def main() -> int:
    """`python -m farspan.launch.agent [SPEC.json]`: the spec comes from the file, else from standard input."""
    agent = Agent()
    text = Path(sys.argv[1]).read_text() if len(sys.argv) > 1 else sys.stdin.read()
    return agent.run(Spec.from_json(text))


if __name__ == "__main__":
    sys.exit(main())
