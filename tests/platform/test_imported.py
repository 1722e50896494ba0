"""What other houses saved is read as they meant it, by name and in order; whatever else a file holds is never run."""

import io
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from farspan.platform.optim.imported import Imported, imported, read

SHAPES = {"one": (100, 96), "two": (64,), "three": (33, 130)}


def meanings(*, signed: bool) -> Tensor:
    """The published map: seven decades, 0 and 1, and no −1 (Dettmers et al., 2022)."""
    found = [0.0, 1.0]
    for decade in range(7):
        cells = 2**decade if signed else 2 ** (decade + 1)
        for j in range(cells):
            value = 10.0 ** (decade - 6) * (0.1 + 0.9 * (j + 0.5) / cells)
            found += [value, -value] if signed else [value]
    return torch.tensor(sorted(found))


def coded(x: Tensor, block: int, *, signed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes over the flattened tensor, a maximum for each block, and the map: code by code, as nobody would do it."""
    table, codes, scales = meanings(signed=signed), [], []
    for part in x.flatten().split(block):
        scales.append(part.abs().max())
        codes.append((part.unsqueeze(1) / scales[-1] - table).abs().argmin(1))
    return torch.cat(codes).to(torch.uint8).view(x.shape), torch.stack(scales), table


def moments() -> dict[str, tuple[Tensor, Tensor]]:
    made = torch.Generator().manual_seed(3)
    sizes = {name: torch.exp(torch.randn(shape, generator=made) - 9) for name, shape in SHAPES.items()}
    return {name: (torch.randn(size.shape, generator=made) * size, size**2) for name, size in sizes.items()}


def groups(**more: Any) -> list[dict[str, Any]]:
    """Weights that decay, then others: the order of the optimizer is not that of the model."""
    return [{"lr": 1e-3, "params": [0, 1], **more}, {"lr": 1e-3, "params": [2]}]


ORDER = ["one", "three", "two"]


def bitsandbytes(block: int = 256, *, nested: bool = True) -> dict[str, Any]:
    """As bitsandbytes 0.50.2 saves AdamW8bit: checked against one that it wrote."""
    state = {}
    for i, name in enumerate(ORDER):
        tensors: dict[str, Tensor] = {}
        for which, moment in zip((1, 2), moments()[name], strict=True):
            if moment.numel() < 4096:
                tensors[f"state{which}"] = moment
            else:
                codes, scales, table = coded(moment, block, signed=which == 1)
                tensors |= {f"state{which}": codes, f"absmax{which}": scales, f"qmap{which}": table}
        state[i] = {"step": 5, "__bnb_optimizer_quant_state__": tensors} if nested else {"step": 5, **tensors}
    return {"state": state, "param_groups": groups()}


def torch_adamw(**more: Any) -> dict[str, Any]:
    entries = {n: {"step": torch.tensor(5.0), "exp_avg": m, "exp_avg_sq": v, **more} for n, (m, v) in moments().items()}
    return {"state": {i: entries[name] for i, name in enumerate(ORDER)}, "param_groups": groups()}


def check(found: Imported, quantised: tuple[str, ...] = ()) -> None:
    assert found.step == 5 and not found.problems(SHAPES)
    for name, exact in moments().items():
        for moment, wanted, error in zip(found.moments(name), exact, (0.0142, 0.0071), strict=True):
            if name not in quantised:
                assert torch.equal(moment, wanted)
                continue
            for part, of in zip(moment.flatten().split(256), wanted.flatten().split(256), strict=True):
                assert ((part - of).abs() <= error * of.abs().max()).all()
            assert not torch.equal(moment, wanted)


@pytest.mark.parametrize("nested", [True, False])
def test_bitsandbytes(nested: bool) -> None:
    check(imported(bitsandbytes(nested=nested), ORDER), quantised=("one", "three"))


def test_bitsandbytes_of_long_blocks() -> None:
    """2048 codes to a maximum, as before 0.44: told from the number of maxima."""
    found = imported(bitsandbytes(2048), ORDER)
    for name in ("one", "three"):
        for moment, wanted in zip(found.moments(name), moments()[name], strict=True):
            parts = zip(moment.flatten().split(2048), wanted.flatten().split(2048), strict=True)
            assert all(((part - of).abs() <= 0.0142 * of.abs().max()).all() for part, of in parts)


def test_a_square_is_never_zero() -> None:
    """Where the code says so, it means the middle of what it stands for: at 0 a step would be the mean over eps."""
    told = bitsandbytes()
    tensors = told["state"][0]["__bnb_optimizer_quant_state__"]
    tensors["state2"][0], tensors["state1"][0] = 0, int((tensors["qmap1"] == 0).nonzero())
    first, second = imported(told, ORDER).moments("one")
    assert (first[0] == 0).all()
    assert torch.allclose(second[0], torch.full((96,), 3.25e-7 / 4) * tensors["absmax2"][0], rtol=1e-3)


def test_torch_by_order_and_by_name(tmp_path: Path) -> None:
    check(imported(torch_adamw(), ORDER))
    check(imported({"model": {}, "optimizer": torch_adamw(), "epoch": 3}, ORDER))
    named = {"state": torch_adamw()["state"], "param_groups": groups(param_names=["one", "three"])}
    named["param_groups"][1]["param_names"] = ["two"]
    check(imported(named))
    theirs = {"1": "one", "2": "two", "3": "three"}
    by_name = {"state": {k: torch_adamw()["state"][ORDER.index(n)] for k, n in theirs.items()}}
    check(imported({**by_name, "param_groups": [{"params": list(theirs)}]}, theirs))
    file, names = tmp_path / "optimizer.pt", tmp_path / "names.json"
    torch.save(torch_adamw(master_param=torch.zeros(1)), file)
    names.write_text(json.dumps(ORDER))
    found = read(file, names)
    check(found)
    assert found.left_out == ("master_param",)
    assert set(imported(torch_adamw(), ["one", None, "two"]).entries) == {"one", "two"}


@pytest.fixture
def torchao() -> Iterator[Callable[[Tensor, bool], Tensor]]:
    """A class of torchao's name and parts, which only its writer knows."""
    name = "torchao.optim.subclass_8bit"

    class OptimState8bit(Tensor):
        codes: Tensor
        scale: Tensor
        qmap: Tensor
        block_size: int
        signed: bool

        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
            assert func is torch.ops.aten.detach.default, func
            return args[0]

    def made(x: Tensor, signed: bool) -> Tensor:
        found = Tensor._make_wrapper_subclass(OptimState8bit, x.shape, dtype=x.dtype)
        found.codes, found.scale, found.qmap = coded(x, 256, signed=signed)
        found.block_size, found.signed = 256, signed
        return found

    OptimState8bit.__module__, OptimState8bit.__qualname__ = name, "OptimState8bit"
    chain = [".".join(name.split(".")[: i + 1]) for i in range(3)]
    before = {module: sys.modules.get(module) for module in chain}
    sys.modules.update({module: types.ModuleType(module) for module in chain})
    sys.modules[name].OptimState8bit = OptimState8bit  # type: ignore[attr-defined]
    yield made
    for module, was in before.items():
        sys.modules.pop(module)
        if was is not None:
            sys.modules[module] = was


def test_torchao_is_read_without_torchao(torchao: Callable[[Tensor, bool], Tensor], tmp_path: Path) -> None:
    """Whole blocks of 256 are coded, other tensors are plain."""
    shape = (128, 96)
    first, second = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    entry = {"step": torch.tensor(5.0), "exp_avg": torchao(first, True), "exp_avg_sq": torchao(second**2, False)}
    told = torch_adamw()
    told["state"][0] = entry
    torch.save(told, tmp_path / "optimizer.pt")
    for module in [name for name in sys.modules if name.startswith("torchao")]:
        sys.modules[module] = types.ModuleType(module)
    (tmp_path / "names.json").write_text(json.dumps(ORDER))
    found = read(tmp_path / "optimizer.pt", tmp_path / "names.json")
    assert not found.problems({**SHAPES, "one": shape})
    for moment, wanted, error in zip(found.moments("one"), (first, second**2), (0.0142, 0.0071), strict=True):
        scale = wanted.view(-1, 256).abs().amax(1, keepdim=True)
        assert ((moment - wanted).view(-1, 256).abs() <= error * scale).all()
        assert not torch.equal(moment, wanted)
    assert torch.equal(found.moments("two")[0], moments()["two"][0])


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this must never be said",))


def test_nothing_of_a_file_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "optimizer.pt"
    torch.save({**torch_adamw(), "more": Harmful()}, file)
    with pytest.raises(ValueError, match=r"holds more than tensors and plain values.*print; save plain tensors"):
        read(file)
    assert capsys.readouterr().out == ""
    for content in (b"", b"no pickle", b"PK\x03\x04 no zip"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"--state {file}"):
            read(file)
    with pytest.raises(ValueError, match="not readable"):
        read(tmp_path / "nothing.pt")
    buffer = io.BytesIO()
    torch.save(torch_adamw(), buffer, _use_new_zipfile_serialization=False)
    file.write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="no names"):
        read(file)


