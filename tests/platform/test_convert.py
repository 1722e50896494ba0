"""What two optimizers store alike passes bit for bit; what they do not is as near as the new one can say it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY

from farspan.kernels.codes8 import decode, encode
from farspan.kernels.master import whole
from farspan.models.roles import Role
from farspan.platform import stored
from farspan.platform.checkpoint import folder_of, latest, verify
from farspan.platform.optim import Adamw, Adamw8, convert
from farspan.platform.optim.convert import Form, layout
from farspan.platform.optim.imported import Imported
from farspan.platform.optim.placement import Interleaved, Streamed
from farspan.platform.stored import Stored, store

SHAPES = {"embed": (70, 96), "experts": (3, 65, 128), "down": (64, 512), "odd": (80, 97), "norm": (33,)}
ROLES = {
    "embed": Role("embedding"),
    "experts": Role("matrix"),
    "down": Role("matrix", cut_inputs=True),
    "odd": Role("matrix"),
    "norm": Role("norm"),
}
FP32 = Adamw(rate=1e-3)
CODED = Adamw8(rate=1e-3)
KINDS: dict[str, Adamw | Adamw8] = {
    "fp32": FP32,
    "streamed": Adamw(rate=1e-3, offload=Streamed()),
    "interleaved": Adamw(rate=1e-3, offload=Interleaved()),
    "residual8": CODED,
    "residual16": replace(CODED, master="residual16", block=64, max_tp=1),
    "none": replace(CODED, master="none", exact=()),
    "wide": replace(CODED, master="fp32", block=128),
    "offloaded": replace(CODED, offload=Streamed()),
}


def turned(state: dict[str, Tensor], old: Any, new: Any, imported: Imported | None = None) -> dict[str, Tensor]:
    return dict(convert.convert(state, old, new, SHAPES, ROLES, imported))


def trained() -> dict[str, Tensor]:
    """A checkpoint of AdamW in fp32: blocks of unlike size and sign, and some nobody has updated."""
    made = torch.Generator().manual_seed(0)
    state = {"optim.step": torch.tensor([1234.0])}
    for name, shape in SHAPES.items():
        size = torch.exp(2 * torch.randn(shape, generator=made) - 12)
        state[f"model.{name}"] = torch.randn(shape, generator=made) * 0.05
        state[f"optim.first.{name}"] = torch.randn(shape, generator=made) * size
        state[f"optim.second.{name}"] = size**2
    state["optim.first.down"][3] = state["optim.second.down"][3] = 0.0
    return state


def moments(state: dict[str, Tensor], optim: Any, name: str) -> tuple[Tensor, Tensor]:
    """Decoded by the kernel's own twin."""
    block = Form.of(optim, SHAPES[name], ROLES[name]).block
    first, second = (state[f"optim.{of}.{name}"] for of in ("first", "second"))
    if not block:
        return first, second
    scales = [state[f"optim.{of}_scale.{name}"] for of in ("first", "second")]
    return decode(first, scales[0], block, signed=True), decode(second, scales[1], block, signed=False)


@pytest.mark.parametrize("kind", KINDS)
def test_the_layout_is_what_the_optimizer_itself_makes(kind: str) -> None:
    """Names, shapes and types; offloaded, those of the same in `Adamw8State`."""
    optim = KINDS[kind]
    weights = {name: torch.zeros(shape, dtype=optim.weight_type) for name, shape in SHAPES.items()}
    halves = isinstance(optim, Adamw) and optim.offload is not None
    made = (optim.in_halves if halves else optim).build(weights, ROLES, 0).state()  # type: ignore[union-attr]
    wanted = {f"model.{n}": w for n, w in weights.items()} | {f"optim.{n}": t for n, t in made.items()}
    state = turned(trained(), FP32, optim)
    for found in (layout(optim, SHAPES, ROLES), state):
        assert {n: (t.shape, t.dtype) for n, t in found.items()} == {n: (t.shape, t.dtype) for n, t in wanted.items()}
    assert state["optim.step"].sum() == 1234


