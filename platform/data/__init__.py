"""Where tokens come from."""

from farspan.platform.data.mixture import Mixture
from farspan.platform.data.synthetic import Synthetic
from farspan.platform.data.text import Text
from farspan.platform.data.tokens import Tokens

Data = Text | Tokens | Mixture | Synthetic

__all__ = ["Data", "Mixture", "Synthetic", "Text", "Tokens"]
