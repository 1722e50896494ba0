"""What a placement of optimizer state costs: seconds of an update, and of the forward pass that hides it."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Literal

from farspan.platform.optim.rates import Rates

Place = Literal["resident", "streamed", "cpu"]
"""On the device for good; in host memory, updated on the device; in host memory, updated there."""

WINDOW = 3
"""Device buffers of the stream: one is filled, one updated, one emptied."""

SHARED = 0.05
"""So much later than either by itself link and cores end where what they share, the host's memory, is the bound."""


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
    gradient: float = 4.0
    """From the device before an update on the CPU, as soon as the norm is known: fp32, for the CPU's kernel wants all
    of one type."""

    def __post_init__(self) -> None:
        if min(self.down, self.up, self.resident, self.host) <= 0 or min(self.weight, self.gradient) < 0:
            raise ValueError(f"codec: {self} must be positive; weight and gradient may be zero")


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
    """What takes longest: cpu, h2d, d2h, dram (which link and cores share), window, or gpu (updates and forward)."""

    @property
    def hidden(self) -> float:
        """The share of the update that costs no time."""
        return min(1.0, max(0.0, 1 - (self.step - self.forward) / self.update)) if self.update > 0 else 1.0


def parameters(sizes: Sequence[int], places: Sequence[Place]) -> tuple[int, int, int]:
    """How many are resident, streamed, on the CPU."""
    kinds: tuple[Place, ...] = "resident", "streamed", "cpu"
    resident, streamed, cores = (sum(compress(sizes, (place == kind for place in places))) for kind in kinds)
    return resident, streamed, cores


