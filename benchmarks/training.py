"""A few steps of the 1B configuration through `launch train`, cut off before the run would end and save 15 GB."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parents[1] / "configs"


PLAIN = """
from farspan.kernels import adaln, linear_cross_entropy, norm, poly_norm, rope, swiglu
for module in (adaln, linear_cross_entropy, norm, poly_norm, rope, swiglu):
    module.triton_runs = lambda *_: False
"""
"""What makes a process use the kernels' twins in plain torch."""


def train(
    folder: Path,
    name: str,
    steps: int,
    overrides: list[str],
    config: str = "llama_1b",
    every: int = 3,
    plain: bool = False,
) -> list[dict[str, Any]]:
    """The metrics of the first `steps` steps, up to a multiple of `every`. RuntimeError: the run ended before that.

    plain: without farspan's kernels, in one process that is its own only rank.
    """
    steps += -steps % every
    run = "".join(c if c.isalnum() else "-" for c in name)
    command = [
        sys.executable,
        "-c",
        f"{PLAIN if plain else ''}from farspan.launch.cli import main; main()",
        "train",
        "--config",
        str(CONFIGS / f"{config}.yaml"),
        "--runs",
        str(folder),
    ]
    command += [f"name={run}", f"train.steps={steps + 1000}", "schedule.warmup=4", "train.evaluate=null"]
    command += ["checkpoint.every=null", f"metrics.every={every}", *overrides]
    metrics, said = folder / run / "metrics.jsonl", folder / f"{run}.log"
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    environment = {**os.environ, **alone} if plain else None
    with said.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            while not (metrics.exists() and metrics.read_text().count("\n") >= steps):
                if process.poll() is not None:
                    raise RuntimeError(f"{name}: exit code {process.returncode}: {said.read_text()[-2000:]}")
                time.sleep(0.1)
        finally:
            process.kill()  # its ranks end with it
            process.wait()
    time.sleep(3)  # until their memory is free again
    return [json.loads(line) for line in metrics.read_text().splitlines()[:steps]]


def one_document(folder: Path) -> str:
    """An override that reads a single long document, so that every row is a part of it and packs nothing."""
    long = folder / "long.txt"
    if not long.exists():
        sources = sorted(Path(json.__file__).parents[1].glob("*.py"))
        long.write_text("\n".join(path.read_text(errors="ignore") for path in sources))
    return f"data.paths=[{long}]"
