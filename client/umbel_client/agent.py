"""The agent: wakes a device when its retry window says so, until it is told to stop. One process, mostly asleep."""

from __future__ import annotations

import asyncio
import math
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Final

from umbel.clock import DAY
from umbel.errors import Unavailable, WrongState
from umbel.holding import held
from umbel.stopping import told_to_stop
from umbel_client.device import Device
from umbel_client.private import in_words
from umbel_client.report import describe, of_this_process, write_report
from umbel_client.visits import Ending, Visit

LONGEST_SLEEP: Final = DAY
"""Before the first visit: a clock that was ahead at the last one, and was set right since, must not mean for years."""
LOOK_SECONDS: Final = 60.0
"""Between two looks at the clock while it sleeps."""
LONGEST_VISIT: Final = 6 * 3600.0
"""Seconds after which a visit is asked to end; what was begun goes on at the next."""
END_SECONDS: Final = 1800.0
"""Within which a visit ends that has to. One step of training, or one test, may take so long on a slow machine; a graph
that runs without an end, or a runtime that hangs, takes longer."""
BUSY_SECONDS: Final = 5.0
"""Before another try, where somebody else visits from the same home."""


@dataclass(frozen=True, slots=True)
class Until:
    """When an agent is done; by default only when it is told."""

    visits: int = 0
    """After so many visits; 0 means no such limit."""
    release: int = 0
    """Once a release of this number or a higher one has been judged; 0 means no such limit."""

    def reached(self, visits: int, judged: int) -> bool:
        """Whether it is over."""
        return bool(self.visits and visits >= self.visits) or bool(self.release and judged >= self.release)


class Agent:
    """Visits, sleeps, visits.

    Args:
        device: whom to wake.
        tell: hears of each visit.
    """

    def __init__(self, device: Device, tell: Callable[[Visit], None]) -> None:
        self._device = device
        self._tell = tell
        self._stop = asyncio.Event()

    async def run(self, until: Until) -> Visit | None:
        """Wake the device until `until`, SIGTERM, Ctrl-C or the end of its terminal; returns the last visit.

        Raises:
            WrongState: another agent runs from this home, or the home was enrolled anew; asked for one visit only, also
                where somebody else is on one.
        """
        home = self._device.kit.home
        alone = held(home, f"another agent runs from {home}; let only one run there")
        with told_to_stop(self.stop), nullcontext() if until.visits == 1 else alone:
            return await self._run(until)

    def stop(self) -> None:
        """Finish within one training step; what was begun goes on at the next start."""
        self._stop.set()
        self._device.stop()

    async def _run(self, until: Until) -> Visit | None:
        visit, visits = None, 0
        kit = self._device.kit
        if until.visits != 1:
            await self._sleep(min(kit.memory.state.next_wake - kit.clock.now(), LONGEST_SLEEP))
        while not self._stop.is_set():
            try:
                visit = await self._visit()
            except WrongState:
                kit.identities.require_current()
                if until.visits == 1:
                    raise
                # An app, or somebody at a terminal, visits just now.
                await self._sleep(BUSY_SECONDS)
                continue
            visits += visit.ending is not Ending.WAITED or until.visits == 1
            self.write_status()
            self._tell(visit)
            if until.reached(visits, kit.memory.state.judged):
                break
            await self._sleep(visit.next_wake - kit.clock.now())
        return visit

    async def _visit(self) -> Visit:
        watch = asyncio.create_task(self._watch())
        try:
            return await self._device.wake()
        finally:
            watch.cancel()

    async def _watch(self) -> None:
        """End this process where a visit doesn't end that has to: no thread can be ended otherwise."""
        time = asyncio.get_running_loop().time
        longest, due = time() + LONGEST_VISIT, math.inf
        while time() < due:
            await asyncio.sleep(LOOK_SECONDS)
            if time() >= longest:
                self._device.stop()
            due = min(due, time() + END_SECONDS) if self._device.kit.against_going_on() else math.inf
        with suppress(OSError):
            sys.stderr.write(f"umbel-device: a visit goes on {END_SECONDS:g} s after it had to end; giving it up\n")
            sys.stderr.flush()
        os._exit(1)

    def write_status(self) -> None:
        """Leave `status.json` in the device's home, unless its disk is full, or takes nothing."""
        with suppress(OSError, Unavailable):
            write_report(self._device.kit.home, status_of(self._device), self._device.kit.disk)

    async def _sleep(self, seconds: float) -> None:
        """For so long, by the machine's clock too: one that is set right meanwhile may have been all that was wrong."""
        if seconds <= 0:
            return
        # A machine that loses its power while nothing happens must not cost a release its trial.
        self._device.rest()
        before = now = self._device.kit.clock.now()
        end, left = now + seconds, seconds
        while left > 0 and before <= now < end:
            piece = min(left, LOOK_SECONDS)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), piece)
                return
            left -= piece
            before, now = now, self._device.kit.clock.now()


def status_of(device: Device) -> dict[str, Any]:
    """Everything that is to be told about a device, and the process that it lives in."""
    kit = device.kit
    facts = describe(
        kit.identity, kit.memory.known, kit.memory.state, kit.shelf.slots, kit.examples, kit.policy, kit.clock.now()
    )
    facts["updates"] = in_words(kit.pinned)
    return {**facts, "answers_with": device.answers_with, **of_this_process(kit.runtime.name)}
