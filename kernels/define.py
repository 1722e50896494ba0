"""How a kernel becomes an operator that torch.compile keeps whole, and when Triton runs it."""

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from torch._ops import OpOverload

_LIBRARY = torch.library.Library("farspan", "FRAGMENT")
_INTERPRETED = bool(triton.knobs.runtime.interpret)  # triton reads it once as well, and torch.compile cannot trace it
_HALF = (torch.float16, torch.bfloat16)


def define(schema: str, run: Callable[..., Any], shapes: Callable[..., Any]) -> OpOverload:
    """The operator farspan::`schema`. Its gradient is that of an autograd.Function around it, or `register_autograd`'s.

    run: what it does, on any device. shapes: its results for a tracer, from fake tensors: shapes, types and strides
    alone, which must be those that `run` gives. This costs about half the host time of `torch.library.custom_op`.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"farspan::{name}", shapes, lib=_LIBRARY)
    overload: OpOverload = getattr(torch.ops.farspan, name).default
    return overload


def triton_runs(*tensors: Tensor) -> bool:
    """Whether kernels run on these: fp64 is for tests and stays with the twins; interpreted kernels take CPU tensors.

    One answer for all that an operation and its backward do: traced, fake tensors of a GPU are on that GPU, and tensors
    without a device stand for a GPU's where they are of half precision: what a layer will hold is foretold with them.
    """
    if any(x.dtype == torch.float64 for x in tensors):
        return False
    first = tensors[0]
    return first.is_cuda or (first.is_meta and first.dtype in _HALF) or (_INTERPRETED and first.device.type == "cpu")
