"""Training Qwen3-30B-A3B's layers, as many as fit: what one more block costs, and how near the card's peak that is.

Two depths are trained through `launch`; their difference is the blocks', without embedding, head and data. Nothing is
recomputed. `balanced` sends every expert the same number of tokens, the others where their routers say. On two GPUs
experts are dealt out (`ep 2`), by each way of dispatch, or sharded like all weights.
"""

import argparse
import tempfile
from pathlib import Path
from statistics import mean, median
from typing import Any

from record import record
from training import train

FORCED = "model.blocks.0.ffn.forced=true"
WARMUP = "schedule.warmup=500"
"""Routers that learn at full speed from the first step on send all tokens to the same few experts."""
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
    parser.add_argument("--steps", type=int, default=45)
    parser.add_argument("--rows", type=int, default=8, help="of 4096 tokens, of each GPU at once")
    parser.add_argument("overrides", nargs="*", help="of configs/qwen3_30b_a3b.yaml")
    parsed = parser.parse_args()
    settings = {1: ONE, 2: TWO}[parsed.gpus]
    rows: list[dict[str, Any]] = []
    for name in parsed.only or settings:
        same = [f"launch.ranks={parsed.gpus}", f"train.batch={parsed.rows * parsed.gpus}", "parallel.ep=1"]
        same += [f"train.micro_batch={parsed.rows}", "train.recompute=none", WARMUP, *settings[name], *parsed.overrides]
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
    """tokens: of a step, on each GPU. MFU times seconds are the seconds of the card's peak that a step is worth."""
    seconds, worth, found = [], [], {}
    with tempfile.TemporaryDirectory() as folder:
        for depth in depths:
            deep = [*overrides, f"model.blocks.0.repeat={depth}"]
            lines = train(Path(folder), f"{name}, {depth}", steps, deep, "qwen3_30b_a3b")[steps // 3 :]
            seconds.append(median(line["step_seconds"] for line in lines))
            worth.append(mean(line["mfu"] * line["step_seconds"] for line in lines))
            found = {
                "tokens/s a GPU": tokens / seconds[-1],
                "MFU %": 100 * median(line["mfu"] for line in lines),
                "GB": max(line["memory_gb"] for line in lines),
                "load max": median(line["load_max"] for line in lines),
            }
    one = (seconds[1] - seconds[0]) / (depths[1] - depths[0])
    busy = (worth[1] - worth[0]) / (depths[1] - depths[0])
    return {"a block, ms": 1e3 * one, "a block, MFU %": 100 * busy / one, **found}


if __name__ == "__main__":
    main()
