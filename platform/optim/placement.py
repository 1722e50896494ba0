"""Where optimizer state lives and who updates it: it stays on the GPU, is streamed through it, or is the CPU's."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from farspan.platform.optim.cost import WINDOW, Codec, Place, Prediction, parameters, predict
from farspan.platform.optim.rates import Rates

Pattern = Literal["stride", "optimum"]
PIECE = 1 << 28
"""Bytes of state that are streamed at once: at 50 GB/s five milliseconds, long against a launch."""

LETTERS: dict[str, Place] = {"r": "resident", "s": "streamed", "c": "cpu"}

TIE = 0.05
"""Steps that differ by less are alike, as for attention's schedules: the plainest is taken."""

DOUBT = 0.2
"""An error that asks for another measurement."""


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """State waits in pinned host memory and is updated on the device, a few layers at a time, while the next forward
    pass runs."""

    device_gb: float = 0.0
    """Gigabytes of device memory for state that never leaves it: that of the layers which come first in the forward
    pass, whose updates nothing hides. The stream's window comes on top, three pieces of 256 MB."""
    gradients: bool = False
    """Gradients go to host memory as soon as the backward has them, and come back with the state. Needs a single
    micro-batch a step: several add up on the device."""

    def __post_init__(self) -> None:
        if not 0 <= self.device_gb < math.inf:
            raise ValueError(f"device_gb={self.device_gb}: must be 0, which leaves all state in host memory, or more")


@dataclass(frozen=True, kw_only=True)
class Interleaved:
    """fp32 state waits in host memory; the CPU updates some layers while others are streamed through the device (Deep
    Optimizer States, Maurya et al., 2024)."""

    pattern: Pattern | Literal["auto"] = "auto"
    """Which layers are streamed: every k-th, by the paper's law for k (stride); so many that link and CPU end together
    (optimum); or what the cost model foretells to be fastest, host memory's speed included (auto)."""


@dataclass(frozen=True)
class Split:
    """Who updates each subgroup, in forward order."""

    places: tuple[Place, ...]
    parameters: tuple[int, int, int]
    """Resident, streamed, on the CPU."""
    predicted: Prediction

    @property
    def code(self) -> str:
        """A letter for each subgroup: r, s or c."""
        return "".join(place[0] for place in self.places)


def decode(code: str) -> tuple[Place, ...]:
    """The places of `Split.code`."""
    if not set(code) <= set(LETTERS):
        raise ValueError(f"split: {code!r} must be a word of r, s and c")
    return tuple(LETTERS[letter] for letter in code)


def choose(
    sizes: Sequence[int],
    codec: Codec,
    rates: Rates,
    free_device_bytes: float,
    free_host_bytes: float = math.inf,
    forward_seconds: float = 0.0,
    *,
    window: int = WINDOW,
) -> Split:
    """The split with the shortest predicted step; of those within 5 % the one with the least on the CPU.

    sizes: parameters of this rank's subgroups, in forward order. forward_seconds: of a whole pass. The stream's first
    window is on the device already: it is fetched during the backward pass.
    ValueError: no split fits. A larger resident part is never worse, so only the number on the CPU is searched: exact
    for subgroups of one size, within about 2 % for unlike ones.
    """
    count, reserve = len(sizes), min(window, len(sizes)) * max(sizes, default=0) * max(codec.down, codec.up)
    found: list[Split] = []
    for cores in range(count + 1 if rates.cpu > 0 else 1):
        kept = _fitting(sizes[: count - cores], codec.resident, free_device_bytes)
        if kept + cores < count:
            if reserve > free_device_bytes:
                continue
            kept = _fitting(sizes[: count - cores], codec.resident, free_device_bytes - reserve)
        places = decode(spread(count, kept, cores))
        if host_bytes(sizes, places, codec) <= free_host_bytes:
            found.append(split(sizes, places, codec, rates, forward_seconds, window=window))
    if not found:
        raise ValueError(
            f"optimizer state: {sum(sizes)} parameters on this rank do not fit {free_device_bytes:.3g} free bytes of "
            f"the device and {free_host_bytes:.3g} of its host; take smaller subgroups, a codec with fewer than "
            f"{codec.host} bytes a parameter, or more ranks"
        )
    best = min(each.predicted.step for each in found)
    return next(each for each in found if each.predicted.step <= best * (1 + TIE))


