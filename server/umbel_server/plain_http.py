"""Plain HTTP for those who watch: a GET of a few pages, one a connection, and nothing else.

What stands on such a page must be for anybody who reaches the port: nobody is asked who they are.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

import structlog

from umbel.errors import Unavailable
from umbel_server.addresses import from_here, joined, why_not
from umbel_server.passing import tell

REQUEST_SECONDS: Final = 5.0
"""Whoever asks nothing, or endlessly, is hung up on."""
ANSWER_SECONDS: Final = 30.0
"""So is whoever doesn't read."""
_MOST: Final = 8 << 10
"""Bytes of a request."""
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a page says now."""

    body: bytes
    kind: str
    """Its media type."""
    status: HTTPStatus = HTTPStatus.OK


Page = Callable[[str], Awaitable[Answer]]
"""(the request's `Accept`, "" without one) -> answer."""


class Pages:
    """A port and its pages.

    Args:
        pages: by path.
    """

    def __init__(self, pages: Mapping[str, Page]) -> None:
        self._pages = pages
        self._server: asyncio.Server | None = None
        self._under_way: set[asyncio.Task[None]] = set()

    async def open(self, host: str, port: int) -> str:
        """Listen; returns where, as host:port, with the port that 0 became.

        Args:
            host: address to listen at.
            port: 0 for any free one.

        Raises:
            Unavailable: the port is taken.
        """
        try:
            self._server = await asyncio.start_server(self._take, host, port, limit=_MOST)
        except OSError as error:
            raise Unavailable(f"can't listen at {joined(host, port)}{why_not(host, port, 'program')}") from error
        return from_here(host, self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Take no more requests, and give up those under way."""
        if self._server is not None:
            self._server.close()
        under_way = list(self._under_way)
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)

    def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with (
            contextlib.closing(writer),
            contextlib.suppress(TimeoutError, EOFError, asyncio.LimitOverrunError, OSError),
        ):
            async with asyncio.timeout(REQUEST_SECONDS):
                head = await reader.readuntil(b"\r\n\r\n")
            async with asyncio.timeout(ANSWER_SECONDS):
                writer.write(_written(await self._answer(head.decode("latin-1"))))
                await writer.drain()

    async def _answer(self, head: str) -> Answer:
        line, *headers = head.split("\r\n")
        method, target, *_ = (*line.split(" "), "", "")
        page = self._pages.get(target.partition("?")[0])
        if page is None:
            return _says(HTTPStatus.NOT_FOUND)
        if method != "GET":
            return _says(HTTPStatus.METHOD_NOT_ALLOWED)
        named = [header.partition(":") for header in headers]
        try:
            return await page(",".join(value for name, _, value in named if name.lower() == "accept"))
        except Exception as error:  # noqa: BLE001 - the edge: whatever it is, the caller gets a status
            tell(_log, "a page failed", error, page=target[:80])
            return _says(HTTPStatus.INTERNAL_SERVER_ERROR)


def _says(status: HTTPStatus) -> Answer:
    return Answer(f"{status.phrase}\n".encode(), "text/plain", status)


def _written(answer: Answer) -> bytes:
    head = (
        f"HTTP/1.1 {answer.status.value} {answer.status.phrase}\r\ncontent-type: {answer.kind}\r\n"
        f"content-length: {len(answer.body)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode("latin-1") + answer.body
