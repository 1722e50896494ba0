"""Ghosts do what ranks do, a machine's figures order the schedules as others measured them, and auto picks alike."""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from farspan.kernels.softmax_attention_tiles import Tile, Tiles, tiles_ref
from farspan.parallel.comm import Group
from farspan.parallel.context import Auto, Axis, Gather, Grid, Ring, TokenRing, Ulysses, calibrate
from farspan.parallel.context import ring as ring_module
from farspan.parallel.context.attention import Call, Deal, Spread
from farspan.parallel.context.auto import ALIKE, Choice, candidates
from farspan.parallel.context.calibrate import _slowest
from farspan.parallel.context.exchange import loopback
from farspan.parallel.context.ghosts import Await, Begin, Trace, trace
from farspan.parallel.context.layout import Kind, layout
from farspan.parallel.context.local import Local
from farspan.parallel.context.pinned import Pinned
from farspan.parallel.context.ring import Lane
from farspan.parallel.context.shard import Batch
from farspan.parallel.context.sight import Sight
from farspan.parallel.context.simulate import Curve, Machine, Timeline, Wire, play, simulate
from farspan.parallel.context.sums import ALL, Kernels, Me, Saved

CAUSAL = Sight(causal=True)
SCHEDULES: list[Pinned] = [
    Gather(),
    Gather(groups=2),
    Ring(),
    TokenRing(),
    Ulysses(),
    Ulysses(groups=2),
    Grid(inner=2),
    Grid(inner=2, outer=Ring()),
    Grid(inner=2, outer=TokenRing()),
]


def h100(rate: float = 350e9, **figures: Any) -> Machine:
    """Eight H100 behind NVSwitch: the FA3 kernel's published points for 64 heads of 128 at 8K and 32K tokens, and NCCL,
    whose kernels make those beside them a third slower."""
    forward = Curve(((0, 1e-5), (1.1e12, 1.1 / 657), (17.6e12, 17.6 / 680)))
    backward = Curve(((0, 2e-5), (2.75e12, 2.75 / 517), (44e12, 44 / 586)))
    nccl = Curve(((0, 30e-6), (8e6, 30e-6 + 8e6 / rate * 2), (256e6, 30e-6 + 264e6 / rate)))
    kernels = (forward, backward)
    memory = Curve.line(4e-6, 2.6e12)
    return Machine(
        full=kernels, edge=kernels, memory=memory, near=Wire(nccl, rate), post=1e-5, contention=1.35, **figures
    )


def a10() -> Machine:
    """Four A10 whose PCIe carries 13.5 GB/s between two and 21.4 GB/s from or to one, both ways of exchange at once.

    Their kernels run at the card's peak here, so that the links decide.
    """
    kernel = Curve.line(2e-5, 125e12)
    wire = Wire(Curve.line(2e-5, 13.5e9), 21.4e9)
    memory = Curve.line(1e-5, 0.4e12)
    return Machine(full=(kernel, kernel), edge=(kernel, kernel), memory=memory, near=wire, in_order=False)


def h200() -> Machine:
    """Two H200 with FlashAttention 2 at 335 TFLOP/s, and NCCL as measured: 85, 212 and 276 GB/s at 8, 64 and 256 MB."""
    kernel = Curve.line(1e-5, 335e12)
    nccl = Curve(((0, 7e-5), (8e6, 8 / 84.9e3), (64e6, 64 / 212.3e3), (256e6, 256 / 276.2e3)))
    figures = {"memory": Curve.line(4e-6, 3.6e12), "near": Wire(nccl, 300e9)}
    return Machine(full=(kernel, kernel), edge=(kernel, kernel), post=1e-5, contention=1.15, **figures)


def call(
    tokens: int | tuple[int, ...],
    ranks: int,
    heads: tuple[int, int],
    *,
    backward: bool,
    sight: Sight = CAUSAL,
    kind: Kind = "zigzag",
    width: int = 128,
    dtype: torch.dtype = torch.bfloat16,
) -> Call:
    lengths = (tokens,) if isinstance(tokens, int) else tokens
    return Call(layout(kind, lengths, ranks), sight, *heads, width, width, dtype, backward)


