"""The small coordinator behind real sockets, with certificates of its own, and the faults that a test asks for."""

from __future__ import annotations

import datetime
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.client.coordinator import POPULATION, Coordinator
from umbel.errors import ERROR_KEY, EnrolmentRefused, UmbelError
from umbel.identity import id_of_key
from umbel.messages import report_begin_from_message, window_to_message
from umbel.v1 import device_pb2 as pb
from umbel.v1 import device_pb2_grpc as rpc
from umbel_client.enrolment import EnrolmentCode

CHUNK = 4096


@dataclass
class DeviceAuthority:
    """Signs device certificates, each for `life` seconds from `born` seconds ago on."""

    born: float = 0.0
    life: float = 3600.0
    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))

    @property
    def subject(self) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test device authority")])

    def certificate(self) -> bytes:
        builder = self._builder(self.subject, self.key.public_key(), -60.0, 86_400.0)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        return _pem(builder.sign(self.key, hashes.SHA256()))

    def issue(self, request: bytes) -> bytes:
        wanted = x509.load_der_x509_csr(request)
        assert wanted.is_signature_valid
        public_key = wanted.public_key()
        assert isinstance(public_key, ec.EllipticCurvePublicKey)
        builder = self._builder(wanted.subject, public_key, -self.born, self.life)
        return _pem(builder.sign(self.key, hashes.SHA256()))

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, start: float, life: float
    ) -> x509.CertificateBuilder:
        begin = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=start)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(begin + datetime.timedelta(seconds=life))
        )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


@dataclass
class Peer:
    """A running test coordinator, and what it saw."""

    coordinator: Coordinator
    server_authority: bytes
    devices: DeviceAuthority
    enrol_address: str = ""
    device_address: str = ""
    tokens: set[str] = field(default_factory=lambda: {"token-1"})
    callers: list[str] = field(default_factory=list)
    """Device ids, by certificate, in the order of their calls."""
    renewals: int = 0
    fetch_fault: str = ""
    """"endless", "flipped", "silent" or a status to abort with."""
    fetch_code: str = ""
    """The error code that such a status comes with; "" for none."""
    hang_up_after: int = -1
    """End fetch streams after so many bytes, once."""

    def code(self, token: str = "token-1") -> EnrolmentCode:
        return EnrolmentCode(self.enrol_address, token, self.server_authority)


async def _abort(context: Any, error: UmbelError) -> None:
    await context.abort(
        grpc.StatusCode[error.status.name], str(error), trailing_metadata=(("umbel-error", error.code),)
    )


class _Enrolment(rpc.EnrolmentServiceServicer):
    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    async def Enrol(self, request: pb.EnrolRequest, context: Any) -> pb.EnrolResponse:  # noqa: N802
        peer = self._peer
        if request.token not in peer.tokens:
            await _abort(context, EnrolmentRefused("this token is unknown or was used; ask for a new one"))
        peer.tokens.discard(request.token)
        return pb.EnrolResponse(
            certificate_chain=peer.devices.issue(request.certificate_request),
            population=POPULATION,
            release_key=peer.coordinator.release_key.public_key().public_bytes_raw(),
            server_authority=peer.server_authority,
            device_address=":" + peer.device_address.rpartition(":")[2],
        )


class _Devices(rpc.DeviceServiceServicer):
    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    def _caller(self, context: Any) -> None:
        pem = context.auth_context()["x509_pem_cert"][0]
        self._peer.callers.append(id_of_key(x509.load_pem_x509_certificate(pem).public_key()))

    async def Renew(self, request: pb.RenewRequest, context: Any) -> pb.RenewResponse:  # noqa: N802
        self._caller(context)
        self._peer.renewals += 1
        self._peer.devices.born = 0.0
        return pb.RenewResponse(certificate_chain=self._peer.devices.issue(request.certificate_request))

    async def CheckIn(self, request: pb.CheckInRequest, context: Any) -> pb.CheckInResponse:  # noqa: N802
        self._caller(context)
        try:
            return self._peer.coordinator.check_in(request)
        except UmbelError as error:
            await _abort(context, error)
            raise

    async def Fetch(self, request: pb.FetchRequest, context: Any) -> AsyncIterator[pb.FetchResponse]:  # noqa: N802
        peer = self._peer
        if peer.fetch_fault in grpc.StatusCode.__members__:
            told = ((ERROR_KEY, peer.fetch_code),) if peer.fetch_code else ()
            await context.abort(grpc.StatusCode[peer.fetch_fault], "as the test asked", told)
        data = peer.coordinator.read(request.digest, request.offset)
        if peer.fetch_fault == "flipped":
            data = bytes([data[0] ^ 1]) + data[1:]
        sent = 0
        while peer.fetch_fault == "endless" or sent < len(data):
            if 0 <= peer.hang_up_after <= sent:
                peer.hang_up_after = -1
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the line went dead")
            chunk = data[sent : sent + CHUNK] or bytes(CHUNK)
            yield pb.FetchResponse(total_size=request.offset + len(data), chunk=chunk)
            sent += len(chunk)

    async def Report(self, requests: AsyncIterator[pb.ReportRequest], context: Any) -> Any:  # noqa: N802
        coordinator = self._peer.coordinator
        begin = report_begin_from_message((await anext(requests)).begin)
        try:
            offset = coordinator.begin(begin)
            yield pb.ReportResponse(proceed=pb.ReportProceed(offset=offset))
            while offset < begin.sealed_size:
                chunk = (await anext(requests)).chunk
                coordinator.append(begin, chunk)
                offset += len(chunk)
            window = coordinator.finish(begin)
        except UmbelError as error:
            await _abort(context, error)
        else:
            yield pb.ReportResponse(accepted=pb.ReportAccepted(next=window_to_message(window)))


@asynccontextmanager
async def serving(coordinator: Coordinator) -> AsyncIterator[Peer]:
    """A coordinator on two loopback ports, until the block ends."""
    authority = trustme.CA()
    own = authority.issue_cert("localhost", "127.0.0.1")
    pair = (own.private_key_pem.bytes(), b"".join(part.bytes() for part in own.cert_chain_pems))
    peer = Peer(coordinator, authority.cert_pem.bytes(), DeviceAuthority())
    # One address, and nobody else's: gRPC would share a port that another test's server has found in the other family.
    enrol, devices = (grpc.aio.server(options=[("grpc.so_reuseport", 0)]) for _ in range(2))
    rpc.add_EnrolmentServiceServicer_to_server(_Enrolment(peer), enrol)
    rpc.add_DeviceServiceServicer_to_server(_Devices(peer), devices)
    mutual = grpc.ssl_server_credentials([pair], peer.devices.certificate(), require_client_auth=True)
    peer.enrol_address = f"127.0.0.1:{enrol.add_secure_port('127.0.0.1:0', grpc.ssl_server_credentials([pair]))}"
    peer.device_address = f"127.0.0.1:{devices.add_secure_port('127.0.0.1:0', mutual)}"
    await enrol.start()
    await devices.start()
    try:
        yield peer
    finally:
        await enrol.stop(0)
        await devices.stop(0)
