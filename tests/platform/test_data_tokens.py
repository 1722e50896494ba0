"""Training on files of tokens is training on the documents in them, wherever their bounds and files lie."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from farspan.parallel.context.shard import IGNORE
from farspan.platform.data import Tokens, index
from farspan.platform.data.corpus import Corpus
from farspan.platform.data.objective import Masked
from farspan.platform.data.tokens import Maps
from streams import stream

END = 256


def put(prefix: Path, documents: list[list[int]], dtype: str = "<u2") -> str:
    index.write(str(prefix), (np.array(document, np.int64) for document in documents), np.dtype(dtype))
    return str(prefix)


def build(*paths: str, seed: int = 0, **fields: Any) -> Corpus:
    given: dict[str, Any] = {"paths": paths, "sequence_length": 8, "tokenizer": "bytes", "held_out": 0.0}
    return Tokens(**(given | fields)).build(seed)


def some(seed: int, count: int, close: bool = True) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [[*draw.integers(0, 256, draw.integers(1, 30)).tolist(), *[END] * close] for _ in range(count)]


def test_several_files_of_several_types_are_one_stream(tmp_path: Path) -> None:
    parts = [some(1, 20), some(2, 1), [], some(3, 30)]
    for i, (documents, dtype) in enumerate(zip(parts, ("<u2", "<i4", "<i8", "<i2"), strict=True)):
        put(tmp_path / f"{i}", documents, dtype)
    wanted = [document for part in parts for document in part]
    for paths in ([f"{tmp_path}/{i}" for i in range(4)], [f"{tmp_path}/*.bin"], [f"{tmp_path}/*"]):
        assert stream(build(*paths).train) == wanted
    mixed = [f"{tmp_path}/3.idx", f"{tmp_path}/0.bin", f"{tmp_path}/[0-2]"]
    assert stream(build(*mixed).train) == [*parts[3], *parts[0], *parts[1]]


def test_places_in_any_order_are_found_across_maps() -> None:
    arrays = [np.arange(5, dtype=np.uint16), np.empty(0, np.int32), np.arange(5, 12, dtype=np.int64)]
    maps = Maps(arrays, ["a", "b", "c"], 12)
    places = np.random.default_rng(0).integers(0, 12, 50)
    assert len(maps) == 12 and np.array_equal(maps[places], places)
    assert maps[np.empty(0, np.int64)].shape == (0,)


def test_documents_of_several_sequences_and_empty_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "LONGEST", 3)
    wanted = [[1, 2, 3, 4, 5, 6, 7, END], [], [8, END], [], [*range(30), END], []]
    assert stream(build(put(tmp_path / "x", wanted)).train) == [document for document in wanted if document]


@pytest.mark.parametrize("close", [True, False])
def test_labels_stop_where_documents_end(tmp_path: Path, close: bool) -> None:
    documents = some(4, 40, close)
    documents[7] = [5, END, 6, *[END] * close]  # an end token inside is like any other
    built = build(put(tmp_path / "x", documents), sequence_length=11)
    rows = [built.train.row(n) for n in np.argsort([built.train.place(n) for n in range(len(built.train))])]  # type: ignore[attr-defined]
    labels = np.concatenate([row.labels for row in rows]).tolist()
    wanted = [label for document in documents for label in [*document[1:], IGNORE]]
    assert labels[: len(wanted)] == wanted and set(labels[len(wanted) :]) <= {IGNORE}
    said = " ".join(built.notes)
    assert ("documents close with the end token 256" in said) == close
    assert ("40 of 40 documents looked at do not close with" in said) != close


@pytest.mark.parametrize("share", [0.0, 1e-9, 0.3, 0.999999])
def test_the_held_out_share_is_a_fixed_choice_of_each_file(tmp_path: Path, share: float) -> None:
    first, second = some(5, 60), some(6, 30)
    paths = put(tmp_path / "a", first), put(tmp_path / "b", second)
    built = build(*paths, held_out=share)
    train, held_out = stream(built.train), stream(built.held_out)
    assert sorted(train + held_out) == sorted(first + second) and bool(held_out) == (share > 0) and train
    if share == 0.3:
        assert 15 <= len(held_out) <= 40
        alone = stream(build(paths[0], held_out=share).held_out)
        assert alone == held_out[: len(alone)]  # another file beside it changes nothing


def test_masked_tokens_are_masked_when_held_out(tmp_path: Path) -> None:
    built = build(put(tmp_path / "x", some(1, 40)), held_out=0.3, objective=Masked())
    for rows in (built.train, built.held_out):
        assert all((rows.row(number).tokens == 257).any() for number in range(len(rows)))


def test_the_fingerprint_knows_contents_and_not_places(tmp_path: Path) -> None:
    documents = some(7, 50)
    a, b = put(tmp_path / "a", documents), put(tmp_path / "b", some(8, 5))
    first = build(a, b)
    (tmp_path / "moved").mkdir()
    for name in ("a.bin", "a.idx", "b.bin", "b.idx"):
        shutil.copy(tmp_path / name, tmp_path / "moved")
    assert build(f"{tmp_path}/moved/a", f"{tmp_path}/moved/b", seed=5).fingerprint == first.fingerprint
    documents[20][0] ^= 1  # same bounds, one token of many
    other = put(tmp_path / "c", documents)
    assert (tmp_path / "c.idx").read_bytes() == (tmp_path / "a.idx").read_bytes()
    prints = [first, build(b, a), build(a), build(a, b, held_out=0.1), build(other, b)]
    assert len({corpus.fingerprint for corpus in prints}) == 5


def test_large_files_are_sampled_end_to_end() -> None:
    tokens = np.zeros(10_000_000, np.uint16)
    sample = Maps([tokens], ["x"], END).sample()
    assert len(sample) < 2 << 20
    for place in (0, 2047, len(tokens) - 1):
        changed = tokens.copy()
        changed[place] = 1
        assert Maps([changed], ["x"], END).sample() != sample


def test_tokens_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x.bin: token 257 at place 2 is outside the tokenizer's 257; set data.token"):
        build(put(tmp_path / "x", [[1, END], [257, END]]))
    with pytest.raises(ValueError, match=r"y.bin: token -1 at place 0 is outside"):
        build(put(tmp_path / "y", [[-1, END]], "<i4"))
    tokens = np.zeros(10_000_000, np.uint16)
    tokens[1_234_567] = 300  # between the blocks that are looked at
    maps = Maps([np.zeros(10, np.uint16), tokens], ["a.bin", "b.bin"], 257)
    maps.sample()
    with pytest.raises(ValueError, match=r"b.bin: token 300 at place 1234567 is outside the tokenizer's 257"):
        maps[np.arange(1_234_500, 1_234_600)]


def test_a_sidecar_holds_the_tokenizer_to_its_word(tmp_path: Path) -> None:
    prefix = put(tmp_path / "x", some(9, 5))
    (tmp_path / "x.json").write_text(json.dumps({"tokenizer": "bytes", "end": 256}))
    Tokens(paths=(prefix,), sequence_length=8, tokenizer="bytes").find()
    (tmp_path / "x.json").write_text(json.dumps({"tokenizer": "json-abc-0", "end": 0}))
    with pytest.raises(ValueError, match=r"data.tokenizer=bytes: is bytes, and .*/x was written by json-abc-0; name"):
        Tokens(paths=(prefix,), sequence_length=8, tokenizer="bytes").find()
    for content in ("{", "[]", "{}", "5"):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(ValueError, match=r"x.json: cannot be read as what launch data build writes .*; remove it"):
            build(prefix)


def test_paths_that_lead_nowhere_say_so(tmp_path: Path) -> None:
    put(tmp_path / "x", some(1, 2))
    faults = {"y": "leads to no .bin", "*.idy": "leads to no .bin", ".": "is a folder"}
    for path, fault in ((f"{tmp_path}/{name}", fault) for name, fault in faults.items()):
        with pytest.raises(ValueError, match=rf"data.paths\[1\]='.*': {fault}.*; name a prefix, its .bin, or a glob"):
            build(f"{tmp_path}/x", path)
    (tmp_path / "x.bin").unlink()
    with pytest.raises(ValueError, match=r"x.bin: no such file"):
        build(f"{tmp_path}/x")
    with pytest.raises(ValueError, match=r"data.paths=.*: no token in 1 datasets; name others"):
        build(put(tmp_path / "empty", [[], []]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"paths": ()}, r"^paths=\(\): no data"),
        ({"paths": ("a", "")}, r"^paths=\('a', ''\): .*empty path"),
        ({"sequence_length": 0}, r"^sequence_length=0: "),
        ({"held_out": 1.0}, r"^held_out=1.0: "),
    ],
)
def test_impossible_configs_say_why(fields: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"paths": ("a",), "sequence_length": 8, "tokenizer": "bytes"}
    with pytest.raises(ValueError, match=message):
        Tokens(**(given | fields))
