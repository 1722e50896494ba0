"""farspan's fused kernels against torch eager, torch.compile and Liger, and against the card: bandwidth and products.

A cell is one operation at one shape in bf16. Forward and backward together are timed as torch.autograd.grad with an
upstream gradient made before, so that nothing is filled or accumulated: as a program calls it, and, where an operation
is short, once more out of a CUDA graph, which leaves out the host. The ceiling is the fewest bytes that the
operation can move at the rate of a copy, or its products at the rate of a large one, both measured in the same run.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from record import record
from torch import Tensor
from triton.testing import do_bench, do_bench_cudagraph

from farspan.kernels.adaln import add_adaln, add_adaln_ref
from farspan.kernels.linear_cross_entropy import linear_cross_entropy
from farspan.kernels.norm import add_rms_norm, layer_norm, rms_norm
from farspan.kernels.rope import qk_norm_rope, rope, rope_ref
from farspan.kernels.swiglu import geglu, swiglu
from farspan.models.block import Block
from farspan.models.ffns import Swiglu
from farspan.models.linear import Fp8, Plain
from farspan.models.mixers import Softmax
from farspan.models.norm import Rms
from farspan.parallel.context.local import Local
from farspan.parallel.context.shard import Documents

Run = Callable[..., Any]
EPS = 1e-5


@dataclass(frozen=True)
class Cell:
    name: str
    shape: str
    leaves: tuple[Tensor, ...]
    """What gradients are taken of; the runs get them, then `others`."""
    runs: dict[str, Run]
    """By competitor; `ours` is one."""
    others: tuple[Any, ...] = ()
    passes: tuple[int, int] = (0, 0)
    """Fewest bytes of a forward, and of forward and backward together."""
    flops: int = 0
    """Of forward and backward together."""
    repeats: int = 60
    notes: dict[str, str] = field(default_factory=dict)
    """What has to be known of a competitor."""


def normal(*shape: int, grad: bool = True, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype).requires_grad_(grad)


def weight(width: int) -> Tensor:
    return torch.rand(width, device="cuda", dtype=torch.bfloat16).add(0.5).requires_grad_()


def norms() -> Iterator[Cell]:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    def plain(x: Tensor, w: Tensor) -> Tensor:
        return F.rms_norm(x, w.shape, w, EPS)

    def joined(x: Tensor, branch: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = x + branch
        return total, F.rms_norm(total, w.shape, w, EPS)

    def centred(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.layer_norm(x, w.shape, w, b, EPS)

    shapes = ((16384, 1024), (16384, 2048), (16384, 4096), (8192, 8192), (4096, 16384), (524288, 128))
    for rows, width in shapes:
        size = 2 * rows * width
        yield Cell(
            "rms_norm",
            f"{rows} x {width}",
            (normal(rows, width), weight(width)),
            {
                "ours": lambda x, w: rms_norm(x, w, EPS),
                "torch": plain,
                "compile": torch.compile(plain, dynamic=False),
                "liger": lambda x, w: LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False),
            },
            passes=(2 * size, 5 * size),
        )
    for rows, width in ((16384, 2048), (16384, 4096)):
        size = 2 * rows * width
        yield Cell(
            "add_rms_norm",
            f"{rows} x {width}",
            (normal(rows, width), normal(rows, width), weight(width)),
            {
                "ours": lambda x, y, w: add_rms_norm(x, y, w, EPS),
                "torch": joined,
                "compile": torch.compile(joined, dynamic=False),
                "liger": lambda x, y, w: LigerFusedAddRMSNormFunction.apply(x, y, w, EPS, 0.0, "llama", False)[::-1],
            },
            passes=(4 * size, 8 * size),
        )
    for rows, width in ((16384, 4096),):
        size = 2 * rows * width
        yield Cell(
            "layer_norm",
            f"{rows} x {width}",
            (normal(rows, width), weight(width), weight(width)),
            {
                "ours": lambda x, w, b: layer_norm(x, w, b, EPS),
                "torch": centred,
                "compile": torch.compile(centred, dynamic=False),
                "liger": lambda x, w, b: LigerLayerNormFunction.apply(x, w, b, EPS),
            },
            passes=(2 * size, 5 * size),
        )


def modulations() -> Iterator[Cell]:
    for batch, tokens, width in ((32, 1024, 1152), (8, 4096, 3072)):
        size = 2 * batch * tokens * width
        yield Cell(
            "add_adaln",
            f"{batch} x {tokens} x {width}",
            (normal(batch, tokens, width), normal(batch, tokens, width), *(normal(batch, width) for _ in range(3))),
            {
                "ours": lambda *x: add_adaln(*x, EPS),
                "torch": lambda *x: add_adaln_ref(*x, EPS),
                "compile": torch.compile(lambda *x: add_adaln_ref(*x, EPS), dynamic=False),
            },
            passes=(4 * size, 10 * size),
        )


def rotations() -> Iterator[Cell]:
    from liger_kernel.ops.rope import LigerRopeFunction

    def both(q: Tensor, k: Tensor, w: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return rope_ref(F.rms_norm(q, w.shape, w, EPS), F.rms_norm(k, v.shape, v, EPS), cos, sin)

    def liger(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        table = [torch.cat((x, x), -1).squeeze(2) for x in (cos, sin)]
        return LigerRopeFunction.apply(q.transpose(1, 2).clone(), k.transpose(1, 2).clone(), *table)

    for batch, tokens, heads, kv_heads, width in ((2, 8192, 32, 8, 64), (2, 8192, 32, 8, 128)):
        q, k = normal(batch, tokens, heads, width), normal(batch, tokens, kv_heads, width)
        size = 2 * (q.numel() + k.numel())
        angles = torch.randn(batch, tokens, 1, width // 2, device="cuda")
        shape = f"{batch} x {tokens}, {heads}:{kv_heads} x {width}"
        yield Cell(
            "rope",
            shape,
            (q, k),
            {
                "ours": rope,
                "torch": rope_ref,
                "compile": torch.compile(rope_ref, dynamic=False),
                "liger": liger,
            },
            others=(angles.cos(), angles.sin()),
            passes=(2 * size, 4 * size),
            notes={"liger": "writes over its inputs: timed with the copies that a model's backward needs"},
        )
        yield Cell(
            "qk_norm_rope",
            shape,
            (q, k, weight(width), weight(width)),
            {
                "ours": lambda q, k, w, v, cos, sin: qk_norm_rope(q, k, w, v, EPS, cos, sin),
                "torch": both,
                "compile": torch.compile(both, dynamic=False),
            },
            others=(angles.cos(), angles.sin()),
            passes=(2 * size, 5 * size),
        )


def activations() -> Iterator[Cell]:
    from liger_kernel.ops.geglu import LigerGELUMulFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def silu(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    def gelu(gate: Tensor, up: Tensor) -> Tensor:
        return F.gelu(gate, approximate="tanh") * up

    for name, ours, plain, liger in (
        ("swiglu", swiglu, silu, LigerSiLUMulFunction.apply),
        ("geglu", geglu, gelu, LigerGELUMulFunction.apply),
    ):
        for rows, width in ((16384, 8192), (16384, 14336)) if name == "swiglu" else ((16384, 14336),):
            size = 2 * rows * width
            yield Cell(
                name,
                f"{rows} x {width}",
                (normal(rows, width), normal(rows, width)),
                {"ours": ours, "torch": plain, "compile": torch.compile(plain, dynamic=False), "liger": liger},
                passes=(3 * size, 8 * size),
                # Liger's backward writes its gradients over gate and up, so a second one computes with other numbers.
                notes={"liger": "its gradients are written over its inputs"},
            )


def feed_forward() -> Iterator[Cell]:
    def run(act: Run) -> Run:
        return lambda x, gate, up, down: act(x @ gate.T, x @ up.T) @ down.T

    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def plain(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    rows, width, hidden = 16384, 4096, 14336
    yield Cell(
        "feed-forward",
        f"{rows}, {width} to {hidden}",
        (normal(rows, width), *(normal(hidden, width) for _ in range(2)), normal(width, hidden)),
        {
            "ours": run(swiglu),
            "torch": run(plain),
            "compile": torch.compile(run(plain), dynamic=False),
            "liger": run(LigerSiLUMulFunction.apply),
        },
        flops=18 * rows * width * hidden,
        repeats=8,
    )


def losses() -> Iterator[Cell]:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def liger(hidden: Tensor, head: Tensor, labels: Tensor, dtype: torch.dtype | None = torch.float32) -> Tensor:
        mean = "mean", None, False, dtype
        found: Tensor = LigerFusedLinearCrossEntropyFunction.apply(
            hidden, head, labels, None, None, -100, 0.0, 0.0, *mean
        )[0]
        return found

    def plain(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy((hidden @ head.T).float(), labels)

    for tokens, width in ((16384, 4096), (16384, 2048)):
        vocabulary = 128256
        hidden, head = normal(tokens, width), normal(vocabulary, width)
        head.data.mul_(width**-0.5)
        labels = torch.randint(vocabulary, (tokens,), device="cuda")
        yield Cell(
            "linear_cross_entropy",
            f"{tokens} x {width}, {vocabulary}",
            (hidden, head),
            {
                "ours": linear_cross_entropy,
                "ours, bf16 sums": lambda h, w, y: linear_cross_entropy(h, w, y, accumulate=torch.bfloat16),
                "torch": plain,
                "compile": torch.compile(plain, dynamic=False),
                "liger": liger,
                "liger, bf16 sums": lambda h, w, y: liger(h, w, y, None),
            },
            others=(labels,),
            flops=6 * tokens * width * vocabulary,
            repeats=3,
        )


def eight_bits() -> Iterator[Cell]:
    """A layer of Llama-3-8B's shapes, one kind after the other, so that memory holds one of them."""
    kinds = {"bf16": Plain(), "ours": Fp8(), "fp8, bf16 dw": Fp8(weight_gradient="bf16"), "block": Fp8(recipe="block")}
    batch, tokens = 2, 8192
    products = 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336)
    attention = 2 * 4096 * tokens  # causal: half of the pairs, two products
    for name, kind in kinds.items():
        block = Block(mixer=Softmax(heads=32, kv_heads=8), ffn=Swiglu(hidden=14336), linear=kind)
        with torch.device("cuda"):
            layer = block.build(4096, 32, Rms(), "pre", Local()).bfloat16()
        for each in layer.parameters():
            torch.nn.init.normal_(each, std=0.02) if each.dim() == 2 else torch.nn.init.ones_(each)
        angles = layer.example(batch, tokens)[1]
        yield Cell(
            "8B block in fp8",
            f"{batch} x {tokens}",
            (normal(batch, tokens, 4096), *layer.parameters()),
            {name: lambda x, *_, layer=layer, angles=angles: layer(x, angles, Documents())},
            flops=3 * batch * tokens * (2 * products + attention),
            repeats=8,
            notes={name: "ceiling: bf16 products"},
        )


