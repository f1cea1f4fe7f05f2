"""The device at its helper: enrolment with a token of the helper's own, and renewal; gRPC, its certificate pinned."""

from __future__ import annotations

from typing import Final

import grpc
import grpc.aio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from umbel.errors import CertificateRefused
from umbel.helper_card import HelperCard
from umbel.participants import ParticipantCertificate, prove
from umbel.v1 import secure_sum_pb2 as pb
from umbel.v1 import secure_sum_pb2_grpc as rpc
from umbel_client.grpc_errors import error_of
from umbel_client.private import Pinned, pin

SECONDS: Final = 30.0


async def enrol_at_helper(
    card: HelperCard, token: str, population: str, now: float, key: Ed25519PrivateKey | None = None
) -> Pinned:
    """Have the helper certify a key for reports.

    Args:
        card: of the helper.
        token: for one device; after a lost answer it may be redeemed again, by the same key only.
        population: of the device.
        now: POSIX seconds.
        key: for reports; None makes one.

    Raises:
        EnrolmentRefused: the token is unknown, used up or too old.
        Unreachable: nobody answers, or not with the pinned certificate.
    """
    key = key or Ed25519PrivateKey.generate()
    request = pb.EnrolParticipantRequest(
        token=token,
        population=population,
        public_key=key.public_key().public_bytes_raw(),
        proof=prove(population, key),
    )
    async with _channel(card) as connection:
        try:
            answer = await rpc.ParticipantServiceStub(connection).EnrolParticipant(request, timeout=SECONDS)
        except grpc.aio.AioRpcError as failure:
            raise error_of(failure, card.address) from failure
    return pin(card, key, _checked(answer.certificate, key), now)


async def renew_at_helper(pinned: Pinned, population: str, now: float) -> Pinned:
    """A new certificate for the same key; raises as `enrol_at_helper`, or `CertificateRefused`."""
    key = Ed25519PrivateKey.from_private_bytes(pinned.key)
    old = pinned.certificate
    request = pb.RenewParticipantRequest(
        population=population,
        certificate=pb.ParticipantCertificate(
            public_key=old.public_key, not_after_ms=old.not_after_ms, signature=old.signature
        ),
        proof=prove(population, key),
    )
    async with _channel(pinned.card) as connection:
        try:
            answer = await rpc.ParticipantServiceStub(connection).RenewParticipant(request, timeout=SECONDS)
        except grpc.aio.AioRpcError as failure:
            raise error_of(failure, pinned.card.address) from failure
    return pinned.renewed(_checked(answer.certificate, key), now)


def _channel(card: HelperCard) -> grpc.aio.Channel:
    return grpc.aio.secure_channel(card.address, grpc.ssl_channel_credentials(card.certificate))


def _checked(message: pb.ParticipantCertificate, key: Ed25519PrivateKey) -> ParticipantCertificate:
    if message.public_key != key.public_key().public_bytes_raw():
        raise CertificateRefused("the helper certified another key; nothing was kept")
    return ParticipantCertificate(message.public_key, message.not_after_ms, message.signature)