def _fitting(sizes: Sequence[int], each: float, free: float) -> int:
    """How many of the first fit."""
    return sum(total * each <= free for total in accumulate(sizes))


def stride(codec: Codec, rates: Rates) -> int:
    """Every how many subgroups one is streamed, if the cores' others are to cover its way in and its update:
    k = 1 + ⌈U_c (s/B + 1/U_g)⌉ (Deep Optimizer States, Maurya et al., Middleware 2024)."""
    return 1 + math.ceil(rates.cpu * (codec.down / rates.duplex + 1 / rates.gpu))


def optimum(codec: Codec, rates: Rates) -> float:
    """The share to stream when link and cores end together: f* = (B/s) / (U_c + B/s). Neither the host's memory nor
    the GPU is thought of."""
    return 1 / (1 + rates.cpu * codec.down / rates.duplex)


def in_front(sizes: Sequence[int], room: float) -> int:
    """How many of the first layers' states, of so many bytes, stay on the device: what fits in `room`, or all if they
    fit in it and the window that is then not needed."""
    window = min(WINDOW, len(sizes)) * min(PIECE, max(sizes, default=0))
    return len(sizes) if sum(sizes) <= room + window else _fitting(sizes, 1.0, room)


def interleave(
    sizes: Sequence[int],
    codec: Codec,
    rates: Rates,
    pattern: Pattern,
    forward_seconds: float = 0.0,
    *,
    resident: int = 0,
    prefetched: bool = True,
) -> Split:
    """The first subgroups resident, the others between link and cores by the stride or at the optimum."""
    rest = len(sizes) - resident
    if pattern == "stride":
        every = stride(codec, rates)
        code = "r" * resident + "".join("c" if (i + 1) % every else "s" for i in range(rest))
    else:
        code = spread(len(sizes), resident, round(rest * (1 - optimum(codec, rates))))
    return split(sizes, decode(code), codec, rates, forward_seconds, prefetched=prefetched)


def spread(count: int, kept: int, cores: int) -> str:
    """A split's code: the first `kept` of `count` resident, `cores` others the CPU's, evenly among the streamed."""
    rest = count - kept
    mixed = ("c" if (i + 1) * cores // rest > i * cores // rest else "s" for i in range(rest))
    return "r" * kept + "".join(mixed)


def host_bytes(sizes: Sequence[int], places: Sequence[Place], codec: Codec) -> float:
    """Host memory of a split, all of it pinned."""
    _, streamed, cores = parameters(sizes, places)
    return codec.host * (streamed + cores) + (codec.weight + codec.gradient) * cores


def split(
    sizes: Sequence[int],
    places: Sequence[Place],
    codec: Codec,
    rates: Rates,
    forward_seconds: float = 0.0,
    *,
    window: int = WINDOW,
    prefetched: bool = True,
) -> Split:
    """Given places with what they will cost."""
    told = predict(sizes, places, codec, rates, forward_seconds, window=window, prefetched=prefetched, piece=PIECE)
    return Split(tuple(places), parameters(sizes, places), told)


def lines(chosen: Split, measured: float) -> list[str]:
    """What a log says of an update whose last weights were there `measured` seconds after the norm was known."""
    told, total = chosen.predicted, max(1, sum(chosen.parameters))
    shares = ", ".join(
        f"{count / total:.0%} {name}"
        for name, count in zip(("resident", "streamed", "on the CPU"), chosen.parameters, strict=True)
        if count
    )
    error = told.update / measured - 1 if measured > 0 else math.inf
    said = [
        f"optimizer state: {shares or 'none'}; an update takes {told.update:.4g} s by prediction, {measured:.4g} s "
        f"measured ({error:+.1%}), bound by {told.bound}"
    ]
    if abs(error) > DOUBT:
        said.append(f"warning: optimizer state: a prediction more than {DOUBT:.0%} off; measure this host's rates anew")
    return said
