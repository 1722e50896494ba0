"""Runs a function of a test file as several ranks, each in its own process, joined by gloo."""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Ranks = Callable[..., list[Any]]


def pytest_configure() -> None:
    """Where every core has a test process of its own, more threads would only wait for each other."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        import torch

        torch.set_num_threads(1)


_CHILD = """
import importlib.util, json, os, sys
import torch, torch.distributed as dist
torch.set_num_threads(1)
file, name, arguments, out = sys.argv[1:]
spec = importlib.util.spec_from_file_location("ranks_under_test", file)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
here, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=here, world_size=world)
result = getattr(module, name)(**json.loads(arguments))
torch.save(result, f"{out}/{here}.pt")
dist.barrier()
dist.destroy_process_group()
"""


def _start(world: int, function: Callable[..., Any], arguments: str, out: Path) -> list[tuple[int, str]]:
    """(exit code, output) of each rank that failed."""
    command = [sys.executable, "-c", _CHILD, function.__code__.co_filename, function.__name__, arguments, str(out)]
    # They meet in a file: a port that is free when it is asked for may be another test's when it is used.
    place = {"WORLD_SIZE": str(world), "PYTHONSAFEPATH": "1"}
    place |= {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}  # who dies in native code says where
    started = [
        subprocess.Popen(
            command,
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, text) for process, text in zip(started, said, strict=True) if process.returncode]


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """`ranks(world, function, **arguments)`: what the function returned on each rank; arguments travel as JSON."""

    def run(world: int, function: Callable[..., Any], **arguments: Any) -> list[Any]:
        import torch

        for again in (True, False):
            out = tmp_path_factory.mktemp("ranks")
            failed = _start(world, function, json.dumps(arguments), out)
            if again and any(code < 0 for code, _ in failed):  # torch's own threads crash once in hundreds of runs
                warnings.warn(f"a rank of {function.__name__} was killed; once more: {failed}", stacklevel=2)
                continue
            assert not failed, "\n".join(f"exit {code}: {text}" for code, text in failed)
            break
        return [torch.load(out / f"{rank}.pt", weights_only=True) for rank in range(world)]

    return run


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
