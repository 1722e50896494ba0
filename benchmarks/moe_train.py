"""Training Qwen3-30B-A3B's layers, as many as fit: what one more block costs, and how near the card's peak that is.

Two depths are trained through `launch`; their difference is the blocks', without embedding, head and data. Nothing is
recomputed. `balanced` sends every expert the same number of tokens, the others where their routers say. On two GPUs
experts are dealt out (`ep 2`), by each way of dispatch, or sharded like all weights.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from record import record
from training import CONFIGS, train

PEAK = 989.5e12
"""Operations a second of one H100 or H200 in bf16."""
FORCED = "model.blocks.0.ffn.forced=true"
ONE = {"one GPU, balanced": [FORCED], "one GPU": []}
TWO = {
    "two GPUs, sharded": [],
    "two GPUs, ep 2, all_to_all": ["parallel.ep=2", "parallel.dispatch={kind: all_to_all}"],
    "two GPUs, ep 2, all_gather": ["parallel.ep=2", "parallel.dispatch={kind: all_gather}"],
    "two GPUs, ep 2, weight_gather": ["parallel.ep=2", "parallel.dispatch={kind: weight_gather}"],
    "two GPUs, ep 2, all_to_all, balanced": ["parallel.ep=2", "parallel.dispatch={kind: all_to_all}", FORCED],
}
"""By setting: what is changed of configs/qwen3_30b_a3b.yaml."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", type=int, choices=(1, 2), default=1)
    parser.add_argument("--only", nargs="*", help="names of settings")
    parser.add_argument("--depths", type=int, nargs=2, default=(2, 4))
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--rows", type=int, default=8, help="of 4096 tokens, of each GPU at once")
    parser.add_argument("overrides", nargs="*", help="of configs/qwen3_30b_a3b.yaml")
    parsed = parser.parse_args()
    settings = {1: ONE, 2: TWO}[parsed.gpus]
    rows: list[dict[str, Any]] = []
    for name in parsed.only or settings:
        same = [f"launch.ranks={parsed.gpus}", f"train.batch={parsed.rows * parsed.gpus}", "parallel.ep=1"]
        same += [f"train.micro_batch={parsed.rows}", "train.recompute=none", *settings[name], *parsed.overrides]
        row: dict[str, Any] = {"setting": name, "GPUs": parsed.gpus}
        try:
            row |= block(name, parsed.depths, parsed.steps, same, parsed.rows * 4096)
        except RuntimeError as error:
            print(str(error)[-1500:], flush=True)
            continue
        print(row, flush=True)
        rows.append(row)
        record("moe_train", rows, shapes="Qwen3-30B-A3B's layers, 4096 tokens a row")  # so far: a run may be cut off


def block(name: str, depths: tuple[int, int], steps: int, overrides: list[str], tokens: float) -> dict[str, Any]:
    """tokens: of a step, on each GPU."""
    seconds, operations, found = [], [], {}
    with tempfile.TemporaryDirectory() as folder:
        for depth in depths:
            deep = [*overrides, f"model.blocks.0.repeat={depth}"]
            lines = train(Path(folder), f"{name}, {depth}", steps, deep, "qwen3_30b_a3b")[steps // 3 :]
            seconds.append(median(line["step_seconds"] for line in lines))
            operations.append(counted(deep))
            found = {
                "tokens/s a GPU": tokens / seconds[-1],
                "MFU %": 100 * median(line["mfu"] for line in lines),
                "GB": max(line["memory_gb"] for line in lines),
                "load max": median(line["load_max"] for line in lines),
            }
    one = (seconds[1] - seconds[0]) / (depths[1] - depths[0])
    rate = (operations[1] - operations[0]) / (depths[1] - depths[0]) * tokens / one
    return {"a block, ms": 1e3 * one, "a block, MFU %": 100 * rate / PEAK, **found}


def counted(overrides: list[str]) -> float:
    """Operations of a token, forward and backward, as a dry run counts them."""
    command = [sys.executable, "-c", "from farspan.launch.cli import main; main()", "train", "--dry-run"]
    command += ["--config", str(CONFIGS / "qwen3_30b_a3b.yaml"), *overrides]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"FLOPs per token +([\d.e+]+)", said)
    assert found, said
    return float(found[1])


if __name__ == "__main__":
    main()
