"""What the zoo's inputs mean, for whoever prepares data: needs no torch."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

PADDING: Final = 0
UNKNOWN: Final = 1
CHARACTERS: Final = "\n" + "".join(map(chr, range(32, 127)))
"""Newline and printable ASCII; the first has token 2."""
TOKENS: Final = 2 + len(CHARACTERS)
"""98: padding, unknown, and the characters."""
CONTEXT: Final = 80
"""How many characters a text model sees."""

FLIGHT_FEATURES: Final = ("month", "weekday", "hour", "distance", "origin", "carrier")
"""Columns of a flight: 1 to 12; 0 (Monday) to 6; scheduled departure, 0 to 24; miles; places in the two lists below."""
ORIGINS: Final = ("EWR", "JFK", "LGA")
CARRIERS: Final = (
    "9E", "AA", "AS", "B6", "DL", "EV", "F9", "FL", "HA", "MQ", "OO", "UA", "US", "VX", "WN", "YV",
)  # fmt: skip

_TOKEN_OF: Final = {character: place for place, character in enumerate(CHARACTERS, start=2)}


def encode(text: str) -> NDArray[np.int64]:
    """One token for each character, int64 [len(text)]; those outside `CHARACTERS` are `UNKNOWN`."""
    return np.array([_TOKEN_OF.get(character, UNKNOWN) for character in text], np.int64)


def decode(tokens: NDArray[np.int64]) -> str:
    """The text of tokens [T]; padding is left out, what is unknown becomes "?"."""
    return "".join("?" if token == UNKNOWN else CHARACTERS[token - 2] for token in tokens if token != PADDING)
