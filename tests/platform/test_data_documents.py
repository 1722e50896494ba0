"""The same documents come out whatever they are packed in and however they are read; what is none is named."""

import gzip
import importlib.util
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from farspan.platform.data import documents
from farspan.platform.data.documents import Bad, LeftOut, Part, find, read

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
zstandard = pytest.importorskip("zstandard")

PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda content: zstandard.ZstdCompressor(write_checksum=True).compress(content),
}


def found(path: Path, *, key: str = "text", separator: str | None = None) -> tuple[list[str], list[Bad]]:
    """Whole documents, and faults with places made short."""
    texts, bad, pieces = [], [], list[str]()
    for part in read(str(path), key=key, separator=separator):
        if isinstance(part, Part):
            pieces.append(part.text)
            if part.last:
                texts.append("".join(pieces))
                pieces = []
        else:
            bad.append(Bad(part.reason, part.place.replace(str(path), path.name)))
            pieces = []
    assert not pieces, "a document without an end"
    return texts, bad


def scribble(seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices("ab \n\ré漢🙂\u2028\x00", k=draw.randrange(1, 40))) for _ in range(count)]


# Text


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", ["a.txt", "b.py", "c", "d.JSON", "e.TXT"])
def test_a_text_file_is_one_document_byte_for_byte(tmp_path: Path, name: str, packing: str) -> None:
    path = tmp_path / (name + packing)
    path.write_bytes(PACKINGS[packing](b"\xef\xbb\xbfone\r\n\r\n\ttwo \xf0\x9f\x99\x82\n"))
    assert found(path) == (["one\r\n\r\n\ttwo 🙂\n"], [])


@pytest.mark.parametrize("separator", ["|", "<|end|>", "aa", "\n\n\n", "é漢", "aba"])
@pytest.mark.parametrize("piece", [1, 2, 3, 7, 1000])
def test_separators_cut_like_a_split_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, separator: str, piece: int
) -> None:
    monkeypatch.setattr(documents, "PIECE", piece)
    draw = random.Random(piece)
    for _ in range(20):
        text = "".join(draw.choices([separator, separator[:-1], separator[1:], "a", "b", "\n", "漢"], k=30))
        (tmp_path / "a.txt").write_text(text, newline="")
        wanted = [document for document in text.split(separator) if document]
        texts, bad = found(tmp_path / "a.txt", separator=separator)
        assert texts == wanted
        assert bad == ([] if wanted else [Bad("empty", "a.txt")])


def test_a_line_of_megabytes_passes_through_small_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PIECE", 1 << 12)
    text = "wörd " * 400_000
    (tmp_path / "a.txt").write_text(text)
    assert max(len(part.text) for part in read(str(tmp_path / "a.txt"), key="", separator="|")) <= 1 << 12  # type: ignore[union-attr]
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "next"}))
    assert found(tmp_path / "a.txt", separator="|")[0] == [text]
    assert found(tmp_path / "a.jsonl")[0] == [text, "next"]


def test_damage_costs_the_document_it_hits_and_what_follows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one|two|thr\xffee|four")
    assert found(tmp_path / "a.txt") == ([], [Bad("not UTF-8", "a.txt")])
    texts, bad = found(tmp_path / "a.txt", separator="|")
    assert not texts and len(bad) == 1  # all in one piece: nothing was read before it
    texts, bad = found(tmp_path / "nowhere.txt")
    assert not texts and bad == [Bad("unreadable", "nowhere.txt")]


# Lines


