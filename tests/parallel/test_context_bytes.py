"""What schedules send, byte for byte, against formulas; and that `loopback`, which counts it, lets nothing wrong pass.

Of N ranks each holds L tokens. One rank's queries are u bytes, its keys and values 2u/g, where g queries share a key
head; a log-sum-exp of its queries is l bytes in fp32.
"""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from farspan.parallel.context import Gather, Grid, Ring, TokenRing, Ulysses
from farspan.parallel.context.exchange import (
    SLOTS,
    Give,
    Packing,
    Post,
    Room,
    Schedule,
    Sections,
    Take,
    Wait,
    drive,
    loopback,
    renumbered,
)
from farspan.parallel.context.layout import KINDS, Kind, Layout, layout
from farspan.parallel.context.pinned import Pinned
from farspan.parallel.context.sight import Sight
from farspan.parallel.context.sums import Kernels, Me, Saved

CPU = torch.device("cpu")
CAUSAL = Sight(causal=True)
HEADS, WIDTH, CHUNK = 8, 4, 4
L = 2 * CHUNK
U = L * HEADS * WIDTH * 2
LSE = L * HEADS * 4
Sent = list[list[int]]
"""By sender, then by receiver."""


def sent(schedule: Pinned, of: Layout, kv_heads: int, sight: Sight = CAUSAL) -> tuple[Sent, Sent]:
    """Bytes of a forward and of a backward in bf16."""

    def tensors(*heads: int) -> list[Tensor]:
        return [torch.ones(of.tokens, count, WIDTH, dtype=torch.bfloat16) for count in heads]

    ranks = [Me(rank, of, sight, Kernels()) for rank in range(of.ranks)]
    q, k, v, dout = tensors(HEADS, kv_heads, kv_heads, HEADS)
    forward, there = loopback([schedule.forward(me, q, k, v) for me in ranks], CPU)
    saved = [Saved(dout, q, k, v, out, lse) for out, lse in forward]
    _, back = loopback([schedule.backward(me, part) for me, part in zip(ranks, saved, strict=True)], CPU)
    return there, back


def even(ranks: int, inner: int = 1, kind: Kind = "zigzag") -> Layout:
    return layout(kind, (ranks * L,), ranks, inner)


def totals(of: Sent) -> list[int]:
    return [sum(row) for row in of]


def received(of: Sent) -> list[int]:
    return [sum(row[rank] for row in of) for rank in range(len(of))]


@pytest.mark.parametrize("kv_heads", [8, 2, 1])
@pytest.mark.parametrize("ranks", [2, 3, 5, 8])
def test_a_ring_sends_all_keys_each_step(ranks: int, kv_heads: int) -> None:
    """Half goes each way; the backward sends keys and values again, and as many bytes of gradients to the owners."""
    cargo = 2 * U * kv_heads // HEADS
    there, back = sent(Ring(), even(ranks), kv_heads)
    for rank in range(ranks):
        ways = [0] * ranks
        for neighbour in (rank + 1, rank - 1):
            ways[neighbour % ranks] += (ranks - 1) * cargo // 2
        assert there[rank] == ways
    assert totals(back) == [2 * (ranks - 1) * cargo] * ranks


def test_a_ring_sends_only_the_tokens_that_there_are() -> None:
    """Padding stays at home: at step s what rank r - s holds goes up, and what r + s holds goes down."""
    of, row = layout("documents", (1, 40, 3), 5, multiple=4), 2 * 2 * WIDTH * 2
    held = [of.held(rank) for rank in range(5)]
    assert len(set(held)) > 1
    there, _ = sent(Ring(), of, 2)
    for rank in range(5):
        up = sum(held[(rank - step) % 5] for step in range(4))
        down = sum(held[(rank + step) % 5] for step in range(4))
        assert there[rank][(rank + 1) % 5] == up * row // 2
        assert there[rank][(rank - 1) % 5] == down * row // 2


