"""The state of one kind of AdamW becomes that of another, weight by weight: bit for bit where both store a thing alike,
to the nearest where they do not."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from farspan.kernels.codes8 import decode, encode
from farspan.kernels.master import RESIDUALS, Master, split, whole
from farspan.models.roles import Role
from farspan.parallel.fsdp import in_blocks
from farspan.platform.optim.adamw import Adamw
from farspan.platform.optim.adamw8 import Adamw8, kinds
from farspan.platform.optim.imported import Imported

Convertible = Adamw | Adamw8

AT_ONCE = 1 << 22
"""Elements of a weight that are computed at a time: what lies between is never as large as a large weight."""

SIGNED = {"first": True, "second": False}

Rows = Callable[[slice], Tensor]
"""Rows of a tensor in fp32."""


@dataclass(frozen=True)
class Form:
    """How a weight and its moments are stored."""

    block: int
    """Codes to a scale; 0: moments in fp32."""
    master: Master

    @staticmethod
    def of(optim: Convertible, shape: tuple[int, ...], role: Role) -> "Form":
        if isinstance(optim, Adamw) and optim.offload is None:
            return Form(0, "fp32")
        over = optim.in_halves if isinstance(optim, Adamw) else optim
        block = over.block_of(shape, role)
        return Form(block, over.master_of(block))

    @property
    def weight_type(self) -> torch.dtype:
        return torch.float32 if self.master == "fp32" else torch.bfloat16

    def empty(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """The tensors of a weight of this shape, unwritten: `weight`, and the state's by its own names."""
        made = {"weight": torch.empty(shape, dtype=self.weight_type)}
        for of, (dtype, each) in kinds(self.block, self.master).items():
            made[of] = torch.empty(in_blocks(shape, each), dtype=dtype)
        return made


def layout(optim: Convertible, shapes: Mapping[str, tuple[int, ...]], roles: Mapping[str, Role]) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, on the meta device. shapes: of whole weights."""
    found = {}
    with torch.device("meta"):
        found["optim.step"] = _count(optim, 0.0)
        for name, shape in shapes.items():
            made = Form.of(optim, shape, roles[name]).empty(shape)
            found |= {_named(of, name): tensor for of, tensor in made.items()}
    return found


def convert(
    state: Mapping[str, Tensor],
    old: Convertible,
    new: Convertible,
    shapes: Mapping[str, tuple[int, ...]],
    roles: Mapping[str, Role],
    imported: Imported | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint of `new`, by name, from those of one of `old`; both as `layout` has them.

    `state` is asked for the tensors of one weight at a time, and may read them only then. imported: moments and count
    of updates that take the place of the state's; the weights are the state's in any case.
    """
    yield "optim.step", _count(new, float(state["optim.step"]) if imported is None else float(imported.step))
    for name, shape in shapes.items():
        was, form = Form.of(old, shape, roles[name]), Form.of(new, shape, roles[name])
        for of, tensor in _one(state, name, shape, was, form, imported).items():
            yield _named(of, name), tensor


def _named(of: str, name: str) -> str:
    return f"model.{name}" if of == "weight" else f"optim.{of}.{name}"


def _count(optim: Convertible, steps: float) -> Tensor:
    """The count of updates made, as each optimizer keeps it."""
    if isinstance(optim, Adamw) and optim.offload is None:
        return torch.full((1,), steps, dtype=torch.float32)
    return torch.full((), steps, dtype=torch.float64)


def _one(
    state: Mapping[str, Tensor], name: str, shape: tuple[int, ...], old: Form, new: Form, imported: Imported | None
) -> dict[str, Tensor]:
    """Of one weight."""
    made = new.empty(shape)
    if old.master == new.master:
        for of in ("weight", "residual"):
            if of in made:
                made[of] = state[_named(of, name)]
    else:
        residual = state[_named("residual", name)] if old.master in RESIDUALS else None
        _remember(state[_named("weight", name)], residual, made["weight"], made.get("residual"))
    moments = dict(zip(SIGNED, imported.moments(name), strict=True)) if imported is not None else None
    for of in SIGNED:
        scales = f"{of}_scale"
        if moments is not None:
            _put(moments[of].__getitem__, made[of], made.get(scales), new.block, signed=SIGNED[of])
        elif old.block == new.block:
            made |= {same: state[_named(same, name)] for same in (of, scales) if same in made}
        else:
            rows = _rows(state, name, of, old.block)
            _put(rows, made[of], made.get(scales), new.block, signed=SIGNED[of])
    return made


def _rows(state: Mapping[str, Tensor], name: str, of: str, block: int) -> Rows:
    """A stored moment."""
    stored = state[_named(of, name)]
    if not block:
        return stored.__getitem__
    scales = state[_named(f"{of}_scale", name)]
    return lambda rows: decode(stored[rows], scales[rows], block, signed=SIGNED[of])


def _put(moment: Rows, into: Tensor, scales: Tensor | None, block: int, *, signed: bool) -> None:
    for rows in _parts(into.shape):
        if scales is None:
            into[rows] = moment(rows)
        else:
            into[rows], scales[rows] = encode(moment(rows).contiguous(), block, signed=signed)


def _remember(weight: Tensor, residual: Tensor | None, into: Tensor, rest: Tensor | None) -> None:
    """Writes a weight in another way of remembering it; without a residual to the nearest, not by chance."""
    for rows in _parts(weight.shape):
        wanted = whole(weight[rows], None if residual is None else residual[rows]).contiguous()
        if rest is None:
            into[rows] = wanted
        else:
            split(wanted, into[rows], rest[rows])


def _parts(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of the first axis."""
    each = max(1, AT_ONCE // max(1, prod(shape[1:])))
    return (slice(first, first + each) for first in range(0, shape[0], each))
