"""The supervisor keeps the gang together: one failure ends every node, and all start again from the last checkpoint."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Literal, final

from farspan.launch.agent import Spec, headline
from farspan.launch.exit import Exit, NodeExit, worst
from farspan.launch.on_local import Node, NodeLost, Placement
from farspan.launch.pulse import last_beat, publish, read

State = Literal["running", "done", "failed", "preempted"]
_POLL = 0.2  # seconds between two looks at the nodes
_KILL = 15.0  # seconds the nodes get to report that they are empty
_STATES: Mapping[Exit, State] = {Exit.DONE: "done", Exit.PREEMPTED: "preempted"}
_HEARD = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to run and how patiently: `ranks` per node, `retries` restarts without progress, `grace` seconds to save."""

    command: tuple[str, ...]
    folder: Path
    ranks: int
    retries: int = 3
    threads: int | None = None
    timeout: float = 600.0
    grace: float = 120.0
    environment: Mapping[str, str] = field(default_factory=dict)
    directory: str | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of one attempt; `log` is the file, within logs/, that most likely shows the cause."""

    code: Exit
    reason: str
    step: int | None = None
    log: str | None = None


class _Killed(Exception):  # noqa: N818 - an event, and no fault of the program
    """The second Ctrl-C."""


@final
class Supervisor:
    """Runs `plan` on the nodes of `placement` until it is done, preempted, or not worth another attempt.

    `progress` returns the last durable step, None before the first; `say` hears events, one line each; `watch` is
    called at every poll. `run` belongs in the main thread: it listens to SIGINT, SIGTERM and SIGUSR1.
    """

    def __init__(
        self,
        plan: Plan,
        placement: Placement,
        *,
        say: Callable[[str], None],
        watch: Callable[[], None] | None = None,
        progress: Callable[[], int | None] | None = None,
    ) -> None:
        self._plan = plan
        self._nodes: list[Node] = list(placement.nodes)
        self._restore = placement.restore
        self._say = say
        self._watch = watch or (lambda: None)
        self._progress = progress or (lambda: None)
        before = read(plan.folder / "status.json").get("attempt")
        self._attempt = before if isinstance(before, int) else 0  # goes on counting when a run is resumed
        self._heard: list[signal.Signals] = []
        self._stopping: signal.Signals | None = None
        self._deadline = 0.0

    def run(self) -> int:
        """See the run through; returns its exit code, which status.json holds too. No rank is alive afterwards."""
        with self._listening():
            try:
                outcome = self._supervise()
            except BaseException as error:
                self._kill({})
                reason = f"the launcher failed: {type(error).__name__}: {error}"
                self._record("failed", Outcome(code=Exit.RETRY, reason=reason, step=self._step()))
                raise
            self._record(_STATES.get(outcome.code, "failed"), outcome)
        return int(outcome.code)

    def _supervise(self) -> Outcome:
        durable, restarts = self._durable(), 0
        while True:
            self._attempt += 1
            self._record("running")
            try:
                lost, outcome = self._run_once()
                if not outcome.code.retried or self._stopping:
                    return self._conclude(outcome)
                reached = self._durable()
                restarts = 0 if reached > durable else restarts
                durable = reached
                if restarts >= self._plan.retries:
                    return self._give_up(outcome, restarts, durable)
                restarts += 1
                self._say(f"{outcome.reason}; restarting from {_place(durable)} ({restarts} of {self._plan.retries})")
                self._record("running", outcome)
                if self._bring_back(lost):
                    return Outcome(code=Exit.PREEMPTED, reason="stopped while waiting for a node", step=self._step())
            except _Killed:
                self._kill({})
                return Outcome(code=Exit.RETRY, reason="killed by a second Ctrl-C", step=self._step())

    def _run_once(self) -> tuple[list[int], Outcome]:
        """One attempt, from the start of the agents to the end of the last; also says which nodes were lost."""
        ended: dict[int, NodeExit] = {}
        lost: dict[int, str] = {}
        try:
            self._start()
        except NodeLost as error:
            lost[0] = f"node 0 was lost: {error}"
        finished: float | None = None
        verdict, overstayed = Exit.DONE, ""
        while verdict.clean and not lost and len(ended) < len(self._nodes) and not overstayed:
            self._watch()
            self._heed()
            time.sleep(_POLL)
            self._poll(ended, lost)
            verdict = worst(told.code for told in ended.values())
            now = time.monotonic()
            finished = finished or (now if ended else None)
            if self._stopping and now > self._deadline:
                overstayed = f"not stopped {self._plan.grace:g} s after {self._stopping.name}: killed"
            elif finished and now > finished + self._plan.grace + 1:  # the agents hold their own ranks to the grace
                overstayed = f"a node still ran {self._plan.grace:g} s after another had ended"
        votes = dict(ended)
        self._kill(ended)
        return list(lost), self._judge(votes, "; ".join(lost.values()) or overstayed)

    def _start(self) -> None:
        plan, first = self._plan, self._nodes[0]
        spec = Spec(
            command=plan.command,
            folder=str(plan.folder),
            node=0,
            nodes=len(self._nodes),
            ranks=plan.ranks,
            address=first.address,
            port=first.free_port(),
            attempt=self._attempt,
            threads=plan.threads,
            environment=dict(plan.environment),
            directory=plan.directory,
            timeout=plan.timeout,
            grace=plan.grace,
        )
        for index, node in enumerate(self._nodes):
            node.start(replace(spec, node=index))

    def _poll(self, ended: dict[int, NodeExit], lost: dict[int, str]) -> None:
        for index, node in enumerate(self._nodes):
            if index in ended or index in lost:
                continue
            try:
                told = node.poll()
            except NodeLost as error:
                lost[index] = f"node {index} was lost: {error}"
            else:
                if told is not None:
                    ended[index] = told

    def _kill(self, ended: dict[int, NodeExit]) -> None:
        """Empty every node and wait until each says so, is lost, or the time is up."""
        left = dict(enumerate(self._nodes))
        for index in ended:
            del left[index]
        for node in left.values():
            node.kill()
        deadline = time.monotonic() + _KILL
        lost: dict[int, str] = {}
        while left and time.monotonic() < deadline:
            self._poll(ended, lost)
            left = {index: node for index, node in left.items() if index not in ended and index not in lost}
            time.sleep(_POLL / 4 if left else 0)

    def _judge(self, votes: dict[int, NodeExit], trouble: str) -> Outcome:
        code = worst([*(told.code for told in votes.values()), *([Exit.RETRY] if trouble else [])])
        told = next((told for told in votes.values() if told.code is code), None)
        if told is None:
            return Outcome(code=code, reason=trouble, step=self._step())
        index = next(index for index, other in votes.items() if other is told)
        log = f"agent-{index}.log" if told.culprit is None else f"rank-{told.culprit}.log"
        return Outcome(code=code, reason=told.reason, step=self._step(*votes.values()), log=log)

    def _conclude(self, outcome: Outcome) -> Outcome:
        if outcome.code.clean:
            return outcome
        return replace(outcome, reason=outcome.reason + self._tail(outcome.log))

    def _give_up(self, outcome: Outcome, restarts: int, durable: int) -> Outcome:
        tries = f"no progress beyond {_place(durable)} in {restarts + 1} attempts: " if restarts else ""
        return self._conclude(replace(outcome, reason=tries + outcome.reason))

    def _bring_back(self, lost: list[int]) -> bool:
        """Wait for the lost nodes; True when a stop was asked for meanwhile."""
        for index in lost:
            self._say(f"waiting for node {index} to come back")
            while (node := self._restore(index)) is None:
                self._watch()
                self._heed()
                if self._stopping:
                    return True
                time.sleep(_POLL)
            self._nodes[index] = node
        return False

    @contextmanager
    def _listening(self) -> Iterator[None]:
        def hear(number: int, frame: FrameType | None) -> None:
            self._heard.append(signal.Signals(number))

        before = {number: signal.signal(number, hear) for number in _HEARD}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _heed(self) -> None:
        """Pass the first signal on to every node; a Ctrl-C after it kills."""
        while self._heard:
            number = self._heard.pop(0)
            if self._stopping is None:
                self._stopping, self._deadline = number, time.monotonic() + self._plan.grace
                for node in self._nodes:
                    node.signal(number)
                self._say("stopping: saving a checkpoint; press Ctrl-C again to kill")
            elif number is signal.SIGINT:
                raise _Killed

    def _durable(self) -> int:
        step = self._progress()
        return -1 if step is None else step

    def _step(self, *told: NodeExit) -> int | None:
        """The furthest step that a rank of the last attempt or a checkpoint has reached."""
        beats = (last_beat(path) for path in (self._plan.folder / "agents").glob("rank-*.heartbeat"))
        steps = [beat.step for beat in beats if beat] + [end.step for end in told if end.step is not None]
        return max([*steps, self._durable()]) if steps else self._progress()

    def _record(self, state: State, outcome: Outcome | None = None) -> None:
        self._plan.folder.mkdir(parents=True, exist_ok=True)
        status = {
            "state": state,
            "exit_code": None if state == "running" or outcome is None else int(outcome.code),
            "step": outcome.step if outcome else self._progress(),
            "reason": outcome.reason if outcome else "",
            "attempt": self._attempt,
        }
        try:
            publish(self._plan.folder / "status.json", status)
        except OSError as error:  # a full disk: the exit code still tells
            self._say(f"cannot write {self._plan.folder / 'status.json'} ({error}): {status}")

    def _tail(self, log: str | None) -> str:
        lines = tail(self._plan.folder / "logs" / log, self._attempt) if log else []
        return f"\nlast lines of logs/{log}:\n" + "\n".join(f"  {line}" for line in lines) if lines else ""


def tail(log: Path, attempt: int, lines: int = 15) -> list[str]:
    """The last lines that `attempt` wrote to `log`; none when the file is not on this machine."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 16384))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return text.rpartition(headline(attempt) + "\n")[2].splitlines()[-lines:]


def _place(durable: int) -> str:
    return "the start" if durable < 0 else f"step {durable}"
