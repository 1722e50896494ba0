"""What a placement of optimizer state costs: seconds of an update, and of the forward pass that hides it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Literal

from farspan.platform.optim.rates import Rates

Place = Literal["resident", "streamed", "cpu"]
"""On the device for good; in host memory, updated on the device; in host memory, updated there."""

WINDOW = 3
"""Device buffers of the stream: one is filled, one updated, one emptied."""


@dataclass(frozen=True, kw_only=True)
class Codec:
    """Bytes of a parameter, as one kind of optimizer keeps it.

    8-bit moments with an 8-bit residual: down = up = resident = host = 3.03; with a 16-bit one 4.03; fp32 moments and
    master: 12.
    """

    down: float
    """To the device before a streamed update."""
    up: float
    """Back to the host after it."""
    resident: float
    """On the device, of state that stays there."""
    host: float
    """In host memory, of state that does not."""
    weight: float = 2.0
    """To the device after an update on the CPU."""
    gradient: float = 2.0
    """In host memory before an update on the CPU; it comes there during the backward pass."""
    touched: float = 28.0
    """Of host memory, read and written by an update on the CPU: fp32 moments and master, gradient and weight."""

    def __post_init__(self) -> None:
        if min(self.down, self.up, self.resident, self.host) <= 0 or min(self.weight, self.gradient, self.touched) < 0:
            raise ValueError(f"codec: {self} must be positive; weight, gradient and touched may be zero")


@dataclass(frozen=True)
class Prediction:
    """Seconds from the moment the gradient's norm is known."""

    update: float
    """Until the last weight is updated."""
    step: float
    """Until the end of the next forward pass, whose layers wait for their own updates only."""
    forward: float
    """Of that pass by itself."""
    bound: str
    """What takes longest: cpu, h2d, d2h, dram, window, or gpu (updates and forward)."""

    @property
    def hidden(self) -> float:
        """The share of the update that costs no time."""
        return min(1.0, max(0.0, 1 - (self.step - self.forward) / self.update)) if self.update > 0 else 1.0


def parameters(sizes: Sequence[int], places: Sequence[Place]) -> tuple[int, int, int]:
    """How many are resident, streamed, on the CPU."""
    kinds: tuple[Place, ...] = "resident", "streamed", "cpu"
    resident, streamed, cores = (sum(compress(sizes, (place == kind for place in places))) for kind in kinds)
    return resident, streamed, cores


def predict(
    sizes: Sequence[int],
    places: Sequence[Place],
    codec: Codec,
    rates: Rates,
    forward_seconds: float = 0.0,
    *,
    window: int = WINDOW,
    prefetched: bool = True,
) -> Prediction:
    """The longest of what runs at once, and what has to wait for its end.

    sizes: parameters of subgroups in forward order. forward_seconds: of a whole pass, spread evenly over them.
    prefetched: the stream's first window came during the backward pass. With many subgroups this is what `simulate`
    plays, within a few percent: tests/platform/test_placement.py. ValueError: places do not fit sizes or rates.
    """
    if len(sizes) != len(places):
        raise ValueError(f"placement: {len(places)} places for {len(sizes)} subgroups; choose anew")
    if "cpu" in places and not rates.cpu > 0:
        raise ValueError(
            f"placement: the CPU is to update {places.count('cpu')} subgroups, but rates.cpu=0; place none"
        )
    if not sizes:
        return Prediction(0.0, forward_seconds, forward_seconds, "gpu")
    load = _load(sizes, places, codec, window if prefetched else 0, window)
    terms = load.terms(rates, window)
    wait, tail = _head(sizes[0], places[0], codec, rates, prefetched), load.tail(rates)
    knots = load.knots(rates)
    update = max(knots[-1][0], terms["window"], wait + terms["gpu"]) + tail
    terms["gpu"] += forward_seconds
    after = max(seconds + (1 - done) * terms["gpu"] for seconds, done in knots)
    step = max(wait + terms["gpu"], after, update + forward_seconds / len(sizes))
    return Prediction(update, step, forward_seconds, max(terms, key=lambda name: terms[name]))


