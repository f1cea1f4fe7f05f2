"""Files from a web server: a mirror of what a coordinator publishes, which needn't be trusted.

    <address>/listing/<name>      release metadata (TUF), believed by their signatures
    <address>/blobs/<digest>      files of bundles, believed by their digests

Nothing that comes from here is believed for where it comes from, so any static web server or CDN will do
(`umbel releases mirror DIR` fills its folder). Downloads go on where an earlier one stopped (RFC 9110, section 14).
"""

from __future__ import annotations

import asyncio
import http.client
import urllib.parse
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Final, TypeVar

from umbel.digests import Digest
from umbel.errors import BadInput, NotFound, OutOfBounds, Unreachable
from umbel.http_exchange import Exchange

T = TypeVar("T")
READ_SECONDS: Final = 10.0
"""How long a mirror may say nothing at all."""
BLOB_SECONDS: Final = 300.0
"""For one file, however it drips; what came by then stays, and goes on from elsewhere or later."""
PIECE: Final = 64 << 10


class HttpFiles:
    """Files below an address.

    Args:
        address: http(s)://host[:port]/path of the folder.
        seconds: for one file, all of it.

    Raises:
        BadInput: not such an address.
    """

    def __init__(self, address: str, seconds: float = BLOB_SECONDS) -> None:
        if not _can_be_asked(address):
            raise BadInput(f"{address!r} is no mirror's address; write https://host/path")
        self._address = address.rstrip("/")
        self._seconds = seconds

    async def fetch(self, name: str, limit: int) -> bytes:
        """One file of at most `limit` bytes; raises `NotFound`, `OutOfBounds` or `Unreachable`."""
        data = bytearray()
        async with aclosing(self.stream(name, 0)) as chunks:
            async for chunk in chunks:
                data += chunk
                if len(data) > limit:
                    raise OutOfBounds(f"{name} is longer than {limit} bytes; the rest was left")
        return bytes(data)

    async def stream(self, name: str, offset: int) -> AsyncGenerator[bytes, None]:
        """A file from `offset` on, piece by piece; raises `NotFound` or `Unreachable`."""
        ends = asyncio.get_running_loop().time() + self._seconds
        address = f"{self._address}/{name}"
        exchange = Exchange(_connection(address))
        try:
            # A server that can't resume sends what is here already once more.
            skip = await _before(ends, name, lambda: _ask(exchange, urllib.parse.urlsplit(address).path, offset))
            while chunk := await _before(ends, name, lambda: exchange.read(PIECE)):
                if len(chunk) > skip:
                    yield chunk[skip:]
                skip = max(0, skip - len(chunk))
        finally:
            exchange.end()


class Mirror:
    """A web server's copy of a coordinator's listing and blobs.

    Args:
        address: of the folder that holds both.
        seconds: for one file, all of it.

    Raises:
        BadInput: not such an address.
    """

    def __init__(self, address: str, seconds: float = BLOB_SECONDS) -> None:
        self._files = HttpFiles(address, seconds)
        self.came = 0
        """Bytes of files that came from here so far."""

    async def read_listing(self, name: str, limit: int) -> bytes:
        """A file of the release listing; see `Channel`."""
        data = await self._files.fetch(f"listing/{name}", limit)
        self.came += len(data)
        return data

    async def fetch(self, digest: Digest, offset: int) -> AsyncGenerator[bytes, None]:
        """A blob's bytes from `offset` on; see `Channel`."""
        async with aclosing(self._files.stream(f"blobs/{digest}", offset)) as chunks:
            async for chunk in chunks:
                self.came += len(chunk)
                yield chunk


def _can_be_asked(address: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(address)
        _connection(address)
        return (
            parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and parts.port != 0
            and not (parts.query or parts.fragment)
        )
    except (ValueError, http.client.InvalidURL):
        return False


def _connection(address: str) -> http.client.HTTPConnection:
    parts = urllib.parse.urlsplit(address)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    return kind(parts.netloc, timeout=READ_SECONDS)


def _ask(exchange: Exchange, path: str, offset: int) -> int:
    """Ask for everything from `offset` on; how many bytes of the answer to skip."""
    answer = exchange.ask(path, {"Range": f"bytes={offset}-"} if offset else {})
    if answer.status in (http.client.NOT_FOUND, http.client.FORBIDDEN):
        raise NotFound(f"{path} isn't there ({answer.status})")
    if answer.status == http.client.OK:
        return offset
    told = answer.headers.get("Content-Range", "")
    if answer.status == http.client.PARTIAL_CONTENT and told.startswith(f"bytes {offset}-"):
        return 0
    raise Unreachable(f"{path}: asked from byte {offset} on, the mirror answered {answer.status} {told[:40]}")


async def _before(ends: float, name: str, work: Callable[[], T]) -> T:
    """Do one blocking step on a thread, until `ends` (of the loop's clock) at the latest."""
    left = ends - asyncio.get_running_loop().time()
    try:
        return await asyncio.wait_for(asyncio.to_thread(work), max(0.0, left))
    except TimeoutError:
        raise Unreachable(f"{name}: the mirror is too slow; what came stays") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise Unreachable(f"{name}: {error}") from error
