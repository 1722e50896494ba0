"""The 1B configuration on long sequences: cp = 2 on two GPUs against one GPU with as many tokens as each has."""

import argparse
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from record import record
from training import one_document, train

ONE = ["launch.ranks=1", "parallel.cp=1"]


def settings(tokens: int) -> dict[str, list[str]]:
    """Overrides of configs/long_context_1b.yaml by name; both give a GPU `tokens` tokens."""
    return {
        f"one GPU, {tokens // 1024}k": [*ONE, f"data.sequence_length={tokens}"],
        f"cp 2, {2 * tokens // 1024}k": [f"data.sequence_length={2 * tokens}"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--tokens", type=int, nargs="*", default=[65536, 262144], help="tokens of a GPU")
    parser.add_argument("--only", choices=("one GPU", "cp 2"), help="of the two settings; default: both")
    parser.add_argument("overrides", nargs="*", help="of configs/long_context_1b.yaml")
    parsed = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for tokens in parsed.tokens:
            for name, overrides in settings(tokens).items():
                if parsed.only and not name.startswith(parsed.only):
                    continue
                whole = [one_document(folder), "data.held_out=0", *overrides, *parsed.overrides]
                lines = train(folder, name, parsed.steps, whole, "long_context_1b", 2)
                rows.append({"setting": name, **told(lines, tokens, 1 if "one" in name else 2)})
                print(rows[-1], flush=True)
    record("long_context", rows, shapes="Llama-3.2-1B, one document a row, recompute block", overrides=parsed.overrides)


def told(lines: list[dict[str, Any]], tokens: int, gpus: int) -> dict[str, float]:
    later = lines[max(1, len(lines) // 3) :]  # the first step compiles
    memory = max(line["memory_gb"] for line in lines)
    return {
        "tokens/s a GPU": median(line["tokens_per_second"] for line in later) / gpus,
        "MFU %": 100 * median(line["mfu"] for line in later),
        "GB a rank": memory,
        "kB a token": memory * 1e6 / tokens,
        "seconds a step": median(line["step_seconds"] for line in later),
        "loss": lines[-1]["loss"],
    }


if __name__ == "__main__":
    main()
