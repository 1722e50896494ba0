"""One step of offloaded optimizer state on a simulated clock: four lanes, and a forward pass behind them."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from farspan.platform.optim.cost import WINDOW, Codec, Place
from farspan.platform.optim.rates import Lane, Rates

Kind = Literal["h2d", "d2h", "gpu", "cpu", "forward"]
"""Lanes; `forward` is the gpu's as well, and rests while it updates: updates are launched at higher priority."""


@dataclass(frozen=True)
class Layer:
    """A piece of the forward pass."""

    seconds: float
    subgroups: tuple[int, ...]
    """Those that hold its weights."""


@dataclass(frozen=True)
class Bar:
    """A lane's work on one subgroup, or on a layer."""

    lane: Kind
    what: int
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """Seconds from the moment the gradient's norm is known."""

    bars: tuple[Bar, ...]
    """By their end."""
    ready: tuple[float, ...]
    """When each layer's weights were updated."""
    began: tuple[float, ...]
    """When each layer's forward began."""
    update: float
    """Until the last weight is updated."""
    step: float
    """Until the end of the forward pass."""
    drained: float
    """Until all state is where it stays."""
    alone: float
    """The update with no forward beside it."""
    forward: float
    """The forward with no update beside it."""

    @property
    def hidden(self) -> float:
        """The share of the update that costs no time."""
        return min(1.0, max(0.0, 1 - (self.step - self.forward) / self.alone)) if self.alone > 0 else 1.0


def simulate(
    sizes: Sequence[int],
    places: Sequence[Place],
    codec: Codec,
    rates: Rates,
    layers: Sequence[Layer] = (),
    *,
    window: int = WINDOW,
    prefetched: bool = True,
) -> Timeline:
    """Plays one step.

    sizes: parameters of subgroups in forward order; a streamed one fits a buffer: `cost.pieces`. window: device buffers
    of the stream. prefetched: the stream's first window is on the device already. ValueError: a lane that has work has
    no speed.
    """
    player = _Player(sizes, places, codec, rates, layers, window, prefetched)
    player.play()
    began = {bar.what: bar.start for bar in player.bars if bar.lane == "forward"}
    update = max(player.ready, default=0.0)
    return Timeline(
        bars=tuple(player.bars),
        ready=tuple(player.ready_for(layer) for layer in layers),
        began=tuple(began[i] for i in range(len(layers))),
        update=update,
        step=max((bar.end for bar in player.bars if bar.lane == "forward"), default=update),
        drained=max((bar.end for bar in player.bars if bar.lane != "forward"), default=0.0),
        alone=simulate(sizes, places, codec, rates, window=window, prefetched=prefetched).update if layers else update,
        forward=sum(layer.seconds for layer in layers),
    )


@dataclass
class _Task:
    what: int
    left: float
    start: float


class _Player:
    """Lanes take what is possible, lowest subgroup first, and are not interrupted.

    But the gpu takes streamed subgroups before resident ones, as the link waits for their buffers, and the link takes
    gradients for the CPU when it is the turn of the CPU's subgroup before.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        places: Sequence[Place],
        codec: Codec,
        rates: Rates,
        layers: Sequence[Layer],
        window: int,
        prefetched: bool,
    ) -> None:
        if window < 1:
            raise ValueError(f"window={window}: must be at least 1, or nothing can be streamed")
        self.sizes, self.places, self.codec, self.rates, self.layers = sizes, places, codec, rates, layers
        cores = [what for what, place in enumerate(places) if place == "cpu"]
        self.ahead = dict(zip(cores, [-1, *cores], strict=False))
        self.waiting: dict[Kind, list[tuple[int, int]]] = {"h2d": [], "gpu": [], "d2h": [], "cpu": [], "forward": []}
        """Heaps: turn, and subgroup or layer."""
        self.free = window
        """Buffers that hold nothing."""
        first: dict[Place, Kind] = {"resident": "gpu", "streamed": "h2d", "cpu": "d2h"}
        for what, place in enumerate(places):
            here = place == "streamed" and prefetched and self.free > 0
            self.free -= here
            self._wait("gpu" if here else first[place], what)
        for what in range(len(layers)):
            self._wait("forward", what)
        self.busy: dict[Kind, _Task] = {}
        self.ready = [float("inf")] * len(sizes)
        self.bars: list[Bar] = []
        self.now = 0.0

    def play(self) -> None:
        self._start()
        while self.busy:
            self._advance()
            self._start()

    def ready_for(self, layer: Layer) -> float:
        return max((self.ready[i] for i in layer.subgroups), default=0.0)

    def _start(self) -> None:
        for lane, waiting in self.waiting.items():
            if lane not in self.busy and waiting and self._may(lane, waiting[0][1]):
                _, what = heapq.heappop(waiting)
                self.busy[lane] = _Task(what, self._amount(lane, what), self.now)
                self.free -= lane == "h2d" and self.places[what] == "streamed"

    def _wait(self, lane: Kind, what: int) -> None:
        turn = what
        if lane == "gpu" and self.places[what] == "resident":
            turn += len(self.places)
        elif lane == "d2h" and self.places[what] == "cpu":
            turn = self.ahead[what]
        heapq.heappush(self.waiting[lane], (turn, what))

    def _may(self, lane: Kind, what: int) -> bool:
        if lane == "forward":
            rests = "gpu" in self.busy or (self.rates.alone and "cpu" in self.busy)
            return not rests and self.ready_for(self.layers[what]) <= self.now
        return lane != "h2d" or self.places[what] == "cpu" or self.free > 0

    def _amount(self, lane: Kind, what: int) -> float:
        """Parameters, bytes, or seconds."""
        if lane == "forward":
            return self.layers[what].seconds
        streamed, codec = self.places[what] == "streamed", self.codec
        down, up = (codec.down, codec.up) if streamed else (codec.weight, codec.gradient)
        return self.sizes[what] * {"h2d": down, "d2h": up}.get(lane, 1.0)

    def _advance(self) -> None:
        """To the end of what ends first."""
        shared: list[Lane] = [lane for lane in self.busy if lane != "gpu" and lane != "forward"]
        speeds: dict[Kind, float] = {"gpu": self.rates.gpu, "forward": 1.0}
        speeds.update(dict(self.rates.speeds(shared).items()))
        above: Sequence[Kind] = ("gpu", "cpu", "forward") if self.rates.alone else ("gpu", "forward")
        running = [lane for lane in above if lane in self.busy]
        speeds.update(dict.fromkeys(running[1:], 0.0))
        ends = {lane: task.left / speeds[lane] for lane, task in self.busy.items() if speeds[lane] > 0}
        if not ends:
            raise ValueError(f"simulate: nothing moves in {sorted(self.busy)} at {self.rates}; let the CPU update none")
        spent = min(ends.values())
        self.now += spent
        for lane, task in list(self.busy.items()):
            task.left -= speeds[lane] * spent
            if ends.get(lane, float("inf")) <= spent:
                del self.busy[lane]
                self.bars.append(Bar(lane, task.what, task.start, self.now))
                self._finish(lane, task.what)

    def _finish(self, lane: Kind, what: int) -> None:
        """What may go on because of it."""
        if lane == "h2d" and self.places[what] == "streamed":
            self._wait("gpu", what)
        elif lane == "cpu":
            self._wait("h2d", what)
        elif lane == "d2h" and self.places[what] == "cpu":
            self._wait("cpu", what)
        elif lane == "d2h":
            self.free += 1
        elif lane != "forward":
            self.ready[what] = self.now
            if lane == "gpu" and self.places[what] == "streamed":
                self._wait("d2h", what)
