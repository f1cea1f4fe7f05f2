"""From settings to a running coordinator: one asyncio process, its ports, and an orderly end.

* device port: mutual TLS, certificates of the device authority
* enrolment port: TLS without client certificates (grpc-python can't ask for one that may be absent)
* admin port: mutual TLS, certificates of the operator authority
* token port: the same service over TLS without client certificates, for operators with tokens of an OpenID provider
* inference port: mutual TLS like the admin port, for programs that ask models; with tokens, on the token port
* inference port for HTTP: the same; certificates may be absent where tokens count, since Python's ssl can ask for them
* metrics port: `/metrics` over plain HTTP, for Prometheus, where it is asked for
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import grpc
import structlog

from umbel.clock import DAY, Clock, SystemClock
from umbel.errors import NotAllowed, NotFound, Unavailable
from umbel.holding import held
from umbel.stopping import told_to_stop
from umbel_server import descriptors
from umbel_server.access import AcceptAll, Access, Authorities, RefuseAll
from umbel_server.addresses import from_here, joined, why_not
from umbel_server.admin import AdminGateway
from umbel_server.blobs import Blobs
from umbel_server.coordinator import Coordinator
from umbel_server.files import read_file
from umbel_server.folder import Folder
from umbel_server.gateway import DeviceGateway, EnrolmentGateway
from umbel_server.helper.remote import RemoteHelper
from umbel_server.identity import Addresses
from umbel_server.key_audit import KeyAudit
from umbel_server.operators import Operators
from umbel_server.passing import may_pass
from umbel_server.port_certificate import PortCertificate
from umbel_server.provider import HttpsGet, Provider
from umbel_server.rpc import OF_STRANGERS, STREAMS, Service, Watch, port_options
from umbel_server.serving.gateway import InferenceGateway
from umbel_server.serving.inference import MAX_QUESTION_BYTES, QUESTIONS, Inference
from umbel_server.serving.service import ModelService
from umbel_server.settings import Oidc, Settings
from umbel_server.store import Store
from umbel_server.surroundings import Surroundings
from umbel_server.token_operators import TokenOperators

if TYPE_CHECKING:
    from umbel_server.flower.program import Program
    from umbel_server.https_port import HttpsPort
    from umbel_server.monitoring.monitor import Monitor
    from umbel_server.plain_http import Pages

ADMIN_STOP_SECONDS: Final = 0.5
"""Watching operators would never hang up by themselves."""

HOLD_SECONDS: Final = 5.0
"""Between two looks at the lock of the database."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Parts:
    """A coordinator without its ports: what a simulation joins to its own channel."""

    store: Store
    access: Access
    operators: Operators
    coordinator: Coordinator
    authorities: Authorities
    release_key: bytes
    release_root: bytes


def build(settings: Settings, clock: Clock, around: Surroundings | None = None) -> Parts:
    """Open the folder and the store, and put the coordinator together.

    Raises:
        NotFound: `umbel init` hasn't been at the folder.
        NotAllowed: settings that the production profile refuses.
        Unreachable: the database doesn't answer.
        WrongState: the database is of another folder.
    """
    folder, around, card = Folder(settings.state), around or Surroundings(), settings.helper_card
    _require_profile(settings)
    authorities, signer, leader = folder.authorities(), folder.signer(), folder.leader_key()
    listing = folder.repository()
    store = Store.open(settings.effective_database_url, around.on_step, durable=settings.durable)
    KeyAudit(store, listing[0]).require_ours()
    attestation = AcceptAll() if settings.accepts_unattested else RefuseAll()
    life = settings.device_certificate_days * DAY
    access = Access(store, authorities, attestation, clock, life, around.beat.look)
    operators = Operators(store, authorities.operator, clock, settings.operator_certificate_days * DAY)
    operators.bootstrap(read_file(folder.first_admin / "certificate.pem"))
    coordinator = Coordinator(
        store,
        Blobs(folder.blobs, around.on_step, durable=settings.durable),
        signer,
        leader,
        clock,
        replace(around, helper=around.helper or (RemoteHelper(card, signer.for_helper()) if card else None)),
        pace=settings.pace,
        trust=settings.trust,
        listing=listing,
        witness=folder.witness(),
    )
    root = listing[0].first_root
    return Parts(store, access, operators, coordinator, authorities, signer.public_key, root)


def _require_profile(settings: Settings) -> None:
    if settings.profile != "production":
        return
    if settings.helper is not None and settings.trust.is_development:
        raise NotAllowed(f"the production profile refuses {settings.trust.words}; see docs/how-to/run-the-helper.md")
    if not settings.durable:
        raise NotAllowed("the production profile refuses durable = false: a power cut would lose acknowledged reports")