@pytest.fixture
def one_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ring as it is published: all of K and V go one way."""
    monkeypatch.setattr(ring_module, "lanes", lambda layout, heads, kv_heads: (Lane(1, (ALL, ALL), ALL),))


def waiting(of: Trace) -> Trace:
    """The same schedule where nothing is done while an exchange is under way."""
    ranks = []
    for actions in of.actions:
        tickets = iter(range(len(actions)))
        ranks.append(tuple(x for a in actions for x in ((a, Await(next(tickets))) if isinstance(a, Begin) else (a,))))
    return replace(of, actions=tuple(ranks))


@pytest.mark.parametrize("spanning", SCHEDULES, ids=str)
@pytest.mark.parametrize(
    ("ranks", "lengths", "sight"),
    [(2, (61,), CAUSAL), (4, (40, 2, 2, 7, 1, 13), CAUSAL), (8, (130,), Sight(causal=True, window=17))],
)
def test_ghosts_send_what_ranks_send(spanning: Pinned, ranks: int, lengths: tuple[int, ...], sight: Sight) -> None:
    asked = call(lengths, ranks, (8, 4), backward=False, sight=sight, width=4, dtype=torch.float64)
    t = asked.layout.tokens

    def filled(heads: int) -> torch.Tensor:
        return torch.randn(t, heads, 4, dtype=torch.float64)

    kept = [(filled(8), filled(4), filled(4)) for _ in range(ranks)]
    members = [Me(rank, asked.layout, sight, Kernels()) for rank in range(ranks)]
    device = torch.device("cpu")
    found, sent = loopback([spanning.forward(me, *x) for me, x in zip(members, kept, strict=True)], device)
    assert [list(row) for row in trace(spanning, asked).sent] == sent
    saved = [Saved(filled(8), *x, *out) for x, out in zip(kept, found, strict=True)]
    _, sent = loopback([spanning.backward(me, x) for me, x in zip(members, saved, strict=True)], device)
    assert [list(row) for row in trace(spanning, replace(asked, backward=True)).sent] == sent


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("pulls", [False, True])
def test_more_bandwidth_is_never_slower_and_free_links_leave_computing(backward: bool, pulls: bool) -> None:
    asked = call((3000, 9000, 500), 4, (8, 4), backward=backward, kind="documents")
    for spanning in SCHEDULES:
        of = trace(spanning, asked)
        played = [play(of, replace(h100(rate, pulls=pulls), contention=1.0)) for rate in (1e9, 1e10, 1e11, 1e12)]
        seconds = [timeline.seconds for timeline in played]
        assert seconds == sorted(seconds, reverse=True), spanning
        free = play(of, h100().silent())
        assert free.exposed == 0
        assert free.seconds == pytest.approx(played[0].compute)
        assert all(event.kind == "compute" for event in free.events)
        alone = [
            sum(h100().seconds(a, backward=backward) for a in x if not isinstance(a, Begin | Await)) for x in of.actions
        ]
        assert free.seconds >= max(alone) * (1 - 1e-9)


def test_a_slower_node_link_is_felt_only_across_nodes() -> None:
    asked = call(32768, 8, (8, 8), backward=False)
    far = Wire(Curve.line(1e-5, 5e9), 5e9)
    within, across = (replace(h100(), far=far, node=node) for node in (8, 4))
    for spanning in (Gather(), Ring(), Grid(inner=4)):
        assert simulate(spanning, asked, within).seconds == simulate(spanning, asked, h100()).seconds
        assert simulate(spanning, asked, across).seconds > 2 * simulate(spanning, asked, within).seconds
    assert simulate(Grid(inner=4), asked, across).seconds < simulate(Ulysses(), asked, across).seconds


def test_memory_is_what_schedules_hold() -> None:
    def peak(spanning: Pinned, ranks: int) -> float:
        asked = call(4096 * ranks, ranks, (32, 8), backward=False)
        return trace(spanning, asked).peaks[-1]

    assert peak(Gather(groups=4), 8) < peak(Gather(), 8)
    assert peak(Ring(), 16) == peak(Ring(), 8)  # as much however many ranks there are; what is gathered grows
    assert peak(Gather(), 16) > 1.3 * peak(Gather(), 8)


def test_predicting_a_ring_is_quick() -> None:
    asked = call(65536, 8, (64, 8), backward=False)
    simulate(Ring(), asked, h100())
    start = time.perf_counter()
    simulate(Ring(), asked, h100())
    assert time.perf_counter() - start < 0.3


def rates(backward: bool) -> dict[str, float]:
    """TFLOP/s of each GPU, 64K causal tokens, 64:8 heads of 128."""
    asked = call(65536, 8, (64, 8), backward=backward)
    work = 2 * 65536**2 * 64 * 128 * (2.5 if backward else 1) / 8 / 1e12
    predicted = {name: play(trace(s, asked), h100()).seconds for name, s in ORDERED.items()}
    predicted["collective"] = play(waiting(trace(Gather(), asked)), h100()).seconds
    return {name: work / seconds for name, seconds in predicted.items()}


ORDERED: dict[str, Pinned] = {
    "gather": Gather(),
    "ulysses": Ulysses(),
    "grid": Grid(inner=4, outer=Ring()),
    "ring": Ring(),
}


def test_eight_h100_are_ordered_as_published(one_way: None) -> None:
    """MagiAttention's benchmark: forward Ulysses 602, all-gather 602, USP 592, ring 421; backward 582, 516, 571, 432.

    The order is what counts: the published gather is a collective that nothing hides and takes all of the keys
    (`collective`), the published ring carries dK and dV along and runs on other merges.
    """
    forward, backward = rates(False), rates(True)
    assert forward["collective"] == pytest.approx(forward["ulysses"], rel=0.05)
    assert min(forward["collective"], forward["ulysses"]) >= forward["grid"] > 1.1 * forward["ring"]
    assert backward["ulysses"] >= backward["grid"] > backward["collective"] > 1.1 * backward["ring"]
    # What ours gains by taking only what is needed, while it computes.
    assert forward["gather"] > forward["collective"]
    assert backward["gather"] > backward["collective"]
    for found, kernel in ((forward, 680), (backward, 586)):
        assert all(0.6 * kernel < rate < kernel for rate in found.values())


def test_ulysses_on_two_h200_is_as_fast_as_measured() -> None:
    """The share of a rank's ideal time at 16K, 32K, 64K and 128K causal tokens of 32 heads, all of it exposed."""
    for tokens, measured in zip((16384, 32768, 65536, 131072), (0.77, 0.87, 0.93, 0.97), strict=True):
        asked = call(tokens, 2, (32, 32), backward=False, kind="contiguous")
        ideal = h200().edge[0].seconds(2 * tokens**2 * 16 * 128)
        assert ideal / simulate(Ulysses(), asked, h200()).seconds == pytest.approx(measured, abs=0.03)


