"""Held-out loss and sampled text: what the model knows, and what it says."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist

from farspan.kernels.random import key, uniform
from farspan.parallel.context.shard import IGNORE, Batch
from farspan.parallel.engine import Engine
from farspan.platform.data.corpus import Language
from farspan.platform.data.row import Rows, collate


def held_out_loss(
    engine: Engine, rows: Rows, end: int, *, limit: int, micro_batch: int, beat: Callable[[], None]
) -> float:
    """Mean loss in nats over the labels of the first `limit` held-out rows; every rank reads its share.

    NaN: these rows have no label. Rows are filled up with `end`. `beat` is called for every batch: a sign of life.
    """
    mesh = engine.mesh
    dp, rank = mesh.sizes.dp, mesh.index("dp")
    total = torch.zeros(2, dtype=torch.float64)
    mine = range(min(limit, len(rows)))[rank::dp]
    rounds = -(-min(limit, len(rows)) // (dp * micro_batch))  # the same on every rank: forwards are collective
    for i in range(rounds):
        numbers = mine[i * micro_batch : (i + 1) * micro_batch]
        batch = collate([rows.row(number) for number in numbers or [0]], end)
        beat()
        if not numbers:
            batch = replace(batch, labels=torch.full_like(batch.labels, IGNORE), valid=0)
        total += torch.tensor([engine.evaluate(batch).item(), batch.valid], dtype=torch.float64)
    dist.all_reduce(total, group=mesh.control)
    summed, labels = (total / (mesh.sizes.world // dp)).tolist()
    return summed / labels if labels else math.nan


def sample(
    engine: Engine,
    tokenizer: Language,
    prompt: str,
    *,
    tokens: int,
    temperature: float,
    context: int,
    seed: int,
    beat: Callable[[], None],
) -> str:
    """Continues `prompt` by at most `tokens` tokens; every rank computes the same text.

    The whole context is read again for each token: right for a glance at a model in training, not for serving.
    """
    ids = [int(token) for token in tokenizer.encode(prompt)]
    begun = len(ids)
    draw = key(seed, "sample")
    while len(ids) < begun + tokens:
        beat()
        logits = engine.evaluate(*_prefix(ids[-context:]))[0, : tokenizer.vocabulary].double().cpu()
        if temperature == 0:
            ids.append(int(logits.argmax()))
        else:
            noise = uniform(len(ids) << 20 | torch.arange(len(logits)), draw).double()
            ids.append(int((logits / temperature - (-noise.log()).log()).argmax()))  # Gumbel's trick
        if ids[-1] == tokenizer.end:
            break
    return tokenizer.decode(ids[begun:])


def _prefix(ids: list[int]) -> tuple[Batch, torch.Tensor]:
    """One row that ends with padding to a multiple of 64, so that few shapes occur, and the place of its last token."""
    length = -(-len(ids) // 64) * 64
    tokens = torch.zeros(1, length, dtype=torch.int64)
    tokens[0, : len(ids)] = torch.tensor(ids)
    batch = Batch(
        tokens=tokens,
        labels=torch.full_like(tokens, IGNORE),
        positions=torch.arange(length).unsqueeze(0),
        cu_seqlens=None,
        lengths=(len(ids),),
        valid=0,
        padding=length - len(ids),
        places=torch.where(torch.arange(length) < len(ids), torch.arange(length), -1).int().unsqueeze(0),
        whole=(1, length),
    )
    return batch, torch.tensor([len(ids) - 1])