class Server:
    """A coordinator that listens."""

    def __init__(self, settings: Settings, parts: Parts, clock: Clock) -> None:
        self._settings = settings
        self._parts = parts
        self._clock = clock
        self._folder = Folder(settings.state)
        self._devices, self._admins = (grpc.aio.server(options=port_options(STREAMS)) for _ in range(2))
        self._enrolments, self._tokens = (grpc.aio.server(options=port_options(OF_STRANGERS)) for _ in range(2))
        self._questions = grpc.aio.server(options=port_options(QUESTIONS, MAX_QUESTION_BYTES))
        self._models: ModelService | None = None
        self._https: HttpsPort | None = None
        own = () if settings.host in ("0.0.0.0", "::") else (settings.host,)  # noqa: S104 - to be called at
        self._certificate = PortCertificate(parts.authorities.server, (*settings.names, *own), clock)
        self._rounds: asyncio.Task[None] | None = None
        self._monitor: Monitor | None = None
        self._pages: Pages | None = None

    async def start(self) -> Addresses:
        """Listen, and run the rounds.

        Returns:
            Where it listens, with the ports that 0 became.

        Raises:
            Unavailable: a port is taken.
        """
        parts, settings = self._parts, self._settings
        device_port = self._listen(self._devices, settings.device_port, parts.authorities.device.certificate_pem)
        enrol_port = self._listen(self._enrolments, settings.enrol_port, None)
        admin_port = self._listen(self._admins, settings.admin_port, parts.authorities.operator.certificate_pem)
        device_address = settings.advertise or f":{device_port}"
        said = (settings.warnings, settings.windows)
        admin = AdminGateway(parts.coordinator, parts.access, parts.operators, self._clock, *said)
        enrolment = EnrolmentGateway(parts.access, parts.release_key, device_address, parts.release_root)
        metrics = await self._open_metrics()
        self._add(DeviceGateway(parts.coordinator, parts.access).service(), self._devices)
        self._add(enrolment.service(), self._enrolments)
        self._add(admin.service(), self._admins)
        tokens = _token_operators(settings.oidc, self._clock) if settings.oidc is not None else None
        token_port = self._listen(self._tokens, settings.token_port, None) if tokens else 0
        if tokens is not None:
            self._add(admin.service(tokens), self._tokens)
        inference_ports = await self._serve_models(tokens)
        for server in (self._devices, self._enrolments, self._admins, self._tokens, self._questions):
            await server.start()
        self._rounds = asyncio.create_task(parts.coordinator.run(), name="rounds")
        ports = (device_port, enrol_port, admin_port, token_port, *inference_ports)
        listening = Addresses(*(from_here(settings.host, port) if port else "" for port in ports))
        addresses = replace(listening, metrics=metrics)
        self._folder.write_addresses(addresses)
        return addresses

    async def wait(self) -> None:
        """Until the rounds end, which they do only by a fault; raises it."""
        if self._rounds is not None:
            await self._rounds

    async def stop(self) -> None:
        """Take no new calls, let those under way end within the settings' time, then close everything."""
        self._folder.forget_addresses()
        drain = self._settings.stop_seconds
        await asyncio.gather(
            *(server.stop(min(ADMIN_STOP_SECONDS, drain)) for server in (self._admins, self._tokens)),
            *(server.stop(drain) for server in (self._enrolments, self._devices, self._questions)),
            *(port.stop(drain) for port in (self._https,) if port is not None),
        )
        if self._models is not None:
            await self._models.stop()
        if self._pages is not None:
            await self._pages.close()
        if self._monitor is not None:
            await self._monitor.close()
        if self._rounds is not None:
            self._rounds.cancel()
            await asyncio.gather(self._rounds, return_exceptions=True)
        self._parts.store.close()

    async def _serve_models(self, tokens: TokenOperators | None) -> tuple[int, int]:
        """Have programs ask models, where they may at all; gives the ports for gRPC and for HTTP."""
        parts, settings = self._parts, self._settings
        rollouts, port = parts.coordinator.rollouts, settings.inference_port
        if rollouts is None or port is settings.inference_http_port is None:
            return 0, 0
        folder, registry = self._folder.inferences, parts.coordinator.registry
        self._models = ModelService(settings, parts.store, registry, rollouts.desk, self._clock, folder)
        if self._monitor is not None:
            self._monitor.watch(self._models)
        self._models.start()
        inference = self._models.inference
        gateway = InferenceGateway(inference, parts.operators)
        if port is not None:
            port = self._listen(self._questions, port, parts.authorities.operator.certificate_pem)
            self._add(gateway.service(), self._questions)
            if tokens is not None:
                self._add(gateway.service(tokens), self._tokens)
        return port or 0, await self._serve_models_over_http(inference, tokens)

    async def _serve_models_over_http(self, inference: Inference, tokens: TokenOperators | None) -> int:
        if (port := self._settings.inference_http_port) is None:
            return 0
        from umbel_server.https_port import HttpsPort
        from umbel_server.serving.rest import METHODS, SERVICE, RestGateway

        authority = self._parts.authorities.operator.certificate_pem
        context = self._certificate.context(authority, required=tokens is None)
        self._https = HttpsPort(self._settings.host, port, context)
        watch = self._watch(SERVICE, METHODS)
        await self._https.start(RestGateway(inference, self._parts.operators, tokens, watch).app())
        return self._https.number

    async def _open_metrics(self) -> str:
        """Let Prometheus in, where it may come at all; gives the address."""
        if (port := self._settings.metrics_port) is None:
            return ""
        from umbel_server.monitoring.monitor import Monitor
        from umbel_server.plain_http import Pages

        self._monitor = Monitor(self._settings, self._parts, self._clock)
        self._pages = Pages({"/metrics": self._monitor.page})
        self._monitor.start()
        return await self._pages.open(self._settings.metrics_host, port)

    def _add(self, service: Service[Any], server: grpc.aio.Server) -> None:
        """Serve it, watched where there are metrics."""
        service.add_to(server, self._watch(service.descriptor.name, service.methods))

    def _watch(self, service: str, methods: Iterable[str]) -> Watch:
        """Counts calls, where there are metrics."""
        if self._monitor is None:
            return nullcontext
        self._monitor.calls.expect(service, methods)
        return self._monitor.calls.watch

    def _listen(self, server: grpc.aio.Server, port: int, client_authority: bytes | None) -> int:
        credentials, address = self._certificate.credentials(client_authority), joined(self._settings.host, port)
        try:
            return server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise Unavailable(
                f"can't listen at {address}{why_not(self._settings.host, port, 'coordinator')}"
            ) from error


