"""Which dispatch is fastest: a layer's bytes over the speed of the link, both measured at the start of a run."""

import time
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from statistics import median

import torch
import torch.distributed as dist

from farspan.parallel.comm import Group
from farspan.parallel.expert import AllGather, AllToAll, Dispatch, WeightGather

KINDS: dict[str, Dispatch] = {"all_to_all": AllToAll(), "all_gather": AllGather(), "weight_gather": WeightGather()}
REPEATS = 5


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer of experts as one rank meets it."""

    tokens: int
    """Of a micro-batch, on this rank."""
    experts: int
    active: int
    width: int
    hidden: int
    itemsize: int
    """Bytes of a number in products."""
    shared: int = 0
    """Channels of an expert that all tokens meet."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """What the ranks of ep were measured to do."""

    exchange: float
    """Bytes a second that leave a rank when every one sends to every other."""
    gather: float
    """Bytes a second that come to a rank when every one gathers what all have."""
    latency: float
    """Seconds of an exchange of next to nothing."""
    product: float
    """Operations a second of a product in the type of the layer."""


def seconds(layer: Layer, ep: int, shard: int, link: Link) -> dict[str, float]:
    """By kind, what a layer's forward and backward wait for exchanges, once.

    shard: the ranks between which an expert is sharded besides. A token travels once to each rank that has one of its
    experts: of ep ranks, with experts chosen evenly, ep (1 - (1 - 1/ep)^K). Each way is gone four times: there and
    back, forward and backward. Ways there, and their gradients' ways back, hide behind the shared expert as far as that
    lasts. Gathered experts come twice, and their gradients leave once in fp32; all of it hides behind the layer's
    products.
    """
    row, away = layer.width * layer.itemsize, (ep - 1) / ep
    met = ep * (1 - away**layer.active)
    weights = 3 * layer.experts * layer.width * layer.hidden
    more = weights * ((1 - 1 / (shard * ep)) - (1 - 1 / shard) / ep)
    product = 6 * layer.tokens * layer.width / link.product  # a forward's, for each channel; a backward's are two
    products = 3 * product * (layer.active * layer.hidden + layer.shared)
    sent, gathered = layer.tokens * met * away * row / link.exchange, layer.tokens * (ep - 1) * row / link.gather
    hidden = {way: min(way, product * layer.shared) + min(way, 2 * product * layer.shared) for way in (sent, gathered)}
    return {
        "all_to_all": 4 * sent - hidden[sent] + 9 * link.latency,
        "all_gather": 4 * gathered - hidden[gathered] + 6 * link.latency,
        "weight_gather": max(0.0, (2 * layer.itemsize + 4) * more / link.gather - products),
    }


def measure(ep: Group, device: torch.device, dtype: torch.dtype, hosts: Group) -> Link:
    """All ranks of `hosts` call it together; the slowest counts."""
    size, side = (1 << 26, 4096) if device.type == "cuda" else (1 << 18, 256)
    part = size // dtype.itemsize // ep.size
    whole = torch.zeros(part * ep.size, dtype=dtype, device=device)
    other, one, few = torch.empty_like(whole), whole[:part].clone(), whole[: ep.size].clone()
    square, sent = torch.ones(side, side, dtype=dtype, device=device), whole.nbytes * (ep.size - 1) / ep.size
    mine = Link(
        exchange=sent / _timed(lambda: dist.all_to_all_single(other, whole, group=ep.handle), device),
        gather=sent / _timed(lambda: dist.all_gather_into_tensor(other, one, group=ep.handle), device),
        latency=_timed(lambda: dist.all_to_all_single(few.clone(), few, group=ep.handle), device),
        product=2 * side**3 / _timed(lambda: square @ square, device),
    )
    slowest = torch.tensor([mine.exchange, mine.gather, -mine.latency, mine.product], dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MIN, group=hosts.handle)
    exchange, gather, latency, product = slowest.tolist()
    return Link(exchange=exchange, gather=gather, latency=-latency, product=product)


def _timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds, the median."""
    found = []
    for _ in range(REPEATS + 1):
        begun = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - begun)
    return median(found[1:])


def pick(
    layers: dict[Layer, int], ep: int, shard: int, link: Link, needs: Mapping[str, int] | None = None, room: int = 0
) -> tuple[str, str]:
    """The kind that is fastest over all layers, of which there are so many alike, and a line that says why.

    needs: bytes that a rank holds under each kind, of which it has `room`: those that do not fit are left out, and
    where none does all but the smallest; None: all fit.
    """
    total = dict.fromkeys(KINDS, 0.0)
    for layer, count in layers.items():
        for kind, each in seconds(layer, ep, shard, link).items():
            total[kind] += count * each
    needs = needs or dict.fromkeys(KINDS, 0)
    out = [kind for kind in KINDS if needs[kind] > max(room, min(needs.values()))]
    best = min((kind for kind in KINDS if kind not in out), key=lambda kind: total[kind])
    told = ", ".join(f"{kind} {1e3 * spent:.3g}" for kind, spent in total.items())
    big = [f"; {kind} would take {needs[kind] / 1e9:.3g} GB of the device's {room / 1e9:.3g}" for kind in out]
    exchange, gather, *_ = astuple(link)
    return best, (
        f"dispatch: {best}; ms that a micro-batch waits for exchanges, foretold: {told} "
        f"({exchange / 1e9:.3g} GB/s all to all, {gather / 1e9:.3g} gathering){''.join(big)}"
    )
