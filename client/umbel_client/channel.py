"""The seam between a device and its coordinator: five calls, all of which may be made again.

`GrpcChannel` (in `grpc_channel.py`) crosses a network; a simulation joins device and server in one process. Errors
come out as the same classes that the far side raised, or `Unreachable`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from umbel.digests import Digest
from umbel.visit import CheckIn, CheckInReply, ReportBegin, RetryWindow


@dataclass(slots=True)
class Traffic:
    """Bytes of messages that crossed a channel since it was made."""

    up: int = 0
    down: int = 0


class Channel(Protocol):
    """A device's side of the conversation (`docs/reference/device-protocol.md`)."""

    traffic: Traffic

    async def check_in(self, check_in: CheckIn) -> CheckInReply:
        """Offer to take part, or ask for the newest release."""

    def fetch(self, digest: Digest, offset: int) -> AsyncGenerator[bytes, None]:
        """A blob's bytes from `offset` on, in chunks; nothing about them may be believed yet."""

    async def read_listing(self, name: str, limit: int) -> bytes:
        """A file of the release listing, of at most `limit` bytes; nothing about it may be believed yet.

        Raises:
            NotFound: there is no such file; for the listing's next root that is the usual answer.
            OutOfBounds: it is larger.
        """

    async def report(self, begin: ReportBegin, sealed: bytes) -> RetryWindow:
        """Ask whether the report is still wanted, and send what the far side lacks of it.

        Raises:
            RoundClosed: too late; not a byte of `sealed` was sent.
            AlreadyReported: the session has reported under another report id.
        """

    async def renew(self, certificate_request: bytes) -> bytes:
        """A new certificate chain (PEM) for the same key, for a request in DER."""

    async def close(self) -> None:
        """Let go of connections; the next call makes new ones."""
