"""Documents as a corpus holds them, read back from its rows."""

import numpy as np

from farspan.platform.data.pack import PackedRows
from farspan.platform.data.row import Rows


def stream(rows: Rows) -> list[list[int]]:
    """The tokens of every document, in order."""
    if not len(rows):
        return []
    assert isinstance(rows, PackedRows)
    order = np.argsort([rows.place(n) for n in range(len(rows))])
    tokens = np.concatenate([rows.row(int(n)).tokens for n in order])
    return [piece.tolist() for piece in np.split(tokens, np.cumsum(rows.documents()))[:-1]]