LINES: list[tuple[bytes, str | Bad | None]] = [
    (b'\xef\xbb\xbf{"text": "marked"}', "marked"),
    (b"", None),
    (b" \t\r", None),
    (b'{"text": "windows\\r\\n"}\r', "windows\r\n"),
    (b'{"text": "cut", ', Bad("not JSON", "")),
    (b"[" * 100_000, Bad("not JSON", "")),
    (b'{"text": "caf\xe9"}', Bad("not UTF-8", "")),
    (b'{"txt": "typing error"}', Bad("without the field 'text'", "")),
    (b'["text"]', Bad("without the field 'text'", "")),
    (b'"text"', Bad("without the field 'text'", "")),
    (b'{"text": null}', Bad("not a string in the field 'text'", "")),
    (b'{"text": 5}', Bad("not a string in the field 'text'", "")),
    (b'{"text": ""}', Bad("empty", "")),
    (b'{"text": "\\ud83d"}', Bad("not Unicode (half a surrogate pair)", "")),
    (b'{"text": "\\ud83d\\ude42 \\u0000"}', "🙂 \x00"),
    ('{"text": "a\u2028b\x85c"}'.encode(), "a\u2028b\x85c"),
    (b'{"text": "last, without a newline"}', "last, without a newline"),
]


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("piece", [1, 10, 1 << 24])
def test_every_fault_of_a_line_costs_that_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, packing: str
) -> None:
    monkeypatch.setattr(documents, "PIECE", piece)
    path = tmp_path / f"a.jsonl{packing}"
    path.write_bytes(PACKINGS[packing](b"\n".join(line for line, _ in LINES)))
    texts, bad = found(path)
    assert texts == [wanted for _, wanted in LINES if isinstance(wanted, str)]
    assert bad == [Bad(w.reason, f"{path.name}:{n}") for n, (_, w) in enumerate(LINES, 1) if isinstance(w, Bad)]


def test_dotted_fields(tmp_path: Path) -> None:
    path = tmp_path / "a.ndjson"
    path.write_text('{"a": {"b": "inside"}}\n{"a.b": "literal", "a": {"b": "inside"}}\n{"a": "flat"}\n{"a": [1]}')
    assert found(path, key="a.b")[0] == ["inside", "literal"]
    assert [bad.place for bad in found(path, key="a.b")[1]] == ["a.ndjson:3", "a.ndjson:4"]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.txt.zst", "a.parquet"])
def test_files_without_a_document_are_empty(tmp_path: Path, name: str) -> None:
    if name.endswith("parquet"):
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(PACKINGS[Path(name).suffix if name.count(".") > 1 else ""](b""))
    assert found(tmp_path / name) == ([], [Bad("empty", name)])


# Packed files


