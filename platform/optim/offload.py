"""Optimizer state that lives in host memory: streamed through the device, or updated by the CPU, while the next forward
pass runs.

An update begins when the gradient's norm is known, so clipping is exact, and goes through the weights in the order of
the forward pass; each layer waits for its own weights only (`ready`). Nothing is ever stale and nothing is undone. The
order and the cost of it are those of `simulate` and `cost`.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from farspan.models.roles import Role
from farspan.parallel.fsdp import local
from farspan.platform.optim.adamw import Adamw
from farspan.platform.optim.adamw8 import Adamw8
from farspan.platform.optim.cost import WINDOW, Codec, Place
from farspan.platform.optim.placement import (
    Interleaved,
    Split,
    Streamed,
    choose,
    decode,
    in_front,
    interleave,
    split,
    spread,
)
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
        self.units, self._queues, self._adam = units, queues, units[0].adam
        self.steps = torch.zeros((), dtype=torch.float64, device=device)
        self._thread = ThreadPoolExecutor(1, "optimizer")
        self._span: list[Mark] = []
        """Where the present update begins and ends."""
        self._last: list[Mark] = []
        """The same of the last one whose end is known."""
        self._held: list[Tensor] = []
        """Gradients of the present update: the memory is given back when the model's streams wait for it anyhow."""
        self._going: deque[tuple[Store, Mark, Tensor]] = deque()
        """Gradients on their way to host memory."""
        makers: dict[Place, Callable[[Unit], Store]] = {
            "resident": partial(Resident, queues=queues, device=device),
            "streamed": partial(Stream, queues=queues, gradients=gradients),
            "cpu": partial(Cores, queues=queues, thread=self._thread),
        }
        self._stores = [makers[place](unit) for unit, place in zip(units, places, strict=True)]
        streams = {store: unit for store, unit in zip(self._stores, units, strict=True) if isinstance(store, Stream)}
        self._takers = {} if gradients is None else {name: s for s, unit in streams.items() for name in unit.weights}
        pieces = [piece for stream in streams for piece in stream.pieces]
        self.window = Window(pieces, queues, device)
        self._ready: list[Callable[[], Mark]] = []
        self._unasked: set[int] = set()
        """Units of the present update that the model's streams do not wait for yet."""
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
        self._held = [gradient for _, _, gradient in self._going]
        self._held += [local(w.grad) for unit in self.units for w in unit.weights.values() if w.grad is not None]
        self._going.clear()
        begin = self._queues.now()
        self._span = [begin]
        begun = {id(store): store.update(numbers, rate, begin) for store in _one_ahead(self._stores)}
        self._ready = [begun[id(store)] for store in self._stores]
        self._unasked = set(range(len(self._ready)))
        for piece in self.window.first:  # the next update's first pieces come while the model computes
            piece.fetch()

    @property
    def taken(self) -> list[str]:
        """The weights whose gradients are to be given to `take`, in every step."""
        return list(self._takers)

    @torch.no_grad()
    def take(self, name: str, gradient: Tensor) -> None:
        """Has a gradient go to host memory. The present stream, which makes gradients, waits until those of the unit
        before last are there: their memory is then used again."""
        store = self._takers[name]
        self._going.append((store, store.take(name, gradient), gradient))
        under_way = list(dict.fromkeys(going for going, _, _ in self._going))
        while self._going[0][0] not in under_way[-2:]:
            self._queues.hold(self._going.popleft()[1])

    def ready(self, unit: int, streams: Sequence[Any] = ()) -> None:
        """What the present stream and these are told from now on finds the unit's weights updated."""
        if not self._ready:
            return
        mark = self._ready[unit]()
        self._queues.hold(mark, streams)
        self._unasked.discard(unit)
        if unit == len(self._ready) - 1 and len(self._span) == 1:
            self._span.append(mark)
            self._last = self._span
        if not self._unasked:
            self._held = []

    def seconds(self) -> float | None:
        """What an update took, from the known norm to the last layer's weights: of the last one that has been waited
        for; None: of none yet."""
        return self._queues.seconds(*self._last) if self._last else None

    def close(self) -> None:
        """Gives threads and host memory back; after that nothing can be updated."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._queues.close()

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


def _one_ahead(stores: Sequence[Store]) -> Iterator[Store]:
    """In forward order, but each unit of the CPU in the place of its unit before: its gradients leave before the state
    of the streamed units between, and are there when the CPU is done with the one before."""
    cores = iter([store for store in stores if isinstance(store, Cores)])
    yield from islice(cores, 1)
    for store in stores:
        if isinstance(store, Cores):
            yield from islice(cores, 1)
        else:
            yield store


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


def split_for(
    offload: Streamed | Interleaved, units: Sequence[Unit], rates: Rates, gradients: torch.dtype | None = None
) -> Split:
    """Where the units' state goes. gradients: the type of those that wait in host memory; None: they do not."""
    sizes = [sum(local(weight).numel() for weight in unit.weights.values()) for unit in units]
    each = sum(unit.layout.size for unit in units) / max(1, sum(sizes))  # bytes a parameter, on the average
    codec = Codec(down=each + (gradients.itemsize if gradients else 0), up=each, resident=each, host=each)
    if isinstance(offload, Streamed):
        kept = in_front([unit.layout.size for unit in units], offload.device_gb * 1e9)
        return split(sizes, decode(spread(len(units), kept, 0)), codec, rates)
    if offload.pattern != "auto":
        return interleave(sizes, codec, rates, offload.pattern)
    # `choose` takes whole units for its window, in which some could stay: the window of pieces has no room for them.
    found = choose(sizes, codec, rates, min(WINDOW, len(sizes)) * max(sizes, default=0) * each * (1 + 1e-9))
    return split(sizes, decode(found.code.replace("r", "s")), codec, rates)
