"""attend = attend_ref with gradients on every backend; blocks merge into the whole; no token sees what it may not."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from farspan.kernels.softmax_attention import (
    Mask,
    attend,
    attend_ref,
    block_backward,
    block_forward,
    choose,
    has_cudnn_graphs,
)
from farspan.kernels.softmax_attention_backends import Cpu, Math
from farspan.kernels.softmax_attention_mask import trim, visible

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one NVIDIA GPU")

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def draw(*shape: int, seed: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Normal numbers that bf16 holds exactly, so that every dtype computes on the same ones."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(device, dtype)


def inputs(
    t: int,
    s: int,
    *,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    width: int = 16,
    dtype: torch.dtype,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((batch, t, heads, width), (batch, s, kv_heads, width), (batch, s, kv_heads, width))
    drawn = [draw(*shape, seed=seed, dtype=dtype, device=device) for seed, shape in enumerate(shapes)]
    return drawn[0], drawn[1], drawn[2]


def with_gradients(
    op: Callable[..., tuple[Tensor, Tensor]], tensors: tuple[Tensor, ...], *, through_lse: bool = False, **options: Any
) -> tuple[Tensor, ...]:
    """out, lse and the gradients of q, k, v and sinks (the fourth tensor, if there is one) under a random cotangent."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, lse = op(*leaves[:3], sinks=leaves[3] if len(leaves) > 3 else None, **options)
    device = str(out.device)
    loss = (out * draw(*out.shape, seed=7, dtype=out.dtype, device=device)).sum(dtype=torch.float64)
    if through_lse:
        loss = loss + (lse * draw(*lse.shape, seed=8, dtype=lse.dtype, device=device)).nan_to_num(0.0).sum()
    return out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)


