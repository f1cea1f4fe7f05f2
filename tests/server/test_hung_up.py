"""A device that hangs up while its report is being counted: the report counts, once, and spoils nobody else's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.server.driving import MODEL, TASK, World, task


@dataclass
class SlowFirst:
    """Does heavy work in threads; the first report isn't added before the test says so."""

    began: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)

    async def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        if function.__name__ != "add" or self.began.is_set():
            return await asyncio.to_thread(function, *arguments)
        return await asyncio.to_thread(self._slowly, function, *arguments)

    def _slowly(self, function: Callable[..., Any], *arguments: Any) -> Any:
        self.began.set()
        assert self.go_on.wait(10)
        try:
            return function(*arguments)
        finally:
            self.done.set()


async def test_a_device_that_hangs_up_while_it_is_counted_counts_once(small_world: World) -> None:
    small_world.offload = slow = SlowFirst()
    small_world.restart()
    first, second = small_world.enrol("a", "b")
    await small_world.begin(task(rounds=1))
    report = first.report(await first.assignment())
    sending = asyncio.create_task(first.send(report))
    await asyncio.to_thread(slow.began.wait, 10)
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    slow.go_on.set()
    await asyncio.to_thread(slow.done.wait, 10)
    await second.visit()
    await first.send(report)
    await small_world.coordinator.tick()
    assert small_world.coordinator.operations.round(TASK, 1).reports == 2
    lineage = small_world.coordinator.operations.version(MODEL, 2).lineage
    assert (lineage.cohort, lineage.weight) == (2, 100.0)
