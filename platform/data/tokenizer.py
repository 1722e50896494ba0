"""Text becomes numbers: byte by byte, where nothing is learnt or out of vocabulary, or as a tokenizer.json says."""

import hashlib
import secrets
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

ENDS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|endofdocument|>",
    "<｜end▁of▁sentence｜>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<|im_end|>",
    "<|eot_id|>",
    "[SEP]",
)
"""Names under which tokenizers keep the end of a document; the first that a tokenizer knows is taken."""
Ids = NDArray[np.unsignedinteger]


@final
class Bytes:
    """The 256 bytes of UTF-8, and one token that ends a document."""

    name = "bytes"
    vocabulary = 257
    end = 256
    """The end of a document; `encode` never returns it."""
    piecewise = True
    """The tokens of a text are those of its pieces laid end to end, wherever it is cut: files may be read in pieces."""

    def encode(self, text: str) -> NDArray[np.uint16]:
        """The bytes of `text`, one token each, without the end token."""
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """The tokens of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        """The text of `ids`: end tokens vanish, and what is not UTF-8 shows as U+FFFD.

        ValueError: an id outside 0 … 256.
        """
        tokens = _inside(ids, self.vocabulary)
        return tokens[tokens != self.end].astype(np.uint8).tobytes().decode(errors="replace")

    def token(self, name: str) -> int | None:
        """None: bytes have no named tokens."""
        return None


@final
class Json:
    """A tokenizer.json of the tokenizers library. Nothing is added to a text, cut from it or padded.

    A special token written out in a text becomes that token, as in every program that reads such a file.
    `end` names the token that ends a document; None looks for one of `ENDS`. ValueError: not such a file, or no such
    token.
    """

    piecewise = False
    """A merge may cross any cut: a document is encoded whole."""

    def __init__(self, path: Path, end: str | None) -> None:
        from tokenizers import Tokenizer as Library  # bytes do without

        try:
            content = path.read_bytes()
            self._library: Any = Library.from_buffer(content)
        except Exception as error:  # the library raises its own kinds for a file that it cannot read
            raise ValueError(
                f"data.tokenizer={str(path)!r}: cannot be read as a tokenizer.json ({error}); name bytes, a "
                "tokenizer.json or a folder that holds one"
            ) from error
        self._library.no_truncation()
        self._library.no_padding()
        self.vocabulary: int = 1 + max(self._library.get_vocab(with_added_tokens=True).values(), default=-1)
        self.end = self._find(path, end)
        self.name = f"json-{hashlib.blake2b(content, digest_size=16).hexdigest()}-{self.end}"
        """The file's content and the end token, wherever it lies and whatever it is called."""

    def _find(self, path: Path, end: str | None) -> int:
        for name in ENDS if end is None else (end,):
            if (token := self.token(name)) is not None:
                return token
        special = [token.content for token in self._library.get_added_tokens_decoder().values()]
        known = ", ".join(special[:20]) + (", …" if len(special) > 20 else "") or "none"
        fault = f"has none of {', '.join(ENDS)}" if end is None else "has no such token"
        raise ValueError(
            f"data.end={end!r}: {path} {fault}; name the token that ends a document, its added tokens are: {known}"
        )

    def encode(self, text: str) -> Ids:
        """The tokens of `text`, without the end token. ValueError: the tokenizer has no token for some of it."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """The tokens of each text; the library's threads share the work."""
        try:
            encoded = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # again the library's own kinds
            raise ValueError(f"tokenizer {self.name}: cannot encode a text ({error}); take another") from error
        width = token_type(self.vocabulary)
        return [np.array(one.ids, dtype=width) for one in encoded]

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        """The text of `ids`: end tokens vanish, other special tokens show.

        ValueError: an id outside the vocabulary.
        """
        tokens = _inside(ids, self.vocabulary)
        return str(self._library.decode(tokens[tokens != self.end].tolist(), skip_special_tokens=False))

    def token(self, name: str) -> int | None:
        """The id of the token of this name, None where there is none."""
        found = self._library.token_to_id(name)
        return None if found is None else int(found)


Tokenizer = Bytes | Json
"""Every tokenizer. `name` identifies it in caches and fingerprints; ids are below `vocabulary`."""


def token_type(vocabulary: int) -> type[np.unsignedinteger]:
    """The narrowest type that holds every token and that files are written in."""
    return np.uint16 if vocabulary <= 1 << 16 else np.uint32


def open_tokenizer(given: str, end: str | None) -> Tokenizer:
    """The tokenizer that `data.tokenizer` and `data.end` name: bytes, a tokenizer.json, or a folder that holds one.

    ValueError: no such file, not a tokenizer, or no token that ends a document.
    """
    if given == "bytes":
        if end is not None:
            raise ValueError(f"data.end={end!r}: bytes end a document with a token of their own; leave data.end out")
        return Bytes()
    path = Path(given).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        changed = path.stat().st_mtime_ns
    except OSError as error:
        raise ValueError(
            f"data.tokenizer={given!r}: no tokenizer at {path}, seen from {Path.cwd()}; "
            "name bytes, a tokenizer.json or a folder that holds one"
        ) from error
    return _read(path, changed, end)


@lru_cache(maxsize=4)
def _read(path: Path, changed: int, end: str | None) -> Json:
    """A large file takes a second to read, and a start asks for it several times."""
    return Json(path, end)


def train_bpe(texts: Iterator[str], vocabulary: int, special: Sequence[str], out: Path) -> int:
    """Learn a byte-level BPE (Sennrich, Haddow, Birch 2016) and write it to `out`; returns the size of its vocabulary.

    It ends documents with <|endoftext|>, token 0; the names in `special` follow it. The same texts give the same file.
    The vocabulary is smaller than asked for where the texts hold too few pairs. ValueError: `vocabulary` has no room
    for the 256 bytes and the special tokens, a name given twice, or no text.
    """
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    names = [ENDS[0], *special]
    if len(set(names)) < len(names) or "" in names:
        raise ValueError(f"special={list(special)}: names must differ, from {ENDS[0]} too, and not be empty")
    if vocabulary < 256 + len(names):
        raise ValueError(f"vocabulary={vocabulary}: 256 bytes and {len(names)} special tokens need {256 + len(names)}")
    library: Any = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=names,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    if library.get_vocab_size() == 256 + len(names):
        raise ValueError("no text to learn from, or none in which anything repeats; name other paths")
    partial = out.with_name(f"{out.name}.{secrets.token_hex(8)}.partial")
    try:
        partial.write_text(library.to_str(pretty=True), encoding="utf-8")
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    return int(library.get_vocab_size())


def _inside(ids: Sequence[int] | NDArray[np.integer], vocabulary: int) -> NDArray[np.int64]:
    tokens = np.asarray(ids, dtype=np.int64)
    outside = tokens[(tokens < 0) | (tokens >= vocabulary)]
    if outside.size:
        raise ValueError(f"token {outside[0]} is outside 0…{vocabulary - 1}; mask such ids before sampling or decoding")
    return tokens