def check(ours: tuple[Tensor, ...], truth: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    """Errors relative to the largest entry: gradients of keys grow with the number of queries."""
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv", "dsinks"), ours, truth, strict=False):
        assert a.shape == b.shape and a.dtype == b.dtype, name
        assert torch.equal(a.isinf(), b.isinf()), name
        a, b = a.double().masked_fill(a.isinf(), 0.0), b.double().masked_fill(b.isinf(), 0.0)
        bound = TOLERANCE[dtype] * max(1.0, float(b.abs().max()) if b.numel() else 0.0)
        bound *= 4 if name == "dsinks" else 1  # one sum over all queries, whose terms cancel
        torch.testing.assert_close(a, b, rtol=0, atol=bound, msg=lambda text, name=name: f"{name}: {text}")


def exact(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same values in fp64, so that the reference rounds nothing."""
    return tuple(x.double() for x in tensors)


def agree(tensors: tuple[Tensor, ...], **options: Any) -> None:
    dtype = tensors[0].dtype
    truth = with_gradients(attend_ref, exact(tensors), **options)
    lse_dtype = torch.promote_types(dtype, torch.float32)
    rounded = tuple(x.to(lse_dtype if i == 1 else dtype) for i, x in enumerate(truth))
    check(with_gradients(attend, tensors, **options), rounded, dtype)


MASKS: list[dict[str, Any]] = [
    {"causal": True},
    {"causal": False},
    {"causal": True, "window": 1},
    {"causal": True, "window": 5},
    {"causal": True, "window": 1000},
]


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["cpu", "math"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1, 7, 63, 200])
def test_attend_equals_its_reference(length: int, dtype: torch.dtype, softcap: float | None) -> None:
    for mask in MASKS:
        tensors = (*inputs(length, length, dtype=dtype), draw(4, seed=4, dtype=dtype))
        assert choose(*tensors[:3], Mask(softcap=softcap, **mask)) == ("cpu" if softcap is None else "math")
        agree(tensors, softcap=softcap, **mask)


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["cpu", "math"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_query_heads_share_key_heads(kv_heads: int, softcap: float | None) -> None:
    for mask in MASKS:
        agree(inputs(37, 37, kv_heads=kv_heads, dtype=torch.float32), softcap=softcap, scale=0.5, **mask)


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["cpu", "math"])
@pytest.mark.parametrize(
    "bounds",
    [
        [0, 60, 120],
        [0, 30, 60, 90, 120],
        [0, 1, 8, 8, 60, 61, 119, 120],
        [0, 0, 7, 47, 50, 110, 120, 120, 120],
        [0, 50, 90, 120],
    ],
    ids=str,
)
def test_packed_documents_equal_their_reference(bounds: list[int], softcap: float | None) -> None:
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    for dtype in (torch.float64, torch.float32):
        for mask in MASKS:
            tensors = (*inputs(60, 60, dtype=dtype), draw(4, seed=4, dtype=dtype))
            agree(tensors, softcap=softcap, cu_seqlens=cu_seqlens, **mask)


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["cpu", "math"])
def test_gradients_arrive_through_lse(softcap: float | None) -> None:
    packed = torch.tensor([0, 3, 40, 41, 82, 82], dtype=torch.int32)
    for mask in MASKS:
        tensors = (*inputs(41, 41, dtype=torch.float64), draw(4, seed=4, dtype=torch.float64))
        agree(tensors[:3], through_lse=True, softcap=softcap, **mask)
        agree(tensors, through_lse=True, softcap=softcap, cu_seqlens=packed, **mask)


def test_lse_alone_has_gradients() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(9, 9, dtype=torch.float64))
    ours = torch.autograd.grad(attend(q, k, v, causal=True)[1].sum(), (q, k))
    truth = torch.autograd.grad(attend_ref(q, k, v, causal=True)[1].sum(), (q, k))
    torch.testing.assert_close(ours, truth, rtol=0, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["cpu", "math"])
def test_strides_do_not_matter(softcap: float | None) -> None:
    q = draw(2, 4, 16, 33, seed=0, dtype=torch.float64).permute(0, 3, 1, 2)
    k = draw(2, 33, 1, 16, seed=1, dtype=torch.float64).expand(2, 33, 2, 16)
    v = draw(2, 16, 2, 33, seed=2, dtype=torch.float64).permute(0, 3, 2, 1)
    packed = torch.tensor([0, 33, 40, 66], dtype=torch.int32)
    for options in ({}, {"window": 4}, {"cu_seqlens": packed}):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out, _ = attend(*leaves, causal=True, softcap=softcap, **options)
        truth, _ = attend_ref(*leaves, causal=True, softcap=softcap, **options)
        # out.sum() sends an expanded gradient back, whose strides are all zero.
        ours, theirs = torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(truth.sum(), leaves)
        torch.testing.assert_close((out, *ours), (truth, *theirs), rtol=0, atol=1e-12)


def test_values_may_be_narrower_than_keys() -> None:
    q, k, v = inputs(19, 19, dtype=torch.float64)
    agree((q, k, v[..., :5]), causal=True)


@pytest.mark.parametrize(("batch", "t", "s"), [(0, 3, 3), (2, 0, 5), (2, 5, 0), (2, 0, 0)])
def test_empty_inputs(batch: int, t: int, s: int) -> None:
    tensors = inputs(t, s, batch=batch, dtype=torch.float32)
    agree(tensors, causal=False)
    agree((*tensors, draw(4, seed=4, dtype=torch.float32)), causal=True, through_lse=True)
    if t == s:
        agree(tensors, causal=True, cu_seqlens=torch.tensor([0, 0, batch * t], dtype=torch.int32))


@pytest.mark.parametrize(("t", "s"), [(5, 11), (11, 5), (1, 9), (9, 1)])
def test_query_and_key_lengths_may_differ(t: int, s: int) -> None:
    for mask in MASKS:
        agree(inputs(t, s, dtype=torch.float64), **mask)


OFFSETS = [-300, -14, -13, -6, -1, 0, 1, 4, 8, 9, 21, 300]


def block_ref(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
    """The block's rule read off literally, in fp64."""
    i, j = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])
    seen = (
        (j <= i + mask.offset) & (j > i + mask.offset - (mask.window or 10**6)) if mask.causal else (i >= 0) & (j >= 0)
    )
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    score = torch.einsum("bthk,bshk->bhts", q, k) * mask.scale_of(q)
    score = score if mask.softcap is None else mask.softcap * torch.tanh(score / mask.softcap)
    weight = score.exp() * seen  # scores of unit scale: no maximum to subtract
    total = weight.sum(-1)
    out = torch.einsum("bhts,bshv->bthv", weight / total.masked_fill(total == 0, 1.0)[..., None], v)
    return out, total.log()


