"""A trace holds the steps it names and no others, its account sums to all of the time, and it never ends a run."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from farspan.parallel.mesh import Mesh
from farspan.platform import config, metrics
from farspan.platform.job import Job
from farspan.platform.metrics import Trace
from farspan.platform.tracing import Tracer, summary
from farspan.platform.trainer import Surroundings, Trainer


def steps(folder: Path, config: Trace | None, *, first: int = 1, last: int = 6, rank: int = 0) -> list[str]:
    """Steps from `first` to `last` of a run in `folder`; what was said."""
    said: list[str] = []
    tracer = Tracer(config, folder, rank, torch.device("cpu"), said.append)
    x = torch.ones(8, 8, requires_grad=True)
    for step in range(first, last + 1):
        tracer.before(step)
        (x @ x).sum().backward()
        tracer.after(step)
    tracer.close()
    return said


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(("first", "last", "traced"), [(1, 6, (2, 3, 4)), (3, 6, (3, 4)), (1, 3, (2, 3)), (2, 2, (2,))])
def test_a_trace_holds_the_named_steps_that_were_made(tmp_path: Path, first: int, last: int, traced: Any) -> None:
    (said,) = steps(tmp_path, Trace(first=2, steps=3), first=first, last=last)
    stem = f"step-{traced[0]}-{traced[-1]}-rank-0"
    assert files(tmp_path) == [f"{stem}.json.gz", f"{stem}.txt"] and stem in said
    events = json.loads(gzip.decompress((tmp_path / "traces" / f"{stem}.json.gz").read_bytes()))["traceEvents"]
    names = [event["name"] for event in events if event.get("ph") == "X"]
    assert [name for name in names if name.startswith("step ")] == [f"step {step}" for step in traced]
    assert names.count("aten::mm") == 3 * len(traced)  # one forward, two backward
    told = (tmp_path / "traces" / f"{stem}.txt").read_text()
    assert f"steps {traced[0]} to {traced[-1]}, rank 0" in told and re.search(
        rf" {3 * len(traced)} +\S+  aten::mm", told
    )


@pytest.mark.parametrize(("config", "first"), [(None, 1), (Trace(first=2, ranks=(1, 3)), 1), (Trace(first=2), 5)])
def test_null_other_ranks_and_runs_resumed_beyond_trace_nothing(
    tmp_path: Path, config: Trace | None, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("farspan.platform.tracing.profile", None)  # nothing may even be prepared
    said = steps(tmp_path, config, first=first, last=9)
    assert files(tmp_path) == [] and not any("given up" in text for text in said)


@pytest.mark.parametrize("last", [1, 2])
def test_a_run_that_ends_before_its_trace_writes_nothing_and_leaves_the_profiler_free(
    tmp_path: Path, last: int
) -> None:
    assert steps(tmp_path / "a", Trace(first=3), last=last) == []
    assert len(steps(tmp_path / "b", Trace(first=1, steps=1))) == 1
    assert files(tmp_path) == ["step-1-1-rank-0.json.gz", "step-1-1-rank-0.txt"]


def test_what_goes_wrong_is_said_once_and_training_goes_on(tmp_path: Path) -> None:
    (tmp_path / "traces").write_text("in the way")
    (said,) = steps(tmp_path, Trace(first=2, steps=1))
    assert "metrics.trace: given up on rank 0 (FileExistsError" in said and "training goes on" in said
    with pytest.warns(UserWarning, match="given up on rank 1"):
        assert steps(tmp_path, Trace(first=2, steps=1, ranks=(1,)), rank=1) == []


def test_a_profiler_that_cannot_start_is_said_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing:
        def __init__(self, **_: object) -> None:
            raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES")

    monkeypatch.setattr("farspan.platform.tracing.profile", Refusing)
    (said,) = steps(tmp_path, Trace(first=2))
    assert "INSUFFICIENT_PRIVILEGES" in said and files(tmp_path) == []


def test_wishes_that_this_run_cannot_meet_are_said_at_its_start(tmp_path: Path) -> None:
    memory, missing = steps(tmp_path, Trace(first=90, memory=True, ranks=(0, 5)))
    assert "needs a GPU" in memory and "no rank 5 here; ranks are 0 to 0" in missing


def event(cat: str, name: str, begin: float, end: float, thread: int = 1) -> dict[str, object]:
    return {"ph": "X", "cat": cat, "name": name, "ts": begin, "dur": end - begin, "pid": 1, "tid": thread}


def account(told: str) -> dict[str, float]:
    """The account's milliseconds by name."""
    return {name.strip(): float(ms) for name, ms in re.findall(r"^  ([a-z ]+?) +([\d.]+) ms ", told, re.MULTILINE)}


