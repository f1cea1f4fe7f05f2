"""Becoming a device: a key that is made here and stays here, and a certificate for it.

The operator hands out one enrolment string (or server, token and authority apart); the coordinator's authority is
known before the first byte is sent, so the token goes to nobody else.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.x509.oid import NameOID

from umbel.enrolment_code import EnrolmentCode as EnrolmentCode
from umbel.errors import CertificateRefused, EnrolmentRefused, MalformedMessage, NotFound, WrongState
from umbel.fields import name
from umbel.identity import DeviceId, id_of_key
from umbel.release import STABLE
from umbel.v1 import device_pb2 as pb
from umbel.v1 import device_pb2_grpc as rpc
from umbel.visit import Enrolment
from umbel_client.files import Disk
from umbel_client.grpc_errors import error_of

ENROL_SECONDS: Final = 30.0
RENEW_AT: Final = 2 / 3
"""Share of its life after which a certificate is renewed."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this device is, and whom it trusts: kept in its home, the key readable by its user only."""

    private_key: bytes
    """EC P-256, PEM."""
    certificate_chain: bytes
    server_authority: bytes
    release_key: bytes
    """Ed25519, raw."""
    population: str
    device_address: str
    channel: str = STABLE
    release_root: bytes = b""
    """TUF root metadata that was pinned at enrolment; empty where the release key alone is trusted."""
    device_id: DeviceId = field(init=False)
    """That belongs to the key; worked out once, since parsing a key costs as much as the rest of opening a device."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "device_id", id_of_key(_key(self.private_key).public_key()))

    def __repr__(self) -> str:
        return f"Identity(device={self.device_id!r}, population={self.population!r})"

    def renewal_due(self, now: float) -> bool:
        """Whether two thirds of the certificate's life are over.

        Raises:
            CertificateRefused: all of it is over.
        """
        begin, end = validity(self.certificate_chain)
        if now >= end:
            raise CertificateRefused(
                "this device's certificate has expired, by this machine's clock; "
                "if that is right, enrol it again with a new token"
            )
        return now >= begin + RENEW_AT * (end - begin)

    def certificate_request(self) -> bytes:
        """A request (PKCS #10, DER) that proves the key."""
        return certificate_request(_key(self.private_key))


def new_key() -> bytes:
    """A new private key, PEM; made on the device and never sent."""
    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def certificate_request(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A request (PKCS #10, DER) that proves `key`."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, id_of_key(key.public_key()))])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.DER)


def validity(chain: bytes) -> tuple[float, float]:
    """First and last moment of a certificate, in POSIX seconds; raises `CertificateRefused` if it is none."""
    try:
        certificate = x509.load_pem_x509_certificate(chain)
    except ValueError as error:
        raise CertificateRefused(f"not a certificate: {error}") from error
    return certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()


def require_own(chain: bytes, private_key: bytes) -> None:
    """Raise `CertificateRefused` unless the chain's first certificate is for this key."""
    try:
        certified = x509.load_pem_x509_certificate(chain).public_key()
    except ValueError as error:
        raise CertificateRefused(f"the coordinator sent no certificate: {error}") from error
    if id_of_key(certified) != id_of_key(_key(private_key).public_key()):
        raise CertificateRefused("the coordinator sent a certificate for another key; nothing was kept")


async def request_enrolment(code: EnrolmentCode, private_key: bytes, attestation: bytes = b"") -> Enrolment:
    """Redeem an enrolment code for a certificate, over TLS with the code's authority pinned.

    Raises:
        CertificateRefused: whoever answers isn't the coordinator that the code names.
        EnrolmentRefused: the token is unknown, used up or too old.
        Unreachable: nobody answers.
    """
    message = pb.EnrolRequest(
        token=code.token, certificate_request=certificate_request(_key(private_key)), attestation=attestation
    )
    credentials = grpc.ssl_channel_credentials(code.authority)
    async with grpc.aio.secure_channel(code.server, credentials) as connection:
        stub = rpc.EnrolmentServiceStub(connection)
        try:
            answer = await stub.Enrol(message, timeout=ENROL_SECONDS)
        except grpc.aio.AioRpcError as failure:
            raise error_of(failure, code.server) from failure
    return _checked(answer, code.server, private_key)


def _checked(answer: pb.EnrolResponse, server: str, private_key: bytes) -> Enrolment:
    require_own(answer.certificate_chain, private_key)
    try:
        Ed25519PublicKey.from_public_bytes(answer.release_key)
    except ValueError as error:
        raise EnrolmentRefused(f"the coordinator sent no usable release key: {error}") from error
    host, _, port = answer.device_address.rpartition(":")
    if not port.isdigit():
        raise MalformedMessage(f"the coordinator's device address {answer.device_address!r} has no port")
    return Enrolment(
        certificate_chain=answer.certificate_chain,
        population=name(answer.population, "population"),
        release_key=answer.release_key,
        server_authority=answer.server_authority,
        device_address=f"{host or server.rpartition(':')[0]}:{port}",
        release_root=answer.release_root,
    )


def identity_of(enrolment: Enrolment, private_key: bytes, channel: str = STABLE) -> Identity:
    """What the device keeps of its enrolment."""
    return Identity(
        private_key=private_key,
        certificate_chain=enrolment.certificate_chain,
        server_authority=enrolment.server_authority,
        release_key=enrolment.release_key,
        population=enrolment.population,
        device_address=enrolment.device_address,
        channel=channel,
        release_root=enrolment.release_root,
    )


_FILE: Final = "identity.json"


def save_identity(home: Path, identity: Identity, disk: Disk | None = None) -> None:
    """Keep the identity in `home`, in one step, readable by its user only."""
    tree = {
        "private_key": identity.private_key.decode(),
        "certificate_chain": identity.certificate_chain.decode(),
        "server_authority": identity.server_authority.decode(),
        "release_key": identity.release_key.hex(),
        "population": identity.population,
        "device_address": identity.device_address,
        "channel": identity.channel,
        "release_root": identity.release_root.decode(),
    }
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    (disk or Disk()).write(home / _FILE, json.dumps(tree, indent=1).encode())


def load_identity(home: Path) -> Identity:
    """The identity in `home`.

    Raises:
        NotFound: this home isn't enrolled.
        MalformedMessage: its file is damaged.
    """
    try:
        tree = json.loads((home / _FILE).read_bytes())
        return Identity(
            private_key=tree["private_key"].encode(),
            certificate_chain=tree["certificate_chain"].encode(),
            server_authority=tree["server_authority"].encode(),
            release_key=bytes.fromhex(tree["release_key"]),
            population=tree["population"],
            device_address=tree["device_address"],
            channel=tree["channel"],
            release_root=tree.get("release_root", "").encode(),
        )
    except FileNotFoundError:
        raise NotFound(f"{home} isn't enrolled; run `umbel-device enrol` first") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MalformedMessage(f"{home / _FILE} is damaged ({error!r}); enrol again") from error


class IdentityKeeper:
    """The identity that is in use now: whoever connects asks here, so that a renewed certificate is used at once."""

    def __init__(self, home: Path, identity: Identity, disk: Disk) -> None:
        self._home = home
        self._disk = disk
        self.current = identity

    def require_current(self) -> None:
        """Raise `WrongState` if this home was enrolled anew since: what is kept here must not take that one's place."""
        with suppress(NotFound, MalformedMessage):
            on_disk = load_identity(self._home)
            if on_disk.private_key != self.current.private_key:
                raise WrongState(f"{self._home} was enrolled anew, as {on_disk.device_id}; start this process again")

    def renewed(self, chain: bytes) -> None:
        """Keep a new certificate chain; raises `CertificateRefused` if it is for another key."""
        require_own(chain, self.current.private_key)
        self.current = replace(self.current, certificate_chain=chain)
        save_identity(self._home, self.current, self._disk)


def _key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(pem, None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise MalformedMessage("a device's key must be an elliptic curve key; enrol again")
    return key