def queries_travelling(rank: int, ranks: int) -> float:
    """Times L rows: rank 0 passes halves on only, as all it gets has been past the end; others pass N - r wholes."""
    wholes = ranks - rank if rank else 0
    return wholes + (ranks - 1 - wholes) / 2


def answers_returning(rank: int, ranks: int) -> float:
    """Times L rows: all queries of ranks above see this rank's first chunk, the later half of those below see both."""
    return (ranks - 1 - rank) + rank / 2


@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("ranks", [2, 3, 5, 8])
def test_a_token_ring_sends_queries_and_answers(ranks: int, kv_heads: int) -> None:
    """Keys stay, so g is in no formula; causal zigzag needs three quarters of (N-1)(2u + l) and (N-1)(3u + 2l)."""
    there, back = sent(TokenRing(), even(ranks), kv_heads)
    for rank in range(ranks):
        going, coming = queries_travelling(rank, ranks), answers_returning(rank, ranks)
        assert totals(there)[rank] == going * U + coming * (U + LSE)
        assert totals(back)[rank] == going * (2 * U + 2 * LSE) + coming * U
    steps = ranks * (ranks - 1)
    assert sum(totals(there)) == 0.75 * steps * (2 * U + LSE)
    assert sum(totals(back)) == 0.75 * steps * (3 * U + 2 * LSE)


@pytest.mark.parametrize("ranks", [3, 4])
def test_a_token_ring_without_an_order_sends_everything(ranks: int) -> None:
    there, back = sent(TokenRing(), even(ranks), 8, Sight(causal=False))
    assert totals(there) == [(ranks - 1) * (2 * U + LSE)] * ranks
    assert totals(back) == [(ranks - 1) * (3 * U + 2 * LSE)] * ranks


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kv_heads", [8, 2, 1])
@pytest.mark.parametrize("ranks", [2, 3, 5, 8])
def test_a_gather_of_causal_zigzag_sends_three_quarters_of_a_ring(ranks: int, kv_heads: int, groups: int) -> None:
    """Of a rank above both chunks are in the past of this one's last queries, of one below only the first."""
    cargo = 2 * U * kv_heads // HEADS
    there, back = sent(Gather(groups=groups), even(ranks), kv_heads)
    for taker, giver in product(range(ranks), repeat=2):
        chunks = 0.0 if taker == giver else 1.0 if giver > taker else 0.5
        assert there[giver][taker] == chunks * cargo
        assert back[giver][taker] == there[giver][taker] + there[taker][giver], "the same again, and gradients back"
    assert sum(totals(there)) == 0.75 * ranks * (ranks - 1) * cargo


@pytest.mark.parametrize("window", [1, 2, 6, L + 1, 3 * L])
def test_a_gather_under_a_window_sends_the_halo(window: int) -> None:
    """Of a contiguous sequence: the window less one before a rank's first token, as far as there are any."""
    ranks, row = 5, 2 * 2 * WIDTH * 2
    there, back = sent(Gather(), even(ranks, kind="contiguous"), 2, Sight(causal=True, window=window))
    halo = [min(window - 1, rank * L) * row for rank in range(ranks)]
    assert received(there) == halo
    assert received(back) == [mine + theirs for mine, theirs in zip(halo, totals(there), strict=True)]


