"""The coordinator's release key: what it signs, a device may run."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from umbel.descriptor import sign_as_leader
from umbel.errors import MalformedMessage
from umbel.messages import release_to_bytes
from umbel.offer import Offer, SignedOffer, sign_offer
from umbel.release import Release, SignedRelease, key_id_of, sign_statement
from umbel_server.helper.port import LeaderSigner


class ReleaseSigner:
    """Signs releases. On the coordinator's own machine it is *development trust*: who reads it can release anything."""

    __slots__ = ("_key",)

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key

    @classmethod
    def generate(cls) -> ReleaseSigner:
        """A new key, from the operating system's randomness."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_bytes(cls, raw: bytes) -> ReleaseSigner:
        """Read what `to_bytes` wrote.

        Raises:
            MalformedMessage: not 32 bytes.
        """
        try:
            return cls(Ed25519PrivateKey.from_private_bytes(raw))
        except ValueError as error:
            raise MalformedMessage(f"not an Ed25519 private key: {error}") from error

    def to_bytes(self) -> bytes:
        """The secret itself, 32 bytes, for a file with mode 0600."""
        return self._key.private_bytes_raw()

    @property
    def public_key(self) -> bytes:
        """What devices pin: raw, 32 bytes."""
        return self._key.public_key().public_bytes_raw()

    def sign(self, release: Release) -> SignedRelease:
        """Sign a release's own bytes."""
        return sign_statement(release_to_bytes(release), self._key)

    def sign_descriptor(self, statement: bytes) -> bytes:
        """Sign a private round's descriptor."""
        return sign_as_leader(statement, self._key)

    def for_helper(self) -> LeaderSigner:
        """What the helper knows this coordinator by."""
        return LeaderSigner(self._key)

    def sign_offer(self, offer: Offer) -> SignedOffer:
        """Sign an offer's own bytes."""
        return sign_offer(offer, self._key)

    def __repr__(self) -> str:
        return f"ReleaseSigner({key_id_of(self.public_key)})"
