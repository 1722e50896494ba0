"""What `launch train --dry-run` foretells of a GPU's memory, against the most that training takes: state on the GPU, in
host memory, gradients away as well, activations away. A few steps each, through the trainer."""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import record
from training import CONFIGS, train

EIGHT = "optim={kind: adamw8, rate: 3e-4%s}"
STREAMED = ", offload: {kind: streamed%s}"
ROWS = ["train.batch=2", "train.micro_batch=2"]
SETTINGS: dict[str, tuple[str, list[str]]] = {
    "1B, adamw": ("llama_1b", ROWS),
    "1B, adamw8": ("llama_1b", [*ROWS, EIGHT % ""]),
    "1B, adamw8, streamed": ("llama_1b", [*ROWS, EIGHT % STREAMED % ""]),
    "1B, adamw, recompute offload": ("llama_1b", [*ROWS, "train.recompute=offload"]),
    "7B, adamw8, streamed": ("llama_7b_one_gpu", ["train.micro_batch=1"]),
    "7B, adamw8, streamed, gradients away": ("llama_7b_one_gpu", ["train.batch=1", "optim.offload.gradients=true"]),
}
"""By name: a file of configs/ and what is changed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--steps", type=int, default=6)
    parsed = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in parsed.only:
            config, overrides = SETTINGS[name]
            row: dict[str, Any] = {
                "setting": name,
                "planned GB": planned(config, overrides),
                "taken GB": "",
                "apart": "",
            }
            try:
                lines = train(Path(folder), name, parsed.steps, overrides, config)
                row["taken GB"] = max(line["memory_gb"] for line in lines)
                row["apart"] = f"{100 * (row['planned GB'] / row['taken GB'] - 1):+.1f} %"
            except RuntimeError as error:
                print(str(error)[-1500:], flush=True)
            print(row, flush=True)
            rows.append(row)
            record("memory", rows)  # so far: a run may be cut off


def planned(config: str, overrides: list[str]) -> float:
    """Gigabytes of the device, as a dry run says."""
    command = [sys.executable, "-c", "from farspan.launch.cli import main; main()", "train", "--dry-run"]
    command += ["--config", str(CONFIGS / f"{config}.yaml"), *overrides, "launch.ranks=1"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"about ([\d.]+) GB a rank", said)
    assert found, said
    return float(found[1])


if __name__ == "__main__":
    main()
