"""Any number of ranks is one rank: every schedule's out, lse, dq, dk and dv are those of a dense softmax in fp64.

All ranks run in this process over `loopback`, which spoils memory that is used again. Padding holds NaN, keys are eight
times as large as usual so that log-sum-exps lie far apart, and values are wider than keys. Each family of schedules
meets every pair of the choices below; `make laws` crosses masks, heads and ranks in full.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product

import pytest
import torch
from torch import Tensor

from farspan.parallel.context import Gather, Grid, Ring, TokenRing, Ulysses
from farspan.parallel.context.exchange import loopback
from farspan.parallel.context.layout import KINDS, Kind, Layout, layout
from farspan.parallel.context.pinned import Pinned
from farspan.parallel.context.sight import Sight
from farspan.parallel.context.sums import Kernels, Me, Saved

CPU = torch.device("cpu")
KEY_WIDTH, VALUE_WIDTH = 4, 6
LOUD = 8
"""How much larger than usual keys are."""
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}
"""In fp32 one rank is 1e-5 off by itself: scores and log-sum-exps of 50 are rounded."""

FAMILIES: dict[str, list[Pinned]] = {
    "gather": [Gather(), Gather(groups=2), Gather(groups=3)],
    "ring": [Ring()],
    "token_ring": [TokenRing()],
    "ulysses": [Ulysses(), Ulysses(groups=2), Ulysses(groups=3)],
    "grid": [
        Grid(inner=1, outer=Ring()),
        Grid(inner=2, outer=Gather(groups=2)),
        Grid(inner=2, outer=Ring(), groups=2),
        Grid(inner=2, outer=TokenRing()),
        Grid(inner=3, outer=Ring()),
        Grid(inner=4, outer=TokenRing()),
    ],
}
SIGHTS = [
    Sight(causal=True),
    Sight(causal=False),
    Sight(causal=True, window=1),
    Sight(causal=True, window=5),
    Sight(causal=True, window=17),
    Sight(causal=True, window=1000),
]
SOFTCAPS = [None, 3.0]
LENGTHS = [(64,), (61,), (3,), (20, 20), (5, 9, 1, 30), (40, 2, 2, 7, 1, 13)]
HEADS = [(1, 1), (4, 1), (8, 1), (3, 3), (12, 3), (24, 3)]
EVEN_HEADS = [(4, 1), (8, 1), (4, 4), (8, 2), (12, 3), (12, 12)]
"""A grid deals the heads of a group out evenly."""
RANKS = [1, 2, 3, 4, 5, 8]


@dataclass(frozen=True)
class Case:
    schedule: Pinned
    ranks: int
    heads: tuple[int, int]
    sight: Sight
    softcap: float | None
    lengths: tuple[int, ...]
    kind: Kind
    dtype: torch.dtype
    multiple: int

    @property
    def layout(self) -> Layout:
        return layout(self.kind, self.lengths, self.ranks, self.schedule.within, self.multiple)

    @property
    def seen(self) -> Sight:
        return replace(self.sight, softcap=self.softcap, scale=None if self.softcap is None else 0.3)


def choices(family: str) -> list[Sequence[object]]:
    heads = EVEN_HEADS if family == "grid" else HEADS
    ranks = [*RANKS, 6] if family == "grid" else RANKS
    return [FAMILIES[family], ranks, heads, SIGHTS, SOFTCAPS, LENGTHS, KINDS, list(TOLERANCE), [1, 4]]


def allowed(case: Case) -> bool:
    return not case.schedule.problems(case.ranks, *case.heads)


def covering(family: str) -> list[Case]:
    """Few cases in which every two choices that are allowed together meet: of random ones the best, repeatedly."""
    drawn, levels = random.Random(family), choices(family)
    pairs = list(combinations(range(len(levels)), 2))
    left = {(i, j, a, b) for i, j in pairs for a in range(len(levels[i])) for b in range(len(levels[j]))}
    cases = []

    def case(picks: Sequence[int]) -> Case:
        return Case(*(level[pick] for level, pick in zip(levels, picks, strict=True)))  # type: ignore[arg-type]

    def met(picks: Sequence[int]) -> set[tuple[int, int, int, int]]:
        return {(i, j, picks[i], picks[j]) for i, j in pairs} & left

    while left:
        i, j, a, b = min(left)
        draws = [[drawn.randrange(len(level)) for level in levels] for _ in range(40)]
        for picks in draws:
            picks[i], picks[j] = a, b
        draws = [picks for picks in draws if allowed(case(picks))]
        if draws:
            best = max(draws, key=lambda picks: len(met(picks)))
            cases.append(case(best))
            left -= met(best)
        left.discard((i, j, a, b))
    return cases


def crossed(schedule: Pinned, family: str, ranks: int) -> list[Case]:
    """Every mask with every number of heads; what else there is comes in turn."""
    heads, sights = choices(family)[2:4]
    drawn = random.Random(ranks)
    rest = [[drawn.choice(level) for level in choices(family)[4:]] for _ in range(len(heads) * len(sights))]
    crossing = zip(product(heads, sights), rest, strict=True)
    cases = [Case(schedule, ranks, *pair, *more) for pair, more in crossing]  # type: ignore[arg-type]
    return [case for case in cases if allowed(case)]


Found = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""out S H V, lse H S, dq S H K, dk S Hkv K, dv S Hkv V."""


