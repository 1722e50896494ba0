"""What is written is what is read, by us and by Megatron; a file that lies is caught before it trains anything."""

import random
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from farspan.platform.data import index

TYPES = [np.dtype(name) for name in ("u1", "i1", "<i2", "<i4", "<i8", "<u2")]
GOLDEN_BIN = bytes.fromhex("0700 ffff 0000 0100 0200")
"""uint16: 7 65535 | 0 1 2"""
GOLDEN_IDX = bytes.fromhex(
    "4d4d494449445800 00"  # MMIDIDX, two zeros
    "0100000000000000 08"  # version 1, uint16
    "0300000000000000 0400000000000000"  # three sequences, three documents and one bound more
    "02000000 01000000 02000000"  # lengths
    "0000000000000000 0400000000000000 0600000000000000"  # first bytes
    "0000000000000000 0100000000000000 0100000000000000 0300000000000000"  # the second document is empty
)


def draw_documents(seed: int, count: int, top: int = 100) -> list[NDArray[np.int64]]:
    draw = random.Random(seed)
    return [np.array([draw.randrange(top) for _ in range(draw.choice([0, 1, 3, 50]))], np.int64) for _ in range(count)]


def contents(found: index.Indexed) -> list[list[int]]:
    return [found.tokens[start : start + length].tolist() for start, length in zip(*found.documents(), strict=True)]


def put(tmp_path: Path, idx: bytes = GOLDEN_IDX, data: bytes = GOLDEN_BIN) -> str:
    (tmp_path / "x.idx").write_bytes(idx)
    (tmp_path / "x.bin").write_bytes(data)
    return str(tmp_path / "x")


def test_a_file_written_by_hand(tmp_path: Path) -> None:
    found = index.read(put(tmp_path))
    assert contents(found) == [[7, 65535], [], [0, 1, 2]]
    assert (found.lengths.tolist(), found.starts.tolist()) == ([2, 1, 2], [0, 2, 3])
    assert found.bounds.tolist() == [0, 1, 1, 3]
    assert isinstance(found.tokens.base, np.memmap)


def test_one_sequence_a_document_is_written_bit_for_bit(tmp_path: Path) -> None:
    index.write(str(tmp_path / "x"), iter([np.array([7, 65535]), np.array([0, 1, 2])]), np.dtype("<u2"))
    assert (tmp_path / "x.bin").read_bytes() == GOLDEN_BIN
    assert (tmp_path / "x.idx").read_bytes() == (GOLDEN_IDX[:18] + struct.pack("<QQ2i2q3q", 2, 3, 2, 3, 0, 4, 0, 1, 2))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 7, 200])
