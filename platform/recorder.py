"""Numbers of the steps, kept on the device and read together every few steps."""

import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farspan.models.ffns.router import evenness
from farspan.parallel.clock import Mark, Waits, between, now
from farspan.parallel.engine import Engine
from farspan.platform.loads import Loads
from farspan.platform.metrics import Line

PEAK = {"H100": 989.5e12, "H200": 989.5e12, "H800": 989.5e12, "A100": 312e12, "B200": 2250e12}
"""Dense bf16 operations a second, by the name of the card (makers' data sheets)."""


def peak(device: torch.device, compute: torch.dtype | None) -> float | None:
    """The card's rate for bf16 products, or None where it is not known or other products are used."""
    if device.type != "cuda" or compute is not torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for card, rate in PEAK.items() if card in name), None)


def routed(engine: Engine) -> dict[str, Tensor]:
    """What routers were charged in the last step, how evenly tokens went to experts and to how many, how many of their
    visits found no room and how many met nobody, and how large logits are, over all ranks."""
    if not engine.loads:
        return {}
    dropped, squares, unmet, tokens = engine.told
    visits = torch.stack([load.sum() for load in engine.loads]).sum()
    shares = {
        "active": visits / tokens.clamp(min=1),
        "dropped": dropped / visits.clamp(min=1),
        "unmet": unmet / tokens.clamp(min=1),
        "router_z": squares / tokens.clamp(min=1),
    }
    return {"router_cost": engine.cost, **evenness(engine.loads), **shares}


@dataclass(frozen=True, kw_only=True)
class _Step:
    step: int
    rate: float
    tokens: int
    total: int
    flops: float
    values: Tensor
    """loss, gradient norm, this rank's part of the loss, and `more`; fp64 on the device."""
    more: tuple[str, ...]
    """Names of other numbers of the step."""
    end: Mark
    waits: Waits | None


class Recorder:
    """Collects steps; `flush` gives a line for each and costs one synchronisation with the device."""

    def __init__(self, device: torch.device, peak_flops: float | None) -> None:
        """`peak_flops`: of all ranks together, or None."""
        self.device, self.peak_flops = device, peak_flops
        self.steps: list[_Step] = []
        self.parts: list[tuple[int, float]] = []
        """(step, this rank's part of the loss) of the steps flushed last."""
        self.loads: Loads | None = None
        """How full experts were in the steps flushed last; None without experts."""
        self._loads: list[Tensor] = []
        self.mark: Mark = now(device)

    def note(
        self,
        step: int,
        *,
        loss: Tensor,
        norm: Tensor,
        part: Tensor,
        rate: float,
        tokens: int,
        total: int,
        flops: float,
        more: Mapping[str, Tensor],
        loads: Sequence[Tensor] = (),
        waits: Waits | None = None,
    ) -> None:
        """Remembers one step; nothing waits for the device. more: device scalars that its line shows as well; loads: of
        each layer with experts, E; waits: for exchanges of tokens."""
        values = torch.stack([value.double() for value in (loss, norm, part, *more.values())])
        self._loads = [a + b for a, b in zip(self._loads, loads, strict=True)] if self._loads else list(loads)
        numbers = {"rate": rate, "tokens": tokens, "total": total, "flops": flops}
        rest = {"more": tuple(more), "end": now(self.device), "waits": waits}
        self.steps.append(_Step(step=step, **numbers, values=values, **rest))  # type: ignore[arg-type]

    def pause(self) -> Callable[[], None]:
        """Stops the clock of the next step; the returned function starts it again."""
        begun = time.perf_counter()

        def resume() -> None:
            self.mark = self.mark + time.perf_counter() - begun if isinstance(self.mark, float) else now(self.device)

        return resume

    def flush(self) -> list[Line]:
        """A line of metrics for each step since the last flush."""
        if not self.steps:
            return []
        numbers = torch.stack([entry.values for entry in self.steps]).tolist()  # a run has the same ones at every step
        lines: list[Line] = []
        self.parts = []
        for entry, (loss, norm, part, *more) in zip(self.steps, numbers, strict=True):
            seconds = max(between(self.mark, entry.end), 1e-9)
            self.mark = entry.end
            self.parts.append((entry.step, part))
            used = None if self.peak_flops is None else 3 * entry.flops / seconds / self.peak_flops
            line = {"step": entry.step, "loss": loss, "grad_norm": norm, "rate": entry.rate, "tokens": entry.total}
            waited = {} if entry.waits is None else {"exchange_seconds": entry.waits.seconds()}
            speed = {"tokens_per_second": entry.tokens / seconds, "step_seconds": seconds, "mfu": used}
            lines.append(
                {**line, **speed, "memory_gb": self._memory(), **dict(zip(entry.more, more, strict=True)), **waited}
            )
        self.loads = None
        if self._loads:
            shares = torch.cat([load / load.mean().clamp(min=1e-30) for load in self._loads]).float().cpu()
            layers = [part.numpy() for part in shares.split([len(load) for load in self._loads])]
            self.loads = Loads(first=self.steps[0].step, step=self.steps[-1].step, layers=layers)
        self.steps, self._loads = [], []
        return lines

    def _memory(self) -> float:
        """The most that this rank has held, in GB: of the GPU, or of the process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
