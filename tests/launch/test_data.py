"""`launch data` writes what training on the same text would have read, or nothing at all."""

import json
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from farspan.launch import cli
from farspan.launch.exit import Exit
from farspan.platform import config
from farspan.platform.config import Source
from farspan.platform.data import Data, Text, Tokens, index
from farspan.platform.data.tokenizer import open_tokenizer
from streams import stream


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Documents in several formats, some of them twice, some broken."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(12):
        (folder / f"{i}.txt").write_text(f"document {i}\r\n" + "été 漢字 🙂 the words " * i)
    (folder / "again.md").write_bytes((folder / "3.txt").read_bytes())
    (folder / "bad.txt").write_bytes(b"caf\xe9")
    lines = [{"text": f"line {i} the words"} for i in range(30)] + [{"text": "line 3 the words"}, {"text": None}]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def learn(texts: Path) -> Path:
    out = texts.parent / "tokenizer.json"
    arguments = ["--vocabulary", "300", "--special", "<|mask|>", "--special", "<|fim_prefix|>", "--out", str(out)]
    assert cli.main(["data", "tokenizer", *arguments, str(texts)]) == Exit.DONE
    return out


def documents(corpus: Any) -> Counter[tuple[int, ...]]:
    """Every document of both sides, as tokens."""
    found: Counter[tuple[int, ...]] = Counter()
    for rows in (corpus.train, corpus.held_out):
        found.update(map(tuple, stream(rows)))
    return found


