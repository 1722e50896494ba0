"""Runs a function of a test file as several ranks, each in its own process, joined by gloo."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from select import select
from typing import Any

import pytest

Ranks = Callable[..., list[Any]]


def pytest_configure() -> None:
    """Where every core has a test process of its own, more threads would only wait for each other."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        torch.set_num_threads(1)


_RANK = """
import importlib.util, json, os, sys
import torch, torch.distributed as dist
import farspan.platform.trainer
torch.set_num_threads(1)
while line := sys.stdin.readline():
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    task = json.loads(line)
    os.dup2(os.open(task["said"], os.O_WRONLY | os.O_CREAT), 1)
    os.dup2(1, 2)
    os.environ.clear()  # of what another test had set when this process began
    os.environ.update(task["environment"])
    os.chdir(task["folder"])
    spec = importlib.util.spec_from_file_location("ranks_under_test", task["file"])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    here, world, out = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), task["out"]
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=here, world_size=world)
    result = getattr(module, task["name"])(**task["arguments"])
    torch.save(result, f"{out}/{here}.pt")
    dist.barrier()
    dist.destroy_process_group()
    break
"""
_LIMIT = 240
"""Seconds."""
_PLACE = {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
_PLACE |= {"PYTHONFAULTHANDLER": "1"}  # who dies in native code says where


class _Rank:
    """A process that has imported what ranks do, which takes as long as most tests: for each of them it forks.

    One for each rank, so that they differ in what differs from process to process, such as the order of sets.
    """

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _RANK],
            env={**os.environ, **_PLACE},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # it ends with all that it forked
        )

    def start(self, task: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        print(json.dumps(task), file=self.process.stdin, flush=True)

    def ended(self, deadline: float) -> int:
        """The exit code."""
        assert self.process.stdout is not None
        ready, _, _ = select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
        answer = self.process.stdout.readline() if ready else ""
        if not answer:
            raise TimeoutError(f"a rank had not ended after {_LIMIT} s, or could not begin")
        return int(answer)

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


def _start(ranks: list[_Rank], world: int, task: dict[str, Any], out: Path) -> list[tuple[int, str]]:
    """(exit code, output) of each rank that failed."""
    ranks += [_Rank() for _ in range(len(ranks), world)]
    said = [out / f"{rank}.txt" for rank in range(world)]
    deadline = time.monotonic() + _LIMIT
    try:
        for rank in range(world):
            place = {**_PLACE, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
            # They meet in a file: a port that is free when it is asked for may be another test's when it is used.
            ranks[rank].start(
                {**task, "environment": {**os.environ, **place}, "said": str(said[rank]), "out": str(out)}
            )
        codes = [ranks[rank].ended(deadline) for rank in range(world)]
    except BaseException as error:
        while ranks:
            ranks.pop().end()
        for rank, text in enumerate(said):
            error.add_note(f"rank {rank}: {text.read_text()[-4000:] if text.exists() else 'nothing'}")
        raise
    return [(code, text.read_text()) for code, text in zip(codes, said, strict=True) if code]


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """`ranks(world, function, **arguments)`: what the function returned on each rank; arguments travel as JSON."""
    kept: list[_Rank] = []

    def run(world: int, function: Callable[..., Any], **arguments: Any) -> list[Any]:
        import torch

        task = {"file": function.__code__.co_filename, "name": function.__name__, "arguments": arguments}
        for again in (True, False):
            out = tmp_path_factory.mktemp("ranks")
            failed = _start(kept, world, {**task, "folder": str(Path.cwd())}, out)
            if again and any(code < 0 for code, _ in failed):  # torch's own threads crash once in hundreds of runs
                warnings.warn(f"a rank of {function.__name__} was killed; once more: {failed}", stacklevel=2)
                continue
            assert not failed, "\n".join(f"exit {code}: {text}" for code, text in failed)
            break
        return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(world)]

    yield run
    for rank in kept:
        rank.end()


@pytest.fixture(scope="session")
def write_corpus() -> Callable[[Path], Path]:
    """`write_corpus(folder)` makes folder/corpus: small documents that a byte model can learn from."""

    def write(inside: Path) -> Path:
        folder = inside / "corpus"
        folder.mkdir()
        for i in range(40):
            lines = [f"def f{i}_{j}(x):\n    return x + {i * j}\n" for j in range(1 + i % 7)]
            (folder / f"{i:02d}.py").write_text("".join(lines))
        return folder

    return write


@pytest.fixture
def corpus(tmp_path: Path, write_corpus: Callable[[Path], Path]) -> Path:
    return write_corpus(tmp_path)
