"""The devices' two services: messages in, values to the coordinator, messages out. No decisions.

Who calls is known from the certificate (`access.device`), never from a message.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from umbel.digests import parse_digest
from umbel.errors import Interrupted, MalformedMessage, NotAllowed, OutOfBounds, Unavailable
from umbel.identity import DeviceId
from umbel.messages import (
    check_in_from_message,
    check_in_reply_to_message,
    report_begin_from_message,
    window_to_message,
)
from umbel.v1 import device_pb2 as pb
from umbel_server.access import Access
from umbel_server.authority import Peer
from umbel_server.coordinator import Coordinator
from umbel_server.rpc import Requests, Service, Stream, Unary

CHUNK_BYTES: Final = 256 << 10
STREAMS_PER_DEVICE: Final = 4
"""Downloads and uploads that one device may have open at a time."""

_DEVICE = pb.DESCRIPTOR.services_by_name["DeviceService"]
_ENROLMENT = pb.DESCRIPTOR.services_by_name["EnrolmentService"]


class DeviceGateway:
    """DeviceService, for devices with a certificate."""

    def __init__(self, coordinator: Coordinator, access: Access) -> None:
        self._coordinator = coordinator
        self._access = access
        self._open_streams: Counter[DeviceId] = Counter()

    def service(self) -> Service[Peer]:
        """Ready to be added to a gRPC server."""
        methods: dict[str, Unary[Peer] | Stream[Peer]] = {
            "Renew": self._renew,
            "CheckIn": self._check_in,
            "Fetch": self._fetch,
            "Report": self._report,
            "ReadListing": self._read_listing,
        }
        return Service(_DEVICE, lambda method, certificate: self._access.device(certificate), methods)

    async def _renew(self, device: Peer, message: pb.RenewRequest) -> pb.RenewResponse:
        return pb.RenewResponse(certificate_chain=self._access.renew(device, message.certificate_request))

    async def _check_in(self, device: Peer, message: pb.CheckInRequest) -> pb.CheckInResponse:
        check_in = check_in_from_message(message)
        if check_in.population != device.realm:
            raise NotAllowed(f"this device is of population {device.realm!r}, not {check_in.population!r}")
        return check_in_reply_to_message(await self._coordinator.check_in(device.id, check_in))

    async def _fetch(self, device: Peer, message: pb.FetchRequest) -> AsyncIterator[pb.FetchResponse]:
        digest = parse_digest(message.digest)
        path = self._coordinator.fetch(digest)
        size = path.stat().st_size
        if message.offset > size:
            raise OutOfBounds(f"offset {message.offset} lies beyond the blob's {size} bytes; begin again at 0")
        with self._stream(device.id):
            response = pb.FetchResponse(total_size=size)
            async for chunk in _read(path, message.offset, size):
                response.chunk = chunk
                self._coordinator.count_fetched(len(chunk), digest)
                yield response
                response = pb.FetchResponse()
            if message.offset == size:
                yield response

    async def _read_listing(self, device: Peer, message: pb.ReadListingRequest) -> pb.ReadListingResponse:
        return pb.ReadListingResponse(content=self._coordinator.listing_file(message.name))

    async def _report(self, device: Peer, messages: Requests) -> AsyncIterator[pb.ReportResponse]:
        with self._stream(device.id):
            first = await anext(messages, None)
            if first is None or first.WhichOneof("step") != "begin":
                raise MalformedMessage("a report starts with `begin`, then come chunks")
            begin = report_begin_from_message(first.begin)
            offset = await self._coordinator.begin_report(begin)
            yield pb.ReportResponse(proceed=pb.ReportProceed(offset=offset))
            while offset < begin.sealed_size:
                chunk = _chunk(await anext(messages, None), offset)
                await self._coordinator.append(begin.report_id, offset, chunk)
                offset += len(chunk)
            window = await self._coordinator.finish_report(begin.report_id)
            yield pb.ReportResponse(accepted=pb.ReportAccepted(next=window_to_message(window)))

    @contextmanager
    def _stream(self, device: DeviceId) -> Iterator[None]:
        if self._open_streams[device] >= STREAMS_PER_DEVICE:
            raise Unavailable(f"this device has {STREAMS_PER_DEVICE} streams open already; finish one first")
        self._open_streams[device] += 1
        try:
            yield
        finally:
            self._open_streams[device] -= 1
            if not self._open_streams[device]:
                del self._open_streams[device]


class EnrolmentGateway:
    """EnrolmentService, for machines that have a token and no certificate yet."""

    def __init__(self, access: Access, release_key: bytes, device_address: str, release_root: bytes = b"") -> None:
        self._access = access
        self._release_key = release_key
        self._device_address = device_address
        self._release_root = release_root

    def service(self) -> Service[None]:
        """Ready to be added to a gRPC server."""
        return Service(_ENROLMENT, lambda method, certificate: None, {"Enrol": self._enrol})

    async def _enrol(self, nobody: None, message: pb.EnrolRequest) -> pb.EnrolResponse:
        enrolled = self._access.enrol(message.token, message.certificate_request, message.attestation)
        return pb.EnrolResponse(
            certificate_chain=enrolled.certificate_chain,
            population=enrolled.population,
            release_key=self._release_key,
            server_authority=self._access.server_authority,
            device_address=self._device_address,
            release_root=self._release_root,
        )


async def _read(path: Path, offset: int, size: int) -> AsyncIterator[bytes]:
    # Opened anew for each chunk: most files are one, and to go to a thread and back costs more than to open.
    while offset < size and (chunk := await asyncio.to_thread(_piece, path, offset)):
        offset += len(chunk)
        yield chunk


def _piece(path: Path, offset: int) -> bytes:
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        return file.read(CHUNK_BYTES)


def _chunk(message: pb.ReportRequest | None, offset: int) -> bytes:
    if message is None:
        raise Interrupted(f"the upload ended after {offset} bytes; begin again with the same report id")
    if message.WhichOneof("step") != "chunk" or not message.chunk:
        raise MalformedMessage("after `begin` a report is made of chunks that aren't empty")
    if len(message.chunk) > CHUNK_BYTES:
        raise OutOfBounds(f"a chunk of {len(message.chunk)} bytes; the limit is {CHUNK_BYTES}")
    return message.chunk
