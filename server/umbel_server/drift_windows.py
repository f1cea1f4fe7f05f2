"""Which rounds are to be held against which, to notice drift."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from umbel import fields
from umbel.errors import OutOfBounds

MOST: Final = 200
"""Rounds in a window: of twice as many, ten thousand ways are some megabytes."""


@dataclass(frozen=True, slots=True)
class Windows:
    """What is to be compared; raises `OutOfBounds` for what can't be."""

    first: int = 0
    last: int = 0
    """Numbers of the first and the last round of the reference; 0: the task's first ones that count."""
    reference: int = 10
    """How many these are."""
    recent: int = 5
    """How many rounds make the recent window: the last ones that count, after the reference."""
    below: float = 0.001
    """Which p-value is drift."""

    def __post_init__(self) -> None:
        for name in ("first", "last"):
            fields.count(getattr(self, name), name)
        for size in (self.reference, self.recent):
            if not 1 <= size <= MOST:
                raise OutOfBounds(f"a window of {size} rounds; from 1 to {MOST} can be compared")
        if (self.first or self.last) and not 1 <= self.first <= self.last < self.first + MOST:
            raise OutOfBounds(
                f"a reference from round {self.first} to {self.last}; name two rounds, of {MOST} at most, in order"
            )
        if not 0 < self.below < 1:
            raise OutOfBounds(f"below is {self.below}; a p-value lies between 0 and 1")
