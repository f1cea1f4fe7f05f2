"""Each task's turn to go on, one after the other; none waits for long for another one's helper.

A helper is another party's machine: it may be hung, or behind a network that swallows what is sent. The turn of a
private task that takes longer than `patience` goes on by itself while the other tasks, and rollouts, have theirs.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable
from typing import Final

from umbel_server import cohort
from umbel_server.closing import advance
from umbel_server.runner import TaskRunner

AT_HELPER: Final = 2
"""Threads that may wait for the helper at a time: the others are there for devices."""


class Turns:
    """The turns that are under way."""

    def __init__(self) -> None:
        self._under_way: dict[TaskRunner, asyncio.Task[list[Exception]]] = {}

    async def take(self, runners: Iterable[TaskRunner], patience: float) -> list[Exception]:
        """Let each do all that is due for it; returns what failed since the last call.

        Args:
            runners: of all tasks.
            patience: seconds to wait for a private task; infinity: until its turn is over.
        """
        failed = []
        for runner in list(runners):
            failed += await (self._for_a_while(runner, patience) if runner.task.updates_private else _turn(runner))
        return failed

    async def stop(self) -> None:
        """Give up what is under way; the store says where it stands."""
        turns = list(self._under_way.values())
        self._under_way.clear()
        for turn in turns:
            turn.cancel()
        await asyncio.gather(*turns, return_exceptions=True)

    async def _for_a_while(self, runner: TaskRunner, patience: float) -> list[Exception]:
        turn = self._under_way.get(runner)
        if turn is None:
            turn = self._under_way[runner] = asyncio.create_task(_turn(runner))
        elif math.isfinite(patience):
            patience = 0.0
        await asyncio.wait({turn}, timeout=patience if math.isfinite(patience) else None)
        if not turn.done():
            return []
        del self._under_way[runner]
        return turn.result()


async def _turn(runner: TaskRunner) -> list[Exception]:
    step = cohort.advance if runner.task.driven else advance
    try:
        while await step(runner):
            pass
    except Exception as error:  # noqa: BLE001 - raised by `tick`, after the others have had their turn
        return [error]
    return []
