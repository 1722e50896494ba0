"""A few steps of the 1B configuration through `launch train`, cut off before the run would end and save 15 GB."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parents[1] / "configs"


def train(
    folder: Path, name: str, steps: int, overrides: list[str], config: str = "llama_1b", every: int = 3
) -> list[dict[str, Any]]:
    """The metrics of the first `steps` steps, up to a multiple of `every`. RuntimeError: the run ended before that."""
    steps += -steps % every
    run = "".join(c if c.isalnum() else "-" for c in name)
    command = [
        sys.executable,
        "-m",
        "farspan.launch.cli",
        "train",
        "--config",
        str(CONFIGS / f"{config}.yaml"),
        "--runs",
        str(folder),
    ]
    command += [f"name={run}", f"train.steps={steps + 1000}", "schedule.warmup=4", "train.evaluate=null"]
    command += ["checkpoint.every=null", f"metrics.every={every}", *overrides]
    metrics, said = folder / run / "metrics.jsonl", folder / f"{run}.log"
    with said.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
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