@dataclass(frozen=True)
class _Load:
    """What a step asks of every lane."""

    stream: float
    """Bytes to the device that a window waits for."""
    back: float
    """Bytes whose buffer somebody waits for."""
    cores: int
    """Parameters on the CPU."""
    device: int
    """Parameters updated on the device, streamed and resident."""
    flown: int
    """Those of them that are streamed."""
    mean: float
    """Parameters of a subgroup."""
    kept: float
    """The share of subgroups that are resident."""
    codec: Codec

    @property
    def down(self) -> float:
        """Bytes to the device: of streams, and weights from the CPU."""
        return self.stream + self.cores * self.codec.weight

    def link(self, rates: Rates) -> float:
        """Seconds of both directions together, all else idle."""
        both, alone = min(self.down, self.back), rates.h2d if self.down > self.back else rates.d2h
        return both / rates.duplex + (max(self.down, self.back) - both) / alone

    def terms(self, rates: Rates, window: int) -> dict[str, float]:
        """Seconds of each lane, were all others idle."""
        both = window > 1
        touched = self.down + self.back + self.cores * self.codec.touched
        ways = self.stream / (rates.duplex if both else rates.h2d) + self.back / (rates.duplex if both else rates.d2h)
        cpu = self.cores / rates.cpu if self.cores else 0.0
        return {
            "cpu": cpu,
            "h2d": self.down / rates.h2d,
            "d2h": self.back / rates.d2h,
            "dram": touched * rates.ranks / rates.dram,
            "window": (ways + self.flown / rates.gpu) / window,
            "gpu": self.device / rates.gpu + (cpu if rates.alone else 0.0),
        }

    def knots(self, rates: Rates) -> tuple[tuple[float, float], ...]:
        """Seconds until link or cores are done, whichever is first, and the share of all layers whose weights are
        updated by then; and the end of both. Beside each other they share the host's memory."""
        link, copied = self.link(rates), self.down + self.back
        lone, _ = rates.beside(copied / link, 0.0) if link else (1.0, 0.0)
        if not self.cores:
            return ((0.0, self.kept), (link / lone, 1.0))
        slow, cores = rates.beside(copied / link if link else 0.0, self.codec.touched)
        _, free = rates.beside(0.0, self.codec.touched)
        seconds = min(link / slow, self.cores / cores)
        moved, updated = seconds * slow / link if link else 1.0, seconds * cores / self.cores
        end = seconds + max((1 - moved) * link / lone, (1 - updated) * self.cores / free)
        return ((0.0, self.kept), (seconds, self.kept + (1 - self.kept) * min(moved, updated)), (end, 1.0))

    def tail(self, rates: Rates) -> float:
        """Of the last subgroup: its update after its copy, or the copy of its weights after its update."""
        after = self.codec.weight * self.mean / rates.h2d if self.cores else 0.0
        return max(after, self.mean / rates.gpu if self.flown else 0.0)


def _load(sizes: Sequence[int], places: Sequence[Place], codec: Codec, ahead: int, window: int) -> _Load:
    """ahead: streamed subgroups that are on the device when the step begins."""
    resident, flown, cores = parameters(sizes, places)
    streamed = list(compress(sizes, (place == "streamed" for place in places)))
    stream, back = flown - sum(streamed[:ahead]), sum(streamed[:-window])
    mean, kept = sum(sizes) / len(sizes), sum(place == "resident" for place in places) / len(places)
    return _Load(codec.down * stream, codec.up * back, cores, resident + flown, flown, mean, kept, codec)


def _head(size: int, place: Place, codec: Codec, rates: Rates, prefetched: bool) -> float:
    """Before the first layer's update on the device, or until its weights come from the CPU."""
    if place == "cpu":
        return size / rates.cpu + size * codec.weight / rates.h2d
    return size * codec.down / rates.h2d if place == "streamed" and not prefetched else 0.0
