"""What every benchmark prints and writes: a table for people, a JSON file with where and when it was measured."""

import json
import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
Row = Mapping[str, Any]


def record(claim: str, rows: Sequence[Row], **setting: Any) -> Path:
    """Prints `rows` and writes them to results/<claim>-<device>.json with device, versions, date and `setting`."""
    print(table(rows))
    path = RESULTS / f"{claim}-{short_device()}.json"
    path.parent.mkdir(exist_ok=True)
    where: Row = {"device": device(), "torch": torch.__version__, "python": platform.python_version()}
    if torch.cuda.is_available():  # attention over packed documents is twice as fast with it
        where = {**where, "cudnn_frontend": version("nvidia-cudnn-frontend") if find_spec("cudnn") else None}
    told = {"claim": claim, **where, "date": time.strftime("%Y-%m-%d"), **setting, "rows": list(rows)}
    path.write_text(json.dumps(told, indent=1) + "\n")
    print(f"written to {path}")
    return path


def device() -> str:
    """The accelerators of this machine, or its processor's cores."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} cores"


def short_device() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    count = torch.cuda.device_count()
    name = next(word for word in (*torch.cuda.get_device_name().split(), "gpu") if word[0] in "HABg").lower()
    return name if count == 1 else f"{count}x{name}"


def table(rows: Sequence[Row]) -> str:
    """Rows of equal keys as aligned columns."""
    head = list(rows[0])
    cells = [head, *([_cell(row[key]) for key in head] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    return "\n".join("  ".join(f"{cell:>{w}}" for cell, w in zip(line, widths, strict=True)) for line in cells)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