def arrivals(timeline: Timeline) -> list[float]:
    return [(e.end - e.start) * 1e3 for e in timeline.events if e.kind == "exchange" and e.rank == 0]


def test_exchanges_on_four_a10_take_as_long_as_published(one_way: None) -> None:
    """TokenRing's figures for 24,000 tokens of 32 heads: a step of the ring 7.6 ms, of its own 3.5 ms before outputs
    return. The 4.6 ms of queries and outputs together are its port's: 98 MB at 21.4 GB/s."""
    asked = call(24000, 4, (32, 32), backward=False, sight=Sight(causal=False), dtype=torch.float16)
    assert arrivals(simulate(Ring(), asked, a10())) == pytest.approx([7.6] * 3, rel=0.05)
    assert arrivals(simulate(TokenRing(), asked, a10()))[0] == pytest.approx(3.5, rel=0.05)
    queries, outputs = 24000 * 32 * 128 * 2 // 4, 24000 * 32 * (128 * 2 + 4) // 4
    both = Trace(
        False,
        tuple((Begin((((r + 1) % 4, queries), ((r - 1) % 4, outputs))), Await(0)) for r in range(4)),
        ((0,) * 4,) * 4,
        (0,) * 4,
    )
    assert play(both, a10()).seconds * 1e3 == pytest.approx(4.6, rel=0.05)


