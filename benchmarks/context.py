"""Attention cut across the GPUs of this machine, schedule by schedule, against one GPU with a rank's share of work.

The ceiling of a cell is the fastest kernel on one GPU over the same sequence with 1/n of the heads: exactly what a rank
has to compute, without exchange or merge. A run without its link shows how much of the exchange is exposed. Peers run
over the same kernels. `--check` compares errors instead: of bf16 against fp64, beside the single kernel's own error.
"""

import argparse
import json
import os
import random
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from record import record
from torch import Tensor

from farspan.parallel.comm import Group
from farspan.parallel.context import Auto, Axis, Context, Gather, Ring, TokenRing, Ulysses
from farspan.parallel.context.attention import Spread
from farspan.parallel.context.exchange import Post, Room
from farspan.parallel.context.layout import encode, layout
from farspan.parallel.context.sight import Sight
from farspan.parallel.context.sums import Kernels, Me, Saved
from farspan.parallel.context.ulysses import Alone

WIDTH = 128
SCHEDULES: dict[str, Context] = {
    "gather": Gather(),
    "gather, 2 groups": Gather(groups=2),
    "gather over NCCL": Gather(carrier="pairs"),
    "ring": Ring(),
    "token_ring": TokenRing(),
    "ulysses": Ulysses(),
    "ulysses, 2 groups": Ulysses(groups=2),
    "auto": Auto(),
}
LONGEST = ("gather", "ulysses, 2 groups", "auto")
PEERS = ("ring-flash-attn zigzag", "yunchang ulysses")


@dataclass(frozen=True)
class Cell:
    tokens: int
    heads: int
    kv_heads: int
    mask: str

    @property
    def sight(self) -> Sight:
        return Sight(self.mask != "full", 4096 if self.mask == "window 4096" else None)

    @property
    def lengths(self) -> tuple[int, ...]:
        """One document, or packed ones: log-uniform lengths from 256 to a quarter of the tokens, always the same."""
        if self.mask != "packed":
            return (self.tokens,)
        draw, left, found = random.Random(7), self.tokens, []
        while left:
            found.append(min(left, int(256 * (self.tokens / 4 / 256) ** draw.random())))
            left -= found[-1]
        return tuple(found)


def grid() -> Iterator[Cell]:
    for tokens in (16384, 65536):
        for heads, kv_heads in ((32, 32), (32, 8), (64, 8)):
            for mask in ("causal", "full", "window 4096", "packed"):
                yield Cell(tokens, heads, kv_heads, mask)


def long() -> Iterator[Cell]:
    for tokens in (131072, 262144, 524288):
        yield Cell(tokens, 32, 8, "causal")


class Mute:
    """A link that says nothing: what a schedule costs without its exchange; its answers are of no use."""

    def room(self, asked: Room) -> Tensor:
        return torch.empty(asked.size, dtype=torch.uint8, device="cuda")

    def post(self, post: Post) -> int:
        return 0

    def wait(self, ticket: int) -> None:
        pass

    def close(self) -> None:
        pass


