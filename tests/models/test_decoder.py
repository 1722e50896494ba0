"""A decoder sees the past of its own document, and nothing else; and it equals its formula."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from farspan.kernels.random import key
from farspan.kernels.rope import rope_ref
from farspan.models.block import Block, NormPlacement
from farspan.models.decoder import Decoder, DecoderModel, initial
from farspan.models.ffns import Ffn, SquaredRelu, Swiglu
from farspan.models.mixers import Softmax
from farspan.models.norm import Layer, Norm, Rms
from farspan.models.rope import Rope
from farspan.parallel.context.local import Local
from farspan.parallel.context.shard import IGNORE, Batch

FULL = Softmax(heads=4, kv_heads=2, qk_norm=True)
MIXERS = {
    "full": FULL,
    "window": replace(FULL, window=3),
    "softcap": replace(FULL, softcap=2.0),
    "sinks": replace(FULL, sinks=True),
    "no_rope": replace(FULL, rope=None, qk_norm=False, kv_heads=None),
}
STYLES: dict[str, tuple[NormPlacement, Norm, Ffn]] = {
    "pre": ("pre", Rms(), Swiglu(hidden=23)),
    "post": ("post", Layer(eps=1e-4), SquaredRelu(hidden=23)),
    "peri": ("peri", Rms(eps=1e-3), Swiglu(hidden=23)),
    "peri_layer": ("peri", Layer(bias=False), SquaredRelu(hidden=23)),
}
CASES = [(name, "pre") for name in MIXERS] + [("full", "post"), ("sinks", "peri"), ("no_rope", "peri_layer")]


def build(mixer: Softmax, tied: bool = False, dtype: torch.dtype = torch.float32, style: str = "pre") -> DecoderModel:
    """Two layers; gains and biases begin away from 1 and 0, so that none can be forgotten."""
    placement, norm, ffn = STYLES[style]
    blocks = (Block(repeat=2, mixer=mixer, ffn=ffn),)
    config = Decoder(width=16, tied=tied, vocabulary=31, norm=norm, placement=placement, blocks=blocks)
    model = config.build(31, Local())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            start = initial(model)[name]
            start = replace(start, std=0.2) if weight.dim() == 1 else start
            start.fill(weight, key(0, name), tuple(weight.shape), (0,) * weight.dim())
    return model.to(dtype)


def batch(lengths: tuple[int, ...], rows: int = 1, seed: int = 0) -> Batch:
    made = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    tokens = torch.randint(31, (rows, total // rows), generator=made)
    ends = torch.tensor(lengths).cumsum(0) - 1
    labels = tokens.flatten().roll(-1)
    labels[ends] = IGNORE
    return Batch(
        tokens=tokens,
        labels=labels.view_as(tokens),
        positions=torch.cat([torch.arange(length) for length in lengths]).view_as(tokens),
        cu_seqlens=torch.tensor([0, *(ends + 1).tolist()], dtype=torch.int32),
        lengths=lengths,
        valid=total - len(lengths),
    )


def token_losses(model: DecoderModel, given: Batch) -> Tensor:
    """The loss of every single token of row 0."""
    logits = model(given, torch.arange(given.tokens.shape[1]))
    return F.cross_entropy(logits, given.labels[0], ignore_index=IGNORE, reduction="none")


@pytest.mark.parametrize(("name", "style"), CASES)
def test_prefix_causality(name: str, style: str) -> None:
    model, given = build(MIXERS[name], style=style), batch((17,))
    with torch.no_grad():
        before = token_losses(model, given)
        for place in (1, 8, 15):
            tokens = given.tokens.clone()
            tokens[0, place] = (tokens[0, place] + 1) % 31
            after = token_losses(model, replace(given, tokens=tokens))
            assert torch.equal(before[:place], after[:place]), f"token {place} reached back"
            assert not torch.equal(before[place:], after[place:])


@pytest.mark.parametrize(("name", "style"), CASES)
def test_documents_never_see_each_other(name: str, style: str) -> None:
    model, given = build(MIXERS[name], style=style), batch((5, 9, 3))
    with torch.no_grad():
        before = token_losses(model, given)
        tokens = given.tokens.clone()
        tokens[0, 5:14] = (tokens[0, 5:14] + 7) % 31
        after = token_losses(model, replace(given, tokens=tokens))
    assert torch.equal(before[:5], after[:5]) and torch.equal(before[14:], after[14:])
    assert not torch.equal(before[5:14], after[5:14])


@pytest.mark.parametrize("name", MIXERS)
def test_packing_changes_no_loss_and_no_gradient(name: str) -> None:
    """Documents packed in a row learn what they would alone."""
    model = build(MIXERS[name], dtype=torch.float64)
    given = batch((5, 9, 3))
    packed = model(given)
    wanted = torch.autograd.grad(packed, list(model.parameters()))
    alone, found = torch.zeros(()), [torch.zeros_like(weight) for weight in model.parameters()]
    for start, end in ((0, 5), (5, 14), (14, 17)):
        part = replace(
            given,
            tokens=given.tokens[:, start:end],
            labels=given.labels[:, start:end],
            positions=given.positions[:, start:end],
            cu_seqlens=None,
        )
        loss = model(part)
        alone = alone + loss.detach()
        found = [a + b for a, b in zip(found, torch.autograd.grad(loss, list(model.parameters())), strict=True)]
    torch.testing.assert_close(packed.detach(), alone.double(), rtol=1e-10, atol=1e-10)
    for left, right in zip(wanted, found, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-10)


def by_hand(model: DecoderModel, tokens: Tensor, mixer: Softmax, style: str) -> Tensor:
    """The decoder of one document written out: logits T V."""
    weights = dict(model.named_parameters())
    placement, kind, ffn = STYLES[style]

    def rms(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + kind.eps).sqrt() * weights[f"{name}.weight"]

    def norm(x: Tensor, name: str) -> Tensor:
        if isinstance(kind, Rms):
            return rms(x, name)
        deviation = (x.var(-1, unbiased=False, keepdim=True) + kind.eps).sqrt()
        return (x - x.mean(-1, keepdim=True)) / deviation * weights[f"{name}.weight"] + weights.get(f"{name}.bias", 0)

    def join(x: Tensor, branch: Callable[[Tensor], Tensor], name: str) -> Tensor:
        if placement == "post":
            return norm(x + branch(x), name)
        out = branch(norm(x, name))
        return x + (norm(out, f"{name}_out") if placement == "peri" else out)

    def turn(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        pairs = torch.complex(x[..., :half], x[..., half:])
        angles = torch.arange(len(x))[:, None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        turned = pairs * torch.complex(angles.cos().float(), angles.sin().float())[:, None]
        return torch.cat((turned.real, turned.imag), -1)

    x = weights["embed.weight"][tokens]
    x = norm(x, "embed_norm") if placement == "peri" else x
    length = len(tokens)
    behind = torch.arange(length)[:, None] - torch.arange(length)[None]
    seen = (behind >= 0) & (behind < (mixer.window or length))

    def attention(h: Tensor, path: str) -> Tensor:
        q, k, v = ((h @ weights[f"{path}.to_{n}.weight"].T).unflatten(-1, (-1, 4)) for n in "qkv")
        if mixer.qk_norm:
            q, k = rms(q, f"{path}.norm_q"), rms(k, f"{path}.norm_k")
        if mixer.rope:
            q, k = turn(q), turn(k)
        k, v = (t.repeat_interleave(4 // t.shape[1], 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / 2
        if mixer.softcap:
            scores = mixer.softcap * torch.tanh(scores / mixer.softcap)
        scores = scores.masked_fill(~seen, -torch.inf)
        if mixer.sinks:
            sink = weights[f"{path}.sinks"][:, None, None].expand(-1, length, 1)
            p = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
        else:
            p = scores.softmax(-1)
        return torch.einsum("hqk,khd->qhd", p, v).flatten(1) @ weights[f"{path}.to_out.weight"].T

    def think(h: Tensor, path: str) -> Tensor:
        inner = h @ weights[f"{path}.to_up.weight"].T
        if isinstance(ffn, SquaredRelu):
            inner = torch.where(inner > 0, inner**2, 0)
        else:
            gate = h @ weights[f"{path}.to_gate.weight"].T
            inner = gate * torch.sigmoid(gate) * inner
        return inner @ weights[f"{path}.to_out.weight"].T

    for i in range(2):
        x = join(x, partial(attention, path=f"layers.{i}.mixer"), f"layers.{i}.mixer_norm")
        x = join(x, partial(think, path=f"layers.{i}.ffn"), f"layers.{i}.ffn_norm")
    head = weights["head.weight"] if "head.weight" in weights else weights["embed.weight"]
    return (x if placement == "post" else norm(x, "norm")) @ head.T


@pytest.mark.parametrize(("name", "style"), CASES)
@pytest.mark.parametrize("tied", [False, True])
def test_equals_its_formula(name: str, style: str, tied: bool) -> None:
    model, given = build(MIXERS[name], tied, torch.float64, style), batch((13,))
    weights = list(model.parameters())
    wanted = F.cross_entropy(
        by_hand(model, given.tokens[0], MIXERS[name], style), given.labels[0], ignore_index=IGNORE, reduction="sum"
    )
    loss = model(given)
    torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=1e-10)
    for left, right in zip(torch.autograd.grad(loss, weights), torch.autograd.grad(wanted, weights), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-10)


def test_z_loss_keeps_the_logits_of_training_small_and_stays_out_of_evaluation() -> None:
    model, given = build(MIXERS["full"], dtype=torch.float64), batch((13,))
    plain = model(given)
    logits = model(given, torch.arange(13)).detach()
    counted = logits.logsumexp(1)[given.labels[0] != IGNORE]
    model.z_loss = 0.01
    torch.testing.assert_close(model(given), plain + 0.01 * counted.square().sum())
    with torch.no_grad():
        torch.testing.assert_close(model(given), plain)
    with pytest.raises(ValueError, match="z_loss=-1: must not be negative"):
        Decoder(width=8, blocks=(Block(mixer=FULL, ffn=None),), z_loss=-1)


def test_packed_batches_of_other_documents_compile_nothing_new() -> None:
    """As the loader gives them: the last bound of a row's documents repeats up to a power of two."""
    model, graphs = build(MIXERS["full"]), []

    def counting(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    for layer in model.layers:
        layer.forward = torch.compile(layer.forward, backend=counting)  # type: ignore[method-assign]
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        ends = torch.randperm(63, generator=generator)[: int(torch.randint(2, 15, (), generator=generator))] + 1
        bounds = [0, *sorted(ends.tolist()), 64]
        given = batch(tuple(b - a for a, b in pairwise(bounds)))
        padded = torch.tensor(bounds + [64] * (16 - len(bounds)), dtype=torch.int32)
        model(replace(given, cu_seqlens=padded)).backward()
    assert len(graphs) == 1  # two equal layers, ten batches


@pytest.mark.parametrize("name", ["full", "window"])
def test_flops_are_what_torch_counts(name: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model, given = build(MIXERS[name]), batch((24,), rows=1)
    products = 2 * 24 * sum(w.numel() for n, w in model.named_parameters() if w.dim() == 2 and "embed" not in n)
    pairs = sum(min(i + 1, MIXERS[name].window or 24) for i in range(24))
    assert model.flops((24,)) == products + 2 * (4 * pairs * 4 * 4)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(given)
    assert counter.get_total_flops() == products  # attention is one op of ours, which torch does not count
    assert model.flops((12, 12)) < model.flops((24,))


def test_rotation_keeps_lengths_and_turns_by_distance() -> None:
    x = torch.randn(1, 9, 1, 8, dtype=torch.float64)
    cos, sin = Rope(theta=100.0).angles(torch.arange(9)[None], 8)
    turned, _ = rope_ref(x, x, cos.double(), sin.double())
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    q, k = (torch.randn(8, dtype=torch.float64).expand(1, 9, 1, 8) for _ in range(2))
    queries, keys = rope_ref(q, k, cos.double(), sin.double())
    scores = queries[0, :, 0] @ keys[0, :, 0].T
    for shift in range(1, 8):
        same = scores.diagonal(-shift)
        torch.testing.assert_close(same, same[:1].expand_as(same), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layers", "mostly"), [([(1, 3), (1, None)], False), ([(2, 3), (1, None)], True), ([(1, None)], False), ([], False)]
)
def test_windowed_says_what_most_layers_see(layers: list[tuple[int, int | None]], mostly: bool) -> None:
    """Layers count, not blocks, and those without attention not at all."""
    seen = tuple(Block(repeat=n, mixer=Softmax(heads=2, window=window), ffn=None) for n, window in layers)
    blind = Block(repeat=9, mixer=None, ffn=Swiglu(hidden=8))
    assert Decoder(width=16, blocks=(*seen, blind)).windowed == mostly


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused() -> None:
    with pytest.raises(ValueError, match="vocabulary=8: the tokenizer has 31"):
        Decoder(width=16, vocabulary=8, blocks=(Block(mixer=FULL, ffn=None),)).build(31, Local())
    assert build(FULL).embed.weight.shape[0] == 31
    assert Decoder(width=16, blocks=(Block(mixer=FULL, ffn=None),)).build(31, Local()).embed.weight.shape[0] == 64


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Softmax(heads=3, kv_heads=2), "kv_heads=2: must divide heads=3"),
        (lambda: Softmax(heads=0), "heads=0: must be at least 1"),
        (lambda: Softmax(heads=2, head_dim=3), "head_dim=3: must be even"),
        (lambda: Softmax(heads=2, softcap=-1.0), "softcap=-1.0: must be positive"),
        (lambda: Swiglu(hidden=0), "hidden=0"),
        (lambda: Block(mixer=None, ffn=None), "does nothing"),
        (lambda: Block(repeat=0, mixer=FULL, ffn=None), "repeat=0"),
        (
            lambda: Decoder(width=10, blocks=(Block(mixer=FULL, ffn=None),)),
            "blocks.0.mixer.heads=4: must divide width=10",
        ),
        (lambda: Rope(theta=1.0), "theta=1.0"),
    ],
)
def test_errors_name_place_value_and_way_out(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        make()  # type: ignore[operator]