@pytest.mark.parametrize("sight", [CAUSAL, Sight(causal=False)], ids=["causal", "both ways"])
def test_queries_travel_well_only_with_as_many_key_heads_and_no_switch(sight: Sight, one_way: None) -> None:
    def gain(kv_heads: int, machine: Machine) -> float:
        asked = call(24000, 4, (32, kv_heads), backward=False, sight=sight)
        return simulate(Ring(), asked, machine).seconds / simulate(TokenRing(), asked, machine).seconds

    assert gain(32, a10()) > 1.1
    assert gain(8, a10()) < 0.95
    assert gain(32, h100()) < 1.0
    assert gain(8, h100()) < 0.95


def test_a_ring_both_ways_leaves_queries_no_advantage() -> None:
    asked = call(24000, 4, (32, 32), backward=False)
    assert simulate(Ring(), asked, a10()).seconds < simulate(TokenRing(), asked, a10()).seconds


DEAL = Deal("zigzag", "documents")


def test_the_choice_is_the_plainest_of_the_fastest_and_the_same_everywhere() -> None:
    asked = [call(32768, 4, (64, 8), backward=backward) for backward in (False, True)]
    asked.append(call(24000, 4, (8, 1), backward=False, sight=Sight(causal=True, window=1024), kind="contiguous"))
    ranks = [Choice(h100(), DEAL) for _ in range(2)]
    for one in asked:
        taken = ranks[0](one)
        seconds = [simulate(s, one, h100()).seconds for s in candidates(one)]
        plainest = next(s for s, t in zip(candidates(one), seconds, strict=True) if t <= ALIKE * min(seconds))
        assert taken == plainest
    for one in reversed(asked):  # whatever came before
        assert ranks[1](one) == ranks[0](one)
    lines = ranks[0].explain().splitlines()
    assert len(lines) == 3
    assert "forward of 4 x 8192 tokens, 7 pieces, 64:8 heads of 128, causal, bfloat16: gather" in lines[0]


def test_every_choice_is_kept_by_a_name_of_its_own_and_made_again() -> None:
    asked = [
        call(32768, 4, (64, 8), backward=backward, sight=sight)
        for backward in (False, True)
        for sight in (Sight(True), Sight(True, softcap=30.0), Sight(True, scale=0.5), Sight(False), Sight(True, 512))
    ]
    asked += [replace(asked[0], value_width=64), replace(asked[0], dtype=torch.float32)]
    first = Choice(h100(), DEAL)
    for one in asked:
        first(one)
    assert len(first.chosen()) == len(first.explain().splitlines()) == len(asked)
    other = dict.fromkeys(first.chosen(), "ring")
    again = Choice(h100(), DEAL)
    again.replay(other)
    for one in asked:
        assert isinstance(again(one), Ring) == (one.sight.window is None), "under a window none is offered"


@pytest.mark.parametrize(
    "change", [{"contention": "x"}, {"contention": 0.5}, {"near": {}}, {"node": 0}, {"post": None}]
)
def test_a_damaged_file_of_figures_is_measured_again(tmp_path: Path, change: dict[str, Any]) -> None:
    file = tmp_path / "figures.json"
    calibrate._write(file, {"version": calibrate.VERSION, **asdict(h100())})
    assert calibrate._read(file) is not None
    calibrate._write(file, {"version": calibrate.VERSION, **asdict(h100()), **change})
    assert calibrate._read(file) is None
    figures = asdict(h100())
    figures["near"]["port"] = 0
    calibrate._write(file, {"version": calibrate.VERSION, **figures})
    assert calibrate._read(file) is None


def test_documents_alike_are_predicted_once() -> None:
    offered = 0

    def offers(asked: Call) -> Iterator[Pinned]:
        nonlocal offered
        offered += 1
        yield from (Gather(), Ring())

    choice = Choice(h100(), DEAL, offers)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        lengths = torch.randint(900, 1100, (32,), generator=generator).tolist()
        lengths.append(4 * 9216 - sum(lengths))
        choice(call(tuple(lengths), 4, (8, 4), backward=False, kind="documents"))
    assert offered <= 2
    choice(call((4 * 9216 - 10, 10), 4, (8, 4), backward=False, kind="documents"))
    assert offered <= 3


