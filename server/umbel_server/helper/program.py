"""From a helper's folder to a running helper: one port for leader and participants, and pages that tell how it is."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

import grpc
import structlog

from umbel.clock import Clock, SystemClock
from umbel.errors import Unavailable
from umbel.holding import held
from umbel.stopping import told_to_stop
from umbel_server import descriptors
from umbel_server.addresses import from_here, joined, why_not
from umbel_server.helper.core import Helper
from umbel_server.helper.folder import HelperFolder, HelperSettings
from umbel_server.helper.people import People
from umbel_server.helper.records import Records
from umbel_server.helper.service import HelperGateway
from umbel_server.plain_http import Answer, Pages
from umbel_server.rpc import OF_STRANGERS, Service, Watch, port_options

SWEEP_SECONDS: Final = 60.0
STOP_SECONDS: Final = 2.0
_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class HelperParts:
    """A helper without its port."""

    records: Records
    people: People
    helper: Helper


def build(folder: HelperFolder, settings: HelperSettings, clock: Clock) -> HelperParts:
    """Open the folder and put the helper together; raises `NotFound` where `umbel helper init` hasn't been."""
    records = Records(folder.database)
    people = People(records, folder.authority(), clock, settings.certificate_days)
    return HelperParts(records, people, Helper(records, folder.identity(), people.authority, settings.policy, clock))


async def serve(
    folder: HelperFolder, settings: HelperSettings, ready: Callable[[str, str], None], clock: Clock | None = None
) -> None:
    """Run a helper until SIGTERM, Ctrl-C, or the end of its terminal.

    Args:
        folder: its keys and store.
        settings: how.
        ready: told once where it listens, and where its health endpoint does (empty: nowhere).
        clock: the machine's, unless another is given.

    Raises:
        WrongState: another helper runs in its folder.
        Unavailable: a port is taken.
    """
    folder.card()
    descriptors.take_all_that_are_allowed()
    with held(folder.path, f"another helper runs in {folder.path}; stop it first, or use another folder"):
        await _serve(folder, settings, ready, clock or SystemClock())


async def _serve(
    folder: HelperFolder, settings: HelperSettings, ready: Callable[[str, str], None], clock: Clock
) -> None:
    parts = build(folder, settings, clock)
    server = grpc.aio.server(options=port_options(OF_STRANGERS))
    services = HelperGateway(parts.helper, parts.people).services()
    pages, watch = _pages(parts.records, services) if settings.health_port else (None, nullcontext)
    for service in services:
        service.add_to(server, watch)
    port = _listen(server, folder, settings)
    stopping = asyncio.Event()
    with told_to_stop(stopping.set):
        told_at = await pages.open(settings.host, settings.health_port) if pages else ""
        await server.start()
        sweeping = asyncio.create_task(_sweep(parts.helper))
        try:
            address = from_here(settings.host, port)
            _log.info("helper ready", address=address, leader=settings.leader[:16])
            ready(address, told_at)
            await stopping.wait()
        finally:
            sweeping.cancel()
            if pages is not None:
                await pages.close()
            await server.stop(STOP_SECONDS)
            parts.records.close()


def _listen(server: grpc.aio.Server, folder: HelperFolder, settings: HelperSettings) -> int:
    credentials, address = grpc.ssl_server_credentials([folder.tls()]), joined(settings.host, settings.port)
    try:
        return server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise Unavailable(f"can't listen at {address}{why_not(settings.host, settings.port, 'helper')}") from error


def _pages(records: Records, services: Iterable[Service[None]]) -> tuple[Pages, Watch]:
    """What there is to read of a helper, over plain HTTP, and what its calls go on inside of."""
    from umbel_server.monitoring.helper import HelperMonitor

    monitor = HelperMonitor(records)
    for service in services:
        monitor.calls.expect(service.descriptor.name, service.methods)
    return Pages({"/healthz": lambda accept: _told(records), "/metrics": monitor.page}), monitor.calls.watch


async def _told(records: Records) -> Answer:
    """How it is: a helper that can't read its records sums nothing, and says so. Nothing in it is secret."""
    facts: dict[str, object] = {"status": "ok"}
    try:
        facts |= records.counts()
    except sqlite3.Error as error:
        facts = {"status": "failing", "reason": f"its records can't be read: {error}"}
    status = HTTPStatus.OK if facts["status"] == "ok" else HTTPStatus.SERVICE_UNAVAILABLE
    return Answer(json.dumps(facts).encode(), "application/json", status)


async def _sweep(helper: Helper) -> None:
    while True:
        try:
            # On a thread: it waits for a sum that is being formed, and devices that enrol needn't.
            await asyncio.to_thread(helper.sweep)
        except sqlite3.Error as error:
            # Keys must go once they have expired: a disk that is full for a while may only put that off.
            _log.error("what has expired stays for now", reason=str(error))
        await asyncio.sleep(SWEEP_SECONDS)
