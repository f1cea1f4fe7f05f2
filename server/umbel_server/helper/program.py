"""From a helper's folder to a running helper: one port for leader and participants, and a health endpoint."""

from __future__ import annotations

import asyncio
import json
import signal
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import grpc
import structlog

from umbel.clock import Clock, SystemClock
from umbel.errors import Unavailable
from umbel.holding import held
from umbel_server import descriptors
from umbel_server.addresses import from_here, joined
from umbel_server.helper.core import Helper
from umbel_server.helper.folder import HelperFolder, HelperSettings
from umbel_server.helper.people import People
from umbel_server.helper.records import Records
from umbel_server.helper.service import HelperGateway
from umbel_server.rpc import OF_STRANGERS, port_options

SWEEP_SECONDS: Final = 60.0
STOP_SECONDS: Final = 2.0
HEALTH_SECONDS: Final = 5.0
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
    """Run a helper until SIGTERM or SIGINT.

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
    for service in HelperGateway(parts.helper, parts.people).services():
        service.add_to(server)
    port = _listen(server, folder, settings)
    stopping, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    health, told_at = await _health(parts.records, settings)
    await server.start()
    sweeping = asyncio.create_task(_sweep(parts.helper))
    try:
        address = from_here(settings.host, port)
        _log.info("helper ready", address=address, leader=settings.leader[:16])
        ready(address, told_at)
        await stopping.wait()
    finally:
        sweeping.cancel()
        if health is not None:
            health.close()
        await server.stop(STOP_SECONDS)
        parts.records.close()


def _listen(server: grpc.aio.Server, folder: HelperFolder, settings: HelperSettings) -> int:
    credentials, address = grpc.ssl_server_credentials([folder.tls()]), joined(settings.host, settings.port)
    try:
        return server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise Unavailable(f"can't listen at {address}; is something running there?") from error


async def _health(records: Records, settings: HelperSettings) -> tuple[asyncio.Server | None, str]:
    """Answer `GET /healthz` with the counts of the store, over plain HTTP: nothing in it is secret."""
    if not settings.health_port:
        return None, ""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(HEALTH_SECONDS):
                asked = (await reader.readline()).split()
        except (TimeoutError, ValueError, OSError):  # who asks nothing, or endlessly, is hung up on
            writer.close()
            return
        status, facts = _told(records) if asked[:2] == [b"GET", b"/healthz"] else ("404 Not Found", {})
        body = json.dumps(facts).encode()
        head = (
            f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {len(body)}"
        )
        writer.write(f"{head}\r\n\r\n".encode() + body)
        await writer.drain()
        writer.close()

    try:
        server = await asyncio.start_server(answer, settings.host, settings.health_port)
    except OSError as error:
        address = joined(settings.host, settings.health_port)
        raise Unavailable(f"can't tell its health at {address}; is something running there?") from error
    return server, from_here(settings.host, settings.health_port)


def _told(records: Records) -> tuple[str, dict[str, object]]:
    """HTTP status and content: a helper that can't read its records sums nothing, and says so."""
    try:
        return "200 OK", {"status": "ok", **records.counts()}
    except sqlite3.Error as error:
        return "503 Service Unavailable", {"status": "failing", "reason": f"its records can't be read: {error}"}


async def _sweep(helper: Helper) -> None:
    while True:
        try:
            # On a thread: it waits for a sum that is being formed, and devices that enrol needn't.
            await asyncio.to_thread(helper.sweep)
        except sqlite3.Error as error:
            # Keys must go once they have expired: a disk that is full for a while may only put that off.
            _log.error("what has expired stays for now", reason=str(error))
        await asyncio.sleep(SWEEP_SECONDS)