@pytest.mark.parametrize("packing", [".gz", ".zst"])
@pytest.mark.parametrize("members", [1, 3])
def test_a_cut_or_spoilt_file_keeps_what_came_before(tmp_path: Path, packing: str, members: int) -> None:
    draw = random.Random(3)
    lines = [json.dumps({"text": draw.randbytes(200).hex()}) + "\n" for i in range(1500)]
    parts = ["".join(lines[i::members]).encode() for i in range(members)]
    ends = [sum(len(PACKINGS[packing](part)) for part in parts[:i]) for i in range(members + 1)]
    packed = b"".join(PACKINGS[packing](part) for part in parts)
    path = tmp_path / f"a.jsonl{packing}"
    path.write_bytes(packed)
    whole, bad = found(path)
    assert len(whole) == 1500 and not bad
    kept = []
    for cut in [*range(2, 20), *range(20, len(packed), len(packed) // 20), ends[-1] - 1]:
        path.write_bytes(packed[:cut])
        some, bad = found(path)
        assert some == whole[: len(some)] and bad == [Bad("cut short", path.name)]
        kept.append(len(some))
        path.write_bytes(packed[:cut] + bytes([packed[cut] ^ 0x55]) + packed[cut + 1 :])
        some, bad = found(path)
        assert bad or some == whole
    assert sorted(kept) == kept and kept[-1] > 1000
    if members > 1:  # nothing tells that a file ends too early between its members
        path.write_bytes(packed[: ends[1]])
        assert found(path) == (whole[: len(parts[0].splitlines())], [])
    path.write_bytes(b"nothing of the kind")
    assert found(path) == ([], [Bad("damaged", path.name)])


def test_a_cut_text_file_is_no_document(tmp_path: Path) -> None:
    for packing in (".gz", ".zst"):
        packed = PACKINGS[packing](b"one document " * 1000)
        (tmp_path / f"a.txt{packing}").write_bytes(packed[:-3])
        assert found(tmp_path / f"a.txt{packing}") == ([], [Bad("cut short", f"a.txt{packing}")])


# Parquet


def test_rows_of_parquet_are_like_lines(tmp_path: Path) -> None:
    values: list[Any] = [*scribble(5, 1000), None, "", "last"]
    pq.write_table(pa.table({"n": range(1003), "text": values}), tmp_path / "a.parquet", row_group_size=301)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": value}) + "\n" for value in values))
    texts, bad = found(tmp_path / "a.parquet")
    assert texts == [value for value in values if value] == found(tmp_path / "a.jsonl")[0]
    assert bad == [Bad("not a string in the field 'text'", "a.parquet:1001"), Bad("empty", "a.parquet:1002")]
    assert [fault.place.replace("parquet", "jsonl") for fault in bad] == [
        fault.place for fault in found(tmp_path / "a.jsonl")[1]
    ]


def test_columns_of_parquet(tmp_path: Path) -> None:
    table = pa.table(
        {
            "meta": [{"text": "inside"}, None, {"text": None}],
            "a.b": ["literal", "dot", "name"],
            "large": pa.array(["x", "y", "z"], pa.large_string()),
            "few": pa.array(["same", "same", "other"]).dictionary_encode(),
            "number": [1, 2, 3],
            "raw": [b"\xff", b"text", b""],
        }
    )
    path = tmp_path / "a.parquet"
    pq.write_table(table, path)
    assert found(path, key="meta.text")[0] == ["inside"]
    assert found(path, key="a.b") == (["literal", "dot", "name"], [])
    assert found(path, key="large")[0] == ["x", "y", "z"]
    assert found(path, key="few")[0] == ["same", "same", "other"]
    for key in ("number", "raw", "meta"):
        assert [bad.reason for bad in found(path, key=key)[1]] == [f"not a string in the field {key!r}"] * 3 or (
            key == "meta"
        )
        assert found(path, key=key)[0] == []
    assert found(path, key="nothing") == ([], [Bad("without the field 'nothing'", "a.parquet")])
    assert [bad.reason for bad in found(path, key="meta.nothing")[1]] == ["without the field 'meta.nothing'"] * 3


def test_damaged_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"{i} {t}" for i, t in enumerate(scribble(1, 2000))]}), path, row_group_size=500)
    good = path.read_bytes()
    for spoilt in (b"", b"no parquet at all, but long enough", good[:-9], good[: len(good) // 2]):
        path.write_bytes(spoilt)
        assert found(path) == ([], [Bad("not parquet, or damaged", "a.parquet")])
    at = len(good) * 2 // 3
    path.write_bytes(good[:at] + b"\xff" * 200 + good[at + 200 :])
    texts, bad = found(path)
    assert 500 <= len(texts) < 2000 and bad[-1] == Bad("not parquet, or damaged", "a.parquet")
    path.unlink()
    assert found(path) == ([], [Bad("unreadable", "a.parquet")])


def test_parquet_is_read_a_row_group_at_a_time(tmp_path: Path) -> None:
    draw = random.Random(0)
    table = pa.table({"text": [draw.randbytes(1000).hex() for _ in range(4000)]})  # 8 MB
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=400, use_dictionary=False)
    del table
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in read(str(tmp_path / "a.parquet"), key="text", separator=None)]
    assert len(held) == 4000 and max(held) < 4_000_000


# Files


def test_missing_libraries_say_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, library in (("a.txt.zst", "zstandard"), ("a.PARQUET", "pyarrow")):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(ValueError, match=rf"{name}: .* need {library}; pip install farspan\[data\]"):
            find([str(tmp_path / name)], ())


def test_what_is_left_out_is_counted_whole_and_named_in_part() -> None:
    left_out = LeftOut()
    for i in range(1000):
        left_out.note("not JSON", f"a.jsonl:{i}")
        left_out.note("unreadable", f"{i}.txt")
    assert len(left_out.places["not JSON"]) == 100 and len(left_out.places["unreadable"]) == 1000
    assert left_out.lines()[0] == "left out 1,000 not JSON: a.jsonl:0, a.jsonl:1, a.jsonl:2 and 997 more"
