"""The metrics of a helper: what it was asked and how that ended, and how many rounds and participants it has."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from prometheus_client.core import Metric

from umbel_server.helper.records import Records
from umbel_server.monitoring.calls import Calls
from umbel_server.monitoring.families import gauge, number
from umbel_server.monitoring.page import new_registry, page_of
from umbel_server.plain_http import Answer


class HelperMonitor:
    """The metrics of one helper; whatever a coordinator or a device sent becomes no label."""

    def __init__(self, records: Records) -> None:
        self._records = records
        # Not one of those that form sums, which may all be at it.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="metrics")
        self.registry = new_registry(self._now)
        self.calls = Calls(self.registry)

    async def page(self, accept: str) -> Answer:
        """Everything, in the form that the scraper asks for."""
        return await page_of(self.registry, accept, self._thread)

    def _now(self) -> Iterator[Metric]:
        try:
            counts = self._records.counts()
        except sqlite3.Error:
            counts = {}
        yield number("umbel_database_up", "Whether the helper can read its records.", bool(counts))
        rounds = {(state,): float(counts[f"rounds_{state}"]) for state in ("open", "summed") if counts}
        yield gauge("umbel_helper_rounds", "Rounds that the helper remembers, by state.", ("state",), rounds)
        if counts:
            words = "Devices that may take part in sums."
            yield number("umbel_helper_participants", words, counts["participants"])
