"""Whether training in fp8 learns what training in bf16 does: 500 steps of the 1B configuration on the same rows, of
2048 tokens, and how far apart two runs in bf16 are that differ by nothing but the order of some sums on the GPU. All
run at once on one GPU: nothing here is a speed."""

import argparse
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

from record import record
from training import train

WINDOW = 50
"""Steps whose losses are averaged: one by one they differ by their rows far more than by arithmetic."""
SETTINGS = {"bf16": [], "bf16 again": [], "fp8": ["model.blocks.0.linear={kind: fp8}"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--only", nargs="*", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("overrides", nargs="*", help="of configs/llama_1b.yaml")
    parsed = parser.parse_args()
    same = ["data.sequence_length=2048", "train.batch=2", "train.micro_batch=2", "schedule.warmup=50"]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
        runs = {
            name: pool.submit(train, Path(folder), name, parsed.steps, [*same, *own, *parsed.overrides], every=1)
            for name, own in SETTINGS.items()
            if name in parsed.only
        }
        losses = {name: [line["loss"] for line in run.result()] for name, run in runs.items()}
    rows: list[dict[str, Any]] = []
    for end in range(WINDOW, parsed.steps + 1, WINDOW):
        found = {name: mean(of[end - WINDOW : end]) for name, of in losses.items()}
        apart = {f"{name} apart %": 100 * (loss / found["bf16"] - 1) for name, loss in found.items() if "bf16" in found}
        rows.append({"steps": f"{end - WINDOW + 1}-{end}", **found, **apart})
    record(
        "fp8_losses" if "fp8" in parsed.only else "bf16_losses",
        rows,
        shapes="Llama-3.2-1B, 2 rows of 2048 tokens a step",
    )


if __name__ == "__main__":
    main()
