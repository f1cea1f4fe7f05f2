"""Files from a web server: a mirror of what a coordinator publishes, which needn't be trusted.

    <address>/listing/<name>      release metadata (TUF), believed by their signatures
    <address>/blobs/<digest>      files of bundles, believed by their digests

Nothing that comes from here is believed for where it comes from, so any static web server or CDN will do
(`umbel releases mirror DIR` fills its folder). Downloads go on where an earlier one stopped (RFC 9110, section 14).
"""

from __future__ import annotations

import asyncio
import http.client
import socket
import urllib.parse
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from typing import Final, TypeVar

from umbel.digests import Digest
from umbel.errors import BadInput, NotFound, OutOfBounds, Unreachable

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
        exchange = _Exchange(f"{self._address}/{name}")
        try:
            # A server that can't resume sends what is here already once more.
            skip = await _before(ends, name, lambda: exchange.ask(offset))
            while chunk := await _before(ends, name, exchange.read):
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
        _Exchange(address).end()
        return (
            parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and parts.port != 0
            and not (parts.query or parts.fragment)
        )
    except (ValueError, http.client.InvalidURL):
        return False


class _Exchange:
    """One question and its answer, on a connection of its own; `end` may be called while another thread reads."""

    def __init__(self, address: str) -> None:
        self._parts = urllib.parse.urlsplit(address)
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        self._connection = kind(self._parts.netloc, timeout=READ_SECONDS)
        self._socket: socket.socket | None = None
        self._answer: http.client.HTTPResponse | None = None
        self._ended = False

    def ask(self, offset: int) -> int:
        """Ask for everything from `offset` on; how many bytes of the answer to skip."""
        name = self._parts.path
        self._connection.connect()
        self._socket = self._connection.sock
        if self._ended:
            self.end()
        self._connection.request("GET", name, headers={"Range": f"bytes={offset}-"} if offset else {})
        self._answer = answer = self._connection.getresponse()
        if answer.status in (http.client.NOT_FOUND, http.client.FORBIDDEN):
            raise NotFound(f"{name} isn't there ({answer.status})")
        if answer.status == http.client.OK:
            return offset
        told = answer.headers.get("Content-Range", "")
        if answer.status == http.client.PARTIAL_CONTENT and told.startswith(f"bytes {offset}-"):
            return 0
        raise Unreachable(f"{name}: asked from byte {offset} on, the mirror answered {answer.status} {told[:40]}")

    def read(self) -> bytes:
        """The next piece; nothing at the end."""
        return self._answer.read1(PIECE) if self._answer else b""

    def end(self) -> None:
        """Hang up."""
        self._ended = True
        if self._socket is not None:
            # Wakes a thread that still reads; without that, closing would wait for it.
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        if self._answer is not None:
            self._answer.close()
        self._connection.close()


async def _before(ends: float, name: str, work: Callable[[], T]) -> T:
    """Do one blocking step on a thread, until `ends` (of the loop's clock) at the latest."""
    left = ends - asyncio.get_running_loop().time()
    try:
        return await asyncio.wait_for(asyncio.to_thread(work), max(0.0, left))
    except TimeoutError:
        raise Unreachable(f"{name}: the mirror is too slow; what came stays") from None
    except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: a name that IDNA can't spell
        raise Unreachable(f"{name}: {error}") from error
