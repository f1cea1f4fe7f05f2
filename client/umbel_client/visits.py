"""What a visit to the coordinator came to."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from umbel.errors import UmbelError
from umbel.visit import ReleaseOutcome, RetryWindow, SessionRecord

WAITING_WINDOW: Final = RetryWindow(30.0, 90.0)
"""When to look at the conditions again: that asks the machine only, never the network."""


class Ending(Enum):
    """How a visit ended."""

    WAITED = "waited"
    """A condition didn't hold: not a byte was sent."""
    RESTED = "rested"
    """There was nothing to do."""
    CONTRIBUTED = "contributed"
    """A report was accepted."""
    REFUSED = "refused"
    """A report was not wanted any more, or could not be made."""
    INTERRUPTED = "interrupted"
    """A condition fell away, or the app asked to stop; it goes on next time."""
    FAILED = "failed"
    """The coordinator couldn't be reached, or may not be believed."""


@dataclass(frozen=True, slots=True)
class Visit:
    """What happened on one visit."""

    ending: Ending
    at: float
    next_wake: float
    """Both in POSIX seconds."""
    reasons: tuple[str, ...] = ()
    release: ReleaseOutcome | None = None
    session: SessionRecord | None = None
    error: UmbelError | None = None
