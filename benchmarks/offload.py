"""A training step whose optimizer state waits in host memory, against one with the state on the GPU and against
DeepSpeed's ZeRO-Offload; and the largest model that one GPU trains so.

A step is the trainer's: forward, backward, norm, update of one micro-batch of 2048 tokens, no accumulation that would
hide the update. Each setting runs in a process of its own. `step` is the median between starts of steps while the host
runs ahead. `update` is an update by itself, from a known norm until the last weight is updated; `predicted` is what
the split foretold of it. `exposed` is the share of it that a step is longer than forward, backward and norm alone.
`link` is what the update moves each way, together, over the time until all of it is back, and the share of what the
host link was measured to need for it.
"""

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
import torch.distributed as dist
from record import record, table
from torch import Tensor, nn

from farspan.models.block import Block
from farspan.models.decoder import Decoder, DecoderModel, initial
from farspan.models.ffns import Swiglu
from farspan.models.mixers import Softmax
from farspan.models.roles import roles
from farspan.parallel.context.local import Local
from farspan.parallel.context.shard import Batch
from farspan.parallel.engine import Engine, Held
from farspan.parallel.fsdp import fill, local
from farspan.parallel.mesh import Mesh, Parallel
from farspan.platform.optim import Adamw, Adamw8
from farspan.platform.optim.cost import WINDOW
from farspan.platform.optim.offload import Offloaded, split_for, units_of
from farspan.platform.optim.placement import PIECE, Interleaved, Split, Streamed
from farspan.platform.optim.queues import Mark, Queue, Queues, queues_of
from farspan.platform.optim.rates import Rates, measure

Row = dict[str, Any]
RATE, DECAY, BETAS, MAX_NORM = 1e-4, 0.1, (0.9, 0.95), 1.0
HEADROOM = 0.9
"""Of the host's memory: what a setting is foretold to need must be less."""