@pytest.mark.parametrize("backend", ["cpu", "math"])
@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize(("t", "s"), [(13, 9), (9, 13), (1, 6), (6, 1)])
def test_blocks_obey_the_offset(t: int, s: int, window: int | None, backend: str) -> None:
    for offset in OFFSETS:
        mask = Mask(causal=True, window=window, offset=offset)
        leaves = tuple(x.requires_grad_() for x in inputs(t, s, dtype=torch.float64))
        truth_out, truth_lse = block_ref(*leaves, mask)
        out, lse = block_forward(*leaves, mask, backend)
        dout = draw(*out.shape, seed=7, dtype=torch.float64)
        truth = torch.autograd.grad(truth_out, leaves, dout, materialize_grads=True)
        ours = block_backward(dout, *leaves, out, lse, mask, backend)
        check((out, lse, *ours), (truth_out.detach(), truth_lse.detach(), *truth), torch.float64)
        blind = lse.isneginf().transpose(1, 2)
        assert not out[blind].any() and not ours[0][blind].any()


def test_long_blocks_cross_the_strips_of_a_backend() -> None:
    q, k, v = inputs(700, 900, heads=2, kv_heads=1, batch=1, dtype=torch.float64)
    for mask in (Mask(causal=True, window=300, offset=150), Mask(causal=True, offset=150), Mask(causal=True, window=3)):
        leaves = tuple(x.detach().requires_grad_() for x in (q, k, v))
        truth_out, truth_lse = block_ref(*leaves, mask)
        dout = draw(*truth_out.shape, seed=7, dtype=torch.float64)
        truth = (truth_out.detach(), truth_lse.detach(), *torch.autograd.grad(truth_out, leaves, dout))
        for backend in ("cpu", "math"):
            out, lse = block_forward(q, k, v, mask, backend)
            check((out, lse, *block_backward(dout, q, k, v, out, lse, mask, backend)), truth, torch.float64)


def test_trimming_keeps_exactly_what_is_seen() -> None:
    for t, s, window, offset in [
        (t, s, w, o) for t in (1, 4, 7) for s in (1, 5) for w in (None, 1, 3) for o in range(-9, 10)
    ]:
        mask = Mask(causal=True, window=window, offset=offset)
        seen, part = visible(mask, t, s, torch.device("cpu")), trim(mask, t, s)
        assert seen is not None
        kept = torch.zeros(t, s, dtype=torch.bool)
        if part is not None:
            rest = visible(part.mask, part.rows.stop - part.rows.start, part.keys.stop - part.keys.start, kept.device)
            kept[part.rows, part.keys] = True if rest is None else rest
            assert kept[part.rows].any(1).all()
        assert torch.equal(kept, seen)


@pytest.mark.parametrize("through_lse", [False, True])
@pytest.mark.parametrize("cut", [1, 20, 40])
def test_two_key_blocks_merge_into_the_whole(cut: int, through_lse: bool) -> None:
    """Attention over all keys = attention over the first keys merged with the rest; gradients flow through lse."""

    def merged(q: Tensor, k: Tensor, v: Tensor, *, sinks: None) -> tuple[Tensor, Tensor]:
        early = attend(q, k[:, :cut], v[:, :cut], causal=True)
        late = attend(q[:, cut:], k[:, cut:], v[:, cut:], causal=True)
        lse = torch.logaddexp(early[1][..., cut:], late[1])
        shares = [(x - lse).exp().transpose(1, 2)[..., None] for x in (early[1][..., cut:], late[1])]
        out = early[0][:, cut:] * shares[0] + late[0] * shares[1]
        return torch.cat([early[0][:, :cut], out], 1), torch.cat([early[1][..., :cut], lse], 2)

    tensors = inputs(41, 41, dtype=torch.float64)
    whole = with_gradients(attend_ref, tensors, through_lse=through_lse, causal=True)
    check(with_gradients(merged, tensors, through_lse=through_lse), whole, torch.float64)


