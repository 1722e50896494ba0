"""Tokens a second that one core tokenizes, and that the loader hands out, against what the 1B run eats."""

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from record import record

from farspan.launch import cli
from farspan.platform.data import Text, Tokens
from farspan.platform.data.corpus import Corpus
from farspan.platform.data.loader import Loader

EATEN = 60_000
"""Tokens a second that the 1B configuration trains on, on one H200, rounded up: benchmarks/results/scaling-*.json."""


def main() -> None:
    os.sched_setaffinity(0, {0})  # one core for everything, the loader's thread included
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows = list(measure(folder))
    record("data", rows, cores=1, eaten=EATEN, corpus="the Python standard library")


def measure(folder: Path) -> Iterator[dict[str, Any]]:
    bpe, prefix = folder / "bpe.json", folder / "stdlib"
    run("data", "tokenizer", "--vocabulary", "8192", "--out", str(bpe), "python-stdlib")
    run("data", "build", "--tokenizer", str(bpe), "--out", str(prefix), "python-stdlib")
    for length in (512, 8192):
        for name, tokenizer in (("text, bytes", "bytes"), ("text, BPE of 8k", str(bpe))):
            cache = folder / f"{name}-{length}"
            data = Text(paths=("python-stdlib",), sequence_length=length, tokenizer=tokenizer, cache=str(cache))
            yield {"source": name, "sequence": length, **timed(data)}
        data = Tokens(paths=(str(prefix),), sequence_length=length, tokenizer=str(bpe))
        yield {"source": ".bin, BPE of 8k", "sequence": length, **timed(data)}


def timed(data: Text | Tokens) -> dict[str, Any]:
    begun = time.perf_counter()
    corpus = data.build(seed=0)
    building = time.perf_counter() - begun
    speed = loaded(corpus, data.sequence_length)
    tokens = len(corpus.train) * data.sequence_length
    return {"built M tokens/s": tokens / building / 1e6, "loaded M tokens/s": speed / 1e6, "times eaten": speed / EATEN}


def loaded(corpus: Corpus, length: int) -> float:
    """Tokens a second of steps of 8 rows of 8192, or as many tokens in shorter rows."""
    batch = 8 * 8192 // length
    loader = Loader(
        corpus.train, start=0, end=corpus.tokenizer.end, batch=batch, micro_batch=batch // 4, dp_rank=0, dp=1, pin=False
    )
    try:
        next(loader)
        begun, steps = time.perf_counter(), 0
        while time.perf_counter() - begun < 3:
            next(loader)
            steps += 1
        return steps * batch * length / (time.perf_counter() - begun)
    finally:
        loader.close()


def run(*arguments: str) -> None:
    if code := cli.main(arguments):
        raise SystemExit(f"launch {' '.join(arguments)}: exit code {code}")


if __name__ == "__main__":
    main()
