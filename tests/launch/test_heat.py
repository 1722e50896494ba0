"""The picture of loads has a pixel for each, in the colour of its size, and the report shows it."""

import base64
import struct
import zlib
from pathlib import Path

import numpy as np

from farspan.launch.heat import COLUMNS, EVEN, FULL, GAP, HEIGHT, STARVED, picture
from farspan.launch.report import report
from farspan.platform.loads import LoadJournal, Loads
from farspan.platform.metrics import Journal


def pixels(uri: str) -> np.ndarray:
    """Height, width, 4."""
    data = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    at, packed, size = 8, b"", (0, 0)
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + body)
        if kind == b"IHDR":
            size = struct.unpack(">II", body[:8])
        elif kind == b"IDAT":
            packed += body
        at += 12 + length
    lines = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(size[1], 1 + 4 * size[0])
    return lines[:, 1:].reshape(size[1], size[0], 4)


def row(step: int, *layers: list[float]) -> Loads:
    return Loads(first=step, step=step, layers=[np.array(layer, np.float32) for layer in layers])


def test_a_load_is_a_pixel() -> None:
    found = pixels(picture([row(1, [0, 1, 2], [1, 1]), row(2, [3, 0, 0], [0, 2])]))
    assert found.shape == (3 + GAP + 2, 2, 4)
    assert found[:3, 0, :3].tolist() == [list(STARVED), list(EVEN), list(FULL)]
    assert found[0, 1, :3].tolist() == list(FULL) and (found[3, :, 3] == 0).all()
    assert found[4:, 1, :3].tolist() == [list(STARVED), list(FULL)]


def test_a_long_run_of_a_large_model_fits() -> None:
    rows = [row(step, *[[1.0] * 130] * 48) for step in range(1, COLUMNS + 78)]
    found = pixels(picture(rows))
    assert found.shape[0] <= HEIGHT and found.shape[1] == COLUMNS
    assert (found[found[..., 3] == 255][:, :3] == EVEN).all(), "means of even loads are even"


def test_the_report_shows_it(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 0)
    line = {"step": 1, "loss": 1.0, "load_max": 1.5, "load_entropy": 0.9, "router_cost": 0.1, "dropped": 0.2}
    line["exchange_seconds"] = 0.1
    journal.write(line)
    journal.close()
    page = report([tmp_path]).read_text()
    assert all(f'id="{key}"' in page for key in ("load_entropy", "dropped", "exchange_seconds"))
    assert '<img class="heat"' not in page
    LoadJournal(tmp_path).write(row(1, [0, 2]))
    assert '<img class="heat"' in report([tmp_path]).read_text()
