"""A whole coordinator on real sockets, in a thread of this process, and callers with real certificates."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import grpc
from cryptography.hazmat.primitives.asymmetric import ec

from tests.databases import new_sqlite
from umbel import messages
from umbel.clock import SystemClock
from umbel.digests import digest_of
from umbel.errors import ERROR_KEY, UmbelError, from_code
from umbel.identity import DeviceId, id_of_key
from umbel.messages import update_to_bytes
from umbel.randomness import generator
from umbel.release import verify_statement
from umbel.sealing import SEALED, Binding, seal
from umbel.update import Update
from umbel.v1 import admin_pb2_grpc, device_pb2, device_pb2_grpc
from umbel.visit import Assignment, CheckIn, CheckInReply, ReportBegin
from umbel.weights import Weights
from umbel_models.zoo import bundle_path
from umbel_server.app import Parts, Server, build
from umbel_server.authority import key_to_pem, make_request
from umbel_server.folder import Folder
from umbel_server.identity import Addresses, Identity
from umbel_server.settings import Settings, load_settings

T = TypeVar("T")
POPULATION, MODEL, TASK = "wrists", "smartwatch", "learn"


@dataclass
class MovedClock:
    """The machine's clock (TLS reads that one), moved by as much as a test says."""

    ahead: float = 0.0

    def now(self) -> float:
        return SystemClock().now() + self.ahead


@dataclass
class Live:
    """A running coordinator."""

    settings: Settings
    parts: Parts
    addresses: Addresses
    clock: MovedClock
    loop: asyncio.AbstractEventLoop
    channels: list[grpc.Channel] = field(default_factory=list)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do something on the coordinator's own loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    def do(self, function: Callable[[], T]) -> T:
        """Call something on the coordinator's own loop."""

        async def work() -> T:
            return function()

        return self.run(work())

    def channel(self, address: str, key: bytes | None = None, certificate: bytes | None = None) -> grpc.Channel:
        """A TLS channel that trusts the coordinator's authority."""
        pinned = self.parts.authorities.server.certificate_pem
        credentials = grpc.ssl_channel_credentials(pinned, key, certificate)
        self.channels.append(grpc.secure_channel(address, credentials, options=(("grpc.enable_http_proxy", 0),)))
        return self.channels[-1]

    def enrolment(self) -> device_pb2_grpc.EnrolmentServiceStub:
        return device_pb2_grpc.EnrolmentServiceStub(self.channel(self.addresses.enrol))

    def first_admin(self) -> Identity:
        return Identity.read(Folder(self.settings.state).first_admin)

    def admin(self, identity: Identity | None = None) -> admin_pb2_grpc.AdminServiceStub:
        who = identity or self.first_admin()
        return admin_pb2_grpc.AdminServiceStub(self.channel(self.addresses.admin, who.key, who.certificate))

    def token(self, population: str = POPULATION) -> str:
        return self.do(lambda: self.parts.access.create_tokens("operator:test", population, 1, 3600.0)[0][0])

    def device(self) -> LiveDevice:
        """A freshly enrolled device."""
        key = ec.generate_private_key(ec.SECP256R1())
        request = device_pb2.EnrolRequest(token=self.token(), certificate_request=make_request(key))
        enrolled = self.enrolment().Enrol(request)
        return LiveDevice(self, key, enrolled.certificate_chain)

    def add_model(self) -> None:
        self.do(lambda: self.parts.coordinator.operations.add_model(MODEL, bundle_path(MODEL), "operator:test"))

    def facts(self) -> tuple[object, ...]:
        """All that a bad message must leave as it was."""
        operations = self.parts.coordinator.operations
        spool = sorted(path.name for path in Folder(self.settings.state).blobs.joinpath("spool").iterdir())
        # Traffic is counted in memory and written every few seconds, whatever was sent.
        rounds = self.do(lambda: [replace(found, bytes_down=0) for found in operations.rounds()])
        return self.do(lambda: (operations.audit_rows(10_000), rounds, operations.tasks(), spool))


