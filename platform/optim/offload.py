"""Optimizer state that lives in host memory: streamed through the device, or updated by the CPU, while the next forward
pass runs.

An update begins when the gradient's norm is known, so clipping is exact, and goes through the weights in the order of
the forward pass; each layer waits for its own weights only (`ready`). Nothing is ever stale and nothing is undone. The
order and the cost of it are those of `simulate` and `cost`.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from farspan.models.roles import Role
from farspan.parallel.fsdp import local
from farspan.platform.optim.adamw import Adamw
from farspan.platform.optim.adamw8 import Adamw8
from farspan.platform.optim.cost import WINDOW, Codec, Place
from farspan.platform.optim.placement import Interleaved, Split, Streamed, choose, interleave
from farspan.platform.optim.queues import Mark, Queues
from farspan.platform.optim.rates import Rates
from farspan.platform.optim.stores import Cores, Resident, Store, Stream, Unit, Window


class Offloaded:
    """Adamw8's update, which with every weight `exact` is that of AdamW in fp32, over state away from the device."""

    def __init__(
        self,
        units: Sequence[Unit],
        places: Sequence[Place],
        queues: Queues,
        device: torch.device,
        gradients: torch.dtype | None = None,
    ) -> None:
        """units: in the order of the forward pass; places: of the state of each. gradients: the type of those of
        streamed units, which `take` is given in the backward; None: they are the weights' `.grad`."""
        self.units, self.places, self._queues, self._adam = units, tuple(places), queues, units[0].adam
        self.steps = torch.zeros((), dtype=torch.float64, device=device)
        thread = ThreadPoolExecutor(1, "optimizer")
        makers: dict[Place, Callable[[Unit], Store]] = {
            "resident": partial(Resident, queues=queues, device=device),
            "streamed": partial(Stream, queues=queues, gradients=gradients),
            "cpu": partial(Cores, queues=queues, thread=thread),
        }
        self._stores = [makers[place](unit) for unit, place in zip(units, places, strict=True)]
        streams = {store: unit for store, unit in zip(self._stores, units, strict=True) if isinstance(store, Stream)}
        self._takers = {} if gradients is None else {name: s for s, unit in streams.items() for name in unit.weights}
        pieces = [piece for stream in streams for piece in stream.pieces]
        self.window = Window(pieces, queues, device)
        self._ready: list[Callable[[], Mark]] = []
        self.restored()

    def state(self) -> dict[str, Tensor]:
        """As Adamw8's, from wherever it is; the host waits for what is under way."""
        self.settle()
        found = {"step": self.steps}
        for unit, store in zip(self.units, self._stores, strict=True):
            found |= unit.named(store.tensors)
        return found

    @torch.no_grad()
    def update(self, rate: float, scale: Tensor) -> None:
        """See `farspan.parallel.engine.Optimizer`. Everything is begun here, and waited for in `ready`."""
        numbers = self._adam.numbers(self.steps, rate, scale)
        self._begin = begin = self._queues.now()
        self._end: Mark = None
        self._ready = [store.update(numbers, rate, begin) for store in self._stores]
        for piece in self.window.first:  # the next update's first pieces come while the model computes
            piece.fetch()

    @property
    def taken(self) -> list[str]:
        """The weights whose gradients are to be given to `take`, in every step."""
        return list(self._takers)

    @torch.no_grad()
    def take(self, name: str, gradient: Tensor) -> None:
        """Has a gradient go to host memory; its memory on the device may be used again."""
        self._takers[name].take(name, gradient)

    def ready(self, unit: int, streams: Sequence[Any] = ()) -> None:
        """What the present stream and these are told from now on finds the unit's weights updated."""
        if not self._ready:
            return
        mark = self._ready[unit]()
        self._queues.hold(mark, streams)
        if unit == len(self._ready) - 1:
            self._end = mark

    def seconds(self) -> float | None:
        """What the last update took, from the known norm to the last layer's weights; None: not known yet."""
        return self._queues.seconds(self._begin, self._end) if self._ready and self._end is not None else None

    def settle(self) -> None:
        """The host waits until weights and state are what the last update left."""
        for i, store in enumerate(self._stores):
            self.ready(i)
            store.settle()

    def restored(self) -> None:
        """To be called when weights and state have been written from outside."""
        self._ready = []
        for store in self._stores:
            store.restored()


def units_of(
    config: Adamw | Adamw8,
    weights: Mapping[str, Tensor],
    roles: Mapping[str, Role],
    seed: int,
    names: Sequence[Sequence[str]],
) -> list[Unit]:
    """The units of an optimizer that has `offload`; names: of the weights gathered together, in forward order."""
    over_bf16 = config.in_halves if isinstance(config, Adamw) else config
    return [Unit(over_bf16, {name: weights[name] for name in unit}, roles, seed) for unit in names]


def split_for(offload: Streamed | Interleaved, units: Sequence[Unit], rates: Rates) -> Split:
    """Where the units' state goes."""
    sizes = [sum(local(weight).numel() for weight in unit.weights.values()) for unit in units]
    each = sum(unit.layout.size for unit in units) / max(1, sum(sizes))  # bytes a parameter, on the average
    codec = Codec(down=each, up=each, resident=each, host=each)
    if isinstance(offload, Interleaved):
        return interleave(sizes, codec, rates, offload.pattern)
    reserved = min(WINDOW, len(sizes)) * max(sizes, default=0) * each  # `choose` takes whole units for its window
    return choose(sizes, codec, replace(rates, cpu=0.0), offload.device_gb * 1e9 + reserved * (1 + 1e-9))
