"""Where tokens come from."""

from typing import Annotated

from farspan.platform.data.text import Text

Data = Annotated[Text, "choice"]

__all__ = ["Data", "Text"]