def test_the_account_of_a_gpu_counts_every_moment_once_and_sums_to_all() -> None:
    told = summary(
        [
            event("user_annotation", "step 1", 0, 4000),
            event("user_annotation", "step 2", 4000, 6000),
            event("kernel", "gemm", 1000, 3000),
            event("kernel", "other", 2500, 3500, thread=2),
            event("kernel", "ncclDevKernel_AllGather", 2000, 5000, thread=3),
            event("gpu_memcpy", "Memcpy HtoD", 4500, 5500, thread=4),
            event("kernel", "gemm", 7000, 10_000),  # the device goes on after the host's last step
            event("cpu_op", "aten::mm", 100, 200),
        ],
        "x",
    )
    assert "x: 10.0 ms, 5.0 ms a step" in told
    assert account(told) == {"compute": 5.5, "communication": 1.5, "copies": 0.5, "idle": 2.5}
    assert "and 1.50 ms behind other work" in told and "and 0.50 ms behind other work" in told
    rows = [line.split() for line in told.splitlines() if line.endswith("  gemm")]
    assert rows == [["5.00", "50.0%", "2", "2,500.0", "gemm"]]


def test_an_operator_is_not_charged_with_what_it_calls() -> None:
    told = summary(
        [
            event("user_annotation", "step 1", 0, 10_000),
            event("cpu_op", "aten::linear", 1000, 5000),
            event("cpu_op", "aten::mm", 2000, 4000),
            event("cpu_op", "aten::empty", 2000, 2500),
            event("cpu_op", "aten::mm", 4500, 5000),
            event("cpu_op", "AddBackward0", 6000, 9000),
            event("user_annotation", "gloo:all_reduce", 4000, 8000, thread=7),
        ],
        "x",
    )
    assert account(told) == {"compute": 4.0, "communication": 3.0, "no operator": 3.0}
    own = {line.split()[-1]: line.split()[0] for line in told.splitlines() if "aten::" in line}
    assert own == {"aten::linear": "1.50", "aten::mm": "2.00", "aten::empty": "0.50"}


def test_a_trace_without_steps_says_so() -> None:
    assert summary([event("cpu_op", "aten::mm", 0, 1)], "x") == "x: the profiler recorded no step\n"


def trained(folder: str, corpus: str, observed: bool) -> dict[str, Any]:
    """A short run on this rank, with or without everything that looks at it."""
    block = {"mixer": {"kind": "softmax", "heads": 2}, "ffn": {"kind": "swiglu", "hidden": 24}}
    looks: dict[str, Any] = {"tensorboard": True, "trace": {"first": 3, "steps": 2, "ranks": [0, 1]}}
    tree: dict[str, Any] = {
        "name": "t",
        "model": {"kind": "decoder", "width": 16, "blocks": [block]},
        "data": {"kind": "text", "paths": [corpus], "sequence_length": 48, "cache": f"{corpus}/../cache"},
        "train": {"steps": 6, "batch": 4},
        "optim": {"kind": "adamw", "rate": 1e-2},
        "schedule": {"kind": "constant"},
        "metrics": {"every": 2, **(looks if observed else {})},
    }
    job = config.decode(config.Source(tree=tree, raw=tree), Job)
    said: list[str] = []
    around = Surroundings(
        folder=Path(folder), say=said.append, stopping=lambda: False, beat=lambda step: None, config={}
    )
    mesh = Mesh(job.parallel.sizes(dist.get_world_size()), torch.device("cpu"), dist.new_group(backend="gloo"))
    outcome = Trainer(job, mesh, around).run()
    return {"kind": outcome.kind, "said": said}


def both(folder: str, corpus: str) -> list[dict[str, Any]]:
    return [trained(f"{folder}/{observed}", corpus, observed) for observed in (False, True)]


def test_a_run_that_is_looked_at_is_the_same_run(ranks: Any, corpus: Path, tmp_path: Path) -> None:
    results = ranks(2, both, folder=str(tmp_path), corpus=str(corpus))
    assert [result["kind"] for rank in results for result in rank] == ["done"] * 4
    plain, observed = (
        [(line["step"], line["loss"], line["grad_norm"]) for line in metrics.read(tmp_path / name)]
        for name in ("False", "True")
    )
    assert plain == observed and len(plain) == 6
    assert not (tmp_path / "False" / "traces").exists() and not (tmp_path / "False" / "tensorboard").exists()
    assert files(tmp_path / "True" / "traces") == [
        f"step-3-4-rank-{rank}.{end}" for rank in (0, 1) for end in ("json.gz", "txt")
    ]
    assert len(list((tmp_path / "True" / "tensorboard").iterdir())) == 1
    told = account((tmp_path / "True" / "traces" / "step-3-4-rank-1.txt").read_text())
    assert told["compute"] > 0 and told["communication"] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_traced_with_its_memory(tmp_path: Path) -> None:
    said: list[str] = []
    tracer = Tracer(Trace(first=2, steps=2, memory=True), tmp_path, 0, torch.device("cuda", 0), said.append)
    x = torch.ones(2048, 2048, device="cuda")
    for step in range(1, 5):
        tracer.before(step)
        for _ in range(20):
            x = (x @ x) / 2048
        x.cpu()
        tracer.after(step)
    tracer.close()
    assert files(tmp_path) == [f"step-2-3-rank-0.{end}" for end in ("json.gz", "pickle", "txt")] and len(said) == 1
    told = (tmp_path / "traces" / "step-2-3-rank-0.txt").read_text()
    found = account(told)
    assert found["compute"] > 0 and found["copies"] > 0 and "Memcpy DtoH" in told and re.search(r" 40 .*gemm", told)
    total = float(re.findall(r": ([\d.,]+) ms,", told)[0].replace(",", ""))
    assert abs(sum(found.values()) - total) < 0.1