async def serve(
    settings: Settings, ready: Callable[[Addresses], None], clock: Clock | None = None, program: Program | None = None
) -> None:
    """Run a coordinator until SIGTERM, Ctrl-C, or the end of its terminal.

    Args:
        settings: what to run.
        ready: told once where it listens.
        clock: the machine's, unless another is given.
        program: a Flower program to run once it listens.

    Raises:
        WrongState: another coordinator runs in its folder.
        UmbelError: it can't start, or its rounds can't go on.
    """
    Folder(settings.state).authorities()
    descriptors.take_all_that_are_allowed()
    # Two that keep their books in one folder would each count half of the reports.
    with held(settings.state, f"another coordinator runs in {settings.state}; stop it first, or use another folder"):
        await _serve(settings, ready, clock or SystemClock(), program)


async def _serve(settings: Settings, ready: Callable[[Addresses], None], clock: Clock, program: Program | None) -> None:
    parts = build(settings, clock)
    with parts.store.alone() as hold:
        await _listen(settings, ready, clock, program, parts, hold)


async def _listen(
    settings: Settings,
    ready: Callable[[Addresses], None],
    clock: Clock,
    program: Program | None,
    parts: Parts,
    hold: Callable[[], None],
) -> None:
    server = Server(settings, parts, clock)
    stopping = asyncio.Event()
    with told_to_stop(stopping.set):
        try:
            addresses = await server.start()
            for warning in settings.warnings:
                _log.warning(warning)
            _log.info("ready", **{name: address for name, address in asdict(addresses).items() if address})
            ready(addresses)
            with _running(program, parts.coordinator):
                await _first(server.wait(), stopping.wait(), _alone_while(hold))
            _log.info("stopping", drain_seconds=settings.stop_seconds)
        finally:
            await server.stop()


async def _alone_while(hold: Callable[[], None]) -> None:
    """Make sure now and then that no other coordinator has taken the database; raises `WrongState` once one has."""
    while True:
        await asyncio.sleep(HOLD_SECONDS)
        try:
            hold()
        except Exception as error:
            if not may_pass(error):
                raise


@contextmanager
def _running(program: Program | None, coordinator: Coordinator) -> Iterator[None]:
    """Have a program run meanwhile; it is let go when the coordinator stops."""
    if program is None:
        yield
        return
    from umbel_server.flower.port import CoordinatorPort

    port = CoordinatorPort(coordinator, program.task, asyncio.get_running_loop())
    program.start(port)
    try:
        yield
    finally:
        port.close()


async def _first(*waits: object) -> None:
    tasks = [asyncio.ensure_future(wait) for wait in waits]  # type: ignore[call-overload]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()


def _token_operators(oidc: Oidc, clock: Clock) -> TokenOperators:
    try:
        context = ssl.create_default_context(cafile=oidc.ca)
    except OSError as error:
        raise NotFound(f"{oidc.ca} isn't an authority's certificate: {error}; see `oidc.ca`") from error
    return TokenOperators(oidc.rules, Provider(oidc.issuer, HttpsGet(context), clock), clock)
