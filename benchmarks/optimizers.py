"""An 8-bit AdamW step over all weights of Llama-3.2-1B and Llama-2-7B, whole and as one of eight ranks holds them,
against torch's fused AdamW, bitsandbytes, torchao and FlashOptim, and against the rate of a copy.

`device` is the time between two events, with so much work before the first that the host has told the device all of
the step by then; whoever waits for the device in between pays for it here. `graph` is our kernel alone, replayed from a
CUDA graph. `kernels` is the sum over kernels by torch's profiler. `wall` is what a training step sees, from one idle
device to the next; ours are on the DTensors that training has, unless a row says otherwise. `host` is the time until
the call returns. Bytes are those that a step has to move: the gradient once, weights and state to and fro.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from record import record, table
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from triton.testing import do_bench, do_bench_cudagraph

from farspan.kernels import adamw8
from farspan.kernels.adamw8 import Part, Place, Update, update_ref
from farspan.kernels.master import RESIDUALS, Master, split
from farspan.kernels.random import key
from farspan.models.block import Block
from farspan.models.decoder import Decoder
from farspan.models.ffns import Swiglu
from farspan.models.mixers import Softmax
from farspan.models.roles import Role, roles
from farspan.parallel.context.local import Local
from farspan.parallel.fsdp import local
from farspan.platform.optim import Adamw8
from farspan.platform.optim.adamw8 import part

Row = dict[str, Any]
RANKS = 8
FAST, SLOW = (0.9, 0.95), (0.9, 0.999)
MASTERS: tuple[Master, ...] = ("residual8", "none", "residual16", "fp32")
MODELS = {
    "1B": Decoder(
        width=2048,
        vocabulary=128256,
        tied=True,
        blocks=(Block(repeat=16, mixer=Softmax(heads=32, kv_heads=8, head_dim=64), ffn=Swiglu(hidden=8192)),),
    ),
    "7B": Decoder(
        width=4096, vocabulary=32000, blocks=(Block(repeat=32, mixer=Softmax(heads=32), ffn=Swiglu(hidden=11008)),)
    ),
}
TINY = Decoder(width=256, vocabulary=256, blocks=(Block(repeat=2, mixer=Softmax(heads=4), ffn=Swiglu(hidden=512)),))


@dataclass(frozen=True)
class Case:
    """The weights that one rank updates."""

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    roles: Mapping[str, Role]

    @property
    def numel(self) -> int:
        return sum(map(prod, self.shapes.values()))


@dataclass(frozen=True)
class Step:
    """An optimizer over weights that are there, ready to be timed."""

    run: Callable[[], object]
    moved: int
    """Bytes, by design."""
    kernel: Callable[[], object] | None = None
    """What may be captured in a graph."""


@dataclass(frozen=True)
class Competitor:
    name: str
    build: Callable[[Case, torch.device], Step]
    held: float
    """Bytes of a parameter on the device, about: a case that cannot fit is left out."""
    note: str = ""
    cases: Sequence[str] | None = None
    """None: all."""


def case_of(name: str, model: Decoder, ranks: int = 1) -> Case:
    """ranks: how many cut the rows between them."""
    with torch.device("meta"):
        built = model.build(256, Local())
    shapes = {n: (-(-w.shape[0] // ranks), *w.shape[1:]) for n, w in built.named_parameters()}
    return Case(f"{name}, 1/{ranks}" if ranks > 1 else name, shapes, roles(built))


def cases(tiny: bool) -> list[Case]:
    models = {"tiny": TINY} if tiny else MODELS
    return [case_of(name, model, ranks) for name, model in models.items() for ranks in (1, RANKS)]


def made(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, nn.Parameter]:
    """Weights and their gradients, of the sizes that training has."""
    found = {}
    for name, shape in case.shapes.items():
        found[name] = nn.Parameter(torch.empty(shape, dtype=dtype, device=device).normal_(0.0, 0.02))
        found[name].grad = torch.empty(shape, dtype=dtype, device=device).normal_(0.0, 1e-4)
    return found


def spread(weights: Mapping[str, nn.Parameter], mesh: DeviceMesh) -> dict[str, nn.Parameter]:
    """The same as DTensors."""
    found = {}
    for name, weight in weights.items():
        over = partial(DTensor.from_local, device_mesh=mesh, placements=[Shard(0)], run_check=False)
        found[name] = nn.Parameter(over(weight.detach()))
        assert weight.grad is not None
        found[name].grad = over(weight.grad)
    return found


def ours(config: Adamw8, mesh: DeviceMesh | None, case: Case, device: torch.device) -> Step:
    weights = made(case, config.weight_type, device)
    held = weights if mesh is None else spread(weights, mesh)
    with device:
        optimizer = config.build(held, case.roles, 0)
    scale = torch.ones((), dtype=torch.float64, device=device)
    parts = [part(w, optimizer.states[n], key(0, "adamw8", n)) for n, w in held.items()]
    update, numbers = Update(parts, config.adam), config.adam.numbers(optimizer.steps.clone(), 1e-4, scale)
    gradients = [local(w.grad) for w in held.values() if w.grad is not None]
    size = config.weight_type.itemsize
    state = sum(config.state_bytes(shape, case.roles[name]) for name, shape in case.shapes.items())
    moved = 3 * size * case.numel + 2 * state
    return Step(lambda: optimizer.update(1e-4, scale), moved, lambda: update(gradients, numbers))


def theirs(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], dtype: torch.dtype, case: Case, device: torch.device
) -> Step:
    """What a first step leaves on the device is taken for the state's size."""
    weights = list(made(case, dtype, device).values())
    before = allocated(device)
    optimizer = make(weights)
    optimizer.step()
    state = allocated(device) - before
    return Step(optimizer.step, 3 * dtype.itemsize * case.numel + 2 * state)


