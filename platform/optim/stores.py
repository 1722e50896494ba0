"""Where optimizer state is, and how it is updated there: on the device, streamed through it, or by the CPU."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from farspan.kernels.adamw8 import Part, Update
from farspan.kernels.master import split, whole
from farspan.kernels.random import key
from farspan.models.roles import Role
from farspan.parallel.fsdp import around, in_blocks, local
from farspan.platform.optim.adamw8 import Adamw8, check, kinds, part
from farspan.platform.optim.cost import WINDOW
from farspan.platform.optim.placement import PIECE
from farspan.platform.optim.queues import Mark, Queues
from farspan.platform.optim.slab import Layout


class Unit:
    """The weights that the model gathers together, and what their state is made of."""

    def __init__(self, config: Adamw8, weights: Mapping[str, Tensor], roles: Mapping[str, Role], seed: int) -> None:
        self.weights, self.adam, self._seed = weights, config.adam, seed
        self._kinds = {}
        for name, weight in weights.items():
            block = config.block_of(tuple(weight.shape), roles[name])
            check(name, weight, block)
            self._kinds[name] = kinds(block, config.master_of(block))
        like = {
            f"{of}.{name}": _part_like(weights[name], *kind)
            for name, tensors in self._kinds.items()
            for of, kind in tensors.items()
        }
        self.layout = Layout.of(like)

    def parts(self, state: Mapping[str, Tensor]) -> list[Part]:
        """What the kernel reads, with state in these memories: by the names of the layout."""
        return [self.part(name, state, slice(None)) for name in self.weights]

    def part(self, name: str, state: Mapping[str, Tensor], rows: slice) -> Part:
        """The same of some local rows of one weight, and of state that these rows have."""
        found = {of: state[f"{of}.{name}"] for of in self._kinds[name]}
        return part(self.weights[name], found, key(self._seed, "adamw8", name), rows)

    def spans(self, limit: int) -> list[list[tuple[str, slice]]]:
        """The unit in pieces of at most `limit` bytes of state, or of a single row: rows of weights, all in order."""
        found: list[list[tuple[str, slice]]] = []
        left = 0
        for name, weight in self.weights.items():
            rows = local(weight).shape[0]
            slots = (self.layout.slots[f"{of}.{name}"] for of in self._kinds[name])
            each = sum(slot.bytes for slot in slots) / max(1, rows)
            begin = 0
            while begin < rows:
                if not found or left < each:
                    found.append([])
                    left = limit
                count = min(rows - begin, max(1, int(left / each)))
                found[-1].append((name, slice(begin, begin + count)))
                begin, left = begin + count, left - int(count * each)
        return found

    def named(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same tensors, each as this rank's part of a whole."""
        return {
            f"{of}.{name}": around(self.weights[name], state[f"{of}.{name}"], block)
            for name, tensors in self._kinds.items()
            for of, (_, block) in tensors.items()
        }

    def require(self, given: set[str]) -> None:
        """ValueError: a weight's gradient was not given."""
        missing = [name for name, weight in self.weights.items() if name not in given and local(weight).numel()]
        if missing:
            raise ValueError(f"optim.offload: {missing[0]} has no gradient: every weight must take part in every step")

    def gradients(self) -> dict[str, Tensor]:
        """Those on the device. ValueError: one is missing."""
        self.require({name for name, weight in self.weights.items() if weight.grad is not None})
        return {
            name: torch.empty_like(local(weight)) if weight.grad is None else local(weight.grad)
            for name, weight in self.weights.items()
        }


def _part_like(weight: Tensor, dtype: torch.dtype, block: int) -> Tensor:
    return torch.empty(in_blocks(local(weight).shape, block), dtype=dtype, device="meta")


def _in_host(queues: Queues, layout: Layout) -> dict[str, Tensor]:
    """Zeros in host memory, in one piece."""
    return layout.views(queues.host(layout.size).zero_())


