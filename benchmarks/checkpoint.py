"""How long a step is blocked by an asynchronous save, against a synchronous one of the same state."""

import argparse
import os
import socket
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from record import record
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from farspan.platform.checkpoint import FORMAT, Saver


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=14.8 if torch.cuda.is_available() else 1.0)
    parser.add_argument("--saves", type=int, default=4)
    parsed = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK="0", WORLD_SIZE="1")
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    state = tensors(parsed.gigabytes)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), state, parsed.saves)
    record("checkpoint", rows, gigabytes=parsed.gigabytes, target="asynchronous blocks at most 2 % of synchronous")
    dist.destroy_process_group()


def tensors(gigabytes: float) -> dict[str, DTensor]:
    """fp32 tensors of 64 MB, as a large model's layers have."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = DeviceMesh(device, [0])
    count = max(1, round(gigabytes * 1e9 / (1 << 26)))
    parts = (torch.randn(4096, 4096, device=device) for _ in range(count))
    return {f"model.{i}": DTensor.from_local(part, mesh, [Shard(0)]) for i, part in enumerate(parts)}


def measure(root: Path, state: dict[str, DTensor], saves: int) -> list[dict[str, float | str]]:
    control = dist.new_group(backend="gloo")
    saver = Saver(root, 1, control, lambda _: None)
    manifest = {"format": FORMAT}
    sync = median(_timed(lambda step=step: saver.save(step, state, manifest)) for step in (1, 2))
    prepared = _timed(lambda: saver.prepare(state))
    time.sleep(2)  # the first steps of a run compile and warm up: preparing is done beside them
    blocked, total = [], []
    for step in range(3, 3 + saves):
        begun = time.perf_counter()
        saver.start(step, state, manifest)
        saver.staged()
        blocked.append(time.perf_counter() - begun)
        saver.finish()
        total.append(time.perf_counter() - begun)
    assert saver.saved == 2 + saves, "the saves stand"
    saver.close()
    rows = [("synchronous", sync, sync), ("prepare", prepared, prepared), ("first asynchronous", blocked[0], total[0])]
    rows.append(("later asynchronous", median(blocked[1:]), median(total[1:])))
    return [
        {"save": name, "blocked s": block, "total s": whole, "% of synchronous": 100 * block / sync}
        for name, block, whole in rows
    ]


def _timed(action: object) -> float:
    begun = time.perf_counter()
    action()  # type: ignore[operator]
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
