"""Two GPUs against one on the 1B configuration: the same losses, and how much of twice the speed is left."""

import argparse
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from record import record
from training import train

SETTINGS = {
    "one GPU": ["launch.ranks=1"],
    "shard 2": ["launch.ranks=2"],
    "shard 2, gathered once a step": ["launch.ranks=2", "parallel.gather=step"],
    "two copies": ["launch.ranks=2", "parallel.shard=1"],
    "tp 2": ["launch.ranks=2", "parallel.tp=2"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--only", nargs="*", default=list(SETTINGS), help="names of settings, the first for one GPU")
    parser.add_argument("overrides", nargs="*", help="of configs/llama_1b.yaml")
    parsed = parser.parse_args()
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in parsed.only:
            try:
                runs[name] = train(Path(folder), name, parsed.steps, [*SETTINGS[name], *parsed.overrides])
            except RuntimeError as error:
                print(error, flush=True)
    one = runs["one GPU"]
    rows = [{"setting": name, **compared(lines, one, 1 if lines is one else 2)} for name, lines in runs.items()]
    record("scaling", rows, shapes="Llama-3.2-1B, sequence 8192, 8 rows a step, packed", overrides=parsed.overrides)


def compared(lines: list[dict[str, Any]], one: list[dict[str, Any]], gpus: int) -> dict[str, float]:
    speed, alone = (median(line["tokens_per_second"] for line in run[len(run) // 3 :]) for run in (lines, one))
    apart = {
        key: max(abs(a[key] / b[key] - 1) for a, b in zip(lines, one, strict=True)) for key in ("loss", "grad_norm")
    }
    return {
        "tokens/s": speed,
        "of one GPU times n %": 100 * speed / alone / gpus,
        "MFU %": 100 * median(line["mfu"] for line in lines[len(lines) // 3 :]),
        "GB a rank": max(line["memory_gb"] for line in lines),
        "loss apart": apart["loss"],
        "norm apart": apart["grad_norm"],
    }


if __name__ == "__main__":
    main()