class Bench:
    """One rank's measurements."""

    def __init__(self, repeats: int) -> None:
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.axis = Axis(group=Group(dist.group.WORLD), device=torch.device("cuda", self.rank))
        self.runtimes: dict[str, Spread] = {}
        self.repeats = repeats

    def runtime(self, name: str) -> Spread:
        if name not in self.runtimes:
            built = SCHEDULES[name].build(self.axis)
            assert isinstance(built, Spread)
            self.runtimes[name] = built
        return self.runtimes[name]

    def time(self, run: Callable[[], object]) -> float:
        """Seconds of a call: the median of repeats, of the slowest rank."""
        run()  # graphs are built, kernels loaded
        torch.cuda.synchronize()
        begun = time.perf_counter()
        run()
        torch.cuda.synchronize()
        if (once := self.slowest(time.perf_counter() - begun)) > 1.0:
            return once
        often = max(1, min(20, int(0.02 / once)))
        found = []
        for _ in range(self.repeats if once < 0.2 else 1):
            dist.barrier()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(often):
                run()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / 1e3 / often)
        return self.slowest(median(found))

    def slowest(self, value: float) -> float:
        shared = torch.tensor([value], dtype=torch.float64, device="cuda")
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return shared.item()

    def inputs(self, cell: Cell, tokens: int, heads: int, kv_heads: int) -> tuple[Tensor, ...]:
        torch.manual_seed(self.rank)
        shapes = ((heads, "q"), (kv_heads, "k"), (kv_heads, "v"), (heads, "dout"))
        return tuple(torch.randn(tokens, n, WIDTH, device="cuda", dtype=torch.bfloat16) for n, _ in shapes)

    def single(self, cell: Cell) -> dict[str, float]:
        """The ceiling: one GPU, all tokens, a rank's share of the heads."""
        whole = layout("contiguous", cell.lengths, 1)
        me = Me(0, whole, cell.sight, Kernels())
        heads, kv_heads = cell.heads // self.ranks, max(1, cell.kv_heads // self.ranks)
        q, k, v, dout = self.inputs(cell, cell.tokens, heads, kv_heads)
        (tiles,) = me.sight.tiles(me.pieces, me.pieces)
        flops = 4 * tiles.pairs * heads * WIDTH
        out, lse = me.kernels.forward(q, k, v, tiles)
        forward = self.time(lambda: me.kernels.forward(q, k, v, tiles))
        backward = self.time(lambda: me.kernels.backward(dout, q, k, v, out, lse, tiles))
        return {"flops": flops, "forward": forward, "backward": backward}

    def schedule(self, cell: Cell, name: str, silent: bool) -> dict[str, float]:
        runtime = self.runtime(name)
        kind = runtime.deal.packed if cell.mask == "packed" else runtime.deal.rows
        table = torch.tensor(encode(kind, cell.lengths, runtime.deal.inner, 1))
        tokens = layout(kind, cell.lengths, self.ranks, runtime.deal.inner).tokens
        q, k, v, dout = self.inputs(cell, tokens, cell.heads, cell.kv_heads)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out, lse = runtime.forward(q, k, v, table, cell.sight)
        saved = Saved(dout, q, k, v, out, lse)
        found = {
            "forward": self.time(lambda: runtime.forward(q, k, v, table, cell.sight)),
            "backward": self.time(lambda: runtime.backward(saved, table, cell.sight)),
            "GB": self.slowest((torch.cuda.max_memory_allocated() - before) / 1e9),
        }
        if silent:
            link, runtime.link = runtime.link, Mute()
            found["forward alone"] = self.time(lambda: runtime.forward(q, k, v, table, cell.sight))
            found["backward alone"] = self.time(lambda: runtime.backward(saved, table, cell.sight))
            runtime.link = link
        return found

    def zigzag(self, cell: Cell) -> dict[str, float]:
        from ring_flash_attn.zigzag_ring_flash_attn import (
            zigzag_ring_flash_attn_backward,
            zigzag_ring_flash_attn_forward,
        )

        q, k, v, dout = (
            x.unsqueeze(0) for x in self.inputs(cell, cell.tokens // self.ranks, cell.heads, cell.kv_heads)
        )
        group, scale = dist.group.WORLD, WIDTH**-0.5
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out, lse = zigzag_ring_flash_attn_forward(group, q, k, v, scale)
        return {
            "forward": self.time(lambda: zigzag_ring_flash_attn_forward(group, q, k, v, scale)),
            "backward": self.time(lambda: zigzag_ring_flash_attn_backward(group, dout, q, k, v, out, lse, scale)),
            "GB": self.slowest((torch.cuda.max_memory_allocated() - before) / 1e9),
        }

    def yunchang(self, cell: Cell) -> dict[str, float]:
        from yunchang.ulysses.attn_layer import UlyssesAttention

        inputs = [x.unsqueeze(0) for x in self.inputs(cell, cell.tokens // self.ranks, cell.heads, cell.kv_heads)]
        *leaves, dout = (x.requires_grad_() for x in inputs)
        attention = UlyssesAttention(dist.group.WORLD)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = attention(*leaves, causal=cell.sight.causal)
        with torch.no_grad():
            forward = self.time(lambda: attention(*leaves, causal=cell.sight.causal))
        return {
            "forward": forward,
            "backward": self.time(lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)),
            "GB": self.slowest((torch.cuda.max_memory_allocated() - before) / 1e9),
        }

    def peer(self, cell: Cell, name: str) -> dict[str, float]:
        from flash_attn_shim import install

        install()
        return self.yunchang(cell) if name == "yunchang ulysses" else self.zigzag(cell)


def measure(bench: Bench, cell: Cell, names: list[str], silent: bool) -> list[dict[str, Any]]:
    single = bench.single(cell)
    flops = single["flops"]
    shape = {"tokens": cell.tokens, "heads": f"{cell.heads}:{cell.kv_heads}", "mask": cell.mask}
    rows = []
    for name in names:
        peer = name in PEERS
        if peer and cell.mask not in (("causal", "full") if name == "yunchang ulysses" else ("causal",)):
            continue
        try:
            found = bench.peer(cell, name) if peer else bench.schedule(cell, name, silent)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            continue
        both = found["forward"] + found["backward"]
        exposed = {
            f"{way} exposed ms": 1e3 * (found[way] - found[f"{way} alone"]) if f"{way} alone" in found else ""
            for way in ("forward", "backward")
        }
        rows.append(
            {
                **shape,
                "schedule": name,
                "forward TFLOP/s": flops / found["forward"] / 1e12,
                "backward TFLOP/s": 2.5 * flops / found["backward"] / 1e12,
                "forward share": single["forward"] / found["forward"],
                "backward share": single["backward"] / found["backward"],
                "both share": (single["forward"] + single["backward"]) / both,
                **exposed,
                "GB": found["GB"],
            }
        )
    ceiling = {"forward TFLOP/s": flops / single["forward"] / 1e12}
    ceiling["backward TFLOP/s"] = 2.5 * flops / single["backward"] / 1e12
    best = max((row["both share"] for row in rows if row["schedule"] not in (*PEERS, "auto")), default=0.0)
    for row in rows:
        row["of the best"] = row["both share"] / best
    if bench.rank == 0:
        print(json.dumps({**shape, "one GPU": {k: round(v) for k, v in ceiling.items()}}), flush=True)
        for row in rows:
            print("  " + "  ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()), flush=True)
    return [
        {**row, "one GPU forward": ceiling["forward TFLOP/s"], "one GPU backward": ceiling["backward TFLOP/s"]}
        for row in rows
    ]


def check(bench: Bench, names: list[str]) -> list[dict[str, Any]]:
    """Largest errors of out, dq, dk, dv against fp64, over the single kernel's own."""
    rows = []
    for mask in ("causal", "full", "window 4096", "packed"):
        for tokens in (8192, 6001):
            cell = Cell(tokens, 8, 2, mask)
            sight = Sight(cell.sight.causal, 700 if cell.sight.window else None)
            torch.manual_seed(1)
            shapes = (8, 2, 2, 8)
            whole = [torch.randn(tokens, n, WIDTH, device="cuda", dtype=torch.bfloat16) for n in shapes]
            alone = Me(0, layout("contiguous", cell.lengths, 1), sight, Kernels())
            exact = _attention(alone, [x.double() for x in whole])
            own = _attention(alone, whole)
            for name in names:
                if name in PEERS:
                    continue
                runtime = bench.runtime(name)
                kind = runtime.deal.packed if mask == "packed" else runtime.deal.rows
                table = torch.tensor(encode(kind, cell.lengths, runtime.deal.inner, 1))
                lay = layout(kind, cell.lengths, bench.ranks, runtime.deal.inner)
                places = lay.places(bench.rank).cuda()
                q, k, v, dout = (_cut(x, places, lay.tokens) for x in whole)
                worst = dict.fromkeys(("out", "dq", "dk", "dv"), 0.0)
                for _ in range(2):  # the second call runs over slots that the first has used
                    out, lse = runtime.forward(q, k, v, table, sight)
                    grads = runtime.backward(Saved(dout, q, k, v, out, lse), table, sight)
                    for part, want, plain, key in zip((out, *grads), exact, own, worst, strict=True):
                        error = (part[: len(places)].double() - want[places]).square().mean().sqrt()
                        base = (plain[places].double() - want[places]).square().mean().sqrt()
                        found = bench.slowest((error / base).item())
                        worst[key] = max(worst[key], found if found == found else float("inf"))
                rows.append({"mask": mask, "tokens": tokens, "schedule": name, **worst})
                if bench.rank == 0:
                    print(mask, tokens, name, {k: round(v, 3) for k, v in worst.items()}, flush=True)
    return rows


def _attention(me: Me, inputs: list[Tensor]) -> list[Tensor]:
    q, k, v, dout = inputs
    schedule, results = Alone(), []
    for run in (schedule.forward(me, q, k, v), None):
        if run is None:
            run = schedule.backward(me, Saved(dout, q, k, v, *results[0]))
        try:
            next(run)
        except StopIteration as done:
            results.append(done.value)
    return [results[0][0], *results[1]]


def _cut(x: Tensor, places: Tensor, tokens: int) -> Tensor:
    part = torch.full((tokens, *x.shape[1:]), float("nan"), device=x.device, dtype=x.dtype)
    part[: len(places)] = x[places]
    return part


def work(rank: int, ranks: int, port: int, parsed: argparse.Namespace) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    bench = Bench(parsed.repeats)
    names = parsed.schedules or [*SCHEDULES, *PEERS]
    if parsed.check:
        rows, claim = check(bench, names), "context_errors"
    else:
        end, rows, claim = time.monotonic() + parsed.seconds, [], "context"
        cells = [*grid(), *long()] if parsed.cells is None else [Cell(*cell) for cell in json.loads(parsed.cells)]
        for cell in cells:
            if bench.slowest(time.monotonic()) > end:
                break
            chosen = (
                names if cell.tokens < 131072 else [n for n in names if n in ("gather", "ulysses, 2 groups", "auto")]
            )
            rows += measure(bench, cell, chosen, silent=cell.tokens < 65536 and not parsed.brief)
    if rank == 0:
        record(claim, rows, shapes=f"head size {WIDTH}, bf16, {ranks} GPUs", repeats=parsed.repeats)
    sys.stdout.flush()
    os._exit(0)  # the symmetric memory of a peer that ended first must not be let go of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schedules", nargs="*", help="names; default: all, and the peers")
    parser.add_argument("--cells", help="JSON list of [tokens, heads, kv_heads, mask]; default: the whole grid")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1e9, help="begins no further cell after so many")
    parser.add_argument("--brief", action="store_true", help="does not measure what is exposed")
    parser.add_argument("--check", action="store_true")
    parsed = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = torch.cuda.device_count()
    torch.multiprocessing.spawn(work, (ranks, port, parsed), nprocs=ranks)


if __name__ == "__main__":
    main()
