"""The same contents give the same corpus, whatever the files are called, and whatever befalls them or the cache."""

import os
import random
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from farspan.parallel.context.shard import Batch
from farspan.platform.data import Data, Text, text
from farspan.platform.data.pack import Rows
from farspan.platform.data.text import Corpus
from farspan.platform.data.tokenizer import Bytes

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
    return rows.batch(range(len(rows)))


def texts(rows: Rows) -> set[str]:
    """The documents of rows in order, by their end tokens."""
    if not len(rows):
        return set()
    order = np.argsort([rows._row(n) for n in range(len(rows))])
    tokens = epoch_rows(rows).tokens[torch.from_numpy(order)].flatten().numpy()
    pieces = np.split(tokens, np.flatnonzero(tokens == END) + 1)
    return {Bytes().decode(piece) for piece in pieces} - {""}


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
    monkeypatch.setattr(text, "PIECE", 5)
    contents = {"marked.txt": b"\xef\xbb\xbf" + "été 漢字🙂".encode(), "bad.txt": b"long enough \xff", "z.txt": b"last"}
    root = write(tmp_path / "in", contents)
    assert texts(build(root, tmp_path / "cache").train) == {"été 漢字🙂", "last"}


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "PIECE", 1 << 18)
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

    pieces = text._pieces

    def forbidden(path: str) -> Iterator[str]:
        if path.endswith("c.txt"):
            raise text._NoDocument("unreadable")
        return pieces(path)

    write(root, {"c.txt": b"three"})
    monkeypatch.setattr(text, "_pieces", forbidden)
    assert texts(build(root, cache).train) == {"1st", "two"}
    monkeypatch.undo()  # nothing in size or mtime tells that it became readable
    again = build(root, cache)
    assert texts(again.train) == {"1st", "two", "three"} and "can be read now" in again.notes[-1]
    shutil.rmtree(cache)
    assert build(root, cache).fingerprint == again.fingerprint