@pytest.mark.parametrize("kind", KINDS)
def test_to_any_and_back(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights within what the new kind remembers, moments within a cell; there and back once more: the same."""
    start, optim = trained(), KINDS[kind]
    kept = {name: tensor.clone() for name, tensor in start.items()}
    state = turned(start, FP32, optim)
    monkeypatch.setattr(convert, "AT_ONCE", 500)  # a few rows at a time make no difference
    assert all(torch.equal(tensor, state[n]) for n, tensor in turned(start, FP32, optim).items())
    back = turned(state, optim, FP32)
    once_more = turned(turned(back, FP32, optim), optim, FP32)
    assert all(torch.equal(tensor, start[name]) for name, tensor in kept.items()), "what is read is not written to"
    for name, shape in SHAPES.items():
        form = Form.of(optim, shape, ROLES[name])
        bound = {"fp32": 0.0, "residual16": 0.0, "residual8": 1.6e-5, "none": 2.0**-8}[form.master]
        weight = start[f"model.{name}"]
        assert ((back[f"model.{name}"] - weight).abs() <= bound * weight.abs()).all(), name
        rest = state.get(f"optim.residual.{name}")
        assert torch.equal(whole(state[f"model.{name}"], rest), back[f"model.{name}"])
        for now, signed, of in zip(moments(state, optim, name), (True, False), ("first", "second"), strict=True):
            assert torch.equal(now, back[f"optim.{of}.{name}"])
            before = start[f"optim.{of}.{name}"]
            if form.block:
                largest = before.unflatten(-1, (-1, form.block)).abs().amax(-1, keepdim=True)
                error = (now - before).unflatten(-1, (-1, form.block)).abs()
                assert (error <= largest * (0.0142 if signed else 0.0071) + 1e-36).all(), name
                assert not torch.equal(now, before)
            else:
                assert torch.equal(now, before)
        for of in ("model", "optim.first", "optim.second"):  # by value: a tie and a zero have two ways to be stored
            assert torch.equal(once_more[f"{of}.{name}"], back[f"{of}.{name}"]), f"{of}.{name}"


def test_what_both_store_alike_is_not_computed_again() -> None:
    """8 bits to 8 bits: no value that chance has rounded is rounded once more, and other blocks only where they are."""
    made = torch.Generator().manual_seed(1)
    state = turned(trained(), FP32, CODED)
    for name, tensor in state.items():
        if tensor.dtype in (torch.uint8, torch.int8):
            bounds = (0, 256) if tensor.dtype == torch.uint8 else (-127, 128)
            state[name] = torch.randint(*bounds, tuple(tensor.shape), generator=made).to(tensor.dtype)
    new = replace(CODED, max_tp=1, offload=Streamed())  # only `down` is cut over its inputs
    found = turned(state, CODED, new)
    assert {n for n, t in found.items() if t is not state[n]} == {
        "optim.step",
        *(f"optim.{of}{scale}.down" for of in ("first", "second") for scale in ("", "_scale")),
    }
    for now, before in zip(moments(found, new, "down"), moments(state, CODED, "down"), strict=True):
        assert now.unflatten(-1, (-1, 256)).abs().amax(-1).equal(before.unflatten(-1, (-1, 256)).abs().amax(-1))
    other = turned(state, CODED, replace(CODED, master="residual16"))
    assert {n.split(".")[1] for n, t in other.items() if t is not state[n]} - set(SHAPES) == {"step", "residual"}
    for name in ("experts", "down"):
        remembered = whole(state[f"model.{name}"], state[f"optim.residual.{name}"])
        assert torch.equal(whole(other[f"model.{name}"], other[f"optim.residual.{name}"]), remembered)


def test_moments_from_elsewhere_take_the_place_of_the_states() -> None:
    made = torch.Generator().manual_seed(2)
    entries: dict[str, dict[str, Any]] = {
        name: {"step": 77, "exp_avg": torch.randn(shape, generator=made), "exp_avg_sq": torch.rand(shape)}
        for name, shape in SHAPES.items()
    }
    state = turned(trained(), FP32, CODED)
    found = turned(state, CODED, CODED, Imported(77, entries))
    assert found["optim.step"] == 77 and found["optim.step"].dtype == torch.float64
    for name in SHAPES:
        block = Form.of(CODED, SHAPES[name], ROLES[name]).block
        for key, of in (("exp_avg", "first"), ("exp_avg_sq", "second")):
            wanted = entries[name][key]
            if block:
                codes, scales = encode(wanted, block, signed=of == "first")
                assert torch.equal(found[f"optim.{of}.{name}"], codes)
                assert torch.equal(found[f"optim.{of}_scale.{name}"], scales)
            else:
                assert torch.equal(found[f"optim.{of}.{name}"], wanted)
        assert found[f"model.{name}"] is state[f"model.{name}"]


def test_stored_and_read_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint like any other, in as many files as it takes."""
    state = turned(trained(), FP32, CODED)
    monkeypatch.setattr(stored, "FILE", 40_000)
    store(tmp_path, 12, iter(state.items()), {"format": 1, "note": "kept"})
    folder = folder_of(tmp_path, 12)
    assert verify(folder) == [] and latest(tmp_path) == 12
    assert len(list(folder.glob("*.safetensors"))) > 3
    found = Stored(folder)
    assert set(found) == set(state) and len(found) == len(state)
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype, name


def test_pieces_that_ranks_saved_become_whole(tmp_path: Path) -> None:
    """Cut along either axis, or both, unevenly, and one whole on one rank: as DCP writes them."""
    made = {"cut": torch.randn(7, 6), "whole": torch.randn(5), "coded": torch.randint(256, (7, 4), dtype=torch.uint8)}
    cuts = [
        (slice(0, 4), slice(0, 4)),
        (slice(4, 7), slice(0, 4)),
        (slice(0, 4), slice(4, 6)),
        (slice(4, 7), slice(4, 6)),
    ]
    rows = [slice(0, 3), slice(3, 6), slice(6, 7)]
    for rank in range(4):
        pieces, at = {"cut": made["cut"][cuts[rank]]}, {"cut": [cut.start for cut in cuts[rank]]}
        if rank < 3:
            pieces["coded"], at["coded"] = made["coded"][rows[rank]], [rows[rank].start, 0]
        else:
            pieces["whole"], at["whole"] = made["whole"], [0]
        told = json.dumps({name: {SAVED_OFFSETS_KEY: offsets} for name, offsets in at.items()})
        path = tmp_path / f"shard-{rank}.safetensors"
        save_file({n: t.contiguous() for n, t in pieces.items()}, path, metadata={CUSTOM_METADATA_KEY: told})
    found = Stored(tmp_path)
    assert set(found) == set(made)
    for name, tensor in made.items():
        assert torch.equal(found[name], tensor), name