class Store(Protocol):
    """Where a unit's state is, and who updates it."""

    tensors: dict[str, Tensor]
    """The state, by the names of the unit's layout."""

    def update(self, numbers: Tensor, rate: float, begin: Mark) -> Callable[[], Mark]:
        """Begins an update after the mark; the answer, asked when the weights are needed, is when they are there."""

    def settle(self) -> None:
        """The host waits until `tensors` are what the last update left."""

    def restored(self) -> None:
        """`tensors` and weights have been written from outside."""


class Resident:
    """On the device, updated there."""

    def __init__(self, unit: Unit, queues: Queues, device: torch.device) -> None:
        self._unit = unit
        slab = torch.zeros(unit.layout.size, dtype=torch.uint8, device=device)
        self.tensors = unit.layout.views(slab)
        self._update, self._queues = Update(unit.parts(self.tensors), unit.adam), queues
        self._done: Mark = None

    def update(self, numbers: Tensor, rate: float, begin: Mark) -> Callable[[], Mark]:
        gradients = list(self._unit.gradients().values())
        work = partial(self._update, gradients, numbers)
        self._done = self._queues.run("update", work, [begin], [numbers])
        return lambda: self._done

    def settle(self) -> None:
        self._queues.reached(self._done)

    def restored(self) -> None:
        """Nothing else is kept of them."""


GRADIENT = "gradient"


class Piece:
    """Rows of a unit's weights, whose state has one slab of the window for the time of an update."""

    def __init__(
        self,
        unit: Unit,
        spans: Sequence[tuple[str, slice]],
        state: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
    ) -> None:
        """spans: weights and their local rows. state and gradients: of the whole unit, in host memory, by the names of
        the layout and of the weights; no gradients: they stay on the device."""
        rows = dict(spans)
        names = {key: key.partition(".")[2] for key in state}
        self._host = {key: state[key][rows[name]] for key, name in names.items() if name in rows}
        self._whole = {key for key, part in self._host.items() if part.shape == state[key].shape}
        self._given = {f"{GRADIENT}.{name}": gradients[name][of] for name, of in spans if name in gradients}
        self._unit, self.spans, self.layout = unit, spans, Layout.of(self._host | self._given)
        self._loaded: Mark = None
        self._stored: Mark = None
        self._ahead = False
        """Whether the state is in the slab, or on its way there."""

    def place(self, queues: Queues, window: "Window", turn: int) -> None:
        """Gives it a slab."""
        self._queues, self._window, self._turn = queues, window, turn % len(window.slabs)
        views = self.layout.views(window.slabs[self._turn])
        slab = {name: views[name] for name in self._host}
        self._gradients = {name: views[name] for name in self._given}
        self._state = joined([(slab[name], tensor, name in self._whole) for name, tensor in self._host.items()])
        self._sent = joined([(self._gradients[name], tensor, False) for name, tensor in self._given.items()])
        parts = [self._unit.part(name, slab, rows) for name, rows in self.spans]
        self._update = Update(parts, self._unit.adam)

    def fetch(self) -> None:
        """Has the state come as soon as its slab is free."""
        if not self._ahead:
            free = [self._window.free[self._turn], self._stored]
            self._loaded = self._queues.run("in", partial(_load, self._state), free)
            self._ahead = True

    def update(self, gradients: Mapping[str, Tensor], taken: Mark, numbers: Tensor, begin: Mark) -> Mark:
        """Begins; the answer is when the weights are updated. taken: when gradients in host memory are there."""
        self.fetch()
        if self._given:
            mine = list(self._gradients.values())
            self._loaded = self._queues.run("in", partial(_load, self._sent), [taken])
        else:
            mine = [gradients[name][rows] for name, rows in self.spans]
        work = partial(self._update, mine, numbers)
        done = self._queues.run("update", work, [begin, self._loaded], [numbers])
        self._stored = self._queues.run("out", partial(_store, self._state), [done])
        self._window.free[self._turn], self._ahead = self._stored, False
        return done

    def settle(self) -> None:
        self._queues.reached(self._stored)

    def restored(self) -> None:
        """What was fetched before is no longer true."""
        self._queues.reached(self._loaded)
        self._ahead = False