def pieces(sizes: Iterable[int], limit: float) -> Iterator[int]:
    """Subgroups cut as the stream takes them: alike, and of at most `limit` parameters."""
    for size in sizes:
        count = max(1, math.ceil(size / limit))
        yield from (size * (i + 1) // count - size * i // count for i in range(count))


def predict(
    sizes: Sequence[int],
    places: Sequence[Place],
    codec: Codec,
    rates: Rates,
    forward_seconds: float = 0.0,
    *,
    window: int = WINDOW,
    prefetched: bool = True,
    piece: float = math.inf,
) -> Prediction:
    """The longest of what runs at once, and what has to wait for its end.

    sizes: parameters of subgroups in forward order. forward_seconds: of a whole pass, spread evenly over them.
    prefetched: the stream's first window came during the backward pass. piece: bytes of one of its buffers; larger
    subgroups come in several. With hundreds of subgroups this is what `simulate` plays, within a few percent
    (tests/platform/test_placement.py); with a few dozen, and the CPU's among them, it may be a third short. ValueError:
    places do not fit sizes or rates.
    """
    if len(sizes) != len(places):
        raise ValueError(f"placement: {len(places)} places for {len(sizes)} subgroups; choose anew")
    if "cpu" in places and not rates.cpu > 0:
        raise ValueError(
            f"placement: the CPU is to update {places.count('cpu')} subgroups, but rates.cpu=0; place none"
        )
    if not sizes:
        return Prediction(0.0, forward_seconds, forward_seconds, "gpu")
    load = _load(sizes, places, codec, window if prefetched else 0, window, piece)
    terms, knots = load.terms(rates, window), load.knots(rates)
    wait, tail = _head(sizes[0], places[0], codec, rates, prefetched), load.tail(rates)
    if knots[-1][0] > max(*terms.values(), load.link(rates)) * (1 + SHARED):
        terms["dram"] = knots[-1][0]
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
    stored: float
    """Bytes whose buffer somebody waits for."""
    cores: int
    """Parameters on the CPU."""
    first: int
    """Those of the first subgroup there."""
    device: int
    """Parameters updated on the device, streamed and resident."""
    flown: int
    """Those of them that are streamed."""
    mean: float
    """Parameters of a subgroup."""
    last: int
    """Parameters of the stream's last piece."""
    kept: float
    """The share of subgroups that are resident."""
    codec: Codec

    @property
    def down(self) -> float:
        """Bytes to the device: of streams, and weights from the CPU."""
        return self.stream + self.cores * self.codec.weight

    @property
    def back(self) -> float:
        """Bytes from the device: of streams, and gradients for the CPU."""
        return self.stored + self.cores * self.codec.gradient

    def link(self, rates: Rates) -> float:
        """Seconds of both directions together, all else idle."""
        both, alone = min(self.down, self.back), rates.h2d if self.down > self.back else rates.d2h
        return both / rates.duplex + (max(self.down, self.back) - both) / alone

    def terms(self, rates: Rates, window: int) -> dict[str, float]:
        """Seconds of each lane, were all others idle."""
        both = window > 1
        ways = self.stream / (rates.duplex if both else rates.h2d) + self.stored / (rates.duplex if both else rates.d2h)
        cpu = self.cores / rates.cpu if self.cores else 0.0
        return {
            "cpu": cpu,
            "h2d": self.down / rates.h2d,
            "d2h": self.back / rates.d2h,
            "window": (ways + self.flown / rates.gpu) / window,
            "gpu": self.device / rates.gpu + (cpu if rates.alone else 0.0),
        }

    def knots(self, rates: Rates) -> tuple[tuple[float, float], ...]:
        """Seconds until link or cores are done, whichever is first, and the share of all layers whose weights are
        updated by then; and the end of both. Beside each other both are slower.

        Cores wait for their first gradients, and never run ahead of the link where it brings those of every layer.
        """
        link = self.link(rates)
        if not self.cores:
            return ((0.0, self.kept), (link, 1.0))
        lead = min(self.first * self.codec.gradient / rates.d2h, link)
        slow, cores = rates.beside((self.down + self.back) / link if link else 0.0)
        shared = min((link - lead) / slow, self.cores / cores if cores else math.inf)
        moved, updated = (lead + shared * slow) / link if link else 1.0, shared * cores / self.cores
        end = lead + shared + max((1 - moved) * link, (1 - updated) * self.cores / rates.cpu)
        if self.codec.gradient and updated > moved:
            return ((0.0, self.kept), (end, 1.0))
        return ((0.0, self.kept), (lead + shared, self.kept + (1 - self.kept) * min(moved, updated)), (end, 1.0))

    def tail(self, rates: Rates) -> float:
        """Of the last subgroup: its update after its copy, or the copy of its weights after its update."""
        after = self.codec.weight * self.mean / rates.h2d if self.cores else 0.0
        return max(after, self.last / rates.gpu)


def _load(sizes: Sequence[int], places: Sequence[Place], codec: Codec, ahead: int, window: int, piece: float) -> _Load:
    """ahead: streamed pieces that are on the device when the step begins."""
    resident, flown, cores = parameters(sizes, places)
    cut = pieces(compress(sizes, (place == "streamed" for place in places)), piece / max(codec.down, codec.up))
    streamed, first = list(cut), next(compress(sizes, (place == "cpu" for place in places)), 0)
    return _Load(
        stream=codec.down * (flown - sum(streamed[:ahead])),
        stored=codec.up * sum(streamed[:-window]),
        cores=cores,
        first=first,
        device=resident + flown,
        flown=flown,
        mean=sum(sizes) / len(sizes),
        last=streamed[-1] if streamed else 0,
        kept=sum(place == "resident" for place in places) / len(places),
        codec=codec,
    )


def _head(size: int, place: Place, codec: Codec, rates: Rates, prefetched: bool) -> float:
    """Before the first layer's update on the device, or until its weights come from the CPU."""
    if place == "cpu":
        return size * codec.gradient / rates.d2h + size / rates.cpu + size * codec.weight / rates.h2d
    return size * codec.down / rates.h2d if place == "streamed" and not prefetched else 0.0
