"""Ray only finds and holds the nodes: ranks restart in place under it, and none outlives it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from farspan.launch import on_ray
from farspan.launch.exit import Exit
from farspan.launch.on_local import free_port
from farspan.launch.on_ray import Ray, compare, source, versions
from farspan.launch.runner import run
from processes import alive, within

# The first attempt of rank 1 fails; the second is the first that says where it is and under whom it runs.
WORKER = """
import json, os, pathlib, signal, subprocess, sys, time
folder = pathlib.Path(os.environ["FARSPAN_EXIT"]).parents[1]
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", sys.argv[1]], start_new_session=True)
if os.environ["FARSPAN_ATTEMPT"] == "1" and os.environ["RANK"] == "1":
    sys.exit(9)
if os.environ["FARSPAN_ATTEMPT"] == "2":
    names = "WORLD_SIZE MASTER_ADDR OMP_NUM_THREADS CUDA_VISIBLE_DEVICES".split()
    told = {name: os.environ.get(name) for name in names}
    blocked = [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])]
    (folder / f"told-{os.environ['RANK']}").write_text(json.dumps({**told, "cwd": os.getcwd(), "blocked": blocked}))
    time.sleep(float(sys.argv[2]))
"""


@dataclass
class Bench:
    folder: Path
    marker: str
    heard: list[str] = field(default_factory=list)

    def command(self, seconds: float) -> list[str]:
        return ["python", "-c", WORKER, self.marker, str(seconds)]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path / "run", uuid.uuid4().hex)
    yield bench
    within(10.0, lambda: alive(bench.marker) == [])


def private_folders(driver: int) -> set[str]:
    """The folders that the driver's sweepers watch over."""
    commands = [
        (entry / "cmdline").read_bytes().split(b"\0")
        for entry in Path("/proc").glob("[0-9]*")
        if f" {driver} " in (entry / "stat").read_text().rpartition(")")[2][:16]
    ]
    return {command[-2].decode() for command in commands if b"farspan.launch.on_ray" in command}


def test_a_private_ray_runs_restarts_in_place_and_ends(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    before = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    launch = Ray(ranks=2, device="cpu", retries=1)
    code = run(launch, command=bench.command(0.0), folder=bench.folder, say=bench.heard.append)
    assert code == Exit.DONE
    status = json.loads((bench.folder / "status.json").read_text())
    assert (status["state"], status["attempt"]) == ("done", 2)
    assert len(bench.heard) == 1 and "rank 1 ended with exit code 9; restarting" in bench.heard[0]
    for rank in range(2):
        told = json.loads((bench.folder / f"told-{rank}").read_text())
        assert told == {
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "OMP_NUM_THREADS": "5",  # the driver's, not the one that Ray sets for an actor of one CPU
            "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "cwd": str(Path.cwd()),
            "blocked": [],  # Ray blocks SIGINT in all it starts
        }
    assert alive(bench.marker) == []
    assert {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"} == before
    assert not sys.modules["ray"].is_initialized()


DRIVER = """
import sys
from pathlib import Path
from farspan.launch.on_ray import Ray
from farspan.launch.runner import run
folder, *command = sys.argv[1:]
sys.exit(run(Ray(ranks=2, device="cpu"), command=command, folder=Path(folder), say=print))
"""


def test_kill_9_of_the_driver_leaves_no_rank(bench: Bench) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(bench.folder), *bench.command(60.0)], start_new_session=True
    )
    try:
        within(40.0, lambda: all((bench.folder / f"told-{rank}").exists() for rank in range(2)))
        assert len(alive(bench.marker)) == 5  # the driver, two ranks, a grandchild each in a session of its own
    finally:
        (folder,) = private_folders(driver.pid)
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    within(10.0, lambda: alive(bench.marker) == [])
    within(10.0, lambda: alive(folder) == [] and not Path(folder).exists())


def test_other_code_on_a_node_is_refused_by_name() -> None:
    here = versions()
    compare(here, dict(here), "10.0.0.2")
    with pytest.raises(ValueError, match=r"node 10\.0\.0\.2 .*torch is .* here and 1\.0 there"):
        compare(here, {**here, "torch": "1.0"}, "10.0.0.2")


def test_the_version_of_farspan_is_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = tmp_path / "launch"
    launch.mkdir()
    monkeypatch.setattr(on_ray, "__file__", str(launch / "on_ray.py"))
    (launch / "cli.py").write_text("x = 1")
    first = versions()["farspan"]
    (launch / "cli.py").write_text("x = 2")
    assert versions()["farspan"] != first


def test_what_is_shipped_holds_every_room() -> None:
    assert source().name == "farspan"
    for room in ("kernels", "parallel", "models", "platform", "launch", "configs"):
        assert (source() / room).is_dir()


def test_a_private_ray_cannot_have_two_nodes() -> None:
    with pytest.raises(ValueError, match=r"nodes=2: .*address"):
        Ray(nodes=2)


@pytest.mark.parametrize("address", ["ray://10.0.0.1:10001", "10.0.0.1"])
def test_an_address_that_is_no_cluster_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match=f"address={address}: .*host:port"):
        Ray(address=address)


def test_a_cluster_that_does_not_answer_is_reported_at_once(bench: Bench) -> None:
    launch = Ray(address=f"127.0.0.1:{free_port()}", device="cpu", ranks=1)
    assert run(launch, command=["python"], folder=bench.folder, say=bench.heard.append) == Exit.RETRY
    assert "no Ray cluster answers there" in json.loads((bench.folder / "status.json").read_text())["reason"]


def test_a_worker_that_knows_the_config_has_not_imported_ray() -> None:
    probe = "import sys, farspan.launch.runner; sys.exit('ray' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe]).returncode == 0