def joined(copies: Iterable[tuple[Tensor, Tensor, bool]]) -> list[tuple[Tensor, Tensor]]:
    """Copies between memories, of which those that only padding parts are one: each takes some microseconds.

    copies: dense tensors on the device and in host memory, of one shape and type, and whether the latter is all of what
    is kept there under its name.
    """
    runs: list[list[tuple[Tensor, Tensor]]] = []
    padded = False
    for device, host, entire in copies:
        last = runs[-1][-1] if padded and entire else None
        if last and device.data_ptr() - last[0].data_ptr() == host.data_ptr() - last[1].data_ptr():
            runs[-1].append((device, host))
        else:
            runs.append([(device, host)])
        padded = entire
    found = []
    for run in runs:
        size = run[-1][0].data_ptr() + run[-1][0].nbytes - run[0][0].data_ptr()
        found.append((_bytes(run[0][0], size), _bytes(run[0][1], size)))
    return found


def _bytes(first: Tensor, size: int) -> Tensor:
    """So many bytes of a tensor's memory, from its beginning on."""
    memory = first.untyped_storage()
    flat = torch.empty(0, dtype=torch.uint8, device=first.device)
    return flat.set_(memory, first.data_ptr() - memory.data_ptr(), (size,))  # type: ignore[call-overload]