@pytest.mark.parametrize("backend", ["cpu", "math"])
def test_backward_by_blocks_needs_only_the_whole_out_and_lse(backend: str) -> None:
    """What a ring does: each pair of blocks runs its backward with the out and lse of the whole softmax."""
    q, k, v = inputs(40, 40, dtype=torch.float64)
    for window in (None, 13):
        whole = with_gradients(attend_ref, (q, k, v), causal=True, window=window)
        dout = draw(*q.shape, seed=7, dtype=torch.float64)
        grads = [torch.zeros_like(x) for x in (q, k, v)]
        for rows in (slice(0, 24), slice(24, 40)):
            for keys in (slice(0, 10), slice(10, 31), slice(31, 40)):
                mask = Mask(causal=True, window=window, offset=rows.start - keys.start)
                block = (dout[:, rows], q[:, rows], k[:, keys], v[:, keys], whole[0][:, rows], whole[1][:, :, rows])
                for total, piece, span in zip(
                    grads, block_backward(*block, mask, backend), (rows, keys, keys), strict=True
                ):
                    total[:, span] += piece
        check((*whole[:2], *grads), whole, torch.float64)


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["cpu", "math"])
@pytest.mark.parametrize("window", [None, 6])
def test_later_tokens_leave_earlier_outputs_bit_identical(window: int | None, softcap: float | None) -> None:
    q, k, v = inputs(70, 70, dtype=torch.float32)
    first = attend(q, k, v, causal=True, window=window, softcap=softcap)
    for x in (q, k, v):
        x[:, 41:] = 9.0
    second = attend(q, k, v, causal=True, window=window, softcap=softcap)
    assert torch.equal(first[0][:, :41], second[0][:, :41]) and torch.equal(first[1][..., :41], second[1][..., :41])
    assert not torch.equal(first[0][:, 41:], second[0][:, 41:])


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["cpu", "math"])
@pytest.mark.parametrize("causal", [True, False])
def test_documents_leave_each_other_bit_identical(causal: bool, softcap: float | None) -> None:
    bounds = [0, 20, 40, 57, 60, 80, 120, 120]
    q, k, v = inputs(60, 60, dtype=torch.float32)
    options: dict[str, Any] = {
        "causal": causal,
        "softcap": softcap,
        "cu_seqlens": torch.tensor(bounds, dtype=torch.int32),
    }
    first = with_gradients(attend, (q, k, v), **options)
    changed = slice(20, 40)
    for x in (q, k, v):
        x.view(-1, *x.shape[2:])[changed] *= -3.0
    second = with_gradients(attend, (q, k, v), **options)
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), first, second, strict=True):
        flat_a, flat_b = (x.transpose(1, 2).flatten(0, 1) if name == "lse" else x.flatten(0, 1) for x in (a, b))
        for start, stop in pairwise(bounds):
            same = torch.equal(flat_a[start:stop], flat_b[start:stop])
            assert same == ((start, stop) != (20, 40)), (name, start, stop)


def test_the_op_is_well_behaved() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(9, 9, dtype=torch.float32))
    sinks = draw(4, seed=4, dtype=torch.float32).requires_grad_()
    torch.library.opcheck(torch.ops.farspan.attend.default, (q, k, v, None, sinks, True, 4, None, None))
    tensors, packed = inputs(9, 9, dtype=torch.bfloat16), torch.tensor([0, 9, 14, 18], dtype=torch.int32)
    torch.library.opcheck(torch.ops.farspan.attend.default, (*tensors, packed, None, False, None, 0.3, 2.0))
    out, lse = attend(*tensors, causal=True)
    arguments = (out, None, *tensors, out, lse, None, None, True, None, None, None)
    torch.library.opcheck(
        torch.ops.farspan.attend_backward.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


def test_compiled_in_one_graph_is_the_same() -> None:
    def layer(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
        out, lse = attend(q * 2, k, v + 1, sinks=sinks, **options)
        return out.relu(), lse.detach()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (6, 11):
        tensors = (*inputs(length, length, dtype=torch.float32), draw(4, seed=4, dtype=torch.float32))
        for ours, theirs in zip(
            with_gradients(compiled, tensors, causal=True), with_gradients(layer, tensors, causal=True), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_a_call_without_lse_gradient_keeps_the_fast_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the math backend ran")

    monkeypatch.setattr(Math, "backward", refuse)
    q, k, v = (x.requires_grad_() for x in inputs(9, 9, dtype=torch.float32))
    attend(q, k, v, causal=True)[0].sum().backward()
    with pytest.raises(AssertionError, match="math backend"):
        attend(q, k, v, causal=True)[1].sum().backward()


def test_checkpointing_can_keep_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recomputation that saves the op's outputs by name does not run the op a second time."""
    calls = 0
    forward = Cpu.forward

    def counted(self: Cpu, *arguments: Any) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        return forward(self, *arguments)

    def policy(_: object, op: object, *__: object, **___: object) -> CheckpointPolicy:
        kept = op == torch.ops.farspan.attend.default
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q.sin(), k.sin(), v.sin(), causal=True)[0].sin()

    monkeypatch.setattr(Cpu, "forward", counted)
    leaves = [x.requires_grad_() for x in inputs(9, 9, dtype=torch.float64)]
    plain = torch.autograd.grad(layer(*leaves).sum(), leaves)
    calls = 0
    out = checkpoint(
        layer, *leaves, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, policy)
    )
    kept = torch.autograd.grad(out.sum(), leaves)
    assert calls == 1
    assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))


