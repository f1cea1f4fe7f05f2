"""Sealing a report so that only its recipient can open it, and only for this task, round and report.

HPKE (RFC 9180) in base mode: DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM, single shot. Everything that the
report belongs to goes into HPKE's `info`, so a sealed report can't be moved to another round, report or key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from umbel.digests import Digest
from umbel.errors import MalformedMessage, SealBroken
from umbel.release import key_id_of
from umbel.v1 import secure_sum_pb2 as pb

SEALED: Final = "umbel-sealed/1"
"""The suite in which the leader opens each update: private on the wire and on disk, not from the leader."""

_HPKE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
OVERHEAD: Final = 32 + 16
"""Bytes that sealing adds: the encapsulated key and the tag."""


@dataclass(frozen=True, slots=True)
class Sealing:
    """How a report is to be sealed, and the public key (X25519, raw) it is sealed to."""

    suite: str
    public_key: bytes

    @property
    def key_id(self) -> str:
        """The short name of the recipient's key."""
        return key_id_of(self.public_key)


@dataclass(frozen=True, slots=True)
class SignedDescriptor:
    """A private round's descriptor as it travels: nothing in it may be believed before `verify_descriptor`."""

    statement: bytes
    leader_signature: bytes
    helper_signature: bytes


def descriptor_to_message(signed: SignedDescriptor) -> pb.SignedDescriptor:
    """Encode a signed descriptor."""
    return pb.SignedDescriptor(
        descriptor=signed.statement,
        leader_signature=signed.leader_signature,
        helper_signature=signed.helper_signature,
    )


def descriptor_from_message(message: pb.SignedDescriptor) -> SignedDescriptor:
    """Decode a signed descriptor, unverified."""
    return SignedDescriptor(message.descriptor, message.leader_signature, message.helper_signature)


@dataclass(frozen=True, slots=True)
class Binding:
    """What a sealed report belongs to."""

    task: str
    round: int
    session_id: str
    report_id: str
    base: Digest
    """The bundle that training started from."""

    def info(self, sealing: Sealing) -> bytes:
        """HPKE's `info`: each part with its length, so that no two bindings share their bytes."""
        parts = (
            sealing.suite, sealing.key_id, self.task, str(self.round), self.session_id, self.report_id, self.base,
        )  # fmt: skip
        return b"".join(len(part).to_bytes(4, "little") + part for part in (text.encode() for text in parts))


def seal(plaintext: bytes, sealing: Sealing, binding: Binding) -> bytes:
    """Seal for the holder of `sealing`'s private key.

    Raises:
        MalformedMessage: a suite this side doesn't know, or a key that isn't one.
    """
    _require_known(sealing)
    return seal_to(sealing.public_key, plaintext, binding.info(sealing))


def open_sealed(sealed: bytes, key: X25519PrivateKey, binding: Binding) -> bytes:
    """Undo `seal`.

    Raises:
        SealBroken: sealed to another key, for another round or report, or changed on the way.
    """
    return open_with(key, sealed, binding.info(Sealing(SEALED, key.public_key().public_bytes_raw())))


def seal_to(public_key: bytes, plaintext: bytes, info: bytes) -> bytes:
    """HPKE, whatever stands in `info`; raises `MalformedMessage` for a key (X25519, raw) that isn't one."""
    try:
        recipient = X25519PublicKey.from_public_bytes(public_key)
        # A point of small order passes as a key, and only fails here, where the secret it would share is known to all.
        return _HPKE.encrypt(plaintext, recipient, info)
    except ValueError as error:
        raise MalformedMessage(f"not an X25519 public key: {error}") from error


def open_with(key: X25519PrivateKey, sealed: bytes, info: bytes) -> bytes:
    """Undo `seal_to`; raises `SealBroken` for another key or `info`, or what was changed on the way."""
    try:
        return _HPKE.decrypt(sealed, key, info)
    except (InvalidTag, ValueError) as error:
        raise SealBroken("what is sealed doesn't open for this round, report and key; nothing was counted") from error


def _require_known(sealing: Sealing) -> None:
    if sealing.suite != SEALED:
        raise MalformedMessage(f"suite {sealing.suite!r} is not known here; update umbel")
