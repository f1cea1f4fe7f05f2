"""All metrics of one coordinator, and the page that a scrape reads.

A scrape reads the store on a thread of its own, and waits for it for a few seconds at most: the event loop goes on, and
where the database is away the rest is told all the same. Scrapes that come at once share one reading.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import structlog
from prometheus_client import Histogram
from prometheus_client.core import Metric

from umbel.clock import Clock
from umbel.errors import NotFound, UmbelError
from umbel_server import task_records
from umbel_server.files import read_file
from umbel_server.folder import Folder
from umbel_server.identity import CERTIFICATE_FILE
from umbel_server.monitoring import books, fleet, releases
from umbel_server.monitoring.calls import Calls
from umbel_server.monitoring.drift import Drift
from umbel_server.monitoring.families import SECONDS, number
from umbel_server.monitoring.inferences import Inferences
from umbel_server.monitoring.others import DatabaseErrors, WatchedHelper
from umbel_server.monitoring.page import new_registry, page_of
from umbel_server.monitoring.rounds import Rounds, tasks_by_state
from umbel_server.passing import tell
from umbel_server.plain_http import Answer
from umbel_server.settings import Settings

if TYPE_CHECKING:
    from umbel_server.app import Parts
    from umbel_server.serving.service import ModelService

PATIENCE_SECONDS: Final = 5.0
"""How long a scrape waits for the store: Prometheus itself gives up after ten."""
_FEEL_SECONDS: Final = 0.5
_AUTHORITIES: Final = ("server", "device", "operator")
_log = structlog.get_logger(__name__)


class Monitor:
    """The metrics of one coordinator."""

    def __init__(self, settings: Settings, parts: Parts, clock: Clock) -> None:
        coordinator = parts.coordinator
        self.registry = new_registry(self._now)
        self.calls = Calls(self.registry)
        DatabaseErrors(self.registry, parts.store.engine)
        coordinator.private.watch(lambda helper: WatchedHelper(helper, self.registry))
        self._lag = Histogram(
            "umbel_event_loop_lag_seconds",
            "How much later than asked for the event loop came back to who had waited.",
            registry=self.registry,
            buckets=SECONDS,
        )
        self._settings, self._parts, self._clock = settings, parts, clock
        self._rounds = Rounds()
        self._drift = Drift(coordinator.registry, settings.windows)
        self._privacy = books.Privacy(coordinator.private)
        rollouts = coordinator.rollouts
        self._listing = None if rollouts is None else releases.Listing(rollouts.desk.repository)
        # One waits for the store, the other writes the page.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="metrics")
        self._reading: asyncio.Future[list[Metric]] | None = None
        self._stored: list[Metric] = []
        self._feeling: asyncio.Task[None] | None = None
        self._inferences: Inferences | None = None

    def watch(self, models: ModelService) -> None:
        """Tell of questions to models too."""
        self._inferences = Inferences(models, self.registry)

    def start(self) -> None:
        """Begin to feel how the event loop does."""
        self._feeling = asyncio.create_task(self._feel(), name="metrics")

    async def close(self) -> None:
        """Let go of the store: whoever reads it now ends first, or is given up."""
        if self._feeling is not None:
            self._feeling.cancel()
            await asyncio.gather(self._feeling, return_exceptions=True)
        if self._reading is not None:
            await asyncio.wait({self._reading}, timeout=PATIENCE_SECONDS)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def page(self, accept: str) -> Answer:
        """Everything, in the form that the scraper asks for."""
        await self._look()
        return await page_of(self.registry, accept, self._threads)

    async def _look(self) -> None:
        """Read the store, and wait for it for a while."""
        if self._reading is None:
            self._reading = asyncio.get_running_loop().run_in_executor(self._threads, self._read)
        reading = self._reading
        await asyncio.wait({reading}, timeout=PATIENCE_SECONDS)
        if not reading.done():
            self._stored = []
            return
        if self._reading is reading:
            self._reading = None
            self._stored = reading.result()

    def _now(self) -> Iterator[Metric]:
        stored, coordinator = self._stored, self._parts.coordinator
        yield number("umbel_database_up", "Whether the database answered this scrape.", bool(stored))
        yield from stored
        words = "When the coordinator last looked after all tasks and rollouts without a failure."
        yield number("umbel_tick_timestamp_seconds", words, coordinator.ticked_at)
        words = "Reports that have begun to arrive and aren't whole."
        yield number("umbel_uploads_open", words, len(coordinator.uploads))
        words = "Tasks whose round can't go on before the helper does its part."
        yield number("umbel_tasks_waiting_for_helper", words, len(coordinator.private.waits))
        if self._inferences is not None:
            yield from self._inferences.now()
        with suppress(OSError):
            yield from books.disk(self._settings.state)
        with suppress(UmbelError, OSError):
            yield books.certificates(self._certificates())

    def _certificates(self) -> dict[str, bytes]:
        authorities, card = self._parts.authorities, self._settings.helper_card
        found = {f"{name}-authority": getattr(authorities, name).certificate_pem for name in _AUTHORITIES}
        found |= {"helper": card.certificate} if card else {}
        with suppress(NotFound):  # its folder may have moved to the person
            found["first-admin"] = read_file(Folder(self._settings.state).first_admin / CERTIFICATE_FILE)
        return found

    async def _feel(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _FEEL_SECONDS
            await asyncio.sleep(_FEEL_SECONDS)
            self._lag.observe(max(0.0, loop.time() - due))

    def _read(self) -> list[Metric]:
        """What the store knows; nothing where it doesn't answer."""
        now = self._clock.now()
        try:
            with self._parts.store.reading() as connection:
                tasks = task_records.everything(connection)
                return [
                    tasks_by_state(tasks),
                    *self._rounds.read(connection, tasks),
                    *fleet.devices(connection, now),
                    *fleet.sessions(connection),
                    *releases.rollouts(connection),
                    *releases.channels(connection),
                    *(self._listing.read(connection) if self._listing else ()),
                    *books.audit(connection),
                    *self._privacy.read(connection, tasks),
                    *self._drift.read(connection, tasks),
                ]
        except Exception as error:  # noqa: BLE001 - a scrape tells what there is to tell
            tell(_log, "the store can't be read for metrics", error)
            return []