def decoder(width: int, depth: int, hidden: int, heads: int, kv_heads: int, vocabulary: int, tied: bool) -> Decoder:
    mixer = Softmax(heads=heads, kv_heads=kv_heads, head_dim=width // heads)
    block = Block(repeat=depth, mixer=mixer, ffn=Swiglu(hidden=hidden))
    return Decoder(width=width, vocabulary=vocabulary, tied=tied, blocks=(block,))


MODELS = {
    "1b": decoder(2048, 16, 8192, 32, 8, 128256, True),
    "3b": decoder(3072, 28, 8192, 24, 8, 128256, True),
    "7b": decoder(4096, 32, 11008, 32, 32, 32000, False),
    "tiny": decoder(64, 3, 256, 2, 1, 256, False),
}
"""Llama-3.2-1B and -3B, Llama-2-7B. DeepSpeed holds 16 bytes a parameter in host memory, and needs room beside them:
of 128 GiB 3B is the largest common size."""

EIGHT, HALVES = Adamw8(rate=RATE, betas=BETAS), Adamw(rate=RATE, betas=BETAS, offload=Streamed())
OURS: dict[str, tuple[Adamw | Adamw8, float]] = {
    "adamw8, resident": (EIGHT, 0),
    "adamw8, streamed": (Adamw8(rate=RATE, betas=BETAS, offload=Streamed()), 3.7),
    "adamw, streamed": (HALVES, 10.5),
    "adamw, interleaved, stride": (Adamw(rate=RATE, betas=BETAS, offload=Interleaved(pattern="stride")), 18),
    "adamw, interleaved, optimum": (Adamw(rate=RATE, betas=BETAS, offload=Interleaved(pattern="optimum")), 14),
}
"""By setting: the optimizer, and about how many bytes of a parameter it keeps in host memory."""

SPEED: dict[str, tuple[int, bool]] = {
    "DeepSpeed, stage 2": (2, False),
    "DeepSpeed, stage 3": (3, False),
    "DeepSpeed, stage 3, blocking copies": (3, True),
}
"""By setting: the stage, and whether gradients go to the host as before August 2026."""
SPEED_HOST = 22.0
"""Bytes of a parameter: fp32 weights, gradients and moments, and what pinned memory in powers of two adds."""


INSTEAD = "torch's fused AdamW, DeepSpeedCPUAdam does not compile"
NOT_COMPILED = "OFFLOAD_WITHOUT_CPU_ADAM"
"""An environment variable: what did not compile in one process is not tried in the next."""


@dataclass(frozen=True)
class Plan:
    """What all settings are measured with."""

    device: torch.device
    length: int
    steps: int
    corpus: Path | None = None
    kept: float | None = None
    """See `Engine`: None keeps all activations, 0 recomputes blocks."""


def batches(plan: Plan) -> Iterator[Batch]:
    """One row after the other of the corpus, or of Python's sources, a token a byte."""
    sources = [plan.corpus] if plan.corpus else sorted(Path(json.__file__).parents[1].glob("*.py"))
    text = torch.frombuffer(bytearray(b"\n".join(path.read_bytes() for path in sources)), dtype=torch.uint8).long()
    at, length = 0, plan.length
    while True:
        row = text[at : at + length + 1][None]
        at = (at + length) % (len(text) - length - 1)
        batch = Batch(
            tokens=row[:, :-1].contiguous(),
            labels=row[:, 1:].contiguous(),
            positions=torch.arange(length)[None],
            cu_seqlens=None,
            lengths=(length,),
            valid=length,
        )
        yield batch.map(Tensor.pin_memory) if plan.device.type == "cuda" else batch


def build(model: Decoder) -> DecoderModel:
    with torch.device("meta"):
        return model.build(256, Local())


@cache
def alone(device: torch.device) -> Mesh:
    """This process as all ranks there are."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.TCPStore("127.0.0.1", 0, 1, True), rank=0, world_size=1)
    return Mesh(Parallel().sizes(1), device, dist.new_group(backend="gloo"))


class Run:
    """A model and its optimizer, put together as the trainer does."""

    def __init__(self, model: Decoder, config: Adamw | Adamw8, plan: Plan, queues: Queues | None = None) -> None:
        built, self.device, self.batches = build(model), plan.device, batches(plan)
        known = roles(build(model))
        self.rates: Rates | None = None
        self.split: Split | None = None
        half = torch.bfloat16
        self.engine = Engine(
            built,
            list(built.layers),
            initial(built),
            alone(plan.device),
            context=Local(),
            seed=0,
            compute=half,
            held=Held(half, half),
            kept=plan.kept,
            gather="layer",  # what stays gathered would be a second copy of all weights
        )
        weights = self.engine.weights
        self.numel = sum(weight.numel() for weight in weights.values())
        self.optimizer: Any
        if config.offload is None:
            with plan.device:
                self.optimizer = config.build(weights, known, 0)
            return
        self.rates = measure(plan.device, lambda: None)
        self.units = units_of(config, weights, known, 0, self.engine.units)
        away = half if isinstance(config.offload, Streamed) and config.offload.gradients else None
        self.away, self.split = away is not None, split_for(config.offload, self.units, self.rates, away)
        if plan.kept is not None and not self.away:
            self._rehearse()
        queues = queues_of(plan.device) if queues is None else queues
        self.optimizer = Offloaded(self.units, self.split.places, queues, plan.device, away)
        self.engine.gate(self.optimizer.ready)
        if self.away:
            self.engine.give_away(self.optimizer.taken, self.optimizer.take)

    def _rehearse(self) -> None:
        """A pass with the window's memory taken: what does not fit fails before minutes of locking host memory."""
        window = WINDOW * min(PIECE, max(unit.layout.size for unit in self.units))
        taken = torch.empty(window, dtype=torch.uint8, device=self.device)
        self.without()
        settle(self.device)
        del taken
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def backward(self) -> tuple[Tensor, Tensor]:
        """Loss, and what the gradient is multiplied by."""
        batch = next(self.batches)
        loss = self.engine.sum(self.engine.forward_backward([batch], batch.valid))
        norm = self.engine.gradient_norm()
        scale = (MAX_NORM / (norm + 1e-6)).clamp(max=1.0)
        return loss, torch.where(torch.isfinite(loss) & torch.isfinite(norm), scale, 0.0)

    def step(self, rate: float = RATE) -> Tensor:
        loss, scale = self.backward()
        self.optimizer.update(rate, scale)
        self.engine.clear()
        return loss

    def without(self) -> None:
        """All of a step but the update."""
        self.backward()
        self.engine.clear()

    def update(self) -> tuple[float, float]:
        """Seconds until every weight is updated, and until all state is back, of an update and nothing beside it."""
        _, scale = self.backward()
        settle(self.device)
        begun = time.perf_counter()
        self.optimizer.update(RATE, scale)
        if isinstance(self.optimizer, Offloaded):
            for i in range(len(self.engine.units)):
                self.optimizer.ready(i)
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        updated = time.perf_counter() - begun
        settle(self.device)
        whole = time.perf_counter() - begun
        self.engine.clear()
        return updated, whole

    def moved(self) -> tuple[int, int]:
        """Bytes to the device and back, of one update."""
        down = up = 0
        if self.split is not None:
            for unit, place in zip(self.units, self.split.places, strict=True):
                numel = sum(local(weight).numel() for weight in unit.weights.values())
                gradient = 2 * numel if self.away else 0
                down += {"resident": 0, "streamed": unit.layout.size + gradient, "cpu": 2 * numel}[place]
                up += {"resident": 0, "streamed": unit.layout.size, "cpu": 4 * numel}[place]
        return down, up


def settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def paced(run: Callable[[], object], count: int, device: torch.device) -> float:
    """Seconds from one start to the next, the median, while the host runs ahead; the first two are not counted."""
    settle(device)
    marks: list[Any] = []
    for _ in range(count + 3):
        mark = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else time.perf_counter()
        if device.type == "cuda":
            mark.record()
        marks.append(mark)
        run()
    settle(device)
    return median(a.elapsed_time(b) / 1e3 if device.type == "cuda" else b - a for a, b in pairwise(marks[2:]))


WARMUP = 5
LOSS = f"loss {WARMUP}"
"""That of the last step before those that are timed: every setting has seen the same rows by then."""
KEYS = ("s/step", "tokens/s", "without update s", "update s", "predicted s", "exposed", "link GB/s", "of link")
KEYS += ("device GB", "retries", "host GB", "units", LOSS, "note")
EMPTY: Row = dict.fromkeys(KEYS, "")


def ours(model: Decoder, config: Adamw | Adamw8, plan: Plan) -> Row:
    run = Run(model, config, plan)
    loss = [run.step() for _ in range(WARMUP)][-1].item()
    fresh_peak(plan.device)
    whole = paced(run.step, plan.steps, plan.device)
    memory = peak(plan.device)
    rest = paced(run.without, plan.steps, plan.device)
    update, back = (median(times) for times in zip(*[run.update() for _ in range(4)][1:], strict=True))
    found = {**EMPTY, "s/step": whole, "tokens/s": plan.length / whole, "without update s": rest, "update s": update}
    found |= {"exposed": (whole - rest) / update, **memory, "host GB": host_gb(), LOSS: loss}
    if run.split is not None and run.rates is not None:
        down, up = run.moved()
        found |= {"predicted s": run.split.predicted.update, "link GB/s": (down + up) / back / 1e9}
        found |= {"of link": needed(down, up, run.rates) / back, "units": brief(run.split.code)}
    return found


def needed(down: int, up: int, rates: Rates) -> float:
    """Seconds that the link alone needs: both ways together, then the longer way."""
    both = min(down, up)
    return both / rates.duplex + (down - both) / rates.h2d + (up - both) / rates.d2h


def brief(code: str) -> str:
    return " ".join(f"{code.count(letter)}{letter}" for letter in "rsc" if letter in code)


def fresh_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak(device: torch.device) -> Row:
    """retries: how often the allocator had to wait for the device, and gave memory back, to find room."""
    if device.type != "cuda":
        return {}
    retries = torch.cuda.memory_stats().get("num_alloc_retries", 0)
    return {"device GB": torch.cuda.max_memory_allocated() / 1e9, "retries": retries}


def host_gb() -> float:
    """The most that this process ever had, locked memory included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def zero_offload(model: Decoder, stage: int, blocking: bool, plan: Plan) -> Row:
    """DeepSpeed over the same model, with its own defaults where they are not told here."""
    os.environ.setdefault("DS_ACCELERATOR", plan.device.type)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(free_port())
    import deepspeed
    from deepspeed.utils import set_z3_leaf_module

    if plan.device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, for a minute
    note = f"DeepSpeed {deepspeed.__version__}"
    if blocking:
        block_copies()
    built = build(model).to(torch.bfloat16).to_empty(device=plan.device)
    fill(cast(Any, dict(built.named_parameters())), initial(built), 0)
    if stage == 3:
        for layer in built.layers:
            set_z3_leaf_module(layer, True)  # its kernels read weights of modules that are never called
    optimizer, by = cpu_adam(built.parameters())
    host = {"device": "cpu", "pin_memory": plan.device.type == "cuda"}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": MAX_NORM,
        "bf16": {"enabled": True},
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "offload_optimizer": host},
    }
    speed = deepspeed.initialize(model=built, optimizer=optimizer, config=config)[0]
    rows = batches(plan)

    def backward() -> Tensor:
        batch = next(rows).to(plan.device)
        loss: Tensor = speed(batch) / batch.valid
        speed.backward(loss)
        settle(plan.device)
        return loss.detach()

    times, losses = [], []
    for i in range(WARMUP + plan.steps):
        if i == WARMUP:
            fresh_peak(plan.device)
        begun = time.perf_counter()
        losses.append(backward().item())
        known = time.perf_counter()
        speed.step()
        settle(plan.device)
        times.append((known - begun, time.perf_counter() - known))
    rest, update = (median(part) for part in zip(*times[WARMUP:], strict=True))
    found = {**EMPTY, "s/step": rest + update, "tokens/s": plan.length / (rest + update), "without update s": rest}
    found |= {"update s": update, "exposed": 1.0, **peak(plan.device), "host GB": host_gb(), LOSS: losses[WARMUP - 1]}
    return {**found, "note": f"{note}, {by}"}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def cpu_adam(weights: Iterable[nn.Parameter]) -> tuple[torch.optim.Optimizer, str]:
    """DeepSpeed's own, where it can be compiled, else torch's fused kernel for CPUs."""
    told: dict[str, Any] = {"lr": RATE, "betas": BETAS, "weight_decay": DECAY}
    weights = list(weights)
    if NOT_COMPILED not in os.environ:
        os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")  # it has no CUDA in it
        try:
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return DeepSpeedCPUAdam(weights, adamw_mode=True, **told), "DeepSpeedCPUAdam"
        except Exception as error:
            print(f"DeepSpeedCPUAdam: {str(error)[-300:]}", flush=True)
    return torch.optim.AdamW(weights, fused=True, **told), INSTEAD


def block_copies() -> None:
    """Has stage 3 copy gradients as before DeepSpeed 7dfa67ae: cast on the host, which waits for each.

    AttributeError: this version copies elsewhere, or is older and blocks by itself.
    """
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Stage3

    name = "_offload_grad_partition_at_boundary"
    if not hasattr(Stage3, name):
        raise AttributeError(f"DeepSpeed's stage 3 has no {name}: not made to block")

    def copy(self: Any, param: Any, gradient: Tensor, *_: Any) -> None:
        number = self.get_param_id(param)
        group, start, _size = self.grad_position[number]
        self.norm_for_param_grads[number] = self._constant_buffered_norm2(gradient)
        self.fp32_partitioned_groups_flat[group].grad.narrow(0, start, gradient.numel()).copy_(gradient)

    setattr(Stage3, name, copy)


class Late:
    """Queues of which one is held up before each piece of work."""

    def __init__(self, queues: Queues, slow: Queue) -> None:
        self._queues, self._slow = queues, slow
        self.host, self.now, self.hold, self.reached = queues.host, queues.now, queues.hold, queues.reached
        self.seconds, self.close = queues.seconds, queues.close

    def run(self, queue: Queue, work: Callable[[], object], after: Iterable[Mark], uses: Sequence[Tensor] = ()) -> Mark:
        def late() -> None:
            if queue == self._slow and torch.cuda.is_available():
                torch.cuda._sleep(20_000_000)
            work()

        return self._queues.run(queue, late, after, uses)


def check(plan: Plan) -> None:
    """Streamed is resident bit for bit over five steps, whichever queue is late. RuntimeError: it is not."""
    torch.use_deterministic_algorithms(True)
    model = MODELS["tiny"] if plan.device.type == "cpu" else decoder(512, 6, 2048, 8, 2, 512, False)
    slow: Sequence[Queue] = ("update", "in", "out")
    rows = []
    for streamed in (Adamw8(rate=1e-2, offload=Streamed()), Adamw(rate=1e-2, offload=Streamed())):
        kept = Adamw8(rate=1e-2) if isinstance(streamed, Adamw8) else streamed.in_halves
        reference = five(Run(model, kept, plan))
        settings: dict[str, Callable[[], Run]] = {
            "resident again": lambda kept=kept: Run(model, kept, plan),
            "streamed": lambda streamed=streamed: Run(model, streamed, plan),
        }
        for queue in slow:
            late = Late(queues_of(plan.device), queue)
            settings[f"streamed, {queue} late"] = lambda streamed=streamed, late=late: Run(model, streamed, plan, late)
        for name, made in settings.items():
            found = five(made())
            bits = sum(differing(found[tensor], reference[tensor]) for tensor in reference)
            same = found.keys() == reference.keys()
            row = {"optimizer": type(streamed).__name__, "setting": name, "tensors": len(found), "bits": bits}
            rows.append({**row, "same tensors": same})
            print(rows[-1], flush=True)
    bad = [row for row in rows if row["bits"] or not row["same tensors"]]
    if bad:
        raise RuntimeError(f"streamed is not resident: {bad}")
    print("streamed is resident, bit for bit", flush=True)


def five(run: Run) -> dict[str, Tensor]:
    """Losses, weights and state after five steps, on the host."""
    losses = torch.stack([run.step(1e-2) for _ in range(5)])
    found = {f"weight {name}": weight.detach() for name, weight in run.engine.weights.items()}
    found |= {f"state {name}": tensor for name, tensor in run.optimizer.state().items()}
    return {"losses": losses.cpu(), **{name: local(tensor).cpu().clone() for name, tensor in found.items()}}


def differing(a: Tensor, b: Tensor) -> int:
    """How many bits of two tensors of one shape and type differ."""
    apart = a.contiguous().flatten().view(torch.uint8) ^ b.contiguous().flatten().view(torch.uint8)
    return sum(int(((apart >> bit) & 1).sum()) for bit in range(8))


def of_size(parameters: float, vocabulary: int = 512) -> Decoder:
    """A decoder of about so many parameters: as many layers as the width has heads of 128, in Llama's proportions.

    Weights of products in eighths of whole blocks of 256 codes, whatever tp is.
    """
    widths = range(1024, 32768, 1024)
    found = []
    for width in widths:
        hidden = max(2048, round(8 / 3 * width / 2048) * 2048)
        layer = 2 * width * width + 2 * width * 1024 + 3 * width * hidden
        depth = max(1, round((parameters - 2 * vocabulary * width) / layer))
        found.append((abs(depth / (width / 128) - 1), width, depth, hidden))
    _, width, depth, hidden = min(found)
    return decoder(width, depth, hidden, width // 128, 8, vocabulary, False)


def largest(parameters: float, plan: Plan) -> Row:
    """Twenty steps, printed one by one."""
    tiny = plan.device.type == "cpu"
    model = MODELS["tiny"] if tiny else of_size(parameters)
    begun = time.perf_counter()
    run = Run(model, Adamw8(rate=RATE, betas=BETAS, offload=Streamed(gradients=True)), plan)
    block = model.blocks[0]
    made = f"{run.numel:,} parameters: {model.depth} layers of width {model.width}, {block.ffn}"
    print(f"{made}; ready after {time.perf_counter() - begun:.0f} s, host {host_gb():.1f} GB", flush=True)
    fresh_peak(plan.device)
    losses, times = [], []
    for step in range(plan.steps):
        settle(plan.device)
        begun = time.perf_counter()
        losses.append(run.step(RATE * min(1.0, (step + 1) / 5)).item())
        times.append(time.perf_counter() - begun)
        print(f"step {step + 1}: loss {losses[-1]:.4f}, {times[-1]:.2f} s", flush=True)
    seconds, assured = median(times[len(times) // 3 :]), run.split
    assert assured is not None
    found = {"parameters": run.numel, "s/step": seconds, "tokens/s": plan.length / seconds, **peak(plan.device)}
    found |= {"host GB": host_gb(), "predicted update s": assured.predicted.update}
    return {**found, "losses": " ".join(f"{loss:.3f}" for loss in losses)}


def child(arguments: Sequence[str], seconds: float) -> Row:
    """What a process of its own finds, its last line. RuntimeError: it ended otherwise, or took too long."""
    command = [sys.executable, __file__, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    said: list[str] = []
    assert process.stdout is not None
    try:
        for line in process.stdout:
            said.append(line.rstrip())
            if line.startswith(("step ", "DeepSpeedCPUAdam", "{'opt")) or " parameters: " in line:
                print(f"  {said[-1]}", flush=True)
    finally:
        timer.cancel()
        process.kill()
        code = process.wait()
    told = [line for line in said if line.startswith('{"')]
    if not told:
        raise RuntimeError(f"exit code {code}: " + "\n".join(said[-25:])[-1800:])
    found: Row = json.loads(told[-1])
    return found


def host_bytes() -> float:
    """Of memory that is free for this process: the machine's, or its control group's if that is less."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = 1024.0 * int(lines["MemAvailable"].split()[0])
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        cached = Path("/sys/fs/cgroup/memory.stat").read_text().split("\n")
        file = next((float(line.split()[1]) for line in cached if line.startswith("file ")), 0.0)
        free = min(free, float(limit.read_text()) - float(used.read_text()) + file)
    return free


def compare(model: str, names: Sequence[str], passed: Sequence[str], until: float, host_gb: float) -> Iterator[Row]:
    numel = sum(weight.numel() for weight in build(MODELS[model]).parameters())
    for name in names:
        row: Row = {"model": model, "setting": name, **EMPTY}
        need = numel * (OURS[name][1] if name in OURS else SPEED_HOST) + 6e9
        left, free = until - time.perf_counter(), min(HEADROOM * host_bytes(), host_gb * 1e9)
        if left < 20:
            row["note"] = "not begun: the time given to this program is over"
        elif need > free:
            row["note"] = f"not begun: needs about {need / 1e9:.0f} GB of host memory and may have {free / 1e9:.0f}"
        else:
            try:
                row |= child(["--one", f"{model}/{name}", *passed], left)
                if INSTEAD in row["note"]:
                    os.environ[NOT_COMPILED] = "1"
            except RuntimeError as error:
                row["note"] = str(error).splitlines()[-1][:160]
                print(error, flush=True)
        print("  ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()), flush=True)
        yield row


def link(device: torch.device) -> Row:
    """The host link each way, both ways, and both sides' updates, in GB/s and 1e9 parameters a second."""
    rates = measure(device, lambda: None)
    return {name: value / 1e9 for name, value in asdict(rates).items()}


def one(named: str, plan: Plan) -> Row:
    model, name = named.split("/", 1)
    return ours(MODELS[model], OURS[name][0], plan) if name in OURS else zero_offload(MODELS[model], *SPEED[name], plan)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=["3b", "7b"], help="DeepSpeed runs up to 3b")
    parser.add_argument("--only", nargs="*", default=[*OURS, *SPEED], help="names of settings; default: all")
    parser.add_argument("--steps", type=int, help="that are timed; default: 6, and 20 of the largest model")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a micro-batch")
    parser.add_argument(
        "--largest", type=float, nargs="?", const=18e9, metavar="PARAMETERS", help="trains that instead"
    )
    parser.add_argument("--corpus", type=Path, help="a text file; default: Python's sources")
    parser.add_argument("--check", action="store_true", help="is streamed resident, bit for bit? Nothing else")
    parser.add_argument("--tiny", action="store_true", help="a small model on the CPU, to see whether all of this runs")
    parser.add_argument("--seconds", type=float, default=540, help="after these, settings are no longer begun")
    parser.add_argument("--host-gb", type=float, default=118, help="of host memory, what a setting may need")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    parsed = arguments()
    until = time.perf_counter() + parsed.seconds
    passed = [f"--length={parsed.length}", *(["--tiny"] if parsed.tiny else [])]
    passed += [f"--steps={parsed.steps}"] if parsed.steps else []
    passed += [f"--corpus={parsed.corpus}"] if parsed.corpus else []
    if parsed.one:
        print(json.dumps(worked(parsed)), flush=True)
        os._exit(0)  # threads and libraries of others may not end
    if parsed.check:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        print(child(["--one", "check", *passed], parsed.seconds), flush=True)
        return
    if parsed.largest:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        rows = list(attempts(parsed.largest, passed, until))
        keep(parsed.tiny, "offload_largest", rows, length=parsed.length)
        return
    told = child(["--one", "link", *passed], 120)
    print(table([told]), flush=True)
    for model in ["tiny"] if parsed.tiny else parsed.models:
        names = [name for name in parsed.only if name in OURS or model in ("1b", "3b", "tiny")]
        rows = list(compare(model, names, passed, until, parsed.host_gb))
        keep(parsed.tiny, f"offload_{model}", rows, length=parsed.length, link=told)


def worked(parsed: argparse.Namespace) -> Row:
    """What this process is there for."""
    device = torch.device("cpu" if parsed.tiny else "cuda")
    if device.type == "cuda":
        torch.cuda.set_device(0)
        device = torch.device("cuda", 0)
    if parsed.one == "link":
        return link(device)
    length = 64 if parsed.tiny else parsed.length
    if parsed.one == "check":
        check(Plan(device, length, 5))
        return {"check": "passed"}
    if parsed.one.startswith("largest/"):
        plan = Plan(device, length, parsed.steps or 20, parsed.corpus, kept=0.0)
        return largest(float(parsed.one.partition("/")[2]), plan)
    return one(parsed.one, Plan(device, length, parsed.steps or 6, parsed.corpus))


def attempts(parameters: float, passed: Sequence[str], until: float) -> Iterator[Row]:
    """Smaller ones where the first does not fit, down to four fifths."""
    for share in (1.0, 0.93, 0.87, 0.8):
        named = f"largest/{share * parameters:.0f}"
        try:
            found = child(["--one", named, *passed], max(30.0, until - time.perf_counter()))
        except RuntimeError as error:
            print(f"{named}: {error}", flush=True)
            if "OutOfMemory" not in str(error):
                return
            continue
        yield found
        return


def keep(tiny: bool, claim: str, rows: Sequence[Row], **setting: Any) -> None:
    """Prints the rows, and writes those that are worth it."""
    if not rows:
        print("no rows")
    elif tiny:
        print(table(rows))
    else:
        record(claim, rows, **setting)


if __name__ == "__main__":
    main()
