"""Loads of experts as one picture: a strip for each layer, a line of it for each expert, steps from left to right."""

import base64
import struct
import zlib
from collections.abc import Sequence

import numpy as np

from farspan.platform.loads import Loads

COLUMNS, HEIGHT = 600, 480
"""The most pixels of a picture, as stored; a browser stretches it."""
GAP = 1
"""Lines between layers, left clear."""
STARVED, EVEN, FULL = (0, 114, 178), (240, 240, 238), (213, 94, 0)
"""Colours of a load of nothing, of the mean, and of twice the mean and more."""


def picture(rows: Sequence[Loads]) -> str:
    """The loads as a data URI of a PNG; at least one row, all of the same layers. Neighbouring rows, and experts of
    layers that are too many for the height, are averaged."""
    layers = len(rows[0].layers)
    lines = max(1, (HEIGHT - GAP * layers) // layers)
    strips = []
    for number in range(layers):
        loads = np.stack([row.layers[number] for row in rows], axis=1)  # E, rows
        loads = _fewer(_fewer(loads, lines, axis=0), COLUMNS, axis=1)
        strips += [_colours(loads), np.zeros((GAP, loads.shape[1], 4), np.uint8)]
    return "data:image/png;base64," + base64.b64encode(_png(np.concatenate(strips[:-1]))).decode()


def _fewer(x: np.ndarray, most: int, axis: int) -> np.ndarray:
    """Means of neighbours along `axis`, of which at most so many are left."""
    count = x.shape[axis]
    if count <= most:
        return x
    bounds = np.arange(most) * count // most
    widths = np.diff(np.append(bounds, count))
    return np.add.reduceat(x, bounds, axis=axis) / np.expand_dims(widths, 1 - axis)


def _colours(loads: np.ndarray) -> np.ndarray:
    """Red, green, blue and opacity of each load."""
    low, middle, high = (np.array(colour, np.float32) for colour in (STARVED, EVEN, FULL))
    part = loads[..., None]
    below = low + (middle - low) * np.clip(part, 0, 1)
    above = middle + (high - middle) * np.clip(part - 1, 0, 1)
    colour = np.where(part < 1, below, above).astype(np.uint8)
    return np.concatenate([colour, np.full((*loads.shape, 1), 255, np.uint8)], axis=-1)


def _png(pixels: np.ndarray) -> bytes:
    """pixels: height, width, 4."""
    height, width = pixels.shape[:2]
    lines = b"".join(b"\0" + line.tobytes() for line in pixels)
    head = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, body) for kind, body in chunks)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
