"""Seconds from the command to the first optimizer step, for each launcher, on a CPU; data already tokenized."""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from record import record

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
TARGETS = {"local": 6.0, "ray": 10.0, "torchrun": None}
LAUNCH = ["-m", "farspan.launch.cli"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=3)
    times = parser.parse_args().times
    first_step("local")  # fills the token cache, and the disk's
    rows = []
    for launcher, target in TARGETS.items():
        found = [first_step(launcher) for _ in range(times)]
        rows.append({"launcher": launcher, "seconds": median(found), "slowest": max(found), "target": target or "-"})
    record("startup", rows, ranks=2, config="quickstart.yaml, 1 step")


def first_step(launcher: str) -> float:
    """Seconds until the first line of metrics is on disk."""
    with tempfile.TemporaryDirectory() as folder:
        job = ["train", "--config", str(CONFIG), "--runs", folder, "train.steps=1", "schedule.warmup=0"]
        job += ["metrics.every=1", "train.evaluate=null", "train.sample=null"]
        if launcher == "torchrun":
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--no-python"]
            command += [sys.executable, *LAUNCH, *job, "launch.device=cpu"]
        else:
            command = [sys.executable, *LAUNCH, *job, f"launch.kind={launcher}"]
        metrics = Path(folder) / "quickstart" / "metrics.jsonl"
        begun = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None:
            time.sleep(0.01)
        seconds = time.perf_counter() - begun
        said, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"{launcher}: exit code {process.returncode}\n{said}")
        return seconds


if __name__ == "__main__":
    main()