@pytest.mark.parametrize("sight", [CAUSAL, Sight(causal=False), Sight(causal=True, window=6)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_gather_sends_exactly_what_is_seen(kind: Kind, sight: Sight) -> None:
    """A key travels to a rank if, and once if, one of its queries sees it: counted pair by pair."""
    lengths, ranks, row = (5, 33, 1, 14), 4, 2 * 2 * WIDTH * 2
    of = layout(kind, lengths, ranks, multiple=4)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(sum(lengths))
    mask = document[:, None] == document
    if sight.causal:
        mask &= place <= place[:, None]
    if sight.window is not None:
        mask &= place > place[:, None] - sight.window
    there, _ = sent(Gather(), of, 2, sight)
    for taker, giver in product(range(ranks), repeat=2):
        seen = mask[of.places(taker)][:, of.places(giver)].any(0).sum() * row
        assert there[giver][taker] == (seen if taker != giver else 0)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kv_heads", [8, 4, 2])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ulysses_sends_each_head_to_its_rank(ranks: int, kv_heads: int, groups: int) -> None:
    """Queries, keys, values there, outputs and lse back; a key head that several ranks need goes to each of them."""
    copies = max(1, ranks // kv_heads)
    cargo = 2 * U * kv_heads * copies // HEADS
    there, back = sent(Ulysses(groups=groups), even(ranks, kind="contiguous"), kv_heads)
    for giver, taker in product(range(ranks), repeat=2):
        part = 0 if giver == taker else 1 / ranks
        assert there[giver][taker] == (2 * U + cargo + LSE) * part
        assert back[giver][taker] == (3 * U + 2 * cargo + 2 * LSE) * part, "q, dout, k, v, lse, delta; dq, dk, dv"


@pytest.mark.parametrize("inner", [2, 4])
@pytest.mark.parametrize("outer", [Gather(), Ring(), TokenRing()], ids=lambda outer: type(outer).__name__)
def test_a_grid_sends_what_its_two_parts_send(outer: Gather | Ring | TokenRing, inner: int) -> None:
    """Within a group the swap of heads; between groups the outer schedule, with 1/inner of the heads of inner times
    the tokens: as much as if every rank were a group."""
    ranks, kv_heads = 8, 4
    groups, cargo = ranks // inner, 2 * U * kv_heads // HEADS
    there, back = sent(Grid(inner=inner, outer=outer), even(ranks, inner), kv_heads)
    outer_there, outer_back = sent(outer, even(groups), kv_heads)
    swap_there = (2 * U + cargo + LSE) / inner
    swap_back = (3 * U + 2 * cargo + 2 * LSE) / inner
    for giver, taker in product(range(ranks), repeat=2):
        group, place = divmod(giver, inner)
        other, other_place = divmod(taker, inner)
        swapped = group == other and place != other_place
        spanned = group != other and place == other_place
        assert there[giver][taker] == swapped * swap_there + spanned * outer_there[group][other]
        assert back[giver][taker] == swapped * swap_back + spanned * outer_back[group][other]


@pytest.mark.parametrize("schedule", [Gather(), Ring(), TokenRing(), Ulysses(), Grid(inner=1)], ids=str)
def test_one_rank_sends_nothing(schedule: Pinned) -> None:
    assert sent(schedule, even(1), 2) == ([[0]], [[0]])


def test_documents_that_stay_whole_send_nothing() -> None:
    of = layout("documents", (4,) * 16, 4)
    assert sent(Gather(), of, 2) == ([[0] * 4] * 4, [[0] * 4] * 4)
    assert sent(TokenRing(), of, 2) == ([[0] * 4] * 4, [[0] * 4] * 4)


Speaker = Callable[[int], Schedule[object]]


def speak(*of_rank: Speaker) -> tuple[list[object], Sent]:
    return loopback([speaker(rank) for rank, speaker in enumerate(of_rank)], CPU)


def say(*gives: Give) -> Speaker:
    """Publishes 8 bytes and gives some of them."""

    def speaker(rank: int) -> Schedule[None]:
        room = yield Room(8, 8)
        room.copy_(torch.arange(8) + 10 * rank)
        yield Post(room, gives, ())

    return speaker


def listen(source: int, start: int, size: int) -> Speaker:
    """Takes bytes in one post, and waits for them."""

    def speaker(rank: int) -> Schedule[list[int]]:
        into = torch.empty(size, dtype=torch.uint8)
        ticket = yield Post(torch.empty(0, dtype=torch.uint8), (), [Take(source, start, into)])
        yield Wait(ticket)
        heard: list[int] = into.tolist()
        return heard

    return speaker


def silent(posts: int) -> Speaker:
    def speaker(rank: int) -> Schedule[None]:
        for _ in range(posts):
            yield Post(torch.empty(0, dtype=torch.uint8), (), ())

    return speaker


def test_what_is_given_is_taken_and_counted() -> None:
    results, counted = speak(listen(1, 2, 3), say(Give(0, 2, 5)))
    assert results == [[12, 13, 14], None]
    assert counted == [[0, 0], [3, 0]]


def test_what_a_rank_takes_of_itself_costs_nothing() -> None:
    def speaker(rank: int) -> Schedule[list[int]]:
        room, into = (yield Room(4, 4)), torch.empty(2, dtype=torch.uint8)
        room.fill_(rank + 1)
        yield Wait((yield Post(room, (), [Take(rank, 1, into)])))
        heard: list[int] = into.tolist()
        return heard

    assert speak(speaker, speaker) == ([[1, 1], [2, 2]], [[0, 0], [0, 0]])


@pytest.mark.parametrize(
    "speakers",
    [
        (listen(1, 0, 4), silent(1)),
        (silent(1), say(Give(0, 0, 4))),
        (listen(1, 0, 4), say(Give(0, 0, 5))),
        (listen(1, 1, 4), say(Give(0, 0, 4))),
        (listen(1, 0, 4), say(Give(0, 0, 4), Give(0, 0, 4))),
    ],
    ids=["taken alone", "given alone", "too long", "elsewhere", "twice"],
)
def test_giver_and_taker_must_agree(speakers: tuple[Speaker, ...]) -> None:
    with pytest.raises(RuntimeError, match=r"post 0: rank 1 gives .* to rank 0, which takes"):
        speak(*speakers)


def test_all_ranks_must_post_as_often() -> None:
    with pytest.raises(RuntimeError, match=r"posted \[1, 2, 1\] times; all must as often"):
        speak(silent(1), silent(2), silent(1))


def test_a_room_is_no_larger_than_was_said() -> None:
    def greedy(rank: int) -> Schedule[None]:
        yield Room(9, 8)

    with pytest.raises(RuntimeError, match="rank 0 asks for 9 bytes, and says 8 is the most"):
        speak(greedy)


def test_waiting_for_who_never_posts_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"ranks \[0\] wait for ever"):
        speak(listen(1, 0, 4), silent(0))


def test_more_rooms_than_slots_without_a_post_wait_for_ever() -> None:
    def hoarder(rank: int) -> Schedule[None]:
        for _ in range(SLOTS + 1):
            yield Room(4, 4)

    with pytest.raises(RuntimeError, match=r"ranks \[0, 1\] wait for ever"):
        speak(hoarder, hoarder)


def test_rooms_wait_for_ranks_that_are_behind() -> None:
    """More publications than slots: none is spoilt before the slower rank has it, however far the other is ahead."""
    count = 3 * SLOTS

    def ahead(rank: int) -> Schedule[None]:
        for i in range(count):
            room = yield Room(4, 4)
            room.fill_(i)
            yield Post(room, [Give(1, 0, 4)], ())

    def behind(rank: int) -> Schedule[list[int]]:
        into = [torch.empty(4, dtype=torch.uint8) for _ in range(count)]
        for part in into:
            yield Wait((yield Post(torch.empty(0, dtype=torch.uint8), (), [Take(0, 0, part)])))
        return [int(part[0]) for part in into]

    assert speak(ahead, behind)[0][1] == list(range(count))


def test_old_publications_are_spoilt_and_new_ones_not_filled() -> None:
    kept: list[Tensor] = []
    spoilt: list[list[bool]] = []

    def speaker(rank: int) -> Schedule[None]:
        for i in range(SLOTS + 2):
            room = yield Room(8, 8)
            assert room.view(torch.float32).isnan().all()
            room.view(torch.float32).fill_(i)
            kept.append(room)
            spoilt.append([bool(old.view(torch.bfloat16).isnan().all()) for old in kept])
            yield Post(room, (), ())

    speak(speaker)
    assert spoilt[SLOTS - 1] == [False] * SLOTS
    assert spoilt[SLOTS + 1] == [True] * 2 + [False] * SLOTS


def test_a_room_is_held_until_what_publishes_it_has_passed() -> None:
    """It counts from its post, not from when it was asked for: the other rank, still at its first post, reads it."""
    nothing = torch.empty(0, dtype=torch.uint8)

    def slow(rank: int) -> Schedule[list[int]]:
        into = torch.empty(4, dtype=torch.uint8)
        yield Wait((yield Post(nothing, (), [Take(1, 0, into)])))
        for _ in range(SLOTS - 2):
            yield Post(nothing, (), ())
        yield Wait((yield Post(nothing, (), [Take(1, 0, into)])))
        for _ in range(2):
            yield Post(nothing, (), ())
        heard: list[int] = into.tolist()
        return heard

    def fast(rank: int) -> Schedule[None]:
        first = yield Room(4, 4)
        first.fill_(7)
        yield Post((yield Room(4, 4)), [Give(0, 0, 4)], ())
        for _ in range(SLOTS - 2):
            yield Post((yield Room(4, 4)), (), ())
        yield Post(first, [Give(0, 0, 4)], ())
        yield Post(nothing, (), ())  # the barrier of the post behind it says that everyone has read it
        yield Post((yield Room(4, 4)), (), ())

    assert speak(slow, fast)[0] == [[7] * 4, None]


def test_renumbered_ranks_speak_to_each_other() -> None:
    """Ranks 3 and 1 of four run a schedule of two."""
    outer = [
        silent(1)(0),
        renumbered(say(Give(0, 2, 5))(1), (3, 1)),
        silent(1)(2),
        renumbered(listen(1, 2, 3)(0), (3, 1)),
    ]
    results, counted = loopback(outer, CPU)
    assert results == [None, None, None, [12, 13, 14]]
    assert counted[1][3] == 3 and sum(totals(counted)) == 3


class Diary:
    """A link that only notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def room(self, asked: Room) -> Tensor:
        self.asked.append(f"room {asked.size}")
        return torch.zeros(asked.size, dtype=torch.uint8)

    def post(self, post: Post) -> int:
        self.asked.append(f"post to {[give.to for give in post.gives]}")
        return 5

    def wait(self, ticket: int) -> None:
        self.asked.append(f"wait {ticket}")

    def close(self) -> None:
        self.asked.append("close")


def test_a_link_is_asked_in_order_and_closed_at_the_end() -> None:
    diary = Diary()

    def speaker() -> Schedule[str]:
        room = yield Room(8, 8)
        yield Wait((yield Post(room, [Give(1, 0, 8)], ())))
        return "done"

    assert drive(speaker(), diary) == "done"
    assert diary.asked == ["room 8", "post to [1]", "wait 5", "close"]


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_sections_hold_tensors_of_several_types(rows: int) -> None:
    """What is laid down is read back; stretches of rows are where `bounds` says; every section begins at 16 bytes."""
    made = torch.Generator().manual_seed(rows)
    shapes = [((3, 5), torch.bfloat16), ((3, 2), torch.bfloat16), ((3,), torch.float32), ((2,), torch.float64)]
    q, v, lse, more = (torch.randn(rows, *shape, generator=made).to(dtype) for shape, dtype in shapes)
    sections = Sections([q, v], [lse], [more])
    room = torch.full((sections.size(rows),), 255, dtype=torch.uint8)
    for part, group in zip(sections.parts(room, rows), ([q, v], [lse], [more]), strict=True):
        for view, tensor in zip(Packing(*group).views(part), group, strict=True):
            view.copy_(tensor)
    for view, tensor in zip(sections.views(room, rows), (q, v, lse, more), strict=True):
        assert torch.equal(view, tensor)
    assert all(low % 16 == 0 for low, _ in sections.bounds(rows, (0, rows)))
    for low, high in product(range(rows + 1), repeat=2):
        if low <= high:
            (first, last), (start, stop), _ = sections.bounds(rows, (low, high))
            assert torch.equal(Packing(q, v).views(room[first:last])[1], v[low:high])
            assert torch.equal(Packing(lse).views(room[start:stop])[0], lse[low:high])
