"""Offers: which device may take which release now. Signed online, short-lived, for one device each.

What is authentic stands in the release listing (`umbel.listing`); an offer only points into it. Whoever steals the key
that signs offers can hurry, delay or go back among listed releases, and can't make one.
"""

from __future__ import annotations

from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.message import DecodeError

from umbel import fields
from umbel.digests import Digest, parse_digest
from umbel.errors import Expired, MalformedMessage, NotAllowed
from umbel.release import key_id_of
from umbel.signatures import verify_signature
from umbel.v1 import release_pb2 as pb

LABEL = b"umbel-offer/1\0"


@dataclass(frozen=True, slots=True)
class Offer:
    """A device's permission to move to a release."""

    execution: str
    """Names this device's move; the device answers under it, and takes it once."""
    device: str
    model: str
    number: int
    bundle: Digest
    issued_at: float
    expires_at: float
    """POSIX seconds, to the millisecond."""


@dataclass(frozen=True, slots=True)
class SignedOffer:
    """An offer as it travels: nothing in it may be believed before `verify_offer`."""

    statement: bytes
    key_id: str
    signature: bytes


def sign_offer(offer: Offer, key: Ed25519PrivateKey) -> SignedOffer:
    """Sign an offer's own bytes."""
    statement = pb.Offer(
        execution=offer.execution,
        device=offer.device,
        model=offer.model,
        number=offer.number,
        bundle_digest=offer.bundle,
        issued_at_ms=round(offer.issued_at * 1000),
        expires_at_ms=round(offer.expires_at * 1000),
    ).SerializeToString(deterministic=True)
    public = key.public_key().public_bytes_raw()
    return SignedOffer(statement, key_id_of(public), key.sign(LABEL + statement))


def verify_offer(signed: SignedOffer, public_key: bytes, device: str, now: float) -> Offer:
    """The offer inside, once it is shown to be authentic, meant for this device, and in time.

    Raises:
        SignatureInvalid: not signed by the pinned key, or changed on the way.
        MalformedMessage: signed, but not an offer.
        NotAllowed: for another device.
        Expired: played back, or held back, until after its end.
    """
    verify_signature(public_key, signed.signature, LABEL + signed.statement, "the offer")
    offer = offer_of_statement(signed.statement)
    if offer.device != device:
        raise NotAllowed(f"an offer for device {offer.device}; this is {device}")
    if now >= offer.expires_at:
        raise Expired(
            f"the offer of release {offer.number} has expired; "
            "the next visit brings another one, if this machine's clock is right"
        )
    return offer


def offer_of_statement(statement: bytes) -> Offer:
    """Decode an offer whose signature has been checked, or that was signed here; raises `MalformedMessage`."""
    try:
        message = pb.Offer.FromString(statement)
    except DecodeError as error:
        raise MalformedMessage(f"not an offer: {error}") from error
    return Offer(
        execution=fields.name(message.execution, "execution"),
        device=fields.name(message.device, "device"),
        model=fields.name(message.model, "model"),
        number=fields.count(message.number, "release number", least=1),
        bundle=parse_digest(message.bundle_digest),
        issued_at=message.issued_at_ms / 1000,
        expires_at=message.expires_at_ms / 1000,
    )


def offer_to_message(signed: SignedOffer) -> pb.SignedOffer:
    """Encode a signed offer."""
    return pb.SignedOffer(offer=signed.statement, key_id=signed.key_id, signature=signed.signature)


def offer_from_message(message: pb.SignedOffer) -> SignedOffer:
    """Decode a signed offer, unverified."""
    if not message.offer or not message.signature:
        raise MalformedMessage("a signed offer without a statement or a signature")
    return SignedOffer(message.offer, fields.text(message.key_id, "key id"), message.signature)