def test_a_round_trip(tmp_path: Path, dtype: np.dtype[np.integer], count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = draw_documents(count, count)
    for longest in (index.LONGEST, 7, 1):
        monkeypatch.setattr(index, "LONGEST", longest)
        prefix = str(tmp_path / f"by{longest}")
        index.write(prefix, iter(documents), dtype)
        found = index.read(prefix)
        assert contents(found) == [document.tolist() for document in documents]
        assert found.tokens.dtype == dtype and found.lengths.max(initial=0) <= longest
    assert len(list(tmp_path.iterdir())) == 6


def test_types_that_do_not_hold_the_tokens_are_refused(tmp_path: Path) -> None:
    for token, dtype in ((65536, "<u2"), (-1, "<u2"), (1 << 31, "<i4")):
        with pytest.raises(ValueError, match=rf"x.bin: token {token} of document 1 does not fit .*; take another"):
            index.write(str(tmp_path / "x"), iter([np.array([1]), np.array([3, token])]), np.dtype(dtype))
    for name in ("<u4", "<f4", "<f8"):
        with pytest.raises(ValueError, match=r"x.idx: the format has no code for tokens of type .*; take uint16"):
            index.write(str(tmp_path / "x"), iter([]), np.dtype(name))
    assert index.token_type(65536) == np.uint16 and index.token_type(65537) == np.int32
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_and_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fails() -> Iterator[NDArray[np.int64]]:
        yield np.arange(5)
        raise RuntimeError("on the way")

    with pytest.raises(RuntimeError):
        index.write(str(tmp_path / "x"), fails(), np.dtype("<u2"))
    assert not list(tmp_path.iterdir())
    for name in ("x.bin", "x.idx"):
        (tmp_path / name).write_text("precious")
        with pytest.raises(ValueError, match=rf"{name} exists; remove it"):
            index.write(str(tmp_path / "x"), iter([]), np.dtype("<u2"))
        (tmp_path / name).unlink()


def damaged(at: int, form: str, value: int) -> bytes:
    return GOLDEN_IDX[:at] + struct.pack(form, value) + GOLDEN_IDX[at + struct.calcsize(form) :]


FAULTS = {
    "magic": (b"GZIPIDX" + GOLDEN_IDX[7:], "x.idx: begins with b'GZIPIDX.*no Megatron index"),
    "version": (damaged(9, "<Q", 2), "x.idx: version 2, and only 1"),
    "unknown type": (damaged(17, "<B", 9), "x.idx: tokens of type code 9; readable are 1 uint8.*8 uint16"),
    "floats": (damaged(17, "<B", 6), "x.idx: tokens of type code 6; "),
    "no bounds": (damaged(26, "<Q", 0), "x.idx: 0 document bounds"),
    "empty": (b"", "x.idx: only 0 bytes, cut short"),
    "head only": (GOLDEN_IDX[:33], "x.idx: only 33 bytes, cut short"),
    "cut": (GOLDEN_IDX[:-1], "x.idx: 101 bytes of 102, cut short"),
    "huge count": (damaged(18, "<Q", 1 << 60), "x.idx: 102 bytes of .*, cut short"),
    "longer": (GOLDEN_IDX + b"\0", "x.idx: 103 bytes, where its counts make 102"),
    "modes": (GOLDEN_IDX + b"\0\1\0", "x.idx: holds a mode for each sequence: multimodal sets are not supported"),
    "negative length": (damaged(34, "<i", -2), "x.idx: sequence 0 begins at token 0 and has -2"),
    "negative pointer": (damaged(46, "<q", -2), "x.idx: sequence 0 begins at token -1"),
    "odd pointer": (damaged(54, "<q", 5), "x.idx: sequence 1 begins at byte 5, inside a token of 2"),
    "beyond the file": (damaged(62, "<q", 8), "x.bin: 10 bytes, and x.idx ends at byte 12"),
    "first bound": (damaged(70, "<q", 1), r"x.idx: documents of 3 sequences have the bounds 1 … 3"),
    "last bound": (damaged(94, "<q", 2), r"x.idx: documents of 3 sequences have the bounds 0 … 2"),
    "falling bounds": (damaged(78, "<q", 2), r"x.idx: documents of 3 sequences .* bounds that fall"),
    "bound beyond": (damaged(78, "<q", 1 << 40), r"x.idx: documents of 3 sequences .* bounds that fall"),
    "torn": (damaged(54, "<q", 2), "x.idx: sequences 1 and 2 are of one document and do not lie end to end"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_inconsistency_is_named_with_a_way_out(tmp_path: Path, fault: str) -> None:
    content, message = FAULTS[fault]
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))}/{message}") as error:
        index.read(put(tmp_path, idx=content))
    assert re.search("[;:] (copy|build|name)", str(error.value))


def test_a_bin_that_is_missing_or_of_another_size(tmp_path: Path) -> None:
    for data in (GOLDEN_BIN[:-2], GOLDEN_BIN[:-1], GOLDEN_BIN + b"\0", GOLDEN_BIN * 2, b""):
        with pytest.raises(ValueError, match=rf"x.bin: {len(data)} bytes, and x.idx ends at byte 10: .*; copy both"):
            index.read(put(tmp_path, data=data))
    (tmp_path / "x.bin").unlink()
    with pytest.raises(ValueError, match=r"x.bin: no such file; x.idx needs it beside it"):
        index.read(str(tmp_path / "x"))
    put(tmp_path)
    (tmp_path / "x.idx").unlink()
    with pytest.raises(ValueError, match=r"x.idx: no such file; x.bin needs it"):
        index.read(str(tmp_path / "x"))


def test_random_damage_is_an_error_or_other_content_but_never_a_crash(tmp_path: Path) -> None:
    index.write(str(tmp_path / "good"), iter(draw_documents(1, 30)), np.dtype("<i4"))
    idx, data = (tmp_path / "good.idx").read_bytes(), (tmp_path / "good.bin").read_bytes()
    draw, refused = random.Random(2), 0
    for _ in range(300):
        spoilt = bytearray(idx)
        spoilt[draw.randrange(len(idx))] ^= 1 << draw.randrange(8)
        try:
            contents(index.read(put(tmp_path, bytes(spoilt), data)))
        except ValueError as error:
            refused += 1
            assert str(tmp_path) in str(error)
    assert refused > 250


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_megatron_reads_ours_and_we_read_megatrons(tmp_path: Path, dtype: np.dtype[np.integer]) -> None:
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    torch = pytest.importorskip("torch")
    documents = draw_documents(3, 40)
    index.write(str(tmp_path / "ours"), iter(documents), dtype)
    theirs = megatron.IndexedDataset(str(tmp_path / "ours"))
    assert [theirs[i].tolist() for i in range(len(theirs))] == [document.tolist() for document in documents]
    assert theirs.document_indices.tolist() == list(range(41)) and theirs.index.dtype == dtype

    draw = random.Random(4)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype.type)
    wanted = []
    for _ in range(30):
        sequences = draw_documents(draw.randrange(1000), draw.randrange(4))
        for sequence in sequences:
            builder.add_item(torch.from_numpy(sequence))
        builder.end_document()
        wanted.append([token for sequence in sequences for token in sequence.tolist()])
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert contents(index.read(str(tmp_path / "theirs"))) == wanted