def test_errors_name_the_value_and_the_way_out() -> None:
    q, k, v = inputs(8, 8, dtype=torch.float32)
    packed = torch.tensor([0, 16], dtype=torch.int32)
    wrong: list[tuple[str, tuple[Tensor, Tensor, Tensor], dict[str, Any]]] = [
        ("window=3 needs causal=True", (q, k, v), {"causal": False, "window": 3}),
        ("window=0 must be at least 1", (q, k, v), {"window": 0}),
        ("softcap=-1.0 must be positive", (q, k, v), {"softcap": -1.0}),
        ("heads=4 must be a multiple of kv_heads=3", (q, k[:, :, [0, 0, 0]], v[:, :, [0, 0, 0]]), {}),
        ("must be one float type", (q, k.double(), v), {}),
        ("do not fit", (q, k[..., :3], v), {}),
        ("3 axes|3, 4, 4 axes", (q[0], k, v), {}),
        ("must be int32", (q, k, v), {"cu_seqlens": packed.long()}),
        ("needs T = S, not 8, 7", (q, k[:, :7], v[:, :7]), {"cu_seqlens": packed}),
        (r"document of 16 > T=8", (q, k, v), {"cu_seqlens": packed}),
        (r"document of 16 > T=8", (q, k, v), {"cu_seqlens": packed, "softcap": 1.0}),
        (r"must rise from 0 to B\*T=16", (q, k, v), {"cu_seqlens": packed[:1].expand(1).contiguous() + 16}),
        (r"must rise from 0 to B\*T=16", (q, k, v), {"cu_seqlens": torch.tensor([0, 8, 7, 15], dtype=torch.int32)}),
        ("one logit for each of heads=4", (q, k, v), {"sinks": torch.zeros(3)}),
    ]
    for message, tensors, options in wrong:
        with pytest.raises(ValueError, match=message):
            attend(*tensors, **{"causal": True, **options})
    with pytest.raises(ValueError, match="offset=2 beside cu_seqlens"):
        Mask(causal=True, offset=2, cu_seqlens=packed)
    with pytest.raises(ValueError, match="backend='nonesuch' is unknown"):
        block_forward(q, k, v, Mask(causal=True), "nonesuch")


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("length", [1, 2, 63, 200, 1024])
def test_gpu_attend_equals_its_reference(length: int, kv_heads: int, dtype: torch.dtype) -> None:
    for width in (32, 64, 128, 256):
        for mask in MASKS:
            tensors = inputs(length, length, kv_heads=kv_heads, width=width, dtype=dtype, device="cuda")
            agree((*tensors, draw(4, seed=4, dtype=dtype, device="cuda")), **mask)


@gpu
@needs_gpu
@pytest.mark.parametrize("bounds", [[0, 100, 200], [0, 1, 64, 64, 100, 197, 200, 200, 200], [0, 50, 150, 200]], ids=str)
def test_gpu_packed_documents_equal_their_reference(bounds: list[int]) -> None:
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device="cuda")
    for mask in MASKS:
        for softcap in (None, 2.0):
            tensors = inputs(100, 100, width=64, dtype=torch.bfloat16, device="cuda")
            agree(
                (*tensors, draw(4, seed=4, dtype=torch.bfloat16, device="cuda")),
                cu_seqlens=cu_seqlens,
                softcap=softcap,
                **mask,
            )