@dataclass
class LiveDevice:
    """An enrolled device, that speaks the wire's own messages."""

    live: Live
    key: ec.EllipticCurvePrivateKey
    certificate: bytes
    channel: grpc.Channel = field(init=False)
    stub: device_pb2_grpc.DeviceServiceStub = field(init=False)

    def __post_init__(self) -> None:
        self.connect()

    def connect(self) -> None:
        """Open a channel with the certificate that the device has now."""
        self.channel = self.live.channel(self.live.addresses.device, key_to_pem(self.key), self.certificate)
        self.stub = device_pb2_grpc.DeviceServiceStub(self.channel)

    @property
    def id(self) -> DeviceId:
        return id_of_key(self.key.public_key())

    def check_in(self, population: str = POPULATION) -> CheckInReply:
        offer = CheckIn(population, ("onnx",), (SEALED,), training_examples=50, held_back_examples=10)
        return messages.check_in_reply_from_message(self.stub.CheckIn(messages.check_in_to_message(offer)))

    def assignment(self) -> Assignment:
        reply = self.check_in().reply
        assert isinstance(reply, Assignment)
        return reply

    def fetch(self, digest: str, offset: int = 0) -> bytes:
        return b"".join(part.chunk for part in self.stub.Fetch(device_pb2.FetchRequest(digest=digest, offset=offset)))

    def sealed(self, assignment: Assignment) -> tuple[ReportBegin, bytes]:
        """A report of small random numbers, as a device would seal it."""
        statement = verify_statement(assignment.base, self.live.parts.release_key)
        base = messages.release_from_bytes(statement)
        chance = generator("report", self.id)
        shapes = self.live.parts.coordinator.registry.bundle(base.bundle).manifest.shared_shapes
        size = Weights.zeros(shapes).size
        delta = Weights.from_vector(chance.normal(0, 1e-3, size).astype("float32"), shapes)
        update = Update(delta, 50.0, {"loss": 5.0, "correct": 8.0, "examples": 10.0})
        report_id = chance.bytes(16).hex()
        binding = Binding(assignment.task, assignment.round, assignment.session_id, report_id, base.bundle)
        data = seal(update_to_bytes(update), assignment.sealing, binding)
        begin = ReportBegin(assignment.session_id, report_id, assignment.upload_token, len(data), digest_of(data))
        return begin, data

    def report(self, begin: ReportBegin, chunks: list[bytes]) -> list[device_pb2.ReportResponse]:
        """Send `begin` and then chunks, whatever they are."""
        first = device_pb2.ReportRequest(begin=messages.report_begin_to_message(begin))
        rest = [device_pb2.ReportRequest(chunk=chunk) for chunk in chunks]
        return list(self.stub.Report(iter([first, *rest]), timeout=20))


@contextlib.contextmanager
def serving(state: Path, ahead: float = 0.0, **chosen: Any) -> Iterator[Live]:
    """A coordinator in a new folder, with all three ports wherever there is room."""
    clock = MovedClock(ahead)
    if not state.exists():
        Folder.create(state, (), clock.now())
        new_sqlite(state / "umbel.db")
    settings = load_settings(state, device_port=0, enrol_port=0, admin_port=0, stop_seconds=0.2, **chosen)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="coordinator")
    thread.start()

    async def start() -> tuple[Parts, Server, Addresses]:
        parts = build(settings, clock)
        server = Server(settings, parts, clock)
        return parts, server, await server.start()

    parts, server, addresses = asyncio.run_coroutine_threadsafe(start(), loop).result(30)
    live = Live(settings, parts, addresses, clock, loop)
    try:
        yield live
    finally:
        for channel in live.channels:
            channel.close()
        live.run(server.stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextlib.contextmanager
def refused() -> Iterator[list[UmbelError]]:
    """What a call inside is refused with, as the typed error that travelled."""
    found: list[UmbelError] = []
    try:
        yield found
    except grpc.RpcError as error:
        assert isinstance(error, grpc.Call)
        code = dict(error.trailing_metadata() or ()).get(ERROR_KEY)
        assert isinstance(code, str), f"{error.code()} {error.details()} has no error code"
        found.append(from_code(code, error.details() or ""))
        assert error.code().name == found[0].status.name
    else:
        raise AssertionError("the call wasn't refused")
