"""Loads come back as they were written, whatever a crash has left, and what was trained again counts once."""

from pathlib import Path

import numpy as np

from farspan.platform.loads import FILE, LoadJournal, Loads, read


def loads(first: int, step: int, value: float) -> Loads:
    return Loads(
        first=first, step=step, layers=[np.array([value, 2 - value, 1, 1], np.float32), np.ones(3, np.float32)]
    )


def test_rows_come_back_and_later_attempts_supersede(tmp_path: Path) -> None:
    journal = LoadJournal(tmp_path)
    journal.sync()
    assert read(tmp_path) == [] and not (tmp_path / FILE).exists()
    for i in range(3):
        journal.write(loads(10 * i + 1, 10 * i + 10, 0.25 * i))
    with (tmp_path / FILE).open("ab") as file:
        file.write(loads(31, 40, 1.0).encode()[:-9])
    again = LoadJournal(tmp_path)
    again.write(loads(11, 15, 0.75))
    again.write(loads(16, 25, 0.5))
    again.sync()
    found = read(tmp_path)
    assert [(row.first, row.step) for row in found] == [(1, 10), (11, 15), (16, 25)]
    assert [float(row.layers[0][0]) for row in found] == [0.0, 0.75, 0.5]
    assert [len(layer) for layer in found[0].layers] == [4, 3]


def test_a_load_is_kept_to_a_part_of_the_mean(tmp_path: Path) -> None:
    layer = np.array([0.0, 1 / 3, 2.5, 1000.0], np.float32)
    LoadJournal(tmp_path).write(Loads(first=1, step=1, layers=[layer]))
    [row] = read(tmp_path)
    assert np.abs(row.layers[0][:3] - layer[:3]).max() < 1 / 256 and row.layers[0][3] == 65535 / 256
