"""The same contents give the same corpus, whatever the files are called, and whatever befalls them or the cache."""

import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from farspan.parallel.context.shard import Batch
from farspan.platform.data import Data, Text, documents, store
from farspan.platform.data.corpus import Corpus
from farspan.platform.data.row import Rows, collate
from farspan.platform.data.tokenizer import Bytes, open_tokenizer, train_bpe
from streams import stream

END = 256


def write(folder: Path, contents: dict[str, bytes]) -> Path:
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def scribble(seed: int, documents: int, longest: int) -> dict[str, bytes]:
    """Random non-empty documents of one- to four-byte characters, each told apart by its number."""
    draw = random.Random(seed)
    texts = ("".join(draw.choices("ab \né漢🙂", k=draw.randrange(longest))) for _ in range(documents))
    return {f"{i % 3}/{i}.txt": f"{i}{content}".encode() for i, content in enumerate(texts)}


def build(root: Path, cache: Path, **fields: Any) -> Corpus:
    given: dict[str, Any] = {"paths": (str(root),), "sequence_length": 16, "held_out": 0.0, "cache": str(cache)}
    return Text(**(given | fields)).build(seed=0)


def epoch_rows(rows: Rows) -> Batch:
    return collate([rows.row(number) for number in range(len(rows))], END)


def texts(rows: Rows) -> set[str]:
    """The documents of rows, each closed by one end token."""
    found = stream(rows)
    assert all(document[-1] == END and END not in document[:-1] for document in found)
    assert len({tuple(document) for document in found}) == len(found)
    return {Bytes().decode(document) for document in found}


@pytest.mark.parametrize("share", [0.0, 1e-9, 0.3, 0.999999])
def test_held_out_and_training_documents_are_disjoint(tmp_path: Path, share: float) -> None:
    contents = scribble(5, documents=40, longest=20)
    built = build(write(tmp_path / "in", contents), tmp_path / "cache", held_out=share)
    train, held_out = texts(built.train), texts(built.held_out)
    assert not train & held_out
    assert train | held_out == {content.decode() for content in contents.values()}
    assert train and bool(held_out) == (share > 0)
    if share == 0.3:
        assert 4 <= len(held_out) <= 20


def test_one_document_is_never_held_out(tmp_path: Path) -> None:
    built = build(write(tmp_path / "in", {"a.txt": b"alone"}), tmp_path / "cache", held_out=0.9)
    assert texts(built.train) == {"alone"} and len(built.held_out) == 0


def test_a_moved_corpus_is_the_same(tmp_path: Path) -> None:
    contents = scribble(1, documents=20, longest=30)
    here = write(tmp_path / "here", contents)
    there = write(tmp_path / "there", {f"deep/{hash(name)}.md": content for name, content in contents.items()})
    first, second = (build(root, tmp_path / "cache", held_out=0.2) for root in (here, there))
    assert first.fingerprint == second.fingerprint
    for one, other in ((first.train, second.train), (first.held_out, second.held_out)):
        assert torch.equal(epoch_rows(one).tokens, epoch_rows(other).tokens)
    assert build(here, tmp_path / "cache", held_out=0.3).fingerprint != first.fingerprint
    write(here, {"0/0.txt": b"changed"})
    assert build(here, tmp_path / "cache", held_out=0.2).fingerprint != first.fingerprint


def test_which_files_are_taken(tmp_path: Path) -> None:
    root = write(tmp_path / "in", {"a.txt": b"a", "sub/b.py": b"b", "c.bin": b"c", "d.log": b"d", "sub/e.log": b"e"})

    def taken(*paths: str, **fields: Any) -> set[str]:
        return texts(build(root, tmp_path / "cache", paths=paths, **fields).train)

    assert taken(str(root)) == {"a", "b"}
    assert taken(str(root), suffixes=(".bin", ".txt")) == {"a", "c"}
    assert taken(f"{root}/c.bin", f"{root}/sub") == {"b", "c"}
    assert taken(f"{root}/*.log") == {"d"}
    assert taken(f"{root}/**/*.log") == {"d", "e"}
    assert taken(f"{root}/a.txt", f"{root}/../in/a.txt", str(root)) == {"a", "b"}


