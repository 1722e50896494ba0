"""The chosen experts are the best, the lower of equals and never twice, and logits learn what they did."""

from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from without_gpu import both, compiled

from farspan.kernels import route as ops
from farspan.kernels.define import triton_runs
from farspan.kernels.route import Score, route, route_ref

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one NVIDIA GPU")

SCORES: tuple[Score, ...] = ("softmax", "softmax_after", "sigmoid")


@dataclass(frozen=True)
class Case:
    """A router of a model, or one that is awkward."""

    experts: int
    k: int
    groups: tuple[int, int] | None = None
    normalised: bool = False
    bias: bool = False
    scale: float = 1.0

    def settings(self, score: Score, device: str = "cpu") -> dict[str, Any]:
        bias = draw(self.experts, seed=7, device=device) / 8 if self.bias else None
        return {"score": score, "bias": bias, "groups": self.groups, "normalised": self.normalised, "scale": self.scale}


SMALL = [
    Case(1, 1),
    Case(5, 5, normalised=True),
    Case(12, 4, groups=(4, 2), bias=True, normalised=True, scale=2.5),
    Case(21, 4, groups=(7, 3), scale=0.5),
    Case(6, 3, groups=(6, 3), bias=True),
    Case(40, 8, bias=True),
    Case(129, 3, normalised=True),
]
LARGE = [
    *SMALL,
    Case(64, 6),
    Case(128, 8, normalised=True),
    Case(160, 6, groups=(8, 3), scale=16.0),
    Case(256, 8, groups=(8, 4), normalised=True, bias=True, scale=2.5),
    Case(512, 10, normalised=True, bias=True),
    Case(1000, 32, normalised=True),
    Case(1024, 22, groups=(32, 5), bias=True),
]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def poisoned(x: Tensor, how: str) -> Tensor:
    """The same numbers amid NaN: as rows that are halves of wider ones, or not even dense along a row."""
    if how == "rows":
        return x.new_full((x.shape[0], 2 * x.shape[1]), torch.nan)[:, x.shape[1] :].copy_(x)
    return x.new_full((*x.shape, 2), torch.nan)[..., 1].copy_(x)


