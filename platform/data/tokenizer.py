"""Text becomes numbers: byte by byte, so that nothing is learnt, downloaded or out of vocabulary."""

from collections.abc import Sequence
from typing import final

import numpy as np
from numpy.typing import NDArray


@final
class Bytes:
    """The 256 bytes of UTF-8, and one token that ends a document."""

    name = "bytes"
    vocabulary = 257
    end = 256
    """The end of a document; `encode` never returns it."""

    def encode(self, text: str) -> NDArray[np.uint16]:
        """The bytes of `text`, one token each, without the end token.

        The tokens of a text are those of its pieces laid end to end, wherever it is cut: files may be read in pieces.
        """
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16)

    def decode(self, ids: Sequence[int] | NDArray[np.integer]) -> str:
        """The text of `ids`: end tokens vanish, and what is not UTF-8 shows as U+FFFD.

        ValueError: an id outside 0 … 256.
        """
        tokens = np.asarray(ids, dtype=np.int64)
        outside = tokens[(tokens < 0) | (tokens >= self.vocabulary)]
        if outside.size:
            raise ValueError(f"token {outside[0]} is outside 0…{self.end}; mask such ids before sampling or decoding")
        return tokens[tokens != self.end].astype(np.uint8).tobytes().decode(errors="replace")


Tokenizer = Bytes
"""Every tokenizer."""
