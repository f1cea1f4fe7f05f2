"""The devices that the helper vouches for: let in by its own tokens, certified by its own authority."""

from __future__ import annotations

import secrets

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from umbel.clock import DAY, Clock
from umbel.digests import digest_of
from umbel.errors import CertificateRefused, EnrolmentRefused, NotFound
from umbel.fields import name
from umbel.participants import KEY_BYTES, ParticipantCertificate, issue, require_proof
from umbel_server.helper.records import Records


class People:
    """Tokens, certificates, revocations."""

    def __init__(self, records: Records, authority: Ed25519PrivateKey, clock: Clock, certificate_days: float) -> None:
        self._records = records
        self._authority = authority
        self._clock = clock
        self._life = certificate_days * DAY

    @property
    def authority(self) -> bytes:
        """The authority's public key (Ed25519, raw)."""
        return self._authority.public_key().public_bytes_raw()

    def new_token(self, population: str, life_seconds: float = 7 * DAY) -> str:
        """A token for one device, hexadecimal as it may stand on a command line; only its digest is kept."""
        token = secrets.token_hex(24)
        expiry = self._clock.now() + life_seconds
        self._records.add_token(digest_of(token.encode()), name(population, "population"), expiry)
        return token

    def enrol(self, token: str, population: str, public_key: bytes, proof: bytes) -> ParticipantCertificate:
        """Let a device in; its token may be redeemed again by the same key only.

        Raises:
            EnrolmentRefused: the token or the proof doesn't do.
            CertificateRefused: the key was revoked.
        """
        _require_key(public_key)
        require_proof(population, public_key, proof)
        digest = digest_of(token.encode())
        found = self._records.token(digest)
        if found is None or found[0] != population or found[1] < self._clock.now():
            raise EnrolmentRefused("the helper doesn't know this token for this population, or it is too old")
        if found[2] is not None and found[2] != public_key:
            raise EnrolmentRefused("the token is used up; ask the helper's operator for another")
        self._records.enrol(digest, public_key, population, self._clock.now())
        if not self._records.is_participant(public_key):
            raise CertificateRefused("this participant was revoked")
        return self._certify(population, public_key)

    def renew(self, population: str, certificate: ParticipantCertificate, proof: bytes) -> ParticipantCertificate:
        """A new certificate for the same key, while the old one is good.

        Raises:
            CertificateRefused: the old one isn't, or its holder was revoked.
            EnrolmentRefused: the request doesn't prove the key.
        """
        certificate.verify(population, self.authority, self._clock.now())
        require_proof(population, certificate.public_key, proof)
        if not self._records.is_participant(certificate.public_key):
            raise CertificateRefused("this participant was revoked")
        return self._certify(population, certificate.public_key)

    def holder_of(self, token: str) -> bytes:
        """The key of the device that redeemed a token; raises `NotFound`."""
        found = self._records.token(digest_of(token.encode()))
        if found is None or found[2] is None:
            raise NotFound("no device has redeemed this token")
        return found[2]

    def revoke(self, public_key: bytes) -> None:
        """Shut a participant out of all sums from now on; raises `NotFound`."""
        if not self._records.revoke(public_key, self._clock.now()):
            raise NotFound("no participant has this key, or it was revoked before")

    def _certify(self, population: str, public_key: bytes) -> ParticipantCertificate:
        return issue(population, public_key, self._clock.now() + self._life, self._authority)


def _require_key(public_key: bytes) -> None:
    if len(public_key) != KEY_BYTES:
        raise EnrolmentRefused(f"a participant's key has {KEY_BYTES} bytes, not {len(public_key)}")