def test_home_and_default_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "home/corpus", {"a.txt": b"at home"})
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    config = Text(paths=("~/corpus",), sequence_length=4)
    assert texts(config.build(0).train) == {"at home"}
    assert list((tmp_path / "home/.cache/farspan").glob("*.tokens"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    config.build(0)
    assert list((tmp_path / "xdg/farspan").glob("*.tokens"))


def test_the_standard_library_is_a_corpus(tmp_path: Path) -> None:
    config: Data = Text(paths=("python-stdlib",), sequence_length=512, cache=str(tmp_path))
    built = config.build(0)
    assert len(built.train) > 10_000 and len(built.held_out) > 10
    assert not any("site-packages" in note or "__pycache__" in note for note in built.notes)
    again = config.build(0)
    assert "reused" in again.notes[-1] and again.fingerprint == built.fingerprint


# Bad input


def bad_files(root: Path) -> dict[str, str]:
    """A folder with one file of each fault: name → what is said about it."""
    write(root, {"good.txt": b"good", "empty.txt": b"", "mark.txt": b"\xef\xbb\xbf", "latin.txt": b"caf\xe9 au lait"})
    write(root, {"cut.txt": "cut é".encode()[:-1]})
    (root / "gone.txt").symlink_to(root / "nowhere")
    (root / "broken.txt").symlink_to("/proc/self/mem")  # opens, and cannot be read, even by root
    os.mkfifo(root / "pipe.txt")
    return {
        "empty.txt": "empty",
        "mark.txt": "empty",
        "latin.txt": "not UTF-8",
        "cut.txt": "not UTF-8",
        "gone.txt": "unreadable",
        "broken.txt": "unreadable",
        "pipe.txt": "not a regular file",
    }


needs_proc = pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux's /proc")


@needs_proc
def test_bad_files_are_left_out_by_name(tmp_path: Path) -> None:
    faults = bad_files(tmp_path / "in")
    for _ in ("built", "from the cache"):
        built = build(tmp_path / "in", tmp_path / "cache")
        assert texts(built.train) == {"good"}
        for name, reason in faults.items():
            count = list(faults.values()).count(reason)
            assert any(f"{count} {reason}:" in note and name in note for note in built.notes), (name, built.notes)
    assert "reused" in built.notes[-1]


@needs_proc
@pytest.mark.parametrize("name", ["empty", "mark", "latin", "cut", "gone", "broken", "pipe"])
def test_a_bad_file_stops_where_asked(tmp_path: Path, name: str) -> None:
    name += ".txt"
    faults = bad_files(tmp_path / "in")
    for other in faults.keys() - {name}:
        (tmp_path / "in" / other).unlink()
    with pytest.raises(ValueError, match=f"{name} is {faults[name]}; .*bad_files=skip"):
        build(tmp_path / "in", tmp_path / "cache", bad_files="stop")
    (tmp_path / "in" / name).unlink()
    assert texts(build(tmp_path / "in", tmp_path / "cache", bad_files="stop").train) == {"good"}


def test_duplicates_are_kept_once_and_never_stop(tmp_path: Path) -> None:
    root = write(tmp_path / "in", {f"{i}.txt": b"the same" for i in range(6)} | {"other.txt": b"other"})
    built = build(root, tmp_path / "cache", bad_files="stop")
    assert texts(built.train) == {"the same", "other"}
    assert any("5 duplicate: " in note and "and 2 more" in note for note in built.notes)


def test_pieces_of_files_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PIECE", 5)
    contents = {"marked.txt": b"\xef\xbb\xbf" + "été 漢字🙂".encode(), "bad.txt": b"long enough \xff", "z.txt": b"last"}
    root = write(tmp_path / "in", contents)
    assert texts(build(root, tmp_path / "cache").train) == {"été 漢字🙂", "last"}


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PIECE", 1 << 18)
    root = write(tmp_path / "in", {"large.txt": b"sixteen letters " * (1 << 20)})
    tracemalloc.start()
    try:
        build(root, tmp_path / "cache")
        assert tracemalloc.get_traced_memory()[1] < 4 << 20  # of 16 MiB, and 32 of tokens
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"paths": ()}, r"^paths=\(\): .*python-stdlib"),
        ({"paths": ("a", "")}, r"^paths\[1\]='': .*name a file"),
        ({"sequence_length": 0}, r"^sequence_length=0: must be at least 1; "),
        ({"separator": ""}, r"^separator='': .*null"),
        ({"field": ""}, r"^field='': .*column"),
        ({"held_out": 1.0}, r"^held_out=1.0: .*\[0, 1\); "),
        ({"held_out": -0.1}, r"^held_out=-0.1: "),
        ({"held_out": float("nan")}, r"^held_out=nan: "),
    ],
)
def test_impossible_configs_say_why(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        given: dict[str, Any] = {"paths": ("a",), "sequence_length": 8} | fields
        Text(**given)


def test_missing_paths_and_empty_folders_say_what_was_searched(tmp_path: Path) -> None:
    root = write(tmp_path / "in", {"a.txt": b"", "b.bin": b"b"})
    with pytest.raises(ValueError, match=r"data.paths\[1\]='.*/nowhere': no such file or folder.*; mend"):
        build(root, tmp_path / "cache", paths=(str(root), f"{root}/nowhere"))
    with pytest.raises(ValueError, match=r"data.paths\[0\]='.*': matches no file"):
        build(root, tmp_path / "cache", paths=(f"{root}/*.rst",))
    with pytest.raises(ValueError, match=r"data.paths=.*no document in 1 files.*\.txt.*1 empty.*a\.txt; .*suffixes"):
        build(root, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.tokens"))
    (tmp_path / "blocked").write_text("a file")
    with pytest.raises(ValueError, match=r"data.cache='.*blocked.*: cannot keep .*; set data.cache"):
        build(root, tmp_path / "blocked", suffixes=(".bin",))


# Formats and tokenizers


def test_the_same_documents_in_any_format_are_the_same_corpus(tmp_path: Path) -> None:
    wanted = [content.decode() for content in scribble(7, documents=30, longest=60).values()]
    lines = "".join(json.dumps({"body": {"text": text}}) + "\n" for text in [*wanted, *wanted[:5]]).encode()
    write(tmp_path / "one", {f"{i}.txt": text.encode() for i, text in enumerate(wanted)})
    write(tmp_path / "two", {"a.jsonl": lines})
    write(tmp_path / "three", {"a.txt": "<|cut|>".join(reversed(wanted)).encode()})
    write(tmp_path / "four", {"a.jsonl.gz": gzip.compress(lines[: len(lines) // 2]), "b.jsonl": lines})
    fields: dict[str, Any] = {"field": "body.text", "separator": "<|cut|>", "held_out": 0.2}
    built = [build(tmp_path / name, tmp_path / "cache", **fields) for name in ("one", "two", "three", "four")]
    assert len({corpus.fingerprint for corpus in built}) == 1
    for corpus in built:
        assert texts(corpus.train) | texts(corpus.held_out) == set(wanted)
        assert torch.equal(epoch_rows(corpus.train).tokens, epoch_rows(built[0].train).tokens)
    assert any("left out 5 duplicate: " in note and "a.jsonl:31" in note for note in built[1].notes)
    assert any("1 not JSON: " in note and "a.jsonl.gz:" in note for note in built[3].notes)
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz:\d+ is not JSON; mend .*bad_files=skip"):
        build(tmp_path / "four", tmp_path / "cache", **fields, bad_files="stop")


def learn(path: Path, vocabulary: int = 300) -> Path:
    train_bpe(iter(["the same words, the same merges, été and 漢字 again and again "] * 3), vocabulary, ["<|x|>"], path)
    return path


def test_a_tokenizer_reads_documents_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = open_tokenizer(str(learn(tmp_path / "tokenizer.json")), None)
    contents = [f"{i} the same {'été 漢字 ' * i}and again" for i in range(40)]
    root = write(tmp_path / "in", {f"{i:02}.txt": text.encode() for i, text in enumerate([*contents, contents[3]])})
    wanted = {(*tokenizer.encode(text).tolist(), tokenizer.end) for text in contents}
    monkeypatch.setattr(documents, "PIECE", 7)
    for batch in (1, 100, 1 << 20):
        monkeypatch.setattr(store, "BATCH", batch)
        built = build(root, tmp_path / f"cache{batch}", tokenizer=str(tmp_path / "tokenizer.json"))
        assert sorted(map(tuple, stream(built.train))) == sorted(wanted)
        assert any("left out 1 duplicate: " in note and "40.txt" in note for note in built.notes)
    assert built.tokenizer.name == tokenizer.name


def test_a_document_that_a_tokenizer_leaves_nothing_of_is_left_out(tmp_path: Path) -> None:
    path = learn(tmp_path / "tokenizer.json")
    strip = {"type": "Strip", "strip_left": True, "strip_right": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": strip}))
    root = write(tmp_path / "in", {"a.txt": b" \n ", "b.txt": b"again", "c.txt": b" "})
    built = build(root, tmp_path / "cache", tokenizer=str(path))
    assert len(stream(built.train)) == 1
    assert any("left out 2 without a single token: " in note and "a.txt" in note for note in built.notes)
    with pytest.raises(ValueError, match=r"a\.txt is without a single token; mend"):
        build(root, tmp_path / "cache", tokenizer=str(path), bad_files="stop")


def test_the_tokenizer_is_part_of_the_identity(tmp_path: Path) -> None:
    root = write(tmp_path / "in", scribble(4, documents=10, longest=30))
    path = learn(tmp_path / "tokenizer.json")
    first = build(root, tmp_path / "cache", tokenizer=str(path))
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.copy(path, tmp_path / "elsewhere/tokenizer.json")
    again = build(root, tmp_path / "cache", tokenizer=str(tmp_path / "elsewhere"))
    assert (again.fingerprint, again.tokenizer.name) == (first.fingerprint, first.tokenizer.name)
    assert "reused" in again.notes[-1]
    other_end = build(root, tmp_path / "cache", tokenizer=str(moved), end="<|x|>")
    learn(path, 290)
    retrained = build(root, tmp_path / "cache", tokenizer=str(path))
    plain = build(root, tmp_path / "cache")
    different = (first, other_end, retrained, plain)
    assert len({corpus.fingerprint for corpus in different}) == 4
    assert len({corpus.tokenizer.name for corpus in different}) == 4
    assert "reused" not in "".join(corpus.notes[-1] for corpus in different[1:])


def test_a_vocabulary_beyond_16_bits(tmp_path: Path) -> None:
    words = {f"w{i}": i for i in range(1 << 16)} | {"</s>": 1 << 16, "[UNK]": (1 << 16) + 1}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model, "pre_tokenizer": {"type": "Whitespace"}}))
    write(tmp_path / "in", {"a.txt": b"w65535 w1 other", "b.txt": b"w65534"})
    for _ in ("built", "from the cache"):
        built = build(tmp_path / "in", tmp_path / "cache", tokenizer=str(tmp_path))
        assert sorted(stream(built.train)) == [[65534, 65536], [65535, 1, 65537, 65536]]
    assert built.tokenizer.vocabulary == 65538


def test_impossible_tokenizers_say_why(tmp_path: Path) -> None:
    root = write(tmp_path / "in", {"a.txt": b"a"})
    with pytest.raises(ValueError, match=r"data.tokenizer='.*/nowhere': no tokenizer at .*; name bytes, "):
        Text(paths=(str(root),), sequence_length=4, tokenizer=f"{root}/nowhere").find()
    with pytest.raises(ValueError, match=r"data.end='<eos>': bytes end .*; leave data.end out"):
        Text(paths=(str(root),), sequence_length=4, end="<eos>").find()


# The cache


BUILDER = """
import os, signal, sys, time
from pathlib import Path
from farspan.platform.data import Text, text
finish = text.finish
def slowly(*arguments):
    with open(f"{cache}/built", "a") as log: print(os.getpid(), file=log, flush=True)
    if what == "die": os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.5)
    finish(*arguments)
root, cache, what = sys.argv[1:]
text.finish = slowly
print("ready", flush=True)
sys.stdin.readline()
print(Text(paths=(root,), sequence_length=16, held_out=0.0, cache=cache).build(0).fingerprint)
"""


def start_builder(root: Path, cache: Path, what: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", BUILDER, str(root), str(cache), what]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_ranks_build_once_and_a_kill_leaves_no_broken_cache(tmp_path: Path) -> None:
    root, cache = write(tmp_path / "in", scribble(2, documents=10, longest=30)), tmp_path / "cache"
    cache.mkdir()
    killed, *ranks = [start_builder(root, cache, what) for what in ("die", "build", "build")]
    for process in (killed, *ranks):
        assert process.stdout and process.stdout.readline() == "ready\n"
    killed.communicate("go\n", timeout=30)
    assert list(cache.glob("*.partial")) and not list(cache.glob("*.tokens"))
    for process in ranks:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    fingerprints = {process.communicate(timeout=30)[0] for process in ranks}
    built = build(root, cache)
    assert fingerprints == {f"{built.fingerprint}\n"}
    assert "reused" in built.notes[-1]
    assert len((cache / "built").read_text().split()) == 2  # the killed one, and one of the two ranks
    assert not list(cache.glob("*.partial"))


def spoil(path: Path, how: str) -> None:
    content = path.read_bytes()
    spoilt = {
        "empty": b"",
        "cut": content[:-7],
        "longer": content + b"\0",
        "head lost": content[2:],
        "index": content[:-100] + bytes([content[-100] ^ 1]) + content[-99:],  # in the last document's hash
    }
    path.unlink()  # those who have mapped the good file keep it
    path.write_bytes(spoilt[how])


@pytest.mark.parametrize("how", ["empty", "cut", "longer", "head lost", "index"])
def test_a_broken_cache_is_rebuilt(tmp_path: Path, how: str) -> None:
    root, cache = write(tmp_path / "in", scribble(3, documents=5, longest=30)), tmp_path / "cache"
    built = build(root, cache)
    [kept] = cache.glob("*.tokens")
    good = kept.read_bytes()
    spoil(kept, how)
    again = build(root, cache)
    assert "was broken" in again.notes[-1] and again.fingerprint == built.fingerprint
    assert kept.read_bytes() == good
    assert torch.equal(epoch_rows(again.train).tokens, epoch_rows(built.train).tokens)


def test_the_cache_follows_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, cache = write(tmp_path / "in", {"a.txt": b"one", "b.txt": b"two"}), tmp_path / "cache"
    assert texts(build(root, cache).train) == {"one", "two"}
    write(root, {"a.txt": b"1st"})
    os.utime(root / "a.txt", ns=(1, 1))
    assert texts(build(root, cache).train) == {"1st", "two"}

    blocks = documents._blocks

    def forbidden(path: str) -> Iterator[bytes]:
        if path.endswith("c.txt"):
            raise documents._Damage("unreadable")
        return blocks(path)

    write(root, {"c.txt": b"three"})
    monkeypatch.setattr(documents, "_blocks", forbidden)
    assert texts(build(root, cache).train) == {"1st", "two"}
    monkeypatch.undo()  # nothing in size or mtime tells that it became readable
    again = build(root, cache)
    assert texts(again.train) == {"1st", "two", "three"} and "can be read now" in again.notes[-1]
    shutil.rmtree(cache)
    assert build(root, cache).fingerprint == again.fingerprint
