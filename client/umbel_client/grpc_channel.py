"""`GrpcChannel`: the device's calls over gRPC with mutual TLS."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator
from typing import TYPE_CHECKING, Final, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from umbel.digests import Digest
from umbel.errors import MalformedMessage, OutOfBounds, UmbelError, Unreachable, foreign
from umbel.messages import (
    check_in_reply_from_message,
    check_in_to_message,
    report_begin_to_message,
    window_from_message,
)
from umbel.v1 import device_pb2 as pb
from umbel.v1 import device_pb2_grpc as rpc
from umbel.visit import CheckIn, CheckInReply, ReportBegin, RetryWindow
from umbel_client.channel import Traffic
from umbel_client.grpc_errors import error_of

if TYPE_CHECKING:
    from umbel_client.enrolment import IdentityKeeper

CHUNK_BYTES: Final = 256 << 10
CALL_SECONDS: Final = 30.0
STREAM_SECONDS: Final = 900.0
"""Both streams go on where they broke off, so a deadline costs little."""
MAX_MESSAGE_BYTES: Final = 4 << 20

MessageT = TypeVar("MessageT", bound=Message)

_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # Each device object keeps its own connection: without this, gRPC shares one per process and address.
    ("grpc.use_local_subchannel_pool", 1),
)


class GrpcChannel:
    """Calls to one coordinator; connects at the first call, and again after `close`.

    Args:
        address: host:port of DeviceService; the coordinator's certificate must be for this host.
        identities: holds key, certificate chain and the coordinator's pinned authority.
    """

    def __init__(self, address: str, identities: IdentityKeeper) -> None:
        self._address = address
        self._identities = identities
        self._connection: grpc.aio.Channel | None = None
        self.traffic = Traffic()

    async def check_in(self, check_in: CheckIn) -> CheckInReply:
        """Offer to take part; see `Channel`."""
        message = self._sent(check_in_to_message(check_in))
        with self._errors():
            answer = await self._stub().CheckIn(message, timeout=CALL_SECONDS)
        return check_in_reply_from_message(self._received(answer))

    async def fetch(self, digest: Digest, offset: int) -> AsyncGenerator[bytes, None]:
        """A blob's bytes from `offset` on; see `Channel`."""
        with self._errors():
            call = self._stub().Fetch(self._sent(pb.FetchRequest(digest=digest, offset=offset)), timeout=STREAM_SECONDS)
            try:
                async for answer in call:
                    yield self._received(answer).chunk
            finally:
                call.cancel()

    async def read_listing(self, name: str, limit: int) -> bytes:
        """A file of the release listing; see `Channel`."""
        message = self._sent(pb.ReadListingRequest(name=name))
        with self._errors():
            answer = await self._stub().ReadListing(message, timeout=CALL_SECONDS)
        content = self._received(answer).content
        if len(content) > limit:
            raise OutOfBounds(f"listing file {name} has {len(content)} bytes; at most {limit} are allowed")
        return content

    async def report(self, begin: ReportBegin, sealed: bytes) -> RetryWindow:
        """Ask, then send what is missing; see `Channel`."""
        with self._errors():
            call = self._stub().Report(timeout=STREAM_SECONDS)
            try:
                return await self._upload(call, begin, sealed)
            except asyncio.InvalidStateError:
                # The far side ended the call while we were writing: its status says why.
                raise Unreachable(f"{self._address} ended the upload: {foreign(await call.details() or '')}") from None
            finally:
                call.cancel()

    async def renew(self, certificate_request: bytes) -> bytes:
        """A new certificate chain; see `Channel`."""
        message = self._sent(pb.RenewRequest(certificate_request=certificate_request))
        with self._errors():
            answer = await self._stub().Renew(message, timeout=CALL_SECONDS)
        return self._received(answer).certificate_chain

    async def close(self) -> None:
        """Hang up; the next call connects again."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def _upload(
        self, call: grpc.aio.StreamStreamCall[pb.ReportRequest, pb.ReportResponse], begin: ReportBegin, sealed: bytes
    ) -> RetryWindow:
        question = self._sent(pb.ReportRequest(begin=report_begin_to_message(begin)))
        await call.write(question)
        answer = await self._answer(call, "proceed")
        for start in range(answer.proceed.offset, len(sealed), CHUNK_BYTES):
            chunk = pb.ReportRequest(chunk=sealed[start : start + CHUNK_BYTES])
            try:
                await call.write(self._sent(chunk))
            except asyncio.InvalidStateError:
                # It was refused half-way; reading raises the status that says why.
                break
        else:
            await call.done_writing()
        answer = await self._answer(call, "accepted")
        return window_from_message(answer.accepted.next)

    async def _answer(
        self, call: grpc.aio.StreamStreamCall[pb.ReportRequest, pb.ReportResponse], step: str
    ) -> pb.ReportResponse:
        answer = await call.read()
        if not isinstance(answer, pb.ReportResponse):
            raise Unreachable(f"{self._address} ended the report before it said {step!r}; it goes on next time")
        if answer.WhichOneof("step") != step:
            raise MalformedMessage(f"expected {step!r} in a report's answer, got {answer.WhichOneof('step')!r}")
        return self._received(answer)

    def _stub(self) -> rpc.DeviceServiceAsyncStub:
        if self._connection is None:
            own = self._identities.current
            credentials = grpc.ssl_channel_credentials(own.server_authority, own.private_key, own.certificate_chain)
            self._connection = grpc.aio.secure_channel(self._address, credentials, options=_OPTIONS)
        return rpc.DeviceServiceStub(self._connection)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except grpc.aio.AioRpcError as failure:
            raise error_of(failure, self._address) from failure
        except grpc.aio.UsageError as failure:
            raise UmbelError(f"the connection to {self._address} was closed during a call: {failure}") from failure

    def _sent(self, message: MessageT) -> MessageT:
        self.traffic.up += message.ByteSize()
        return message

    def _received(self, message: MessageT) -> MessageT:
        self.traffic.down += message.ByteSize()
        return message
