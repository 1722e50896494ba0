"""Moments from elsewhere: the saved state of bitsandbytes', torchao's and torch's own AdamW, read without running a
byte of it."""

import json
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

READ = {"step", "state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2", "exp_avg", "exp_avg_sq"}
"""What is taken of a weight's entry."""

BLOCKS = (256, 2048)
"""Codes to a maximum, in bitsandbytes 0.44 and later, and before."""

NESTED = "__bnb_optimizer_quant_state__"
"""Where bitsandbytes puts an entry's tensors since 0.49, to hide them from FSDP."""

TORCHAO = ("torchao.optim.subclass_8bit", "torchao.prototype.low_bit_optim.subclass_8bit")


class _OptimState8bit(Tensor):
    """Stands for torchao's class of that name, of which only the tensors are wanted: `codes`, `scale`, `qmap`."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise NotImplementedError(f"{func}: only the parts of a quantised tensor can be read")


@dataclass(frozen=True)
class Imported:
    """The moments of an Adam by farspan's names of its weights, as they were saved; decoded when asked for."""

    step: int
    """Updates made."""
    entries: Mapping[str, Mapping[str, Any]]
    left_out: tuple[str, ...] = ()
    """What else the entries hold, such as master weights, which nobody reads."""

    def moments(self, name: str) -> tuple[Tensor, Tensor]:
        """fp32: the mean of gradients and of their squares. ValueError: they are no such thing."""
        entry = self.entries[name]
        if "state1" in entry:
            found = [_of_bitsandbytes(name, entry, i) for i in (1, 2)]
        else:
            found = [_of_torch(name, entry[key], signed) for key, signed in (("exp_avg", True), ("exp_avg_sq", False))]
        first, second = found
        if not (first.isfinite().all() and second.isfinite().all() and (second >= 0).all()):
            raise ValueError(f"--state: {name}: a moment is not finite, or a mean of squares is negative; save it anew")
        return first, second

    def problems(self, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
        """Where the entries do not fit weights of these shapes."""
        found = [f"{name}: the weight has no moments there" for name in shapes if name not in self.entries]
        found += [f"{name}: the model has no such weight" for name in self.entries if name not in shapes]
        for name, entry in self.entries.items():
            wanted = shapes.get(name)
            for key in ("state1", "state2", "exp_avg", "exp_avg_sq"):
                if wanted is not None and key in entry and (shape := tuple(entry[key].shape)) != wanted:
                    found.append(f"{name}: {key} is {list(shape)}, and the weight {list(wanted)}")
        return found


def read(path: Path, names: Path | None = None) -> Imported:
    """An optimizer's state_dict() as torch.save wrote it, or a dict that holds one.

    names: a JSON file for `imported`. ValueError: it holds anything but tensors and plain values, or fits no kind.
    """
    try:
        allowed: list[Any] = [(_OptimState8bit, f"{module}.OptimState8bit") for module in TORCHAO]
        with torch.serialization.safe_globals(allowed):
            told = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        what = next((line.partition("GLOBAL ")[2] for line in str(error).splitlines() if "GLOBAL " in line), "")
        raise ValueError(
            f"--state {path}: holds more than tensors and plain values, and is not loaded: "
            f"{what.split(' ')[0] or 'damaged'}; save plain tensors where it was made, as docs/checkpoints.md shows"
        ) from error
    except (OSError, RuntimeError, EOFError) as error:
        raise ValueError(f"--state {path}: not readable ({str(error)[:200]}); give a file of torch.save") from error
    return imported(told, None if names is None else _names(names))


def _names(path: Path) -> list[str | None] | dict[str, str]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--names {path}: not readable as JSON ({error})") from error
    if isinstance(found, dict) and all(isinstance(name, str) for name in found.values()):
        return found
    if isinstance(found, list) and all(name is None or isinstance(name, str) for name in found):
        return found
    raise ValueError(f"--names {path}: must be a list of names (null: leave that one out), or {{theirs: ours}}")


def imported(told: Any, names: Sequence[str | None] | Mapping[str, str] | None = None) -> Imported:
    """From an optimizer's state_dict(), or a dict that holds one.

    names: ours, in the order of the optimizer's param_groups, None for a parameter that is to be left out; or ours by
    theirs, where the state holds names; None: theirs are ours.
    """
    whole = _optimizer(told)
    keys, theirs = _order(whole["param_groups"])
    ours = _ours(keys, theirs, names)
    if twice := {name for name in ours if name is not None and ours.count(name) > 1}:
        raise ValueError(f"--names: {min(twice)} is there twice; null leaves a parameter out")
    entries = {name: _entry(name, whole["state"].get(key)) for key, name in zip(keys, ours, strict=True) if name}
    if not entries:
        raise ValueError("--state: no parameter of it is named; give --names")
    steps = {name: int(entry["step"]) for name, entry in entries.items()}
    if len(set(steps.values())) > 1:
        low, high = (extreme(steps, key=steps.__getitem__) for extreme in (min, max))
        raise ValueError(
            f"--state: {low} was updated {steps[low]} times and {high} {steps[high]} times, and here all weights share "
            "one count; write the larger into each `step`, where biases have long been corrected"
        )
    left_out = sorted({str(key) for entry in entries.values() for key in entry} - READ)
    return Imported(next(iter(steps.values())), entries, tuple(left_out))


def _optimizer(told: Any) -> Mapping[str, Any]:
    """The state_dict of an optimizer."""
    nested = list(told.values()) if isinstance(told, dict) else []
    found = [d for d in (told, *nested) if isinstance(d, dict) and {"state", "param_groups"} <= d.keys()]
    if len(found) != 1:
        raise ValueError(
            f"--state: holds {len(found) or 'no'} optimizer state{'s' * (len(found) > 1)} (a dict of state and "
            "param_groups); save optimizer.state_dict() alone"
        )
    return found[0]


def _order(groups: Sequence[Mapping[str, Any]]) -> tuple[list[Any], list[str] | None]:
    """The keys of all parameters in order, and their names if they have some."""
    keys = [key for group in groups for key in group["params"]]
    if all(isinstance(key, str) for key in keys):
        return keys, keys
    named = [name for group in groups for name in group.get("param_names", ())]
    return keys, named if len(named) == len(keys) else None


def _ours(
    keys: Sequence[Any], theirs: Sequence[str] | None, names: Sequence[str | None] | Mapping[str, str] | None
) -> list[str | None]:
    """The name of each key, None for those left out."""
    if isinstance(names, Mapping) or names is None:
        if theirs is None:
            raise ValueError("--state: its parameters have no names; give --names with a list of ours in their order")
        return list(theirs) if names is None else [names.get(name) for name in theirs]
    if len(names) != len(keys):
        raise ValueError(
            f"--names: has {len(names)} names, and the optimizer {len(keys)} parameters; name each in the order of "
            "param_groups, null for one to leave out"
        )
    return list(names)


def _entry(name: str, entry: Any) -> Mapping[str, Any]:
    """What is saved of one parameter, flat."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"--state: {name}: the optimizer has no state of it; make a step with every weight first")
    flat = {**{key: value for key, value in entry.items() if key != NESTED}, **entry.get(NESTED, {})}
    for pair in (("state1", "state2"), ("exp_avg", "exp_avg_sq")):
        if {*pair, "step"} <= flat.keys():
            return flat
    raise ValueError(
        f"--state: {name}: holds {', '.join(map(str, flat))}, which is no Adam's: step with state1 and state2 "
        "(bitsandbytes) or exp_avg and exp_avg_sq (torch, torchao) is read"
    )


def _of_bitsandbytes(name: str, entry: Mapping[str, Any], which: int) -> Tensor:
    """Codes over the flattened tensor, or the moment itself where the tensor is small."""
    codes = entry[f"state{which}"]
    if codes.dtype != torch.uint8:
        return codes.float()
    if f"absmax{which}" not in entry:
        raise ValueError(f"--state: {name}: has one scale for the whole tensor; only block_wise=True is read")
    scales, meanings = entry[f"absmax{which}"], entry[f"qmap{which}"]
    block = next((b for b in BLOCKS if -(-codes.numel() // b) == scales.numel()), None)
    if block is None:
        raise ValueError(
            f"--state: {name}: {codes.numel()} codes to {scales.numel()} maxima; blocks of 256 or 2048 are read"
        )
    return dequantised(codes, scales, meanings, block, signed=which == 1)


def _of_torch(name: str, moment: Any, signed: bool) -> Tensor:
    """A plain moment, or torchao's codes over the flattened one."""
    if not hasattr(moment, "codes"):
        return moment.float()
    codes, scales = moment.codes, moment.scale
    if codes.shape != moment.shape or codes.numel() % max(1, scales.numel()):
        raise ValueError(f"--state: {name}: codes {list(codes.shape)} of a tensor {list(moment.shape)}; save it anew")
    return dequantised(codes, scales, moment.qmap, codes.numel() // scales.numel(), signed=signed)


def dequantised(codes: Tensor, scales: Tensor, meanings: Tensor, block: int, *, signed: bool) -> Tensor:
    """codes: uint8 of any shape, scales: fp32, one for `block` codes of the flattened, meanings: 256 -> fp32.

    Among squares a code of zero stands for all from 0 to half the smallest other, and means the middle of that here: at
    zero itself the next update would be the mean over eps.
    """
    meanings = meanings.float()
    if not signed:
        smallest = meanings[meanings > 0].min()
        meanings = torch.where(meanings == 0, smallest / 4, meanings)
    found = meanings[codes.flatten().int()]
    full = found.numel() // block
    found[: full * block].view(-1, block).mul_(scales[:full].unsqueeze(1))
    found[full * block :].mul_(scales[-1])
    return found.view(codes.shape)