GROUPS = {
    "norms": norms,
    "modulations": modulations,
    "rotations": rotations,
    "activations": activations,
    "losses": losses,
    "feed_forward": feed_forward,
    "eight_bits": eight_bits,
}


def timed(run: Callable[[], object], repeats: int) -> float:
    """Milliseconds, the median; the cache is cold."""
    run()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    once = max(start.elapsed_time(end), 0.02)
    found: float = do_bench(run, warmup=2 * once, rep=repeats * once, return_mode="median")
    return found


def replayed(run: Callable[[], object], repeats: int, once: float) -> float:
    """Milliseconds on the device, from a CUDA graph."""
    found: float = do_bench_cudagraph(run, rep=repeats * once, return_mode="median")
    return found


def measure(cell: Cell, copy: float, rate: float) -> Iterator[dict[str, Any]]:
    for name, run in cell.runs.items():
        arguments = (*cell.leaves, *cell.others)
        try:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            out = run(*arguments)
            outs = out if isinstance(out, tuple) else (out,)
            upstream = [torch.randn_like(x) if x.dim() else torch.ones_like(x) for x in outs]

            def both(run: Run = run, arguments: Any = arguments, upstream: Any = upstream) -> None:
                out = run(*arguments)
                torch.autograd.grad(out if isinstance(out, tuple) else (out,), cell.leaves, upstream)

            del out, outs
            torch.cuda.reset_peak_memory_stats()
            both()
            peak = torch.cuda.max_memory_allocated() - before
            with torch.no_grad():
                once = partial(run, *arguments)
                forward = timed(once, cell.repeats)
                alone = replayed(once, cell.repeats, forward) if cell.passes[0] else forward
            full = timed(both, cell.repeats)
            device = replayed(both, cell.repeats, full) if cell.passes[1] else full
        except (torch.cuda.OutOfMemoryError, RuntimeError) as error:
            print(f"{cell.name} {cell.shape} {name}: {str(error)[:300]}", file=sys.stderr, flush=True)
            torch.cuda.empty_cache()
            continue
        floor = cell.flops / rate / 1e9 if cell.flops else cell.passes[1] / copy / 1e6
        yield {
            "operation": cell.name,
            "shape": cell.shape,
            "by": name,
            "forward ms": forward,
            "forward device ms": alone,
            "forward of copy": cell.passes[0] / copy / 1e6 / alone if cell.passes[0] else "",
            "both ms": full,
            "floor ms": floor,
            "of ceiling": floor / full,
            "device ms": device,
            "device of ceiling": floor / device,
            "GB": peak / 1e9,
            "note": cell.notes.get(name, ""),
        }


def ceilings() -> tuple[float, float]:
    """GB/s of a copy, reads and writes counted, and TFLOP/s of a product of 8192³ normal numbers in bf16."""
    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    copy = 2 * x.numel() / timed(lambda: y.copy_(x), 30) / 1e6
    a, b = normal(8192, 8192, grad=False), normal(8192, 8192, grad=False)
    return copy, 2 * 8192**3 / timed(lambda: a @ b, 30) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=GROUPS, default=list(GROUPS))
    parsed = parser.parse_args()
    torch.manual_seed(0)
    copy, rate = ceilings()
    rows = []
    for group in parsed.only:
        for cell in GROUPS[group]():
            found = list(measure(cell, copy, rate))
            ours = next((row["both ms"] for row in found if row["by"] == "ours"), 0.0)
            for row in found:
                row["against ours"] = row["both ms"] / ours if ours else 0.0
                print("  ".join(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()), flush=True)
            rows += found
            torch._dynamo.reset()
            torch.cuda.empty_cache()
        record("kernels", rows, shapes="bf16", copy_gb_s=copy, product_tflop_s=rate)  # so far: a run may be cut off


if __name__ == "__main__":
    main()
