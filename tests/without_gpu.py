"""Kernels on a machine without a GPU: interpreted for their numbers, compiled for Hopper to see what they need."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

SHARED_MEMORY = 232_448
"""Bytes that a block may have on Hopper; Triton compiles more without a word."""


def elsewhere(function: Callable[[], None], *, interpret: bool) -> None:
    """Runs a function of a test file in a process of its own: triton reads TRITON_INTERPRET when it is imported."""
    code = f"""
import importlib.util, torch
torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("under_test", {function.__code__.co_filename!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.{function.__name__}()
"""
    tests = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "1" if interpret else "0", "PYTHONPATH": tests},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def both(interpreted: Callable[[], None], compiled: Callable[[], None]) -> Callable[..., None]:
    """The test that these two functions of a test file pass, each in its own process, where there is no GPU."""

    @pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels themselves run here")
    @pytest.mark.parametrize(
        ("run", "interpret"), [(interpreted, True), (compiled, False)], ids=["interpreted", "compiled"]
    )
    def test(run: Callable[[], None], interpret: bool) -> None:
        elsewhere(run, interpret=interpret)

    return test


@dataclass(frozen=True)
class Compiled:
    """What a kernel needs on Hopper."""

    registers: int
    """A thread."""
    stack: int
    """Bytes a thread: more than a few are spilled registers."""
    shared: int
    """Bytes a block."""
    ptx: str
    loop: int
    """Machine instructions of the longest loop, or of the whole program where there is none."""
    sums: tuple[str, ...]
    """How what is summed lies over the threads, for each sum of the program: equal ones have the same last bit."""


def compiled(kernel: Any, types: dict[str, str], fixed: dict[str, Any], **options: int) -> Compiled:
    """Compiles for sm_90, where there is no GPU as well, and asserts that it fits and never computes in fp64.

    types: of each argument that is not in `fixed`: "*bf16", "fp32", "i32", …; fixed: the constants. options: num_warps,
    num_stages. Pointers and what is named `*_row` or `width` count as multiples of 16, as in a model.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    function = getattr(kernel, "fn", kernel) if hasattr(kernel, "configs") else kernel
    names = [name for name in function.arg_names if name not in fixed]
    assert set(names) == set(types), f"{sorted(set(names) ^ set(types))}: argument without a type, or the reverse"
    even = [n for n in names if types[n].startswith("*") or n.endswith("_row") or n == "width"]
    built = compile(
        ASTSource(
            fn=function,
            signature={**types, **dict.fromkeys(fixed, "constexpr")},
            constexprs=fixed,
            attrs={(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in even},
        ),
        target=GPUTarget("cuda", 90, 32),
        options=options,
    )
    assert ".f64" not in built.asm["ptx"], f"{function.__name__}: computes in fp64"
    assert built.metadata.shared <= SHARED_MEMORY, f"{function.__name__}: {built.metadata.shared} B of shared memory"
    registers, stack = _resources(built.asm["cubin"])
    loop, shared = _longest_loop(built.asm["cubin"]), built.metadata.shared
    return Compiled(registers, stack, shared, built.asm["ptx"], loop, _sums(built.asm["ttgir"]))


def _sums(program: str) -> tuple[str, ...]:
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", program, re.M))
    found = re.findall(r'"tt.reduce"\([^)]*\) [^\n]*\n(.*?)\}\) : \(tensor<[^>]*?(#[\w.]+)', program, re.S)
    return tuple(layouts.get(layout, layout) for inside, layout in found if "arith.addf" in inside)


def round_as_hardware_does() -> None:
    """The interpreter cuts numbers short when it makes fp8 of them; a GPU rounds, and so does torch."""
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    before = interpreter._convert_float

    def convert(given: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) == (tl.float32, tl.float8e4nv):
            codes = torch.from_numpy(np.ascontiguousarray(given).view(np.float32)).to(torch.float8_e4m3fn)
            return codes.view(torch.uint8).numpy()
        if (source, target) == (tl.float8e4nv, tl.float32):
            codes = torch.from_numpy(np.ascontiguousarray(given).view(np.uint8)).view(torch.float8_e4m3fn)
            return codes.float().numpy()
        return before(given, source, target, rounding)

    interpreter._convert_float = convert


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack a thread, as cuobjdump tells them."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", _ask("cuobjdump", "--dump-resource-usage", cubin))
    assert found
    return int(found[1]), int(found[2])


def _longest_loop(cubin: bytes) -> int:
    """Machine instructions between a label and the furthest jump back to it."""
    labels: dict[str, int] = {}
    count = longest = 0
    for line in _ask("nvdisasm", "-c", cubin).splitlines():
        if label := re.match(r"(\.L\w+):", line.strip()):
            labels[label[1]] = count
        elif re.match(r"\s+/\*[0-9a-f]{4,}\*/", line):
            count += 1
            if (jump := re.search(r"BRA.*`\((\.L\w+)\)", line)) and jump[1] in labels:
                longest = max(longest, count - labels[jump[1]])
    return longest if longest > 1 else count  # programs end in a jump to itself


def _ask(tool: str, option: str, cubin: bytes) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, option, file.name], capture_output=True, text=True, check=True).stdout
