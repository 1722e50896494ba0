"""One pass over many weights is AdamW: in fp32 states torch's own, in codes the twin, wherever the weights are cut."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from without_gpu import both, compiled

from farspan.kernels.adamw8 import Adam, Part, Place, Update, update_ref
from farspan.kernels.master import RESIDUALS, Master, split, whole
from farspan.kernels.random import key, step_bits

ADAM = Adam(betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, stochastic=False)
SLOW = replace(ADAM, betas=(0.9, 0.999), stochastic=True)
MASTERS: tuple[Master, ...] = ("fp32", "residual16", "residual8", "none")


def made(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def part(
    shape: tuple[int, ...], master: Master, block: int, name: str = "w", device: str = "cpu", place: Place | None = None
) -> Part:
    """A weight of N(0, 0.02²) and no moments yet; block 0: fp32 moments."""
    weight = (0.02 * made(shape, 1)).to(device)
    residual = torch.zeros(shape, dtype=RESIDUALS[master], device=device) if master in RESIDUALS else None
    held = weight if master == "fp32" else weight.bfloat16()
    if residual is not None:
        split(weight, held, residual)
    moments = [torch.zeros(shape, dtype=torch.uint8 if block else torch.float32, device=device) for _ in range(2)]
    scales = [torch.zeros((*shape[:-1], shape[-1] // block), device=device) for _ in range(2)] if block else [None] * 2
    where = place or Place(offset=(0,) * len(shape), shape=shape)
    return Part(held, *moments, where, key(3, name), len(shape) > 1, residual, *scales)


def tensors(of: Part) -> list[Tensor]:
    names = ("weight", "residual", "first", "second", "first_scales", "second_scales")
    return [tensor for name in names if (tensor := getattr(of, name)) is not None]


def copy(of: Part) -> Part:
    return replace(of, **{n: t.clone() for n, t in vars(of).items() if isinstance(t, Tensor)})


def numbers(adam: Adam, step: int, scale: float = 1.0, rate: float = 1e-2, device: str = "cpu") -> Tensor:
    steps = torch.tensor(float(step - 1), dtype=torch.float64, device=device)
    return adam.numbers(steps, rate, torch.tensor(scale, dtype=torch.float64, device=device))


@pytest.mark.parametrize("master", MASTERS[:3])
def test_with_fp32_moments_it_is_torch_adamw(master: Master) -> None:
    """Clipped and decayed; what a residual holds is the fp32 weight, in full or to 2⁻¹⁷ of it."""
    ours = part((6, 64), master, 0)
    theirs = whole(ours.weight, ours.residual).clone().requires_grad_()
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, betas=ADAM.betas, eps=ADAM.eps, weight_decay=ADAM.weight_decay)
    for step in range(1, 6):
        gradient = made((6, 64), step)
        theirs.grad = gradient * 0.25
        optimizer.step()
        update_ref(ours, gradient, numbers(ADAM, step, 0.25), ADAM)
    tolerance = 1e-4 if master == "residual8" else 1e-6
    torch.testing.assert_close(whole(ours.weight, ours.residual), theirs.detach(), rtol=tolerance, atol=tolerance / 30)


@pytest.mark.parametrize("master", MASTERS)
def test_a_skipped_step_changes_nothing(master: Master) -> None:
    of = part((4, 64), master, 32)
    update_ref(of, made((4, 64), 2), numbers(SLOW, 1), SLOW)
    before = copy(of)
    steps = torch.tensor(1.0, dtype=torch.float64)
    told = SLOW.numbers(steps, 1e-2, torch.tensor(0.0))
    update_ref(of, torch.full((4, 64), torch.nan), told, SLOW)
    assert steps == 1 and told[5] == 0
    assert all(torch.equal(a, b) for a, b in zip(tensors(of), tensors(before), strict=True))


@pytest.mark.parametrize("master", ["residual8", "none"])
def test_updates_below_half_an_ulp_add_up(master: Master) -> None:
    """A thousand steps, each a thirtieth of what bf16 can hold: the weight goes where fp32 goes."""
    shape = (4, 256)
    of, exact = part(shape, master, 0), part(shape, "fp32", 0)
    for x in (of, exact):
        x.weight.fill_(1.0)
    if of.residual is not None:
        of.residual.zero_()
    adam = replace(ADAM, weight_decay=0.0)
    gradient = torch.ones(shape)
    for step in range(1, 1001):
        for x in (of, exact):
            update_ref(x, gradient, numbers(adam, step, rate=2.0**-8 / 30), adam)
    moved, wanted = 1 - whole(of.weight, of.residual), 1 - exact.weight
    torch.testing.assert_close(moved.mean(), wanted.mean(), rtol=1e-2, atol=0.0)
    deviation = 1000**0.5 / 2 * (2.0**-8 if master == "none" else 2.0**-9 / 127)  # at most, of a thousand roundings
    assert (moved - wanted).abs().max() < 5 * deviation
    rounded = torch.ones(1, dtype=torch.bfloat16)
    assert rounded - 2.0**-8 / 30 == 1, "without a residual and without chance nothing would ever move"


@pytest.mark.parametrize("drawn", [0, 0xFFFFFFFF])
def test_no_chance_takes_a_residual_out_of_its_byte(drawn: int) -> None:
    """Halfway between two bf16 numbers the rest is 127 steps, and no draw adds one."""
    below = torch.tensor([1.0, 1.9921875, -3.0, 2.0**-126, 1e-38, 0.0])
    half = 2.0 ** (below.abs().clamp(min=2.0**-126).log2().floor() - 8)
    wanted = torch.cat([below + sign * part * half for sign in (1, -1) for part in (1.0, 0.999999, 0.5)])
    weight, residual = torch.empty_like(wanted, dtype=torch.bfloat16), torch.empty_like(wanted, dtype=torch.int8)
    split(wanted, weight, residual, torch.full(wanted.shape, drawn))
    assert residual.abs().max() == 127 and (residual > -128).all()
    apart = (whole(weight, residual) - wanted).abs()
    assert (apart <= 2.0**-15 * wanted.abs() + 2.0**-133).all()


def test_one_large_element_leaves_its_block_stable() -> None:
    """Gradients 10⁴ apart in one block: no update is many times the rate, as a second moment of zero would make it."""
    of = part((1, 256), "fp32", 256)
    adam = replace(SLOW, weight_decay=0.0)
    factors = torch.ones(1, 256)
    factors[0, 7] = 1e4
    for step in range(1, 301):
        before = of.weight.clone()
        spike = torch.where(torch.arange(256) == step % 256, 10.0, 1.0)
        update_ref(of, made((1, 256), step) * factors * spike * 1e-3, numbers(adam, step), adam)
        assert (of.weight - before).abs().max() <= 10 * 1e-2


@pytest.mark.parametrize("size", [1e-7, 1e-12])
def test_small_gradients_are_not_lost(size: float) -> None:
    """Adam does not see the size of gradients; scales of fp32 do not either."""
    small, large = part((4, 256), "fp32", 256), part((4, 256), "fp32", 256)
    adam = replace(ADAM, eps=1e-30)
    for step in range(1, 31):
        gradient = made((4, 256), step)
        update_ref(small, gradient * size, numbers(adam, step), adam)
        update_ref(large, gradient, numbers(adam, step), adam)
    moved = (large.weight - part((4, 256), "fp32", 256).weight).abs().mean()
    assert (small.weight - large.weight).abs().mean() < 0.02 * moved


def test_bits_for_the_moment_and_for_the_weight_are_independent() -> None:
    index = torch.arange(1 << 16)
    for step in (1, 2):
        drawn = step_bits(index, key(1, "w"), step)
        low, high = (drawn & 0xFFFF).double(), (drawn >> 16).double()
        other = (step_bits(index, key(1, "w"), step + 1) >> 16).double()
        beside = (step_bits(index + 1, key(1, "w"), step) >> 16).double()
        for a, b in ((low, high), (high, other), (high, beside), (low, other)):
            assert torch.corrcoef(torch.stack((a, b)))[0, 1].abs() < 4 / 256  # four deviations
            bins = torch.histogramdd(torch.stack((a, b), 1), 16).hist
            assert ((bins - 256).square() / 256).sum() < 255 + 5 * (2 * 255) ** 0.5


CUTS: list[tuple[tuple[int, ...], tuple[slice, ...]]] = [
    ((6, 128), (slice(0, 2), slice(0, 128))),
    ((6, 128), (slice(3, 6), slice(64, 128))),
    ((4, 6, 64), (slice(1, 3), slice(2, 5), slice(0, 64))),
    ((4, 6, 128), (slice(2, 4), slice(0, 6), slice(64, 128))),
]


def cut_from(of: Part, cut: tuple[slice, ...]) -> Part:
    block = of.block
    scales = (*cut[:-1], slice(cut[-1].start // block, cut[-1].stop // block))
    taken = {n: t[scales if "scales" in n else cut].clone() for n, t in vars(of).items() if isinstance(t, Tensor)}
    return replace(of, **taken, place=Place(tuple(s.start for s in cut), tuple(of.weight.shape)))


@pytest.mark.parametrize(("shape", "cut"), CUTS, ids=str)
def test_a_cut_weight_is_updated_as_a_whole_one(shape: tuple[int, ...], cut: tuple[slice, ...]) -> None:
    """Bit for bit, chance included: codes never share a scale across rows, and indices are those of the whole."""
    every = part(shape, "none", 32)
    piece = cut_from(every, cut)
    for step in range(1, 4):
        gradient = made(shape, step)
        update_ref(every, gradient, numbers(SLOW, step), SLOW)
        update_ref(piece, gradient[cut].contiguous(), numbers(SLOW, step), SLOW)
    expected = cut_from(every, cut)
    assert all(torch.equal(a, b) for a, b in zip(tensors(piece), tensors(expected), strict=True))


# What follows runs the Triton kernel: interpreted and compiled where there is no GPU, and on one.


def in_line(codes: Tensor, name: str) -> Tensor:
    """Codes as whole numbers that grow with what they stand for: there are two for zero among the signed ones."""
    codes = codes.int()
    return torch.where(codes > 127, 128 - codes, codes) if name == "first" else codes


def close(ours: list[Part], twins: list[Part]) -> None:
    """Codes at most one apart and seldom; weights within what one code more or less makes of an update."""
    for a, b in zip(ours, twins, strict=True):
        whole_a, whole_b = (whole(x.weight, x.residual) for x in (a, b))
        torch.testing.assert_close(whole_a, whole_b, rtol=1e-4 if a.master != "none" else 2.0**-7, atol=2e-5)
        for name in ("first", "second"):
            x, y = getattr(a, name), getattr(b, name)
            if a.block == 0:
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-8)
                continue
            apart = (in_line(x, name) - in_line(y, name)).abs()
            assert apart.max() <= 1, f"{name}: {apart.max()} codes apart"
            assert (apart > 0).float().mean() < 2e-3
            torch.testing.assert_close(getattr(a, f"{name}_scales"), getattr(b, f"{name}_scales"), rtol=1e-5, atol=1e-9)


def run(shapes: list[tuple[int, ...]], master: Master, block: int, adam: Adam, device: str, wide: bool) -> None:
    """Two updates and a skipped one, of parts with guard bands around them."""
    parts = [part(shape, master, block and min(block, shape[-1]), f"w{i}", device) for i, shape in enumerate(shapes)]
    parts += [cut_from(parts[-1], (slice(1, 3), slice(shapes[-1][-1] // 2, shapes[-1][-1])))] if block else []
    guarded, guards = [], []
    for of in parts:
        fields: dict[str, Tensor] = {}
        for name, tensor in vars(of).items():
            if isinstance(tensor, Tensor):
                band = torch.full((tensor.numel() + 64,), 77, dtype=tensor.dtype, device=device)
                band[32:-32] = tensor.flatten()
                fields[name] = band[32:-32].view(tensor.shape)
                guards.append(band)
        guarded.append(replace(of, **fields))
    twins = [copy(of) for of in guarded]
    update = Update(guarded, adam)
    for step, scale in ((1, 0.5), (2, 1.0), (3, 0.0)):
        told = numbers(adam, step, scale, device=device)
        of_type = torch.float32 if wide else torch.bfloat16
        gradients = [made(tuple(of.weight.shape), step + i).to(device, of_type) for i, of in enumerate(guarded)]
        if scale == 0:
            gradients = [torch.full_like(g, torch.nan) for g in gradients]
        update(gradients, told)
        for of, gradient in zip(twins, gradients, strict=True):
            update_ref(of, gradient, told, adam)
        close(guarded, twins)
        for of, twin in zip(guarded, twins, strict=True):  # what one step left is the next one's start
            for a, b in zip(tensors(of), tensors(twin), strict=True):
                b.copy_(a)
    assert all((band[:32] == 77).all() and (band[-32:] == 77).all() for band in guards)


SMALL: list[tuple[int, ...]] = [(3, 64), (5, 192), (1, 32), (4, 128)]


def run_interpreted() -> None:
    run(SMALL, "none", 64, SLOW, "cpu", wide=False)
    run(SMALL, "residual8", 64, ADAM, "cpu", wide=True)
    run(SMALL, "residual16", 32, SLOW, "cpu", wide=False)
    run(SMALL, "fp32", 32, ADAM, "cpu", wide=True)
    run([(7,), (3, 5), (41,)], "residual16", 0, ADAM, "cpu", wide=True)
    run([(7,), (3, 5), (41,)], "none", 0, ADAM, "cpu", wide=False)


def program(master: Master, block: int, stochastic: bool, cut: bool = False) -> Any:
    from farspan.kernels import adamw8

    fixed = {"wide": False, "master": master, "block": block, "stochastic": stochastic, "cut": cut, "aligned": True}
    fixed |= {"even": True, "columns": 16, "tile": adamw8.TILE, "turns": adamw8.TURNS}
    types = {"p_table": "*i64", "p_chunks": "*i32", "p_gradients": "*i64", "p_numbers": "*fp32", "p_tables": "*fp32"}
    types |= dict.fromkeys(("beta1", "beta2", "eps"), "fp32")
    return compiled(adamw8._update, types, fixed, num_warps=adamw8.WARPS)


def run_compiled() -> None:
    """128-bit loads, no spills, and at most 110 instructions a weight; where it lies in a cut one takes a few more."""
    from farspan.kernels import adamw8

    cases: list[tuple[Master, int, bool, bool]] = [(master, 256, False, False) for master in MASTERS]
    cases += [("residual8", 256, True, False), ("none", 32, True, True), ("residual16", 0, False, False)]
    for master, block, stochastic, cut in cases:
        built = program(master, block, stochastic, cut)
        assert built.stack == 0, f"{master}, {block}: {built.stack} B spilled"
        assert ".v4.b32" in built.ptx
        each = built.loop * 32 * adamw8.WARPS / adamw8.TILE
        assert each <= (120 if cut else 110), f"{master}, {block}, {stochastic}: {each} instructions a weight"


test_kernel = both(run_interpreted, run_compiled)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("adam", [ADAM, SLOW], ids=["nearest", "chance"])
@pytest.mark.parametrize("block", [0, 32, 256])
@pytest.mark.parametrize("master", MASTERS)
def test_gpu_is_the_twin(master: Master, block: int, adam: Adam) -> None:
    shapes: list[tuple[int, ...]] = [(1601, 1280), (8, 128, 512), (257, 256), (3, 512)]
    for wide in (False, True):
        run([*shapes[:1], *shapes[2:]] if block else [(5003,), *shapes], master, block, adam, "cuda", wide)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_update_is_captured() -> None:
    """In a CUDA graph: rate, clipping, bias corrections and the count of steps are read at every replay."""
    live, graphed = (part((64, 512), "residual8", 256, device="cuda") for _ in range(2))
    gradient = made((64, 512), 5).cuda().bfloat16()
    rate, scale = (torch.tensor(x, dtype=torch.float64, device="cuda") for x in (1e-2, 0.5))
    counts = [torch.zeros((), dtype=torch.float64, device="cuda") for _ in range(2)]
    updates = [Update([of], SLOW) for of in (live, graphed)]
    spare = Update([copy(graphed)], SLOW)
    spare([gradient], SLOW.numbers(torch.zeros_like(counts[0]), rate, scale))  # compiles outside of the capture
    updates[1]._groups[0].point([gradient])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        updates[1]([gradient], SLOW.numbers(counts[1], rate, scale))
    for step in range(5):
        rate.fill_(1e-2 / (step + 1))
        gradient.copy_(made((64, 512), step))
        graph.replay()
        updates[0]([gradient], SLOW.numbers(counts[0], rate, scale))
    assert counts[0] == counts[1] == 5
    assert all(torch.equal(a, b) for a, b in zip(tensors(live), tensors(graphed), strict=True))
