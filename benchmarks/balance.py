"""Whether balance works, on real text: 16 experts by each way of evening loads and by none, beside a dense model of as
many active parameters after as many tokens. Python's own library, byte by byte; on the CPU: nothing here is a speed."""

import argparse
import sysconfig
from collections.abc import Mapping, Sequence
from math import log
from pathlib import Path
from typing import Any, NamedTuple

import torch
from record import record
from torch import Tensor

from farspan.kernels.random import key
from farspan.models.block import Block
from farspan.models.decoder import Decoder, DecoderModel, initial
from farspan.models.ffns import Ffn, Moe, Swiglu
from farspan.models.ffns.router import Scope
from farspan.models.mixers import Softmax
from farspan.parallel.context.local import Local
from farspan.parallel.context.shard import Batch
from farspan.parallel.sums import Now, Sums

EXPERTS, ACTIVE = 16, 2
HELD = 64
"""Rows of held-out text."""
WINDOW = 20
"""Steps whose loads are added up in the end."""
SCOPES: Mapping[str, Scope] = {"micro-batches": "micro_batch", "the step": "step"}
LOSSES: dict[str, dict[str, Any]] = {"none": {"balance": 0.0}, "over rows": {"balance": 0.02}}
LOSSES |= {f"over {name}": {"balance": 0.02, "balance_over": scope} for name, scope in SCOPES.items()}
BIASES: Mapping[str, dict[str, Any]] = {
    "bias by sign": {"balance": 0.0, "bias": "aux_free", "bias_rate": 3e-3},
    "bias by quantiles": {"balance": 0.0, "bias": "quantile"},
    "bias by sign, of sigmoids": {"balance": 0.0, "bias": "aux_free", "bias_rate": 1e-2, "score": "sigmoid"},
    "capacity 1.25, over rows": {"balance": 0.02, "capacity": 1.25},
}


class Size(NamedTuple):
    width: int = 64
    depth: int = 2
    hidden: int = 64
    """Of an expert."""
    rows: int = 16
    length: int = 128
    micro_batches: int = 2
    steps: int = 600
    rate: float = 4e-3


class Learnt(NamedTuple):
    loss: float
    """Held out, in nats a byte."""
    entropy: float
    """Of the loads of the last steps' tokens, over that of even ones, in the worst layer; 1 without experts."""
    fullest: float
    """The fullest expert's load over the mean, there."""
    dropped: float
    """Share of visits."""


def text() -> Tensor:
    """About 5 MB, the same for the same Python: uint8."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in paths)), dtype=torch.uint8)


def batch(found: Tensor, rows: int, length: int, made: torch.Generator) -> Batch:
    starts = torch.randint(len(found) - length, (rows,), generator=made)
    pieces = torch.stack([found[start : start + length + 1] for start in starts.tolist()]).long()
    places = torch.arange(length).expand(rows, -1)
    tokens, labels, lengths = pieces[:, :-1], pieces[:, 1:], (length,) * rows
    return Batch(tokens=tokens, labels=labels, positions=places, cu_seqlens=None, lengths=lengths, valid=labels.numel())


def trained(ffn: Ffn, size: Size, corpus: Tensor) -> Learnt:
    block = Block(repeat=size.depth, mixer=Softmax(heads=4), ffn=ffn)
    model = Decoder(width=size.width, blocks=(block,)).build(256, Local())
    starts = initial(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            starts[name].fill(weight, key(0, "initial", name), tuple(weight.shape), (0,) * weight.dim())
    optimizer = torch.optim.AdamW(model.parameters(), size.rate, betas=(0.9, 0.95), weight_decay=0.0)
    end, seen = len(corpus) * 9 // 10, torch.Generator().manual_seed(1)
    told: list[list[Sums]] = []
    for step in range(size.steps):
        for group in optimizer.param_groups:
            group["lr"] = size.rate * min(1.0, (step + 1) / 20, (size.steps - step) / (0.3 * size.steps))
        told.append(
            _step(model, [batch(corpus[:end], size.rows, size.length, seen) for _ in range(size.micro_batches)], step)
        )
        optimizer.step()
        optimizer.zero_grad()
        if told[-1]:
            loads, wishes = (_added(told[-1], of) for of in ("loads", "wishes"))
            model.settle(loads, wishes, torch.ones(()))
    with torch.no_grad():
        held = batch(corpus[end:], HELD, size.length, torch.Generator().manual_seed(2))
        loss = float(model(held)) / held.valid
    return Learnt(loss, *_evenness([sums for step in told[-WINDOW:] for sums in step]))


def _step(model: DecoderModel, batches: Sequence[Batch], step: int) -> list[Sums]:
    told, labels = [], sum(part.valid for part in batches)
    for i, part in enumerate(batches):
        model.tell(Now(seed=0, step=step, row=i * len(part.tokens), first=i == 0))
        found = model(part)
        if isinstance(found, Sums):
            told.append(found)
            found = found.loss + found.cost
        (found / labels).backward()
    return told


def _added(told: Sequence[Sums], of: str) -> list[Tensor]:
    """loads or wishes, layer by layer."""
    return [torch.stack(same).sum(0) for same in zip(*(getattr(sums, of) for sums in told), strict=True)]


def _evenness(told: Sequence[Sums]) -> tuple[float, float, float]:
    if not told:
        return 1.0, 1.0, 0.0
    loads = _added(told, "loads")
    shares = [load / load.sum() for load in loads]
    entropies = [float(torch.special.entr(share).sum()) / log(len(share)) for share in shares]
    worst = min(range(len(loads)), key=lambda layer: entropies[layer])
    dropped = float(sum(sums.told[0] for sums in told)) / float(sum(load.sum() for load in loads))
    return entropies[worst], float(loads[worst].max() / loads[worst].mean()), dropped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=Size().steps)
    size, corpus = Size(steps=parser.parse_args().steps), text()
    ways: dict[str, Ffn] = {"dense": Swiglu(hidden=ACTIVE * size.hidden)}
    for name, fields in {**LOSSES, **BIASES}.items():
        ways[name] = Moe(experts=EXPERTS, active=ACTIVE, hidden=size.hidden, **fields)  # type: ignore[arg-type]
    rows = []
    for name, ffn in ways.items():
        found = trained(ffn, size, corpus)
        rows.append({"balance": name, **found._asdict()})
        print(rows[-1], flush=True)
    record("balance", rows, shapes=str(size), experts=EXPERTS, active=ACTIVE)


if __name__ == "__main__":
    main()
