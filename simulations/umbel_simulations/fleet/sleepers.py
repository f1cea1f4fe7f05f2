"""Who sleeps until when. The loop has one timer, for the first of them, however many there are.

With a timer of the loop's own for each of 100,000 devices, each new one would be compared with a dozen others, in
Python.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Generic, TypeVar

T = TypeVar("T")


class Sleepers(Generic[T]):
    """An alarm clock for many.

    Args:
        loop: whose time it is.
        wake: called for each when it is due; for those who are due at once, in the order in which they were added.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, wake: Callable[[T], object]) -> None:
        self._loop, self._wake = loop, wake
        self._asleep: list[tuple[float, int, T]] = []
        self._added = 0
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._asleep)

    def add(self, due: float, sleeper: T) -> None:
        """Wake somebody at an instant of the loop's time."""
        self._added += 1
        heappush(self._asleep, (due, self._added, sleeper))
        if self._timer is None or due < self._timer.when():
            self._set()

    def _set(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(self._asleep[0][0], self._ring) if self._asleep else None

    def _ring(self) -> None:
        due, self._timer = self._asleep[0][0], None
        # Not the loop's time: that may be a hair before the instant it rings for.
        while self._asleep and self._asleep[0][0] <= max(due, self._loop.time()):
            self._wake(heappop(self._asleep)[2])
        self._set()
