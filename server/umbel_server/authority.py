"""Certificate authorities: who may call which port.

Three of them, each with a key of its own, so that what one signs opens nothing else: the server authority signs the
coordinator's own certificates, the device authority signs devices, the operator authority signs operators. Kept in
files on the coordinator's machine they are *development trust*: whoever reads that machine can make devices.

Bytes in, verified `Peer` or `CertificateRefused` out; no IO, no clock.
"""

from __future__ import annotations

import datetime
import functools
import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from umbel.clock import DAY
from umbel.errors import CertificateRefused, EnrolmentRefused, MalformedMessage
from umbel.identity import DeviceId, id_of_key

AUTHORITY_SECONDS: Final = 10 * 365 * DAY
SERVER_SECONDS: Final = 365 * DAY
BACKDATED_SECONDS: Final = DAY
"""A certificate counts from a while before its making: for machines whose clocks run behind, and for this one's, which
may have been ahead, by a time zone say: until that hour, who was given one would be refused."""
_URI = re.compile(r"umbel://(?P<realm>[A-Za-z0-9][A-Za-z0-9._-]{0,99})/(?P<kind>device|operator)/(?P<id>[0-9a-f]{32})")
_HOST = re.compile(r"(\*\.)?(?!-)[A-Za-z0-9_-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9_-]{1,63}(?<!-))*")
_LONGEST_HOST: Final = 253
_CURVES = (ec.SECP256R1, ec.SECP384R1)


class PeerKind(Enum):
    """What a certificate's holder is."""

    DEVICE = "device"
    OPERATOR = "operator"


@dataclass(frozen=True, slots=True)
class Peer:
    """The holder of a verified certificate."""

    id: DeviceId
    kind: PeerKind
    realm: str
    """A device's population; `operators` for an operator."""
    not_before: float
    not_after: float
    """POSIX seconds."""


@dataclass(frozen=True, slots=True)
class Authority:
    """One certificate authority: its certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def __repr__(self) -> str:
        return f"Authority({self.certificate.subject.rfc4514_string()!r})"

    @classmethod
    def create(cls, name: str, now: float) -> Authority:
        """A new self-signed authority, good for ten years from `now`."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = _subject(name)
        builder = (
            _builder(subject, subject, key.public_key(), now, AUTHORITY_SECONDS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs_certificates=True), critical=True)
        )
        return cls(builder.sign(key, hashes.SHA256()), key)

    @classmethod
    def from_pem(cls, certificate: bytes, key: bytes) -> Authority:
        """Read an authority's two files.

        Raises:
            CertificateRefused: not a certificate and its key.
        """
        try:
            loaded = serialization.load_pem_private_key(key, password=None)
            parsed = x509.load_pem_x509_certificate(certificate)
        except (ValueError, TypeError) as error:
            raise CertificateRefused(f"not an authority's certificate and key: {error}") from error
        if not isinstance(loaded, ec.EllipticCurvePrivateKey) or id_of_key(loaded.public_key()) != id_of_key(
            parsed.public_key()
        ):
            raise CertificateRefused("an authority's key doesn't belong to its certificate; restore both together")
        return cls(parsed, loaded)

    @property
    def certificate_pem(self) -> bytes:
        """What others pin, in PEM."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        """The secret, PKCS #8 in PEM; for a file with mode 0600."""
        return key_to_pem(self.key)

    def issue_server(self, public_key: ec.EllipticCurvePublicKey, names: Iterable[str], now: float) -> bytes:
        """A certificate for the coordinator's own ports, `SERVER_SECONDS` long, as a PEM chain.

        Args:
            public_key: the port's key.
            names: host names and addresses by which others reach it; at least one.
            now: POSIX seconds.

        Raises:
            MalformedMessage: a name that no server can have.
        """
        alternatives = [general_name(name) for name in dict.fromkeys(names)]
        builder = self._leaf(_subject("umbel coordinator"), public_key, now, SERVER_SECONDS)
        return self._chain(builder, alternatives, ExtendedKeyUsageOID.SERVER_AUTH)

    def issue(
        self, public_key: ec.EllipticCurvePublicKey, kind: PeerKind, realm: str, now: float, life: float
    ) -> bytes:
        """A certificate to call with, as a PEM chain: the id is the key's own, whatever was asked for.

        Args:
            public_key: the caller's key.
            kind: device or operator.
            realm: a device's population; `operators` for operators.
            now: POSIX seconds.
            life: seconds from `now` to the certificate's end.
        """
        identity = id_of_key(public_key)
        uri = x509.UniformResourceIdentifier(f"umbel://{realm}/{kind.value}/{identity}")
        return self._chain(
            self._leaf(_subject(identity), public_key, now, life), [uri], ExtendedKeyUsageOID.CLIENT_AUTH
        )

    def renew(self, pem: bytes, kind: PeerKind, now: float, life: float) -> bytes:
        """A certificate from `now` on for the holder of one of ours, which may have ended; a PEM chain.

        Raises:
            CertificateRefused: foreign, malformed, or for another kind of caller.
        """
        peer = self._peer(pem, kind)
        key = x509.load_pem_x509_certificate(pem).public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)  # noqa: S101 - it was signed as one
        return self.issue(key, kind, peer.realm, now, life)

    def verify(self, pem: bytes, kind: PeerKind, now: float) -> Peer:
        """Whose certificate this is, once it has been shown to be one of ours, in time, and for `kind`.

        Raises:
            CertificateRefused: foreign, malformed, outside its time, or for another kind of caller.
        """
        peer = self._peer(pem, kind)
        if not peer.not_before <= now < peer.not_after:
            raise CertificateRefused("the certificate is outside its time; renew it, or enrol again if it has ended")
        return peer

    def _peer(self, pem: bytes, kind: PeerKind) -> Peer:
        peer = _read_peer(self.certificate, pem)
        if peer.kind is not kind:
            raise CertificateRefused(f"this is for a {kind.value}'s certificate, not for a {peer.kind.value}'s")
        return peer

    def _leaf(
        self, subject: x509.Name, public_key: ec.EllipticCurvePublicKey, now: float, life: float
    ) -> x509.CertificateBuilder:
        builder = _builder(subject, self.certificate.subject, public_key, now, life)
        return (
            builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()),
                critical=False,
            )
        )

    def _chain(
        self, builder: x509.CertificateBuilder, names: list[x509.GeneralName], purpose: x509.ObjectIdentifier
    ) -> bytes:
        certificate = (
            builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=True)
            .sign(self.key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM) + self.certificate_pem