def inputs(case: Case) -> list[Tensor]:
    """q, k, v, dout of all tokens."""
    drawn = torch.Generator().manual_seed(sum(case.lengths) + case.ranks)
    length, (heads, kv_heads) = sum(case.lengths), case.heads
    shapes = (heads, KEY_WIDTH), (kv_heads, KEY_WIDTH), (kv_heads, VALUE_WIDTH), (heads, VALUE_WIDTH)
    q, k, v, dout = (torch.randn(length, *s, generator=drawn, dtype=torch.float64) for s in shapes)
    return [x.to(case.dtype) for x in (q, LOUD * k, v, dout)]


def dense(case: Case, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Found:
    """A softmax over all pairs of tokens in fp64, under a mask written down from documents and positions."""
    q, k, v, dout = (x.double() for x in (q, k, v, dout))
    for x in (q, k, v):
        x.requires_grad_()
    document = torch.repeat_interleave(torch.arange(len(case.lengths)), torch.tensor(case.lengths))
    place = torch.arange(sum(case.lengths))
    mask = document[:, None] == document
    if case.sight.causal:
        mask &= place <= place[:, None]
    if case.sight.window is not None:
        mask &= place > place[:, None] - case.sight.window
    keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("ihk,jhk->hij", q, keys) * (case.seen.scale or KEY_WIDTH**-0.5)
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    out = torch.einsum("hij,jhv->ihv", scores.softmax(-1), values)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    return out.detach(), scores.logsumexp(-1).detach(), *grads


def spread(case: Case, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Found]:
    """The same from each rank, over its own tokens."""
    of = case.layout
    parts = [[cut(x, of, rank) for x in (q, k, v, dout)] for rank in range(case.ranks)]
    ranks = [Me(rank, of, case.seen, Kernels()) for rank in range(case.ranks)]
    there = [case.schedule.forward(me, *part[:3]) for me, part in zip(ranks, parts, strict=True)]
    forward, _ = loopback(there, CPU)
    back = [
        case.schedule.backward(me, Saved(part[3], *part[:3], out, lse))
        for me, part, (out, lse) in zip(ranks, parts, forward, strict=True)
    ]
    backward, _ = loopback(back, CPU)
    return [(*there, *back) for there, back in zip(forward, backward, strict=True)]


def cut(x: Tensor, of: Layout, rank: int) -> Tensor:
    """A rank's rows, the padding spoilt."""
    part = x.new_full((of.tokens, *x.shape[1:]), torch.nan)
    part[: of.held(rank)] = x[of.places(rank)]
    return part


def joined(parts: list[Found], of: Layout) -> Found:
    """What the ranks found, in the order of tokens; padding must have found nothing."""
    wholes = []
    for i, tensors in enumerate(zip(*parts, strict=True)):
        axis, nothing = (1, -torch.inf) if i == 1 else (0, 0.0)
        held = [of.held(rank) for rank in range(of.ranks)]
        for tensor, count in zip(tensors, held, strict=True):
            assert tensor.shape[axis] == of.tokens
            assert (tensor.narrow(axis, count, of.tokens - count) == nothing).all(), "padding"
        rows = torch.cat([tensor.narrow(axis, 0, count) for tensor, count in zip(tensors, held, strict=True)], axis)
        order = torch.cat([of.places(rank) for rank in range(of.ranks)]).argsort()
        wholes.append(rows.index_select(axis, order))
    return wholes[0], wholes[1], wholes[2], wholes[3], wholes[4]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors are small: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check(case: Case) -> None:
    given = inputs(case)
    found, wanted = joined(spread(case, *given), case.layout), dense(case, *given)
    for name, ours, theirs in zip(("out", "lse", "dq", "dk", "dv"), found, wanted, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == case.dtype
        terms = LOUD if name in ("dq", "dk") else 1  # what cancels in these sums is as large
        error = (ours.double() - theirs).abs().max() / theirs.abs().max().clamp(min=terms)
        assert error < TOLERANCE[case.dtype], f"{name} is {error:.1e} off: {case}"  # NaN is not below anything


@pytest.mark.parametrize(
    "case", [case for family in FAMILIES for case in covering(family)], ids=lambda c: type(c.schedule).__name__.lower()
)
def test_ranks_are_one_rank(case: Case) -> None:
    check(case)


@pytest.mark.laws
@pytest.mark.parametrize("ranks", [*RANKS, 6])
@pytest.mark.parametrize(
    ("family", "schedule"), [(name, schedule) for name in FAMILIES for schedule in FAMILIES[name]], ids=str
)
def test_all_ranks_are_one_rank(family: str, schedule: Pinned, ranks: int) -> None:
    for case in crossed(schedule, family, ranks):
        check(case)


def example(schedule: Pinned) -> Case:
    """Uneven, packed, with a key head shared by several queries."""
    ranks = 6 if schedule.within == 3 else 4
    heads = (12, 3) if schedule.within in (1, 3) else (8, 2)
    options = Sight(causal=True), None, (40, 2, 2, 7, 1, 13), "documents", torch.float32, 4
    return Case(schedule, ranks, heads, *options)


SCHEDULES = [schedule for family in FAMILIES.values() for schedule in family]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_two_runs_are_equal_bit_for_bit(schedule: Pinned) -> None:
    """The second finds NaN in all memory that it has not written."""
    case = example(schedule)
    first = spread(case, *inputs(case))
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(5).isnan().all(), "torch spoils what is not filled"
        second = spread(case, *inputs(case))
    finally:
        torch.use_deterministic_algorithms(False)
    for ours, theirs in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_bf16_is_little_worse_than_on_one_rank(schedule: Pinned) -> None:
    """A part is rounded where it is found and where it is summed: twice, and a third time if groups share a key head.

    Independent roundings add up in squares, so of two the error is 1.4 times that of one, and of three 1.7 times.
    """
    case = replace(example(schedule), dtype=torch.bfloat16)
    given = inputs(case)
    wanted = dense(case, *given)

    def errors(of: Case) -> list[float]:
        found = joined(spread(of, *given), of.layout)
        return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]

    alone = errors(replace(case, schedule=Gather(), ranks=1))
    limit = 2.0 if getattr(schedule, "groups", 1) > 1 and not isinstance(schedule, Gather) else 1.75
    for ours, theirs in zip(errors(case), alone, strict=True):
        assert ours <= limit * theirs


@pytest.mark.parametrize(
    ("make", "way_out"),
    [
        (lambda: Gather(groups=0), "groups=0: must be at least 1"),
        (lambda: Ulysses(groups=0), "groups=0: must be at least 1"),
        (lambda: Grid(inner=0), "inner=0: must be at least 1"),
        (lambda: Grid(inner=2, groups=-1), "groups=-1: must be at least 1"),
    ],
)
def test_schedules_without_parts_are_refused(make: Callable[[], Pinned], way_out: str) -> None:
    with pytest.raises(ValueError, match=way_out):
        make()


def test_a_grid_says_what_it_cannot_deal_out() -> None:
    assert Grid(inner=3).problems(8, 12, 3) == ["inner=3: must divide parallel.cp=8; try 2"]
    assert Grid(inner=2).problems(8, 12, 3)[0].startswith("inner=2: 12 heads with 3 for keys cannot be dealt out")
    assert Grid(inner=2, groups=3).problems(8, 8, 4) == ["groups=3: must divide the 2 heads of each rank; try 1"]
    assert not Grid(inner=2, groups=2).problems(8, 8, 4)
    with pytest.raises(ValueError, match=r"outer\.layout=zigzag: has no say there; set layout of the grid"):
        Grid(inner=2, outer=Ring(layout="zigzag"))
    assert not Grid(inner=8).problems(8, 12, 3), "one group is an exchange of heads, which takes any"