def _load(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    for device, host in pairs:
        device.copy_(host, non_blocking=True)


def _store(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    for device, host in pairs:
        host.copy_(device, non_blocking=True)


class Window:
    """Device memory that the pieces of all streamed units share in turn."""

    def __init__(self, pieces: Sequence[Piece], queues: Queues, device: torch.device) -> None:
        size, count = max((piece.layout.size for piece in pieces), default=0), min(WINDOW, len(pieces))
        self.slabs = [torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(count)]
        self.free: list[Mark] = [None] * count
        for turn, piece in enumerate(pieces):
            piece.place(queues, self, turn)
        self.first = pieces[:count]
        """What may be fetched before an update begins."""


class Stream:
    """In host memory, updated on the device piece by piece."""

    def __init__(self, unit: Unit, queues: Queues, gradients: torch.dtype | None) -> None:
        """gradients: the type of those that wait in host memory as well; None: they stay on the device."""
        self._unit, self._queues = unit, queues
        self.tensors = _in_host(queues, unit.layout)
        self._gradients: dict[str, Tensor] = {}
        if gradients is not None:
            like = {name: _part_like(weight, gradients, 1) for name, weight in unit.weights.items()}
            self._gradients = _in_host(queues, Layout.of(like))
        self.pieces = [Piece(unit, spans, self.tensors, self._gradients) for spans in unit.spans(PIECE)]
        self._taken: Mark = None
        self._given: Mark = None
        self._fresh: set[str] = set()
        """Weights whose gradient came since the last update."""

    def take(self, name: str, gradient: Tensor) -> Mark:
        """Has a gradient copied to host memory, from which the last update has read the one before."""
        copy = partial(self._gradients[name].copy_, gradient, non_blocking=True)
        self._taken = self._queues.run("out", copy, [self._queues.now(), self._given])
        self._fresh.add(name)
        return self._taken

    def update(self, numbers: Tensor, rate: float, begin: Mark) -> Callable[[], Mark]:
        gradients: dict[str, Tensor] = {}
        if self._gradients:
            self._unit.require(self._fresh)
        else:
            gradients = self._unit.gradients()
        self._fresh = set()
        done = begin
        for piece in self.pieces:  # one after the other: the last one's end is the unit's
            done = piece.update(gradients, self._taken, numbers, begin)
        self._given = done
        return lambda: done

    def settle(self) -> None:
        for piece in self.pieces:
            piece.settle()

    def restored(self) -> None:
        for piece in self.pieces:
            piece.restored()


class Cores:
    """fp32 in host memory, updated by torch's fused kernel for CPUs, in a thread of its own."""

    def __init__(self, unit: Unit, queues: Queues, thread: ThreadPoolExecutor) -> None:
        self._unit, self._queues, self._thread, self._adam = unit, queues, thread, unit.adam
        self.tensors = _in_host(queues, unit.layout)
        self._parts = unit.parts(self.tensors)
        self._weights = [local(weight.detach()) for weight in unit.weights.values()]
        self._masters, self._gradients = (self._like(torch.float32) for _ in range(2))
        self._halves = self._like(torch.bfloat16)
        self._numbers = queues.host(6 * 4).view(torch.float32)
        self._pending: Future[None] | None = None

    def _like(self, dtype: torch.dtype) -> list[Tensor]:
        """Host memory like the weights."""
        like = {str(i): torch.empty_like(w, dtype=dtype, device="meta") for i, w in enumerate(self._weights)}
        return list(_in_host(self._queues, Layout.of(like)).values())

    def update(self, numbers: Tensor, rate: float, begin: Mark) -> Callable[[], Mark]:
        gradients = list(self._unit.gradients().values())

        def fetch() -> None:  # cast on the device: a copy that casts as well would do so on the host, which would wait
            for mine, gradient in zip([self._numbers, *self._gradients], [numbers, *gradients], strict=True):
                mine.copy_(gradient.float(), non_blocking=True)

        come = self._queues.run("out", fetch, [begin], [numbers])
        self._pending = self._thread.submit(self._step, come, rate)
        sent: list[Mark] = []

        def weights() -> Mark:
            if not sent:
                sent.append(self._send())
            return sent[0]

        return weights

    def _send(self) -> Mark:
        """The host waits for the cores; the weights are sent to the device."""
        assert self._pending is not None
        self._pending.result()

        def send() -> None:
            for weight, half in zip(self._weights, self._halves, strict=True):
                weight.copy_(half, non_blocking=True)

        return self._queues.run("send", send, [])

    @torch.no_grad()
    def _step(self, come: Mark, rate: float) -> None:
        self._queues.reached(come)
        share, *_, step = self._numbers.tolist()
        if step == 0:
            return
        beta1, beta2 = self._adam.betas
        inverse, ok = torch.tensor((1 - beta1) / share), torch.zeros(())
        for decays in (True, False):
            at = [i for i, of in enumerate(self._parts) if of.decays == decays and of.weight.numel()]
            if at:
                torch._fused_adamw_(
                    [self._masters[i] for i in at],
                    [self._gradients[i] for i in at],
                    [self._parts[i].first for i in at],
                    [self._parts[i].second for i in at],
                    [],
                    [torch.tensor(step)] * len(at),
                    lr=rate,
                    beta1=beta1,
                    beta2=beta2,
                    weight_decay=self._adam.weight_decay if decays else 0.0,
                    eps=self._adam.eps,
                    amsgrad=False,
                    maximize=False,
                    grad_scale=inverse,
                    found_inf=ok,
                )
        torch._foreach_copy_(self._halves, self._masters)

    @torch.no_grad()
    def settle(self) -> None:
        """Masters are put into the weights and, what these do not hold, into residuals."""
        if self._pending is not None:
            self._pending.result()
            for master, half, weight, of in zip(self._masters, self._halves, self._weights, self._parts, strict=True):
                split(master, half, of.residual)
                weight.copy_(half)

    @torch.no_grad()
    def restored(self) -> None:
        """Masters are what weights and residuals say."""
        self._pending = None
        for master, half, weight, of in zip(self._masters, self._halves, self._weights, self._parts, strict=True):
            half.copy_(weight)
            master.copy_(whole(half, of.residual))
