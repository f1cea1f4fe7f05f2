"""What goes wrong between devices and server, and when processes die. Drawn in the order of virtual events."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from umbel.randomness import generator
from umbel_simulations.world import Crash, Faults


class ProcessKilled(BaseException):
    """A process ends here, between two of its instructions; nothing of it may go on."""


@dataclass(frozen=True, slots=True)
class Fate:
    """What becomes of one message."""

    lost: bool = False
    late: float = 0.0
    """Seconds."""
    again: float | None = None
    """A copy arrives so many seconds later."""
    overtaken: float | None = None
    """It arrives so many seconds later, after those who wait for it have given up."""

    def behind(self, patience: float) -> float | None:
        """After how many seconds it arrives when nobody waits any more; None if it comes in time, or never."""
        if self.lost:
            return None
        return self.late if self.overtaken is None and self.late >= patience else self.overtaken


FINE: Final = Fate()


class Weather:
    """Draws the fate of each message.

    Args:
        faults: how often which.
        seed: of the run.
        counts: is told what was done.
    """

    def __init__(self, faults: Faults, seed: int, counts: Counter[str]) -> None:
        self._faults = faults
        self._chance = generator(seed, "weather")
        self._counts = counts
        self._calm = not (faults.loss or faults.duplicate or faults.reorder or faults.delay)

    def fate(self, *, repeats: bool = False) -> Fate:
        """Of the next message; a call that `repeats` may come twice, an answer or a part of a stream never does."""
        if self._calm:
            return FINE
        faults, drawn = self._faults, self._chance.random(4)
        lost, overtaken = drawn[0] < faults.loss, drawn[1] < faults.reorder
        late, again = drawn[2] < faults.delay, repeats and drawn[3] < faults.duplicate
        self._counts.update(
            word
            for word, happened in (("lost", lost), ("overtaken", overtaken), ("late", late), ("duplicated", again))
            if happened
        )
        return Fate(
            lost=bool(lost),
            late=self._pause() if late else 0.0,
            again=self._pause() if again else None,
            overtaken=self._pause() if overtaken else None,
        )

    def _pause(self) -> float:
        return float(self._chance.exponential(self._faults.delay_seconds))


def crash_times(crash: Crash, place: int, seconds: float, seed: int) -> list[float]:
    """When a process is to be killed, in virtual seconds, rising; never, if the run ends before it could be.

    Args:
        crash: how often, and in which hours.
        place: its place among the scenario's crashes.
        seconds: length of the run.
        seed: of the run.
    """
    begin, until = crash.from_hour * 3600.0, min(crash.until_hour * 3600.0 or seconds, seconds)
    if begin > until:
        return []
    drawn = generator(seed, "crashes", place).uniform(begin, until, crash.times)
    return sorted(float(at) for at in drawn)


class Plug:
    """Pulled at one of a process's durable steps; once it is, that process never takes another."""

    def __init__(self) -> None:
        self._left: int | None = None
        self.is_pulled = False

    def pull_in(self, steps: int) -> None:
        """Let the process take so many more steps."""
        self._left = steps

    @contextmanager
    def held(self) -> Iterator[None]:
        """Steps in here aren't counted: a pull that is due comes at the next one after."""
        left, self._left = self._left, None
        try:
            yield
        finally:
            self._left = left

    def pull(self) -> None:
        """Now.

        Raises:
            ProcessKilled: always.
        """
        self.is_pulled = True
        raise ProcessKilled

    def __call__(self, step: str) -> None:
        """A durable step is about to be taken; raises `ProcessKilled` if it isn't to be."""
        del step
        if self.is_pulled or self._left == 0:
            self.pull()
        if self._left is not None:
            self._left -= 1
