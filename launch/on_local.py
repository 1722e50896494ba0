"""The local launcher: this machine is the only node, and its agent is a child process."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, final

from farspan.launch.agent import HANG_UP, PASSED_ON, Spec, headline, sweep
from farspan.launch.exit import Exit, NodeExit
from farspan.launch.pulse import read

_LOOPBACK = "127.0.0.1"
_PATIENCE = 5.0  # seconds an agent gets to kill its ranks before it is killed itself


class NodeLost(Exception):  # noqa: N818 - an event, and no fault of the program
    """A node no longer answers; what ran on it is gone or will end by itself."""


class Node(Protocol):
    """A machine that can run an agent. No call blocks for long; after an agent's end `poll` keeps its answer."""

    @property
    def address(self) -> str: ...
    def free_port(self) -> int: ...
    def start(self, spec: Spec) -> None: ...
    def poll(self) -> NodeExit | None: ...  # raises NodeLost
    def signal(self, number: int) -> None: ...
    def kill(self) -> None: ...  # asks; poll tells when it is done


@dataclass(frozen=True)
class Placement:
    """The nodes of a run. `restore(index)` brings a lost node back: None until it is there, to be asked again."""

    nodes: Sequence[Node]
    restore: Callable[[int], Node | None]


@dataclass(frozen=True, kw_only=True)
class Local:
    """Run on this machine. `ranks`: processes, auto is one a GPU, else 1; `retries`: restarts without progress;
    `threads`: of a rank, auto shares the cores; `timeout`: age in seconds at which a heartbeat is too old;
    `grace`: seconds that ranks get to save when they are stopped."""

    ranks: int | Literal["auto"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the ranks compute; auto: on GPUs where this machine has them."""
    retries: int = 3
    threads: int | Literal["auto"] = "auto"
    timeout: float = 600
    grace: float = 120

    def __post_init__(self) -> None:
        check(ranks=self.ranks, retries=self.retries, threads=self.threads, timeout=self.timeout, grace=self.grace)


def check(
    *, ranks: int | Literal["auto"], retries: int, threads: int | Literal["auto"], timeout: float, grace: float
) -> None:
    """Raises ValueError for a launch setting that no machine can meet."""
    if ranks != "auto" and ranks < 1:
        raise ValueError(f"ranks={ranks}: a node needs at least one rank; give a number or auto")
    if retries < 0:
        raise ValueError(f"retries={retries}: give 0 to never restart, or a positive number")
    if threads != "auto" and threads < 1:
        raise ValueError(f"threads={threads}: a rank needs at least one thread; give a number or auto")
    if not grace > 0:
        raise ValueError(f"grace={grace}: give the seconds that ranks get to save when they are stopped")
    if not timeout > 0:
        raise ValueError(f"timeout={timeout}: give the seconds after which a silent rank counts as hung")


@contextmanager
def placed() -> Iterator[Placement]:
    """This machine as a placement; no agent is left when the context closes."""
    node = LocalNode()
    try:
        yield Placement([node], lambda index: node)
    finally:
        node.destroy()


@final
class LocalNode:
    """An agent as a child of this process. `start` belongs in a thread that outlives the agent: best the main one."""

    address = _LOOPBACK

    def __init__(self) -> None:
        self._spec: Spec | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._overdue: float | None = None
        self._told: NodeExit | None = None

    def free_port(self) -> int:
        return free_port()

    def start(self, spec: Spec) -> None:
        self._spec = spec = replace(spec, parent=os.getpid())
        self._told = self._overdue = None
        logs = Path(spec.folder, "logs")
        logs.mkdir(parents=True, exist_ok=True)
        spec.exit.unlink(missing_ok=True)
        # The agent inherits the blocked signals and unblocks them once its handlers stand: none can be lost, and the
        # terminal's Ctrl-C reaches only us, since the agent has its own session.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {*PASSED_ON, HANG_UP})
        try:
            with (logs / f"agent-{spec.node}.log").open("ab", buffering=0) as log:
                log.write(headline(spec.attempt).encode() + b"\n")
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "farspan.launch.agent"],
                    env={**os.environ, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"},
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as pipe:
            pipe.write(spec.to_json().encode())

    def poll(self) -> NodeExit | None:
        if self._process is None or self._spec is None:
            return NodeExit(code=Exit.RETRY, reason="its agent was never started")
        if self._told is None:
            if self._process.poll() is not None:
                self._told = self._account(self._process.returncode, self._spec)
            elif self._overdue is not None and time.monotonic() > self._overdue:
                self._process.kill()
        return self._told

    def signal(self, number: int) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """Tell the agent to kill its ranks; `poll` turns to force when it does not obey."""
        if self._process is not None and self._overdue is None:
            self._process.send_signal(HANG_UP)
            self._overdue = time.monotonic() + _PATIENCE

    def destroy(self) -> None:
        """Kill and wait; at most a few seconds, and no time at all when the agent has ended."""
        self.kill()
        while self._process is not None and self.poll() is None:
            time.sleep(0.02)

    def _account(self, status: int, spec: Spec) -> NodeExit:
        # The file decides, not the status: where a host ignores SIGCHLD every status reads 0.
        with contextlib.suppress(KeyError, TypeError, ValueError):
            return NodeExit.from_json(read(spec.exit))
        sweep(spec)
        how = f"signal {-status}" if status < 0 else f"exit code {status}"
        return NodeExit(code=Exit.RETRY, reason=f"the agent of node {spec.node} ended by {how} without a word")


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port