def run(op: Any, logits: Tensor, dprobability: Tensor, k: int, **settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities, chosen experts, the gradient of the logits."""
    leaf = logits.detach().requires_grad_()
    probability, chosen = op(leaf, k, **settings)
    assert chosen.dtype == torch.int32 and not chosen.requires_grad
    return probability.detach(), chosen, torch.autograd.grad(probability, leaf, dprobability)[0]


def different(chosen: Tensor, experts: int) -> bool:
    ordered = chosen.sort(-1).values
    return bool((ordered >= 0).all() and (ordered < experts).all() and (ordered.diff(dim=-1) > 0).all())


def by_hand(logits: Tensor, score: Score, case: Case, bias: Tensor | None) -> list[tuple[list[int], list[float]]]:
    """Token by token, in words: what is added, which groups stay, who is first, what is said of them."""
    found = []
    for row in logits:
        scores = {"softmax": row.softmax(0), "sigmoid": row.sigmoid(), "softmax_after": row}[score].tolist()
        wish = scores if bias is None else [s + b for s, b in zip(scores, bias.tolist(), strict=True)]
        able = range(case.experts)
        if case.groups:
            count, kept = case.groups
            size = case.experts // count
            total = [sum(sorted(wish[g * size : (g + 1) * size])[-2:]) for g in range(count)]
            stay = sorted(range(count), key=lambda g: (-total[g], g))[:kept]
            able = [e for e in able if e // size in stay]
        best = sorted(able, key=lambda e: (-wish[e], e))[: case.k]
        said = torch.tensor([scores[e] for e in best], dtype=torch.float64)
        if score == "softmax_after":
            said = said.softmax(0)
        elif case.normalised:
            said /= said.sum()
        found.append((best, (said * case.scale).tolist()))
    return found


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_equals_what_is_done_by_hand(case: Case, score: Score) -> None:
    """With ties: logits and biases are multiples of a quarter."""
    logits = (draw(63, case.experts, dtype=torch.float64) * 4).round() / 4
    settings = case.settings(score)
    if settings["bias"] is not None:
        settings["bias"] = (settings["bias"] * 16).round() / 4
    probability, chosen = route(logits, case.k, **settings)
    best, said = zip(*by_hand(logits, score, case, settings["bias"]), strict=True)
    assert chosen.tolist() == list(best)
    torch.testing.assert_close(probability, torch.tensor(said, dtype=torch.float64))


@pytest.mark.parametrize("score", SCORES)
def test_gradients_are_those_of_the_formula(score: Score) -> None:
    for case in SMALL[:4]:
        logits = draw(5, case.experts, dtype=torch.float64).requires_grad_()
        settings = case.settings(score)
        chosen = route(logits, case.k, **settings)[1]
        settings["chosen"] = chosen
        assert torch.autograd.gradcheck(lambda x: route_ref(x, case.k, **settings)[0], logits)  # noqa: B023
        replayed = route(logits + 0.0, case.k, **settings)
        assert torch.equal(replayed[1], chosen)
        assert torch.equal(replayed[0], route(logits, case.k, **{**settings, "chosen": None})[0])


def test_a_replay_reads_new_logits_at_old_experts() -> None:
    logits, other = draw(9, 12), draw(9, 12, seed=1)
    chosen = route(logits, 3, score="sigmoid")[1]
    probability, again = route(other, 3, score="sigmoid", chosen=chosen)
    assert torch.equal(again, chosen)
    torch.testing.assert_close(probability, other.sigmoid().gather(1, chosen.long()))


def test_what_does_not_fit_is_refused() -> None:
    logits = draw(3, 12)
    for given, settings, message in (
        (logits.half(), {}, r"logits \(3, 12\) of torch.float16 must be T E in fp32 or fp64"),
        (logits[0], {}, r"logits \(12,\)"),
        (logits, {"score": "relu"}, "score='relu' must be softmax"),
        (logits, {"k": 0}, r"k=0 must be in 1\.\.12"),
        (logits, {"k": 13}, r"k=13 must be in 1\.\.12"),
        (logits, {"k": 7, "groups": (4, 2)}, r"k=7 must be in 1\.\.6"),
        (logits, {"groups": (5, 2)}, "count must divide 12 experts"),
        (logits, {"groups": (4, 0)}, r"groups=\(4, 0\) must be"),
        (logits, {"groups": (4, 5)}, r"groups=\(4, 5\) must be"),
        (logits, {"bias": logits[0, :5]}, r"bias \(5,\) must be \(12,\)"),
        (logits, {"chosen": torch.zeros(3, 4).int()}, r"chosen \(3, 4\) .* must be \(3, 2\)"),
        (logits, {"chosen": torch.zeros(3, 2).long()}, "of torch.int64 must be"),
    ):
        with pytest.raises(ValueError, match=message):
            route(given, **{"k": 2, "score": "softmax", **settings})


def kernels_equal_their_twins(device: str, tokens: tuple[int, ...], cases: list[Case]) -> None:
    """The twin in fp64; rounding may swap a few that are all but equal, and what is said of the chosen is exact."""
    for score, case, count in product(SCORES, cases, tokens):
        settings = case.settings(score, device)
        logits, dprobability = draw(count, case.experts, device=device) * 2, draw(count, case.k, seed=1, device=device)
        for how in ("rows", "columns"):
            found = run(route, poisoned(logits, how), poisoned(dprobability, how), case.k, **settings)
            wanted = route_ref(logits.double(), case.k, **settings)[1]
            swapped = (found[1] != wanted).any(1).sum()
            assert different(found[1], case.experts) and swapped <= max(0, count // 500), (score, case, swapped)
            exact = run(route_ref, logits.double(), dprobability.double(), case.k, **{**settings, "chosen": found[1]})
            again = run(route, logits, dprobability, case.k, **{**settings, "chosen": found[1]})
            assert torch.equal(found[1], again[1])
            if device == "cpu":  # on a GPU two programs may round differently
                assert all(map(torch.equal, found, again))
            torch.testing.assert_close(again, found, rtol=1e-6, atol=1e-7 * case.scale)
            for ours, truth in ((found[0], exact[0]), (found[2], exact[2])):
                assert ours.dtype == torch.float32 and ours.is_contiguous()
                torch.testing.assert_close(ours.double(), truth, rtol=2e-5, atol=2e-6 * case.scale)


def kernels_break_ties_alike(device: str, count: int, cases: list[Case]) -> None:
    """Coarse logits tie often, -0 with 0 too, and -inf are experts as well; what chooses is exact."""
    for case, score in product(cases, SCORES):
        if case.groups is None and not case.bias:
            logits = (draw(count, case.experts, device=device) * 2).round() / 2
            logits[::3, ::2] = -torch.inf if case.experts > 1 else 0.0
            found = route(logits, case.k, score=score)[1]
            assert torch.equal(found, route_ref(logits, case.k, score=score)[1]), (case, score)


def kernels_choose_valid_experts(device: str, cases: list[Case]) -> None:
    """Whatever the logits are."""
    for case, score in product(cases, SCORES):
        logits = draw(24, case.experts, device=device)
        logits[:5] = torch.tensor([torch.nan, -torch.nan, -torch.inf, torch.inf, 3e38], device=device)[:, None]
        odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0], device=device)
        logits[5:20] = odd[torch.arange(15 * case.experts, device=device).view(15, -1) % 4]
        logits[20, -1] = torch.nan
        logits[21].view(torch.int32).fill_(-1)  # the NaN of which every bit is set
        probability, chosen = route(logits, case.k, **case.settings(score, device))
        assert different(chosen, case.experts), (case, score)
        assert probability[22:].isfinite().all()
        run(route, logits, probability.nan_to_num(0.0), case.k, **case.settings(score, device))


def kernels_write_nothing_else(device: str, cases: list[Case]) -> None:
    for case, score, count in product(cases, SCORES, (1, 19)):
        settings = case.settings(score, device)
        groups = list(case.groups) if case.groups else []
        logits = poisoned(draw(count, case.experts, device=device), "rows")
        rooms = [torch.full((count * n + 4096,), torch.nan, device=device) for n in (case.k, case.k, case.experts)]
        rooms[1] = torch.full(rooms[1].shape, -9, dtype=torch.int32, device=device)
        probability, chosen, dlogits = (
            room[2048:-2048].view(count, n) for room, n in zip(rooms, (case.k, case.k, case.experts), strict=True)
        )
        last = case.normalised, case.scale
        ops._launch((probability, chosen), logits, (settings["bias"], None), score, groups, *last)
        ops._launch_backward(dlogits, torch.ones_like(probability), logits, chosen, score, *last)
        assert probability.isfinite().all() and dlogits.isfinite().all() and different(chosen, case.experts)
        assert all((room[:2048].isnan() & room[-2048:].isnan()).all() for room in (rooms[0], rooms[2]))
        assert (rooms[1][:2048] == -9).all() and (rooms[1][-2048:] == -9).all()


def kernels_are_one_node_among_others(device: str) -> None:
    """Other users of logits and probabilities, expanded gradients, checkpointing, nothing to route, fp64."""
    case = SMALL[2]
    for score in SCORES:
        settings = case.settings(score, device)

        def shared(op: Any, logits: Tensor, settings: dict[str, Any] = settings) -> Tensor:
            probability, chosen = op(logits, case.k, **settings)
            return (probability + probability.sin()).sum(1) + logits.gather(1, chosen.long()).sum(1)

        leaf = draw(17, case.experts, device=device).requires_grad_()
        ones = torch.ones((), device=device).expand(17)
        plain = torch.autograd.grad(shared(route, leaf), leaf, ones)[0]
        torch.testing.assert_close(plain, torch.autograd.grad(shared(route_ref, leaf), leaf, ones)[0])
        kept = checkpoint(shared, route, leaf, use_reentrant=False)
        assert torch.equal(plain, torch.autograd.grad(kept, leaf, ones)[0])
        direct = route(leaf, case.k, **settings)[0]
        expanded = torch.autograd.grad(direct, leaf, ones[:1, None].expand(17, case.k), retain_graph=True)[0]
        assert torch.equal(expanded, torch.autograd.grad(direct, leaf, torch.ones_like(direct))[0])
        empty = run(route, leaf[:0], direct[:0].detach(), case.k, **settings)
        assert [x.shape for x in empty] == [(0, case.k), (0, case.k), (0, case.experts)]
        wide = route(leaf.double(), case.k, **settings)
        assert wide[0].dtype == torch.float64


def kernels_stay_whole_under_a_compiler(device: str) -> None:
    case = SMALL[2]
    logits, dprobability = draw(9, case.experts, device=device), draw(9, case.k, seed=1, device=device)
    for score in SCORES:
        settings = case.settings(score, device)
        torch._dynamo.reset()
        whole = torch.compile(route, fullgraph=True, backend="aot_eager")
        found, plain = (run(op, logits, dprobability, case.k, **settings) for op in (whole, route))
        assert all(map(torch.equal, found, plain))
    chosen, tests = plain[1], ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.ROUTE, (logits, None, None, 4, "softmax", [4, 2], True, 2.0), test_utils=tests)
    torch.library.opcheck(ops.ROUTE, (logits, None, chosen, 4, "sigmoid", [], True, 2.0), test_utils=tests)
    given = dprobability.T.contiguous().T, logits, chosen, "sigmoid", True, 2.0
    torch.library.opcheck(ops._ROUTE_BACKWARD, given, test_utils=tests)


def run_interpreted() -> None:
    assert triton_runs(torch.zeros(1))
    kernels_equal_their_twins("cpu", (13,), SMALL)
    kernels_break_ties_alike("cpu", 33, [*SMALL, Case(64, 6)])
    kernels_choose_valid_experts("cpu", [SMALL[1], SMALL[2], SMALL[3], SMALL[5]])
    kernels_write_nothing_else("cpu", [SMALL[2], SMALL[3], SMALL[6]])
    kernels_are_one_node_among_others("cpu")
    kernels_stay_whole_under_a_compiler("cpu")


def run_compiled() -> None:
    """Every width compiles for Hopper and stays in registers, replayed or not; loads take 16 bytes where rows allow."""
    types = {"p_chosen": "*i32", "p_given": "*i32"}
    for i, case in enumerate([Case(8, 2), Case(1, 1), *LARGE[6:]]):
        score, sizes = SCORES[i % 3], list(case.groups or [])
        b_s, b_e = ops._widths(case.experts, sizes)
        b_t, warps = ops._tokens(b_e)
        fixed: dict[str, Any] = {"experts": case.experts, "k": case.k, "score": score, "normalised": case.normalised}
        fixed |= {"scale": case.scale, "b_t": b_t, "b_e": b_e}
        kinds = [(ops._forward, {"p_given": None}), (ops._forward, {"p_bias": None}), (ops._backward, {})]
        for kernel, absent in kinds[:: 2 if i % 2 else 1]:
            more: dict[str, Any] = fixed | absent
            if kernel is ops._forward:
                groups = (case.experts // sizes[0], sizes[1]) if sizes else (case.experts, 0)
                more |= {"size": groups[0], "kept": groups[1], "b_s": b_s}
            elif sizes:
                continue
            else:
                more |= {"dprobability_k": 1}
            if case.experts == 1:  # a stride of one is a constant
                more |= {name: 1 for name in kernel.arg_names if name.endswith("_row")}
            given = {n: types.get(n, "*fp32") if n.startswith("p_") else "i32" for n in kernel.arg_names}
            built = compiled(kernel, {n: t for n, t in given.items() if n not in more}, more, num_warps=warps)
            most = 72 if b_e <= 256 else 112 if b_e == 512 else 216
            assert built.stack == 0 and built.registers <= most, (case, kernel, built.registers)
            assert case.experts % 8 or "ld.global.v4" in built.ptx, (case, kernel)


test_kernels_without_a_gpu = both(run_interpreted, run_compiled)


@gpu
@needs_gpu
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_gpu_kernels_equal_their_twins(case: Case) -> None:
    kernels_equal_their_twins("cuda", (1, 63, 4097), [case])
    kernels_break_ties_alike("cuda", 4097, [case])
    kernels_choose_valid_experts("cuda", [case])
    kernels_write_nothing_else("cuda", [case])


@gpu
@needs_gpu
def test_gpu_kernels_are_one_node_among_others() -> None:
    kernels_are_one_node_among_others("cuda")
    kernels_stay_whole_under_a_compiler("cuda")


@gpu
@needs_gpu
def test_gpu_kernels_reach_beyond_32_bits() -> None:
    """Rows that begin 2^31 elements apart, and probabilities likewise."""
    room = torch.zeros((1 << 31) + 4096, device="cuda")
    logits = room.as_strided((2, 128), (1 << 31, 1))
    logits.copy_(draw(2, 128, device="cuda"))
    dprobability = room[2048:].as_strided((2, 8), (1 << 31, 1)).copy_(draw(2, 8, seed=1, device="cuda"))
    found = run(route, logits, dprobability, 8, score="softmax", normalised=True)
    near = run(route, logits.clone(), dprobability.clone(), 8, score="softmax", normalised=True)
    assert all(map(torch.equal, found, near))


@gpu
@needs_gpu
def test_gpu_runs_are_alike() -> None:
    logits, dprobability = draw(16384, 256, device="cuda"), draw(16384, 8, device="cuda")
    settings = LARGE[10].settings("sigmoid", "cuda")
    first = run(route, logits, dprobability, 8, **settings)
    for _ in range(3):
        assert all(map(torch.equal, first, run(route, logits, dprobability, 8, **settings)))