def end_of(pem: bytes) -> float:
    """When a certificate ends, in POSIX seconds; raises `MalformedMessage` if it isn't one."""
    try:
        return x509.load_pem_x509_certificate(pem).not_valid_after_utc.timestamp()
    except ValueError as error:
        raise MalformedMessage("not a certificate (PEM)") from error


def key_to_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key as PKCS #8 in PEM, unencrypted."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def key_from_pem(pem: bytes) -> ec.EllipticCurvePrivateKey:
    """Undo `key_to_pem`; raises `MalformedMessage`."""
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError) as error:
        raise MalformedMessage(f"not a private key: {error}; delete its file to begin anew") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise MalformedMessage("not an elliptic curve key; delete its file to begin anew")
    return key


def make_request(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A certificate request (PKCS #10, DER) that proves possession of `key`."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(_subject(id_of_key(key.public_key())))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def key_of_request(request: bytes) -> ec.EllipticCurvePublicKey:
    """The key of a certificate request (PKCS #10, DER), once its own signature has been checked.

    Raises:
        MalformedMessage: not a certificate request.
        EnrolmentRefused: it doesn't prove possession of the key, or the key isn't EC P-256 or P-384.
    """
    try:
        parsed = x509.load_der_x509_csr(request)
        key = parsed.public_key()
        # The byte before the signature says how many of its last bits don't count; the parser lets any pass that are 0.
        proven = parsed.is_signature_valid and request.endswith(b"\0" + parsed.signature)
    except Exception as error:  # the parser raises of many kinds
        raise MalformedMessage("not a certificate request; send PKCS #10 in DER") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, _CURVES):
        raise EnrolmentRefused("the certificate request's key must be EC P-256 or P-384")
    if not proven:
        raise EnrolmentRefused("the certificate request isn't signed by its own key")
    return key


@functools.lru_cache(maxsize=4096)
def _read_peer(authority: x509.Certificate, pem: bytes) -> Peer:
    """Cached, because a device's calls all carry the same certificate; time is checked by the caller, each time."""
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        certificate.verify_directly_issued_by(authority)
        purposes = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound) as error:
        raise CertificateRefused("the certificate isn't from this coordinator's authority; enrol first") from error
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    matched = _URI.fullmatch(uris[0]) if len(uris) == 1 else None
    identity = id_of_key(certificate.public_key())
    if matched is None or matched["id"] != identity or list(purposes) != [ExtendedKeyUsageOID.CLIENT_AUTH]:
        raise CertificateRefused("the certificate isn't one to call with")
    return Peer(
        identity,
        PeerKind(matched["kind"]),
        matched["realm"],
        certificate.not_valid_before_utc.timestamp(),
        certificate.not_valid_after_utc.timestamp(),
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, now: float, life: float
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        # Of a short life no more than as much again: a device renews when two thirds of the whole are over.
        .not_valid_before(_instant(now - min(BACKDATED_SECONDS, life)))
        .not_valid_after(_instant(now + life))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _instant(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(int(seconds), datetime.UTC)


def general_name(name: str) -> x509.GeneralName:
    """A name that a server is reached by, as it stands in certificates; raises `MalformedMessage`."""
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    if not _HOST.fullmatch(name) or len(name) > _LONGEST_HOST:
        raise MalformedMessage(f"{name!r} is no host name and no address, such as fleet.example.org or 192.0.2.7")
    return x509.DNSName(name)


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )
