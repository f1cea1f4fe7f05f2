"""A registry as a page: in the form that a scraper asks for, put together on a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import InfoMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from umbel.version import VERSION
from umbel_server.plain_http import Answer


class Now(Collector):
    """What is read at each scrape."""

    def __init__(self, read: Callable[[], Iterable[Metric]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        """As the registry asks for it."""
        yield InfoMetricFamily("umbel_build", "The version of Umbel that runs.", {"version": VERSION})
        yield from self._read()


def new_registry(read: Callable[[], Iterable[Metric]]) -> CollectorRegistry:
    """With what every program tells, beside what is read; nothing of another program in the same process."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(Now(read))
    return registry


async def page_of(registry: CollectorRegistry, accept: str, threads: ThreadPoolExecutor) -> Answer:
    """What a scrape gets."""
    encode, kind = choose_encoder(accept)
    return Answer(await asyncio.get_running_loop().run_in_executor(threads, encode, registry), kind)