@pytest.mark.parametrize("kind", ["bytes", "json"])
def test_tokens_and_text_hold_the_same_documents(texts: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    tokenizer = "bytes" if kind == "bytes" else str(learn(texts))
    prefix = f"{texts.parent}/out"
    assert cli.main(["data", "build", "--out", prefix, "--tokenizer", tokenizer, str(texts)]) == Exit.DONE
    said = capsys.readouterr().out
    fields: dict[str, Any] = {"sequence_length": 16, "tokenizer": tokenizer, "held_out": 0.2}
    text = Text(paths=(str(texts),), cache=f"{texts.parent}/cache", **fields).build(0)
    tokens = Tokens(paths=(prefix,), **fields).build(0)
    assert documents(tokens) == documents(text)
    assert len(documents(text)) == 42 and set(documents(text).values()) == {1}
    total = sum(map(len, documents(text)))
    assert f"42 documents, {total:,} tokens, " in said and "tokens/s" in said
    for note in text.notes:
        assert "left out" not in note or note in said
    assert "left out 2 duplicate: " in said and "left out 1 not UTF-8: " in said and "a.jsonl:32" in said
    # Not only the same documents: the .bin is the cache without its index.
    [kept] = (texts.parent / "cache").glob("*.tokens")
    assert kept.read_bytes().startswith(Path(f"{prefix}.bin").read_bytes())
    sidecar = json.loads(Path(f"{prefix}.json").read_text())
    assert sidecar.pop("farspan") and sidecar == {
        "tokenizer": text.tokenizer.name,
        "end": text.tokenizer.end,
        "documents": 42,
        "tokens": total,
    }


def test_documents_may_stay_open(texts: Path) -> None:
    closed, opened = (f"{texts.parent}/{name}" for name in ("closed", "open"))
    for prefix, option in ((closed, "--append-end"), (opened, "--no-append-end")):
        assert cli.main(["data", "build", "--out", prefix, option, f"{texts}/*.txt"]) == Exit.DONE
    fields: dict[str, Any] = {"sequence_length": 16, "tokenizer": "bytes"}
    with_end, without = (documents(Tokens(paths=(prefix,), **fields).build(0)) for prefix in (closed, opened))
    assert Counter((*document, 256) for document in without.elements()) == with_end


def test_a_wide_vocabulary_is_written_in_32_bits(tmp_path: Path) -> None:
    words = {f"w{i}": i for i in range(1 << 16)} | {"</s>": 1 << 16}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "</s>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model, "pre_tokenizer": {"type": "Whitespace"}}))
    (tmp_path / "a.txt").write_text("w1;w65535|w2")
    arguments = ["--out", f"{tmp_path}/x.bin", "--tokenizer", str(tmp_path), "--separator", "|", f"{tmp_path}/a.txt"]
    assert cli.main(["data", "build", *arguments]) == Exit.DONE
    found = index.read(f"{tmp_path}/x")
    assert found.tokens.dtype == np.int32 and found.lengths.tolist() == [4, 2]
    assert found.tokens.tolist() == [1, 65536, 65535, 65536, 2, 65536]


def test_learnt_tokens(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = learn(texts)
    assert "300 tokens learnt" in capsys.readouterr().out
    tokenizer = open_tokenizer(str(out), None)
    assert [tokenizer.token(name) for name in ("<|endoftext|>", "<|mask|>", "<|fim_prefix|>")] == [0, 1, 2]
    assert len(tokenizer.encode("the words")) < 9


def test_mistakes_end_with_the_code_of_a_configuration(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = f"{texts.parent}/out"

    def fails(*arguments: str) -> str:
        assert cli.main(["data", *arguments]) == Exit.CONFIG
        return capsys.readouterr().err

    assert "nowhere" in fails("build", "--out", out, f"{texts}/nowhere")
    assert "no tokenizer at" in fails("build", "--out", out, "--tokenizer", "nowhere", str(texts))
    assert "data.end='<eos>'" in fails("build", "--out", out, "--end", "<eos>", str(texts))
    assert "no document in 1 files" in fails("build", "--out", out, "--field", "body", f"{texts}/a.jsonl")
    assert "cannot be written" in fails("build", "--out", "/proc/deep/x", str(texts))
    assert "cannot be written" in fails("tokenizer", "--out", "/proc/deep/x", "--vocabulary", "300", str(texts))
    assert "vocabulary=20" in fails("tokenizer", "--out", out, "--vocabulary", "20", str(texts))
    assert sorted(path.name for path in texts.parent.iterdir()) == ["texts"]
    for name in ("out.bin", "out.idx", "out.json"):
        (texts.parent / name).write_text("precious")
        assert f"{name} exists; remove it" in fails("build", "--out", out, str(texts))
        assert (texts.parent / name).read_text() == "precious"
        (texts.parent / name).unlink()
    Path(out).write_text("precious")
    assert "exists; remove it" in fails("tokenizer", "--out", out, "--vocabulary", "300", str(texts))
    assert Path(out).read_text() == "precious"


def test_help_does_without_torch() -> None:
    code = (
        "import sys\nfrom farspan.launch import cli\n"
        "try: cli.main(['data', 'build', '--help'])\n"
        "except SystemExit: print(sorted({'torch', 'numpy', 'pyarrow', 'tokenizers'} & set(sys.modules)))"
    )
    started = time.monotonic()
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.endswith("[]\n") and "PREFIX.idx" in said
    assert time.monotonic() - started < 10


@dataclass(frozen=True, kw_only=True)
class Holder:
    data: Data


def test_every_kind_decodes_and_knows_its_vocabulary(texts: Path) -> None:
    out = learn(texts)
    kinds: list[dict[str, Any]] = [
        {"kind": "text", "paths": [str(texts)], "sequence_length": 8, "tokenizer": "bytes"},
        {"kind": "text", "paths": [str(texts)], "sequence_length": 8, "tokenizer": str(out), "separator": "\n\n"},
        {"kind": "tokens", "paths": ["x"], "sequence_length": 8, "tokenizer": str(out), "end": "<|mask|>"},
    ]
    for data, wanted in zip(kinds, (257, 300, 300), strict=True):
        tree = {"data": data}
        assert config.decode(Source(tree=tree, raw=tree), Holder).data.vocabulary == wanted
