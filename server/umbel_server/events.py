"""What happens in the coordinator, told to whoever watches: after it was committed, and never in its way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Final

BACKLOG: Final = 1_000
"""Events that a slow watcher may lag behind; older ones are dropped for it."""


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One thing that has happened."""

    at: float
    kind: str
    """Such as `round.completed`, `report.accepted`, `version.accepted`."""
    subject: str
    detail: Mapping[str, object] = field(default_factory=dict)
    """JSON-able."""


class Watchers:
    """Those who watch now."""

    def __init__(self) -> None:
        self._queues: set[asyncio.Queue[ServerEvent]] = set()

    def tell(self, event: ServerEvent) -> None:
        """Hand an event to everyone; never waits."""
        for queue in self._queues:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(event)

    async def subscribe(self) -> AsyncIterator[ServerEvent]:
        """Events from now on, until the caller stops."""
        queue: asyncio.Queue[ServerEvent] = asyncio.Queue(BACKLOG)
        self._queues.add(queue)
        try:
            while True:
                yield await queue.get()
        finally:
            self._queues.discard(queue)
