"""`launch data inspect`: what a configuration will train on, before it does."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from farspan.launch.exit import Exit

if TYPE_CHECKING:  # torch takes a second to import: help does without
    import numpy as np
    from numpy.typing import NDArray

    from farspan.platform.data.corpus import Corpus, Language
    from farspan.platform.data.mixture import MixedRows
    from farspan.platform.data.row import Row, Rows
    from farspan.platform.job import Job

BAR = 32
"""Characters of the longest bar."""
SHOWN = 3, 240
"""Rows and documents of a row that are shown as text, and tokens of each. Of a mixture, each source's first row too."""


def add(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `inspect`."""
    inspect = actions.add_parser(
        "inspect",
        help="show documents, rows and mixture of a configuration",
        description="Build the data of a configuration and describe it: lengths of documents, what rows hold, the "
        "shares of a mixture now and at the end of training, and the first rows as text.",
    )
    inspect.add_argument("--config", required=True, type=Path, metavar="X.yaml", help="the configuration file")
    inspect.add_argument(
        "--rows", type=int, default=256, metavar="N", help="training rows to look at; default: the first 256"
    )
    inspect.add_argument("overrides", nargs="*", metavar="a.b=c", help="values that replace the file's")
    inspect.set_defaults(run=_inspect)


def _inspect(parsed: argparse.Namespace) -> int:
    from farspan.launch import run as runs
    from farspan.platform import config

    if parsed.rows < 1:
        raise ValueError(f"--rows {parsed.rows}: must be at least 1")
    job = runs.decode(config.read(runs.shipped(parsed.config), parsed.overrides), print).job
    corpus = job.data.build(job.seed)
    if not len(corpus.train):
        raise ValueError("data: no training row; add documents, or lower data.held_out")
    for line in survey(job, corpus, parsed.rows):
        print(line)
    return int(Exit.DONE)


def survey(job: "Job", corpus: "Corpus", count: int) -> Iterator[str]:
    """Everything there is to say, in lines; `count` training rows are read."""
    from farspan.platform.data.mixture import MixedRows

    language, train = corpus.tokenizer, corpus.train
    sentinels = job.data.vocabulary - language.vocabulary
    yield f"{language.vocabulary:,} tokens of {language.name}" + (f" and {sentinels:,} sentinels" if sentinels else "")
    yield from corpus.notes
    if len(lengths := train.documents()):
        yield from ("", *_histogram(lengths, job.data.sequence_length))
    rows = [train.row(number) for number in range(count)]
    yield from ("", *_of_rows(job, train, rows))
    if isinstance(train, MixedRows):
        yield from ("", *_of_mixture(job, train))
    named = _special(job, language)
    sources = [train.place(number)[0] if isinstance(train, MixedRows) else 0 for number in range(count)]
    shown = {*range(min(SHOWN[0], count)), *(sources.index(source) for source in set(sources))}
    for number in sorted(shown):
        head = f"row {number} (source {sources[number]})" if isinstance(train, MixedRows) else f"row {number}"
        yield from ("", *_of_row(head, rows[number], language, named))


def _histogram(lengths: "NDArray[np.int64]", sequence_length: int) -> Iterator[str]:
    """Documents and their tokens by powers of two."""
    import numpy as np

    bins = np.frexp(lengths)[1] - 1  # the power of two below
    documents, tokens = np.bincount(bins), np.bincount(bins, weights=lengths)
    total = int(lengths.sum())
    yield (
        f"training documents: {len(lengths):,} of {total:,} tokens; "
        f"median {np.median(lengths):,.0f}, mean {lengths.mean():,.0f}, longest {lengths.max():,}"
    )
    yield f"{'tokens each':>23}  {'documents':>11}  {'tokens':>15}"
    for power in range(int(bins.min()), len(documents)):
        count, held = int(documents[power]), int(tokens[power])
        bar = "█" * round(BAR * held / tokens.max()) or ("▏" if held else "")
        bounds = f"{1 << power:,} – {(2 << power) - 1:,}"
        yield f"{bounds:>23}  {count:>11,}  {held:>15,}  {_percent(held, total):>7}  {bar}".rstrip()
    long = lengths[lengths > sequence_length]
    yield (
        f"longer than data.sequence_length={sequence_length:,}: {len(long):,} documents, "
        f"with {_percent(int(long.sum()), total)} of the tokens"
    )


def _of_rows(job: "Job", train: "Rows", rows: "list[Row]") -> Iterator[str]:
    """What rows hold, as the micro-batches of one rank would."""
    from farspan.platform.data.row import collate

    size = min(job.train.micro_batch or job.train.batch, job.train.batch)
    batches = [collate(rows[start : start + size], 0) for start in range(0, len(rows), size)]
    tokens = sum(batch.tokens.numel() for batch in batches)
    padding = sum(batch.padding for batch in batches)
    documents = sum(len(row.lengths) - bool(row.padding) for row in rows)
    total = job.train.steps * job.train.batch
    prefixes = sum(0 if batch.prefix is None else len(batch.prefix) for batch in batches)
    yield f"rows an epoch     {len(train):,}; training reads {total:,}: {total / len(train):.3g} epochs"
    yield f"of {len(rows):,} rows in micro-batches of {size}"
    yield f"  tokens          {_percent(tokens - padding, tokens)} are not padding"
    yield f"  labels          {_percent(sum(batch.valid for batch in batches), tokens)} of the tokens predict"
    yield f"  documents       {documents / len(rows):.2f} a row"
    if prefixes:
        yield f"  prefixes        {_percent(prefixes, tokens)} of the tokens are seen both ways"


def _of_mixture(job: "Job", train: "MixedRows") -> Iterator[str]:
    """The share of each source at the first row and at the last step, and how often its rows come until then."""
    total = job.train.steps * job.train.batch
    yield f"{'source':>6}  {'share now':>9}  {'at the end':>10}  {'rows read':>13}  {'an epoch':>13}  {'epochs':>7}"
    shares = zip(train.weights.at(0), train.weights.at(total), train.counts(total), train.sources, strict=True)
    for i, (now, then, read, rows) in enumerate(shares):
        epochs = f"{read / len(rows):.2f}" if len(rows) else "–"
        yield f"{i:>6}  {float(now):>9.1%}  {float(then):>10.1%}  {read:>13,}  {len(rows):>13,}  {epochs:>7}"


def _special(job: "Job", language: "Language") -> dict[int, str]:
    """Tokens that are shown by name."""
    from farspan.platform.data.objective import Sentinels

    ids = Sentinels.of(language, job.data.sentinels).ids
    return {language.end: "⟨end⟩", **{token: name for name, token in ids.items()}}


def _of_row(head: str, row: "Row", language: "Language", named: dict[int, str]) -> Iterator[str]:
    """A row as text, a line for each document, shortened in the middle."""
    documents = len(row.lengths) - bool(row.padding)
    filled = f", {row.padding:,} tokens of padding" if row.padding else ""
    yield f"{head}: {documents:,} document{'s' * (documents > 1)} in {len(row.tokens):,} tokens{filled}"
    begin = 0
    for place, length in enumerate(row.lengths[:documents]):
        tokens = row.tokens[begin : begin + length].tolist()
        begin += length
        prefix = row.prefixes[place] if row.prefixes else 0
        note = f" (prefix of {prefix:,} seen both ways)" if prefix else ""
        if place < SHOWN[0]:
            yield f"  {length:,} tokens{note}: {_text(tokens, language, named)}"
    if documents > SHOWN[0]:
        yield f"  and {documents - SHOWN[0]:,} more"


def _text(tokens: list[int], language: "Language", named: dict[int, str]) -> str:
    limit = SHOWN[1]
    if len(tokens) > limit:
        head, tail = tokens[: limit * 2 // 3], tokens[-(limit // 3) :]
        return f"{_text(head, language, named)} … {_text(tail, language, named)}"
    parts: list[str] = []
    plain: list[int] = []
    for token in [*tokens, None]:
        if token is not None and token not in named:
            plain.append(token)
            continue
        if plain:
            parts.append(language.decode(plain))
            plain = []
        if token is not None:
            parts.append(named[token])
    return "".join(char if char.isprintable() else "↵" if char == "\n" else "·" for char in "".join(parts))


def _percent(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "0.0%"
