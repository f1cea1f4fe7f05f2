"""Who may take part in a private round: keys that the helper's own authority vouches for.

The leader lets devices in at its gateway; if it alone did, it could fill a cohort with devices of its own and learn
the one update that isn't. So the helper keeps an authority too, and gives each device that it knows a small certificate
for a key used for nothing else: the helper sees that key and never the device's name at the leader.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from umbel.errors import CertificateRefused, EnrolmentRefused, SignatureInvalid
from umbel.signatures import verify_signature

_CERTIFICATE: Final = b"umbel-participant/1/certificate\0"
_PROOF: Final = b"umbel-participant/1/proof\0"
KEY_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64


@dataclass(frozen=True, slots=True)
class ParticipantCertificate:
    """A helper's word that this key belongs to a device of the population, until then."""

    public_key: bytes
    """Ed25519, raw."""
    not_after_ms: int
    signature: bytes

    def verify(self, population: str, authority: bytes, now: float) -> None:
        """Check it against the authority's public key (Ed25519, raw).

        Raises:
            CertificateRefused: another authority's, another population's, changed, or expired.
        """
        if now * 1000 > self.not_after_ms:
            raise CertificateRefused("the participant's certificate has expired; let the device renew it")
        try:
            verify_signature(authority, self.signature, _statement(population, self), "a participant's certificate")
        except SignatureInvalid as error:
            raise CertificateRefused("the participant's certificate isn't from the helper's authority") from error


def issue(population: str, public_key: bytes, not_after: float, authority: Ed25519PrivateKey) -> ParticipantCertificate:
    """Certify a key until `not_after` (POSIX seconds)."""
    unsigned = ParticipantCertificate(public_key, int(not_after * 1000), b"")
    return ParticipantCertificate(
        unsigned.public_key, unsigned.not_after_ms, authority.sign(_statement(population, unsigned))
    )


def prove(population: str, key: Ed25519PrivateKey) -> bytes:
    """Show, when enrolling, that one holds the private half."""
    return key.sign(_PROOF + _part(population.encode()) + key.public_key().public_bytes_raw())


def require_proof(population: str, public_key: bytes, proof: bytes) -> None:
    """Raise `EnrolmentRefused` unless `prove` made this proof."""
    try:
        verify_signature(public_key, proof, _PROOF + _part(population.encode()) + public_key, "the request")
    except SignatureInvalid as error:
        raise EnrolmentRefused("the request doesn't prove that the device holds the key") from error


def _statement(population: str, certificate: ParticipantCertificate) -> bytes:
    expiry = certificate.not_after_ms.to_bytes(8, "little", signed=True)
    return _CERTIFICATE + _part(population.encode()) + certificate.public_key + expiry


def _part(data: bytes) -> bytes:
    return len(data).to_bytes(4, "little") + data