def test_the_slowest_rank_counts() -> None:
    a = {"full": [{"points": ((1.0, 2.0), (3.0, 4.0))}], "port": 5.0, "pulls": True, "node": None, "version": 1}
    b = {"full": [{"points": ((1.0, 3.0), (3.0, 3.5))}], "port": 4.0, "pulls": True, "node": None, "version": 1}
    worst = {"full": [{"points": [[1.0, 3.0], [3.0, 4.0]]}], "port": 4.0, "pulls": True, "node": None, "version": 1}
    assert _slowest([a, b]) == worst


def test_a_curve_goes_through_its_points_and_refuses_those_that_fall() -> None:
    curve = Curve(((2.0, 3.0), (4.0, 5.0), (8.0, 6.0)))
    assert [curve.seconds(x) for x in (0, 2, 3, 4, 6, 8, 12)] == [1, 3, 4, 5, 5.5, 6, 7]
    assert Curve.line(2.0, 4.0).seconds(8) == pytest.approx(4.0)
    with pytest.raises(ValueError, match="rise"):
        Curve(((2.0, 3.0), (4.0, 2.0)))


def test_one_rank_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        axis = Axis(group=Group(dist.group.WORLD), device=torch.device("cpu"))
        assert isinstance(Auto().build(axis), Local)
        assert isinstance(Auto().build(None), Local)
    finally:
        dist.destroy_process_group()
    assert not list(tmp_path.iterdir())


def attend_with_auto(seed: int) -> dict[str, Any]:
    """Attention over two ranks with a schedule that auto picked: how far from one rank's it is, and what was said."""
    world = dist.group.WORLD
    assert world is not None
    axis = Axis(group=Group(world), device=torch.device("cpu"))
    start = time.perf_counter()
    runtime = Auto().build(axis)
    first = time.perf_counter() - start
    assert isinstance(runtime, Spread)
    length, heads, width = 61, 4, 8
    tokens = torch.arange(length)[None]
    batch = runtime.cut(
        Batch(tokens=tokens, labels=tokens, positions=tokens, cu_seqlens=None, lengths=(length,), valid=length)
    )
    torch.manual_seed(seed)
    whole = [torch.randn(length, h, width, requires_grad=True) for h in (heads, 2, 2)]
    here = batch.positions[0][: len(batch.tokens[0])]
    held = len(torch.unique(here)) if here[-1] else int((here > 0).sum()) + (1 if axis.group.rank == 0 else 0)
    mine = [x.detach()[here].unsqueeze(0).requires_grad_() for x in whole]
    out = runtime.attend(*mine, causal=True, documents=batch.documents)
    expected, _ = tiles_ref(*whole, Tiles((Tile(0, length, 0, length, 0),), True))
    upstream = torch.randn(length, heads, width)
    expected.backward(upstream.double())
    real = torch.zeros(len(here), 1, 1)
    real[:held] = 1
    out.backward((upstream[here] * real).unsqueeze(0))
    pairs = [(out[0, :held].double(), expected[here[:held]])]
    pairs += [(x.grad[0, :held], y.grad[here[:held]]) for x, y in zip(mine, whole, strict=True)]
    error = max((a - b).abs().max().item() for a, b in pairs)
    explained, figures = runtime.explain(), runtime.spanning.machine  # type: ignore[attr-defined]
    again = Auto().build(axis)
    assert again.spanning.machine == figures, "measured again"
    return {"error": error, "explained": explained, "first": first}


def test_two_ranks_pick_alike_attend_right_and_measure_once(
    ranks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = ranks(2, attend_with_auto, seed=3)
    assert all(one["error"] < 1e-5 for one in found)
    assert len({one["explained"] for one in found}) == 1
    assert [line.split()[1] for line in found[0]["explained"].splitlines()] == ["forward", "backward"]
    assert all(one["first"] < 5.0 for one in found)  # a second where nothing else runs
    (file,) = (tmp_path / "farspan").iterdir()
    assert file.name == f"context-cpu-2-pairs-{torch.__version__}.json"
    assert json.loads(file.read_text())["version"] == 1
