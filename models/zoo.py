"""The models there are to choose from."""

from typing import Annotated

from farspan.models.decoder import Decoder

Model = Annotated[Decoder, "choice"]
