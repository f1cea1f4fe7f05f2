"""The leader's way to its helper: blocking gRPC over the helper's pinned certificate, called from a worker thread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import grpc

from umbel.cohort_sum import HelperAnswer
from umbel.descriptor import KIND_TO_WIRE
from umbel.errors import ERROR_KEY, MalformedMessage, UmbelError, Unreachable, foreign, from_code
from umbel.helper_card import HelperCard
from umbel.plan import Kind
from umbel.secure_sum import HelperItem
from umbel.v1 import secure_sum_pb2 as pb
from umbel.v1 import secure_sum_pb2_grpc as rpc
from umbel_server.helper.port import LeaderSigner, Prepared, commit_statement, offer_statement, prepare_statement
from umbel_server.helper.service import split_ids

QUICK_SECONDS: Final = 20.0
SUM_SECONDS: Final = 600.0
_PIECE: Final = 1000
_OPTIONS: Final = (
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5000),
    # A peer that vanished without a word, or hangs: no call waits longer than this for it, however long a sum may take.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
)


class RemoteHelper:
    """A helper in another process, at another party if it is to mean anything. See `HelperPort`."""

    def __init__(self, card: HelperCard, sign: LeaderSigner) -> None:
        self._card = card
        self._sign = sign
        self._channel = grpc.secure_channel(card.address, grpc.ssl_channel_credentials(card.certificate), _OPTIONS)
        self._stub = rpc.HelperServiceStub(self._channel)

    @property
    def identity(self) -> bytes:
        """As its card says."""
        return self._card.identity

    def close(self) -> None:
        """Hang up."""
        self._channel.close()

    def offer_key(self, task: str, number: int, kind: Kind) -> bytes:
        """See `HelperPort`."""
        signature = self._sign(offer_statement(task, number, kind))
        request = pb.OfferKeyRequest(task=task, round=number, kind=KIND_TO_WIRE[kind], signature=signature)
        with _Translated(self._card.address):
            return self._stub.OfferKey(request, timeout=QUICK_SECONDS).public_key

    def countersign(self, statement: bytes, leader_signature: bytes) -> bytes:
        """See `HelperPort`."""
        request = pb.CountersignRequest(descriptor=statement, leader_signature=leader_signature)
        with _Translated(self._card.address):
            return self._stub.Countersign(request, timeout=QUICK_SECONDS).helper_signature

    def prepare(self, rd: bytes, items: Sequence[HelperItem]) -> Prepared:
        """See `HelperPort`."""
        signature = self._sign(prepare_statement(rd, items))
        with _Translated(self._card.address):
            answer = self._stub.Prepare(_pieces(rd, signature, items), timeout=SUM_SECONDS)
        return Prepared(split_ids(answer.accepted), {one.report_id: one.reason for one in answer.refused})

    def commit(self, rd: bytes, ids: Sequence[bytes]) -> HelperAnswer:
        """See `HelperPort`."""
        signature = self._sign(commit_statement(rd, ids))
        total, answered = bytearray(), b""
        with _Translated(self._card.address):
            for part in self._stub.Commit(_id_pieces(rd, signature, ids), timeout=SUM_SECONDS):
                answered = answered or part.signature
                total += part.chunk
        return HelperAnswer(bytes(total), answered)


def _pieces(rd: bytes, signature: bytes, items: Sequence[HelperItem]) -> Iterator[pb.PrepareRequest]:
    yield pb.PrepareRequest(rd=rd, signature=signature)
    for start in range(0, len(items), _PIECE):
        part = items[start : start + _PIECE]
        yield pb.PrepareRequest(
            items=[
                pb.HelperItem(report_id=one.report_id, capsule=one.capsule, commitment=one.commitment) for one in part
            ]
        )


def _id_pieces(rd: bytes, signature: bytes, ids: Sequence[bytes]) -> Iterator[pb.CommitRequest]:
    yield pb.CommitRequest(rd=rd, signature=signature)
    for start in range(0, len(ids), 16 * _PIECE):
        yield pb.CommitRequest(report_ids=b"".join(ids[start : start + 16 * _PIECE]))


class _Translated:
    """gRPC failures come out as the helper's own errors, or as `Unreachable`."""

    def __init__(self, address: str) -> None:
        self._address = address

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, grpc.RpcError):
            raise self._error(error) from error

    def _error(self, failure: grpc.RpcError) -> UmbelError:
        call = failure if isinstance(failure, grpc.Call) else None
        if call is None:
            return Unreachable(f"the helper at {self._address} gave no answer")
        details = foreign(call.details() or "")
        for key, value in call.trailing_metadata() or ():
            if key == ERROR_KEY:
                return from_code(value if isinstance(value, str) else value.decode(errors="replace"), details)
        waiting = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
        if call.code() in waiting:
            return Unreachable(f"the helper at {self._address} gave no answer: {details}")
        return MalformedMessage(f"the helper at {self._address} failed: {call.code().name} {details}")