@gpu
@needs_gpu
@pytest.mark.parametrize("backend", ["cudnn", "cudnn_graph", "flash", "math"])
def test_gpu_backends_one_by_one(backend: str) -> None:
    masks = [Mask(causal=True), Mask(causal=False), Mask(causal=True, offset=500)]
    if backend.startswith("cudnn") and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("cuDNN attention is chosen on Hopper or newer")
    if backend == "cudnn_graph":
        if not has_cudnn_graphs():
            pytest.skip("needs nvidia-cudnn-frontend")
        masks += [Mask(causal=True, window=w, offset=o) for w, o in ((1, 0), (70, 0), (70, 149), (190, 180))]
    elif backend != "cudnn":
        masks += [Mask(causal=True, window=w, offset=o) for w in (None, 1, 70) for o in (-130, -40, 0, 30, 90, 199)]
    for mask in masks:
        q, k, v = inputs(150, 150, width=64, dtype=torch.bfloat16, device="cuda")
        leaves = tuple(x.double().cpu().requires_grad_() for x in (q, k, v))
        truth_out, truth_lse = block_ref(*leaves, mask)
        out, lse = block_forward(q, k, v, mask, backend)
        dout = draw(*out.shape, seed=7, dtype=torch.bfloat16, device="cuda")
        truth = torch.autograd.grad(truth_out, leaves, dout.double().cpu(), materialize_grads=True)
        ours = block_backward(dout, q, k, v, out, lse, mask, backend)
        results = tuple(x.double().cpu() for x in (out, lse, *ours))
        check(results, (truth_out.detach(), truth_lse.detach(), *truth), torch.bfloat16)


def test_a_second_derivative_is_refused() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(5, 5, dtype=torch.float64))
    (dq,) = torch.autograd.grad(attend(q, k, v, causal=True)[0].square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):  # torch.autograd.grad says that k is not used
        dq.square().sum().backward()


@gpu
@needs_gpu
def test_gpu_gradients_do_not_depend_on_the_layout_of_out() -> None:
    """torch keeps one cuDNN graph for all layouts of out beside the same q, k and v: ours must not see that."""
    q, k, v = inputs(34, 34, width=64, dtype=torch.bfloat16, device="cuda")
    mask = Mask(causal=True)
    backend = choose(q, k, v, mask)
    out, lse = block_forward(q, k, v, mask, backend)
    dout = draw(*out.shape, seed=7, dtype=torch.bfloat16, device="cuda")
    heads_major = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (dout, out))
    first = block_backward(*(x for x in (next(heads_major), q, k, v, next(heads_major))), lse, mask, backend)
    second = block_backward(dout, q, k, v, out, lse, mask, backend)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=3e-2)


@gpu
@needs_gpu
def test_gpu_choices() -> None:
    hopper = torch.cuda.get_device_capability() >= (9, 0)
    q, k, v = inputs(128, 128, width=64, dtype=torch.bfloat16, device="cuda")
    assert choose(q, k, v, Mask(causal=True)) == ("cudnn" if hopper else "flash")
    assert choose(q, k, v, Mask(causal=True, offset=128)) == ("cudnn" if hopper else "flash")
    band = "cudnn_graph" if hopper and has_cudnn_graphs() else "flash"
    assert choose(q, k, v, Mask(causal=True, window=8)) == band
    assert choose(q, k, v, Mask(causal=True, window=100, offset=128)) == band
    assert choose(q, k, v, Mask(causal=True, offset=5)) == "flash"
    assert choose(q, k, v, Mask(causal=True, softcap=2.0)) in ("flash_attn", "math")
    assert choose(q.float(), k.float(), v.float(), Mask(causal=True)) == "math"
    assert choose(q[..., :60], k[..., :60], v[..., :60], Mask(causal=True)) == "math"


@gpu
@needs_gpu
def test_gpu_packed_attention_never_waits_for_the_device() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(64, 64, width=64, dtype=torch.bfloat16, device="cuda"))
    cu_seqlens = torch.tensor([0, 30, 64, 128, 128], dtype=torch.int32, device="cuda")
    attend(q, k, v, causal=True, cu_seqlens=cu_seqlens)[0].sum().backward()  # warm up: handles and workspaces
    torch.cuda.set_sync_debug_mode("error")
    try:
        for softcap in (None, 2.0):
            attend(q, k, v, causal=True, cu_seqlens=cu_seqlens, softcap=softcap)[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