def without(key: str) -> dict[str, Any]:
    told = bitsandbytes()
    del told["state"][0]["__bnb_optimizer_quant_state__"][key]
    return told


def uneven() -> dict[str, Any]:
    told = torch_adamw()
    told["state"][2] = {**told["state"][2], "step": 3}
    return told


def broken() -> dict[str, Any]:
    told = torch_adamw()
    told["state"][0]["exp_avg_sq"] = -told["state"][0]["exp_avg_sq"]
    return told


@pytest.mark.parametrize(
    ("told", "names", "said"),
    [
        (torch_adamw(), None, "no names; give --names"),
        (torch_adamw(), ["one"], "has 1 names, and the optimizer 3 parameters"),
        (torch_adamw(), ["one", "one", "two"], "one is there twice"),
        (torch_adamw(), [None, None, None], "no parameter of it is named"),
        ({"state": {}}, ORDER, "holds no optimizer state"),
        ({"state": {}, "param_groups": groups()}, ORDER, "one: the optimizer has no state of it"),
        ({"state": {0: {"momentum": 1}}, "param_groups": groups()}, ORDER, "momentum, which is no"),
        (uneven(), ORDER, "two was updated 3 times and one 5 times"),
        (without("absmax1"), ORDER, "only block_wise=True is read"),
        (broken(), ORDER, "a mean of squares is negative"),
    ],
)
def test_what_is_refused(told: Any, names: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        imported(told, names).moments("one")


def test_what_does_not_fit_is_named() -> None:
    problems = imported(torch_adamw(), ["one", "two", "four"]).problems(SHAPES)
    assert problems[:2] == ["three: the weight has no moments there", "four: the model has no such weight"]
    assert problems[2] == "two: exp_avg is [33, 130], and the weight [64]"