def allocated(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def fused(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weights, lr=1e-4, betas=FAST, weight_decay=0.1, fused=True)


def bitsandbytes(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit

    found: torch.optim.Optimizer = AdamW8bit(weights, lr=1e-4, betas=FAST, weight_decay=0.1)
    return found


def flashoptim(weights: list[nn.Parameter], *, bits: int | None) -> torch.optim.Optimizer:
    from flashoptim import FlashAdamW

    found: torch.optim.Optimizer = FlashAdamW(weights, lr=1e-4, betas=FAST, weight_decay=0.1, master_weight_bits=bits)
    return found


def torchao(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    found: torch.optim.Optimizer = AdamW8bit(weights, lr=1e-4, betas=FAST, weight_decay=0.1, bf16_stochastic_round=True)
    return found


def competitors(mesh: DeviceMesh, names: Sequence[str]) -> Iterator[Competitor]:
    """The most telling first. Ours quantise every matrix, as peers do, unless the note says otherwise."""
    half = torch.bfloat16

    def ours_by(master: Master, betas: tuple[float, float]) -> Competitor:
        config = Adamw8(rate=1e-4, betas=betas, master=master, exact=())
        beta, held = f", β₂ {betas[1]}", {"fp32": 10.1, "residual16": 8.1, "residual8": 7.1, "none": 6.1}[master]
        return Competitor(f"ours, {master}{beta}", partial(ours, config, mesh), held)

    yield ours_by("residual8", FAST)
    yield ours_by("residual8", SLOW)
    yield Competitor("flashoptim AdamW, 24 bits", partial(theirs, partial(flashoptim, bits=24), half), 7.2)
    yield Competitor("bitsandbytes AdamW8bit", partial(theirs, bitsandbytes, half), 6.1)
    yield Competitor("torch fused, bf16", partial(theirs, fused, half), 8)
    yield ours_by("none", FAST)
    yield ours_by("none", SLOW)
    yield ours_by("residual16", FAST)
    default = Adamw8(rate=1e-4)
    note = "as configured by default: fp32 moments of embedding, head and norms"
    yield Competitor("ours, residual8, default", partial(ours, default, mesh), 9.0, note)
    plain = Adamw8(rate=1e-4, exact=())
    yield Competitor("ours, residual8, plain", partial(ours, plain, None), 7.1, "on plain tensors")
    yield ours_by("residual16", SLOW)
    yield ours_by("fp32", FAST)
    yield ours_by("fp32", SLOW)
    yield Competitor("flashoptim AdamW, bf16", partial(theirs, partial(flashoptim, bits=None), half), 6.2)
    yield Competitor("torch fused, fp32", partial(theirs, fused, torch.float32), 16, "fp32 gradients")
    note = "compiles for every shape; timed after that"
    yield Competitor("torchao AdamW8bit", partial(theirs, torchao, half), 6.1, note, names[:2])


EMPTY: Row = dict.fromkeys(
    (
        "device ms",
        "graph ms",
        "kernels ms",
        "wall ms",
        "wall ms/1e9",
        "host µs",
        "launches",
        "B/param",
        "GB/s",
        "of copy",
    ),
    "",
)


def measure(step: Step, case: Case, device: torch.device, copy: float) -> Row:
    for _ in range(2):
        step.run()
    walls, hosts = zip(*(wall(step.run, device) for _ in range(7)), strict=True)
    found = {**EMPTY, "wall ms": 1e3 * median(walls), "wall ms/1e9": 1e12 * median(walls) / case.numel}
    found |= {"host µs": 1e6 * median(hosts), "B/param": step.moved / case.numel}
    if device.type != "cuda":
        return found
    alone = found["device ms"] = median(on_device(step.run, median(hosts)) for _ in range(5))
    if step.kernel is not None:
        step.kernel()
        alone = found["graph ms"] = do_bench_cudagraph(step.kernel, rep=20, return_mode="median")
    rate = step.moved / alone / 1e6
    found |= {"GB/s": rate, "of copy": rate / copy}
    if not case.name.startswith("1B"):
        return found
    try:
        return {**found, **profiled(step.run)}
    except Exception as error:  # the profiler may be out of bounds where the device is shared
        print(f"profiler: {error}", file=sys.stderr)
        return found


def wall(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds until the device is idle again, and until the call returns."""
    settle(device)
    begun = time.perf_counter()
    run()
    told = time.perf_counter()
    settle(device)
    return time.perf_counter() - begun, told - begun


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def on_device(run: Callable[[], object], host: float) -> float:
    """Milliseconds between events, the device kept busy before for as long as the host takes to tell it."""
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(int(2e9 * min(0.3, 2 * host + 1e-3)))
    begun.record()
    run()
    ended.record()
    torch.cuda.synchronize()
    return float(begun.elapsed_time(ended))


def profiled(run: Callable[[], object]) -> Row:
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    marks = ("Optimizer.", "Memcpy", "Memset", "ProfilerStep")
    kernels = [
        event
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
        and not event.name.startswith(marks)
        and not getattr(event, "is_user_annotation", False)
    ]
    return {"kernels ms": sum(e.time_range.elapsed_us() for e in kernels) / 1e3, "launches": len(kernels)}


def copy_rate() -> float:
    """GB/s, reads and writes counted, of a copy of a GB; in a CUDA graph it would take the slower way."""
    x = torch.zeros(1 << 30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() / do_bench(lambda: y.copy_(x), rep=60, return_mode="median") / 1e6


def alone(device: torch.device) -> DeviceMesh:
    """This process as a mesh of one rank."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.TCPStore("127.0.0.1", 0, 1, True), rank=0, world_size=1)
    return init_device_mesh(device.type, (1,), mesh_dim_names=("shard",))


def check(device: torch.device) -> None:
    """The kernel against its twin on a few weights, odd ones among them. RuntimeError: they are too far apart."""
    shapes: list[tuple[int, ...]] = [(257, 256), (5003,), (3, 512), (64, 11008)]
    shapes += [(1601, 1280)] if device.type == "cuda" else []
    rows = []
    for master in MASTERS:
        for betas in (FAST, SLOW):
            adam = Adamw8(rate=1e-3, betas=betas).adam
            for block in (32, 256) if master == "residual8" else (256,):
                parts = [_part(shape, master, block, i, device) for i, shape in enumerate(shapes)]
                twins = [
                    replace(p, **{n: t.clone() for n, t in vars(p).items() if isinstance(t, Tensor)}) for p in parts
                ]
                rows.append({"master": master, "β₂": betas[1], "block": block, **_apart(parts, twins, adam, device)})
    print(table(rows), flush=True)
    bad = [r for r in rows if r["codes apart"] > 1 or r["of codes"] > 2e-3 or r["weights"] > 2.0**-7]
    if bad:
        raise RuntimeError(f"the kernel is not its twin: {bad}")
    print("the kernel is its twin", flush=True)


def _part(shape: tuple[int, ...], master: Master, block: int, number: int, device: torch.device) -> Part:
    block = block if len(shape) > 1 and shape[-1] % max(1, block) == 0 else 0
    weight = torch.randn(shape, device=device) * 0.02
    residual = torch.zeros(shape, dtype=RESIDUALS[master], device=device) if master in RESIDUALS else None
    held = weight if master == "fp32" else weight.bfloat16()
    if residual is not None:
        split(weight, held, residual)
    moments = [torch.zeros(shape, dtype=torch.uint8 if block else torch.float32, device=device) for _ in range(2)]
    scales = [torch.zeros((*shape[:-1], shape[-1] // block), device=device) for _ in range(2)] if block else [None] * 2
    place = Place((0,) * len(shape), shape)
    return Part(held, *moments, place, key(3, number), len(shape) > 1, residual, *scales)


def in_line(state: Tensor, signed: bool) -> Tensor:
    """Signed codes as numbers that grow with what they stand for, of which two stand for zero; all else as it is."""
    state = state.double()
    return torch.where(state > 127, 128 - state, state) if signed else state


def _apart(parts: list[Part], twins: list[Part], adam: adamw8.Adam, device: torch.device) -> Row:
    """The worst over three steps, each from where the twin has come to."""
    update, steps = Update(parts, adam), torch.zeros((), dtype=torch.float64, device=device)
    found = {"codes apart": 0, "of codes": 0.0, "weights": 0.0}
    for _ in range(3):
        gradients = [torch.randn(p.weight.shape, device=device).bfloat16() for p in parts]
        numbers = adam.numbers(steps, 1e-3, torch.full((), 0.5, dtype=torch.float64, device=device))
        update(gradients, numbers)
        for p, twin, gradient in zip(parts, twins, gradients, strict=True):
            update_ref(twin, gradient, numbers, adam)
            for name in ("first", "second"):
                a, b = (in_line(getattr(of, name), p.block > 0 and name == "first") for of in (p, twin))
                codes = (a - b).abs()
                codes = codes if p.block else (codes > 1e-8 + 1e-5 * getattr(twin, name).abs()) * 2.0  # fp32: close
                found["codes apart"] = max(found["codes apart"], int(codes.max()))
                found["of codes"] = max(found["of codes"], float((codes > 0).double().mean()))
            apart = (p.weight.float() - twin.weight.float()).abs() / (twin.weight.float().abs() + 1e-3)
            found["weights"] = max(found["weights"], float(apart.max()))
            for a, b in zip(vars(p).values(), vars(twin).values(), strict=True):
                if isinstance(a, Tensor):
                    a.copy_(b)
    return found


def sweep(case: Case, device: torch.device) -> list[Row]:
    """Sets the kernel's constants; the best three pairs of tile and warps then meet all turns, and chance as well."""
    pairs = [
        (tile, warps) for tile in (1024, 2048, 4096, 8192) for warps in (2, 4, 8) if 8 <= tile // warps // 32 <= 64
    ]
    chosen = adamw8.TILE, adamw8.TURNS, adamw8.WARPS
    rows = [_swept(case, device, FAST, tile, 4, warps) for tile, warps in pairs]
    for row in sorted((row for row in rows if row["graph ms"]), key=lambda row: row["graph ms"])[:3]:
        for turns in (1, 2, 8, 16):
            rows.append(_swept(case, device, FAST, row["tile"], turns, row["warps"]))
        for turns in (1, 2, 4, 8, 16):
            rows.append(_swept(case, device, SLOW, row["tile"], turns, row["warps"]))
    adamw8.TILE, adamw8.TURNS, adamw8.WARPS = chosen
    return sorted(rows, key=lambda row: (row["β₂"], row["graph ms"] or 1e9))


def _swept(case: Case, device: torch.device, betas: tuple[float, float], tile: int, turns: int, warps: int) -> Row:
    adamw8.TILE, adamw8.TURNS, adamw8.WARPS = tile, turns, warps
    row: Row = {"case": case.name, "β₂": betas[1], "tile": tile, "turns": turns, "warps": warps, "graph ms": ""}
    try:
        step = ours(Adamw8(rate=1e-4, betas=betas, exact=()), None, case, device)
        assert step.kernel is not None
        step.kernel()
        if device.type == "cuda":
            row["graph ms"] = do_bench_cudagraph(step.kernel, rep=40, return_mode="median")
    except Exception as error:
        print(f"{row}: {str(error)[:300]}", file=sys.stderr)
    print(row, flush=True)
    return row


def compare(every: list[Case], device: torch.device, copy: float, until: float) -> Iterator[Row]:
    for who in competitors(alone(device), [case.name for case in every]):
        for case in every:
            if who.cases is not None and case.name not in who.cases:
                continue
            row = {"case": case.name, "by": who.name, **EMPTY, "note": who.note}
            try:
                _refuse(who, case, device, until)
                row |= measure(who.build(case, device), case, device, copy)
            except Exception as error:
                row["note"] = f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
            if device.type == "cuda":
                torch.cuda.empty_cache()
            print("  ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()), flush=True)
            yield row


def _refuse(who: Competitor, case: Case, device: torch.device, until: float) -> None:
    if time.perf_counter() > until:
        raise TimeoutError("not begun: the time given to this program is over")
    if device.type != "cuda":
        return
    need, free = who.held * case.numel + 2e9, torch.cuda.mem_get_info()[0]
    if need > free:
        raise MemoryError(f"not begun: needs about {need / 1e9:.0f} GB, {free / 1e9:.0f} are free")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="first compares the kernel with its twin")
    parser.add_argument("--sweep", action="store_true", help="tries sizes of the kernel's programs, and nothing else")
    parser.add_argument("--tiny", action="store_true", help="a small model on the CPU, to see whether all of this runs")
    parser.add_argument("--cases", nargs="*", help="of 1B, '1B, 1/8', 7B, '7B, 1/8'; default: all")
    parser.add_argument("--seconds", type=float, default=220, help="after these, rows are no longer begun")
    parsed = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cpu" if parsed.tiny else "cuda")
    every = [case for case in cases(parsed.tiny) if not parsed.cases or case.name in parsed.cases]
    if parsed.check:
        check(device)
    if parsed.sweep:
        rows = [row for case in every[:2] for row in sweep(case, device)]
        print(table(rows))
        if not parsed.tiny:
            record("optimizers_sweep", rows)
        return
    copy, until = 0.0 if parsed.tiny else copy_rate(), time.perf_counter() + parsed.seconds
    rows = list(compare(every, device, copy, until))
    dist.destroy_process_group()
    if parsed.tiny:
        print(table(rows))
    else:
        record("optimizers", rows, shapes="Llama-3.2-1B and Llama-2-7B, bf16 gradients", copy_gb_s=copy)


if __name__ == "__main__":
    main()
