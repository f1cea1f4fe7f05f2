"""The helper's gRPC: messages <-> `Helper` and `People`. No decisions; work that takes long leaves the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Final, TypeVar

from umbel import fields
from umbel.descriptor import kind_from_wire
from umbel.errors import MalformedMessage, OutOfBounds
from umbel.participants import ParticipantCertificate
from umbel.secure_report import MAX_CAPSULE_BYTES, REPORT_ID_BYTES
from umbel.secure_sum import HelperItem
from umbel.v1 import secure_sum_pb2 as pb
from umbel_server.helper.core import Helper
from umbel_server.helper.people import People
from umbel_server.rpc import Requests, Service, Stream, Unary

CHUNK_BYTES: Final = 512 << 10
_HASH_BYTES: Final = 32
P = TypeVar("P", pb.PrepareRequest, pb.CommitRequest)


class HelperGateway:
    """What leaders and participants call."""

    def __init__(self, helper: Helper, people: People) -> None:
        self._helper = helper
        self._people = people

    def services(self) -> tuple[Service[None], Service[None]]:
        """For the leader, and for participants; both open to anybody, because every request proves itself."""
        file = pb.DESCRIPTOR.services_by_name
        leader: dict[str, Unary[None] | Stream[None]] = {
            "OfferKey": self._offer_key,
            "Countersign": self._countersign,
            "Prepare": self._prepare,
            "Commit": self._commit,
        }
        participants: dict[str, Unary[None] | Stream[None]] = {
            "EnrolParticipant": self._enrol,
            "RenewParticipant": self._renew,
        }
        return (
            Service(file["HelperService"], lambda method, certificate: None, leader),
            Service(file["ParticipantService"], lambda method, certificate: None, participants),
        )

    async def _offer_key(self, caller: None, request: pb.OfferKeyRequest) -> pb.OfferKeyResponse:
        task, number = fields.name(request.task, "task"), fields.count(request.round, "round")
        kind = kind_from_wire(request.kind)
        key = await asyncio.to_thread(self._helper.offer_key, task, number, kind, request.signature)
        return pb.OfferKeyResponse(public_key=key)

    async def _countersign(self, caller: None, request: pb.CountersignRequest) -> pb.CountersignResponse:
        signature = await asyncio.to_thread(self._helper.countersign, request.descriptor, request.leader_signature)
        return pb.CountersignResponse(helper_signature=signature)

    async def _prepare(self, caller: None, requests: Requests) -> pb.PrepareResponse:
        first = await _first(requests, pb.PrepareRequest)
        most = self._helper.most_reports(_hash(first.rd))
        items = [_item(item) for item in first.items]
        async for request in requests:
            items += [_item(item) for item in request.items]
            if len(items) > most:
                raise OutOfBounds(f"more than {most} capsules; the round takes no more reports")
        found = await asyncio.to_thread(self._helper.prepare, first.rd, items, first.signature)
        refused = [pb.RefusedItem(report_id=one, reason=reason) for one, reason in found.refused.items()]
        return pb.PrepareResponse(accepted=b"".join(found.accepted), refused=refused)

    async def _commit(self, caller: None, requests: Requests) -> AsyncIterator[pb.CommitResponse]:
        first = await _first(requests, pb.CommitRequest)
        most = self._helper.most_reports(_hash(first.rd))
        ids = bytearray(first.report_ids)
        async for request in requests:
            ids += request.report_ids
            if len(ids) > most * REPORT_ID_BYTES:
                raise OutOfBounds(f"more than {most} reports; the round takes no more")
        answer = await asyncio.to_thread(self._helper.commit, first.rd, split_ids(bytes(ids)), first.signature)
        yield pb.CommitResponse(signature=answer.signature)
        for start in range(0, len(answer.total), CHUNK_BYTES):
            yield pb.CommitResponse(chunk=answer.total[start : start + CHUNK_BYTES])

    async def _enrol(self, caller: None, request: pb.EnrolParticipantRequest) -> pb.EnrolParticipantResponse:
        population = fields.name(request.population, "population")
        certificate = self._people.enrol(request.token, population, request.public_key, request.proof)
        return pb.EnrolParticipantResponse(certificate=_certificate(certificate))

    async def _renew(self, caller: None, request: pb.RenewParticipantRequest) -> pb.RenewParticipantResponse:
        population, old = fields.name(request.population, "population"), request.certificate
        held = ParticipantCertificate(old.public_key, old.not_after_ms, old.signature)
        certificate = self._people.renew(population, held, request.proof)
        return pb.RenewParticipantResponse(certificate=_certificate(certificate))


async def _first(requests: Requests, kind: type[P]) -> P:
    """The first piece of a stream, which says what it is about; an empty one stands for a stream without any."""
    return await anext(requests, kind())


def split_ids(ids: bytes) -> tuple[bytes, ...]:
    """Concatenated report ids, apart; raises `MalformedMessage` for a broken one."""
    if len(ids) % REPORT_ID_BYTES:
        raise MalformedMessage(f"{len(ids)} bytes aren't made of report ids of {REPORT_ID_BYTES}")
    return tuple(ids[start : start + REPORT_ID_BYTES] for start in range(0, len(ids), REPORT_ID_BYTES))


def _item(message: pb.HelperItem) -> HelperItem:
    if len(message.report_id) != REPORT_ID_BYTES or len(message.commitment) != _HASH_BYTES:
        raise MalformedMessage("a report id or commitment has the wrong length")
    if not 0 < len(message.capsule) <= MAX_CAPSULE_BYTES:
        raise OutOfBounds(f"a capsule of {len(message.capsule)} bytes; 1 to {MAX_CAPSULE_BYTES}")
    return HelperItem(message.report_id, message.capsule, message.commitment)


def _hash(value: bytes) -> bytes:
    if len(value) != _HASH_BYTES:
        raise MalformedMessage(f"a round is named by {_HASH_BYTES} bytes, not {len(value)}")
    return value


def _certificate(certificate: ParticipantCertificate) -> pb.ParticipantCertificate:
    return pb.ParticipantCertificate(
        public_key=certificate.public_key, not_after_ms=certificate.not_after_ms, signature=certificate.signature
    )
