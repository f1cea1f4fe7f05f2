"""The two bodies of an HTTP exchange, each within bounds: how much, how long, and what becomes of what nobody reads."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from email.utils import formatdate
from typing import Final, cast

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from umbel.errors import MalformedMessage, OutOfBounds, Unavailable, Unreachable
from umbel_server.https_port import CONNECTION, Connection

BODY_SECONDS: Final = 60.0
"""Within which a body must be there: 16 MB by two megabits a second."""
PIECE_SECONDS: Final = 30.0
"""Within which each piece of an answer must be taken."""
LEFT_SECONDS: Final = 2.0
"""So long is read what nobody wants, for the sender to get to our answer."""
_PIECE: Final = 256 << 10


def connection_of(request: Request) -> Connection:
    """What a request came on."""
    return cast(Connection, request.scope["state"][CONNECTION])


class Room:
    """For so many bytes of bodies at a time, of all callers together."""

    def __init__(self, most: int) -> None:
        self._left = most

    def take(self, size: int) -> None:
        """Take some, or give some back; raises `Unavailable` where there aren't as many."""
        if size > self._left:
            raise Unavailable("too much is being sent already; ask again later")
        self._left -= size


class Body:
    """What comes behind a request's headers, if anything does."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._is_over = False
        headers = request.headers
        self._is_ambiguous = "transfer-encoding" in headers and "content-length" in headers
        self.size = 0
        """Bytes that were read."""

    def require_plain(self) -> None:
        """Raise `MalformedMessage` if it is compressed, or if somebody on its way may have seen another end of it."""
        if self._is_ambiguous:
            raise MalformedMessage("both a content-length and a transfer-encoding; send one of them")
        if "content-encoding" in self._request.headers:
            raise MalformedMessage("bodies can't be compressed here")

    async def read(self, most: int, room: Room) -> bytes:
        """All of it; the room that it takes is for the reader to give back, `size` bytes.

        Raises:
            OutOfBounds: it has more bytes than this.
            Unavailable: there is no room for it.
            Unreachable: it didn't come in time.
        """
        if int(self._request.headers.get("content-length", 0)) > most:
            raise _too_large(most)
        pieces = []
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while not self._is_over:
                    piece = await self._next()
                    room.take(len(piece))
                    pieces.append(piece)
                    self.size += len(piece)
                    if self.size > most:
                        raise _too_large(most)
        except TimeoutError:
            raise Unreachable(f"the body wasn't there within {BODY_SECONDS:.0f} s") from None
        return b"".join(pieces)

    async def left_by(self, reply: Reply) -> Reply:
        """A reply, to be sent whether the body was read or not.

        One that wasn't is read and dropped for a moment: whoever is still sending when the connection closes doesn't
        get to see why. What isn't over by then must not be taken for a next request.
        """
        if not self._is_over and "expect" not in self._request.headers:  # with it, nothing has been sent
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LEFT_SECONDS):
                    while not self._is_over:
                        await self._next()
        if not self._is_over or self._is_ambiguous:
            reply.headers["connection"] = "close"
        return reply

    async def _next(self) -> bytes:
        message = await self._request.receive()
        if message["type"] != "http.request":
            raise asyncio.CancelledError("the caller hung up")
        self._is_over = not message.get("more_body", False)
        return bytes(message["body"])


class Reply(Response):
    """An answer, of pieces that needn't be put together, and are sent as fast as they are taken."""

    def __init__(
        self,
        parts: Sequence[bytes],
        status: int = 200,
        headers: dict[str, str] | None = None,
        media_type: str = "application/json",
    ) -> None:
        super().__init__(status_code=status, headers=headers, media_type=media_type)
        self._parts = parts
        self.headers["content-length"] = str(len(self))
        self.headers["date"] = formatdate(usegmt=True)

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            for part in self._parts:
                for start in range(0, len(part), _PIECE):
                    piece = memoryview(part)[start : start + _PIECE]
                    async with asyncio.timeout(PIECE_SECONDS):
                        await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        except TimeoutError:
            scope["state"][CONNECTION].transport.abort()


def _too_large(most: int) -> OutOfBounds:
    return OutOfBounds(
        f"a body of more than {most >> 20} MB; see docs/how-to/ask-over-the-network.md for how to send it"
    )
