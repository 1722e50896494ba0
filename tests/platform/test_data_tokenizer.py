"""Ids mean what the file says, whatever else it asks for; bytes come back as they went."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Library

from farspan.platform.data.tokenizer import ENDS, Bytes, open_tokenizer, token_type, train_bpe

TEXTS = [
    "def f(x):\n    return x + 1\n",
    "",
    " ",
    "naïve 漢字 🙂 \x00 \ufeff",
    "\r\n\t\n\n",
    "return return return",
    "x" * 1000,
]


def learn(path: Path, vocabulary: int = 400, special: tuple[str, ...] = ()) -> Path:
    train_bpe(iter(TEXTS * 3 + ["the words of the test are the words of the test"] * 5), vocabulary, special, path)
    return path


def scribble(seed: int) -> str:
    return "".join(random.Random(seed).choices("return ax\n\té漢🙂\u0301\x00", k=200))


def change(path: Path, **fields: Any) -> Path:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return path


def test_both_kinds_give_back_what_they_took(tmp_path: Path) -> None:
    for tokenizer in (Bytes(), open_tokenizer(str(learn(tmp_path / "tokenizer.json")), None)):
        texts = [*TEXTS, *map(scribble, range(20))]
        encoded = tokenizer.encode_batch(texts)
        for text, ids in zip(texts, encoded, strict=True):
            assert ids.dtype == token_type(tokenizer.vocabulary)
            assert np.array_equal(ids, tokenizer.encode(text))
            assert tokenizer.end not in ids and (not ids.size or ids.max() < tokenizer.vocabulary)
            assert tokenizer.decode([*ids.tolist(), tokenizer.end]) == text
        for outside in (-1, tokenizer.vocabulary):
            with pytest.raises(ValueError, match=f"token {outside} is outside 0…{tokenizer.vocabulary - 1}; mask"):
                tokenizer.decode([0, outside])
        with pytest.raises(ValueError):
            tokenizer.encode("\ud800")


def test_bytes_are_the_same_in_pieces() -> None:
    text = "".join(TEXTS)
    assert Bytes().encode(text).tolist() == [byte for piece in text for byte in Bytes().encode(piece).tolist()]
    assert Bytes().token("<|endoftext|>") is None


def test_a_file_encodes_as_the_library_does_without_additions(tmp_path: Path) -> None:
    """Truncation, padding and templates of a file are for another use than documents."""
    path = learn(tmp_path / "tokenizer.json", special=("<|x|>",))
    plain = open_tokenizer(str(path), None)
    wanted = [ids.tolist() for ids in plain.encode_batch(TEXTS)]
    assert wanted == [Library.from_file(str(path)).encode(text).ids for text in TEXTS]
    library = Library.from_file(str(path))
    library.enable_truncation(3)
    library.enable_padding(length=50, pad_id=0)
    library.save(str(path))
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|x|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|x|>": {"id": "<|x|>", "ids": [1], "tokens": ["<|x|>"]}},
    }
    change(path, post_processor=template)
    assert [ids.tolist() for ids in open_tokenizer(str(path), None).encode_batch(TEXTS)] == wanted
    assert open_tokenizer(str(path), None).encode("a<|x|>").tolist()[-1] == plain.token("<|x|>") == 1


def test_the_vocabulary_reaches_to_the_largest_id(tmp_path: Path) -> None:
    path = learn(tmp_path / "tokenizer.json")
    size = open_tokenizer(str(path), None).vocabulary
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokens = json.loads(path.read_text())["added_tokens"]
    change(path, added_tokens=[*tokens, {"id": size, "content": "<|late|>", **added}])
    tokenizer = open_tokenizer(str(path), "<|late|>")
    assert (tokenizer.vocabulary, tokenizer.end, tokenizer.token("<|late|>")) == (size + 1, size, size)
    assert tokenizer.encode("<|late|>").tolist() == [size] and tokenizer.decode([size]) == ""
    assert token_type(1 << 16) is np.uint16 and token_type((1 << 16) + 1) is np.uint32


def test_the_end_is_found_by_name_or_given(tmp_path: Path) -> None:
    vocab = {"a": 0, "[UNK]": 1, "</s>": 2, "<|im_end|>": 3, "[STOP]": 4}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"}}))
    found, given, again = (open_tokenizer(str(path), end) for end in (None, "[STOP]", None))
    assert (found.end, given.end) == (2, 4)
    assert found.name == again.name != given.name
    with pytest.raises(ValueError, match=r"data.end='<eos>': .*tokenizer.json has no such token; name the token"):
        open_tokenizer(str(path), "<eos>")
    for name in ENDS:
        vocab.pop(name, None)
    path.write_text(json.dumps({"model": {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"}}))
    with pytest.raises(ValueError, match=r"data.end=None: .* has none of <\|endoftext\|>, .*; name the token"):
        open_tokenizer(str(path), None)
    other = learn(tmp_path / "other.json", special=("<|x|>", "<|y|>"))
    with pytest.raises(ValueError, match=r"its added tokens are: <\|endoftext\|>, <\|x\|>, <\|y\|>$"):
        open_tokenizer(str(other), "<|z|>")


def test_files_that_are_no_tokenizer_say_so(tmp_path: Path) -> None:
    for content in ("", "{}", "[1]", "\x00"):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match=r"data.tokenizer='.*json': cannot be read as a tokenizer.json .*; name"):
            open_tokenizer(str(tmp_path), None)
    with pytest.raises(ValueError, match=r"data.tokenizer='gpt2': no tokenizer at gpt2, seen from .*; name bytes"):
        open_tokenizer("gpt2", None)


def test_a_text_without_tokens_for_it_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": {"type": "WordLevel", "vocab": {"</s>": 0}, "unk_token": "[UNK]"}}))
    with pytest.raises(ValueError, match=r"tokenizer json-.*: cannot encode a text .*; take another"):
        open_tokenizer(str(path), None).encode("word")


LEARN = """
import sys, random
from pathlib import Path
from farspan.platform.data.tokenizer import train_bpe
draw = random.Random(1)
texts = ["".join(draw.choices("abcdefg é漢\\n", k=300)) for _ in range(100)]
print(train_bpe(iter(texts), 600, ["<|fim_prefix|>", "<|mask|>"], Path(sys.argv[1])))
"""


def test_learning_is_deterministic_and_lossless(tmp_path: Path) -> None:
    paths = [tmp_path / "one.json", tmp_path / "two.json"]
    for path, threads in zip(paths, ("1", "2"), strict=True):
        environment = {"PYTHONHASHSEED": threads, "RAYON_NUM_THREADS": threads}
        said = subprocess.run(
            [sys.executable, "-c", LEARN, str(path)], env=environment, capture_output=True, text=True, check=True
        )
        assert said.stdout == "600\n"
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert sorted(tmp_path.iterdir()) == paths
    tokenizer = open_tokenizer(str(paths[0]), None)
    assert tokenizer.end == tokenizer.token("<|endoftext|>") == 0
    assert (tokenizer.token("<|fim_prefix|>"), tokenizer.token("<|mask|>")) == (1, 2)
    text = scribble(99) + "\u3042 never seen"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("abc é漢\n" * 20)) < len("abc é漢\n" * 20)


@pytest.mark.parametrize(
    ("texts", "vocabulary", "special", "message"),
    [
        (["text text"], 256, (), r"vocabulary=256: 256 bytes and 1 special tokens need 257"),
        (["text text"], 400, ("a", "a"), r"special=\['a', 'a'\]: names must differ"),
        (["text text"], 400, ("<|endoftext|>",), r"names must differ, from <\|endoftext\|> too"),
        (["text text"], 400, ("",), r"not be empty"),
        ([], 400, (), r"no text to learn from.*; name other paths"),
    ],
)
def test_impossible_wishes_say_why(
    tmp_path: Path, texts: list[str], vocabulary: int, special: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train_bpe(iter(texts), vocabulary, special, tmp_path / "out.json")
    assert not list(tmp_path.iterdir())
