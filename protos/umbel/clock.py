"""Time is an argument: whoever needs the date is handed a `Clock`.

Instants are POSIX seconds (UTC) as floats. Durations are waited out on the event loop (`asyncio.sleep`), which a
simulation replaces by one that jumps.
"""

from __future__ import annotations

import time
from typing import Final, Protocol

DAY: Final = 86_400.0
"""Seconds."""
CLOCK_SLACK_SECONDS: Final = 60.0
"""A clock that is set back by less moves deadlines by as much, and no more happens."""


def is_recent(at: float, now: float, seconds: float) -> bool:
    """Whether `at` is less than so many seconds ago. An instant yet to come isn't: it is of a clock that was ahead."""
    return 0 <= now - at < seconds


class Clock(Protocol):
    """What the date is, for whoever asks."""

    def now(self) -> float:
        """The current instant, in POSIX seconds."""


class SystemClock:
    """The machine's own clock."""

    def now(self) -> float:
        """The current instant, in POSIX seconds."""
        return time.time()
