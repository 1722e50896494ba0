"""`launch data`: turns files into what training reads without delay."""

import argparse
import json
import signal
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from farspan.launch import survey
from farspan.launch.exit import Exit

if TYPE_CHECKING:  # torch takes a second to import: help does without
    from farspan.platform.data.store import Tape
    from farspan.platform.data.text import Text
    from farspan.platform.data.tokenizer import Tokenizer


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `data` and what belongs to it."""
    data = commands.add_parser("data", help="tokenize files, learn a tokenizer, look at what is configured")
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_build(actions)
    _add_tokenizer(actions)
    survey.add(actions)


def _add_build(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    build = actions.add_parser(
        "build",
        help="tokenize files into Megatron's .bin and .idx",
        description="Write PREFIX.bin, PREFIX.idx and PREFIX.json: the documents and tokens that kind: text would "
        "train on, for kind: tokens or for Megatron.",
    )
    build.add_argument("--out", required=True, metavar="PREFIX", help="what to write; no file is ever replaced")
    build.add_argument("--tokenizer", default="bytes", help="bytes, a tokenizer.json or its folder; default: bytes")
    build.add_argument("--end", metavar="NAME", help="the token that ends a document; default: a known name")
    build.add_argument(
        "--append-end", action=argparse.BooleanOptionalAction, default=True, help="close each document with that token"
    )
    _add_sources(build)
    build.set_defaults(run=_build)


def _add_tokenizer(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    tokenizer = actions.add_parser(
        "tokenizer",
        help="learn a byte-level BPE tokenizer.json",
        description="Learn a byte-level BPE from files; it ends documents with <|endoftext|>.",
    )
    tokenizer.add_argument("--vocabulary", required=True, type=int, metavar="N", help="tokens, special ones included")
    tokenizer.add_argument("--out", required=True, type=Path, metavar="FILE", help="the tokenizer.json to write")
    tokenizer.add_argument(
        "--special", action="append", default=[], metavar="NAME", help="one more special token; may be repeated"
    )
    _add_sources(tokenizer)
    tokenizer.set_defaults(run=_tokenizer)


def _add_sources(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="PATH", help="files, folders, globs, or python-stdlib")
    parser.add_argument("--field", default="text", help="where .jsonl and .parquet hold the text; default: text")
    parser.add_argument("--separator", metavar="S", help="what lies between the documents of a text file")


def _text(parsed: argparse.Namespace, *, tokenizer: str = "bytes", end: str | None = None) -> "Text":
    from farspan.platform.data.text import Text

    return Text(
        paths=tuple(parsed.paths),
        sequence_length=1,  # rows are cut when training starts
        tokenizer=tokenizer,
        end=end,
        field=parsed.field,
        separator=parsed.separator,
    )


def _build(parsed: argparse.Namespace) -> int:
    from farspan.platform.data import documents, index
    from farspan.platform.data.store import Tape
    from farspan.platform.data.tokenizer import open_tokenizer

    started = time.monotonic()
    text = _text(parsed, tokenizer=parsed.tokenizer, end=parsed.end)
    tokenizer = open_tokenizer(parsed.tokenizer, parsed.end)
    listing = documents.find(text.paths, text.suffixes)
    prefix = parsed.out.removesuffix(".bin").removesuffix(".idx")
    if not Path(prefix).name or prefix.endswith("/") or Path(prefix).is_dir():
        raise ValueError(
            f"--out {parsed.out}: is a folder; name a prefix in it, such as {parsed.out.rstrip('/')}/train"
        )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is unfinished goes away, as with Ctrl-C
    if (sidecar := Path(f"{prefix}.json")).exists():
        raise ValueError(f"--out {parsed.out}: {sidecar} exists; remove it or name another prefix")
    try:
        sidecar.parent.mkdir(parents=True, exist_ok=True)
        with index.create(prefix, index.token_type(tokenizer.vocabulary)) as (file, lengths):
            tape = Tape(file, tokenizer, close=parsed.append_end)
            tape.fill(text.parts(listing))
            if not tape.hashes:
                raise text.nothing(len(listing.files), tape.left_out)
            lengths.frombytes(tape.lengths().tobytes())
        _describe(sidecar, tokenizer, tape)
    except OSError as error:
        raise _unwritable(parsed.out, error) from error
    seconds = time.monotonic() - started
    for line in tape.left_out.lines():
        print(line)
    tokens = tape.offsets[-1]
    end = f"end: {json.dumps(parsed.end)}, " if parsed.end else ""
    print(
        f"{len(tape.hashes):,} documents, {tokens:,} tokens, {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s\n"
        f"data: {{kind: tokens, paths: [{prefix}], tokenizer: {parsed.tokenizer}, {end}sequence_length: …}}"
    )
    return int(Exit.DONE)


def _describe(path: Path, tokenizer: "Tokenizer", tape: "Tape") -> None:
    """The sidecar, by which training knows what wrote the tokens."""
    content = {
        "tokenizer": tokenizer.name,
        "end": tokenizer.end,
        "documents": len(tape.hashes),
        "tokens": tape.offsets[-1],
        "farspan": version("farspan"),
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def _tokenizer(parsed: argparse.Namespace) -> int:
    from farspan.platform.data import documents
    from farspan.platform.data.documents import LeftOut, Part
    from farspan.platform.data.tokenizer import train_bpe

    started = time.monotonic()
    if parsed.out.exists():
        raise ValueError(f"--out {parsed.out}: exists; remove it or name another file")
    text = _text(parsed)
    listing = documents.find(text.paths, text.suffixes)
    left_out = LeftOut()

    def texts() -> Iterator[str]:
        for part in text.parts(listing):
            if isinstance(part, Part):
                yield part.text
            else:
                left_out.note(*part)

    try:
        parsed.out.parent.mkdir(parents=True, exist_ok=True)
        vocabulary = train_bpe(texts(), parsed.vocabulary, parsed.special, parsed.out)
    except OSError as error:
        raise _unwritable(parsed.out, error) from error
    for line in left_out.lines():
        print(line)
    fewer = f", fewer than {parsed.vocabulary:,}: the texts hold no more" if vocabulary < parsed.vocabulary else ""
    print(f"{vocabulary:,} tokens learnt{fewer}, in {time.monotonic() - started:.1f} s: {parsed.out}")
    return int(Exit.DONE)


def _unwritable(out: str | Path, error: OSError) -> ValueError:
    return ValueError(f"--out {out}: cannot be written ({error}); name a place in a folder that exists and has room")
