"""The HTTP port against those who don't keep to HTTP, or who never come to an end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from tests.server.live import MovedClock
from tests.serving.http_asking import caller_context
from tests.serving.test_served import World, inference, offered, release
from umbel.errors import ERROR_KEY, Unavailable
from umbel_server import https_port
from umbel_server.authority import Authority, PeerKind, key_to_pem
from umbel_server.https_port import HttpsPort
from umbel_server.identity import Identity
from umbel_server.operators import Operator
from umbel_server.port_certificate import RENEW_AFTER, PortCertificate
from umbel_server.roles import Role
from umbel_server.serving import http_exchange, rest
from umbel_server.serving.http_exchange import Reply
from umbel_server.serving.inference import Inferred
from umbel_server.serving.rest import RestGateway

QUESTION = b'{"inputs":[]}'
LIVE = b"GET /v2/health/live HTTP/1.1\r\nhost: x\r\n\r\n"
IN_CHUNKS = b"POST /v2/models/m/infer HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
AUTHORITY = Authority.create("a coordinator", time.time())
CERTIFICATE = PortCertificate(AUTHORITY, ["localhost"], MovedClock())

App = Callable[[Any, Any, Any], Awaitable[None]]


class Anybody:
    """Whoever the handshake lets in; who may do what is tested elsewhere, with those who decide it."""

    def authorize(self, method: str, certificate: bytes | None) -> Operator:
        subject = x509.load_pem_x509_certificate(certificate or b"").subject.rfc4514_string()
        return Operator(subject, "somebody", Role.CALLER, 0.0)  # type: ignore[arg-type]


@dataclass
class Caller:
    """One connection, byte by byte."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def say(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self) -> tuple[int, dict[str, str], bytes]:
        head = (await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 5)).decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in head[1:-2])
        body = await asyncio.wait_for(self.reader.readexactly(int(headers["content-length"])), 5)
        return int(head[0].split()[1]), headers, body

    async def is_hung_up_on(self) -> bool:
        """Whether nothing more comes."""
        with contextlib.suppress(ConnectionError):
            return await asyncio.wait_for(self.reader.read(1), 5) == b""
        return True


class Port:
    """A port, and a way to it."""

    def __init__(self, port: HttpsPort, context: ssl.SSLContext) -> None:
        self.port, self._context = port, context
        self.callers: list[Caller] = []

    async def call(self, *said: bytes) -> Caller:
        streams = await asyncio.open_connection("127.0.0.1", self.port.number, ssl=self._context, limit=1 << 20)
        self.callers.append(Caller(*streams))
        for data in said:
            await self.callers[-1].say(data)
        return self.callers[-1]


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    folder, key = tmp_path_factory.mktemp("caller"), ec.generate_private_key(ec.SECP256R1())
    certificate = AUTHORITY.issue(key.public_key(), PeerKind.OPERATOR, "operators", time.time(), 3600.0)
    Identity(certificate, key_to_pem(key), b"").write(folder)
    found = caller_context(AUTHORITY.certificate_pem, folder)
    found.check_hostname = False
    return found


@contextlib.asynccontextmanager
async def listening(app: App, context: ssl.SSLContext) -> AsyncIterator[Port]:
    port = HttpsPort("127.0.0.1", 0, CERTIFICATE.context(AUTHORITY.certificate_pem, required=True))
    await port.start(app)
    found = Port(port, context)
    try:
        yield found
    finally:
        await port.stop(0.0)
        for caller in found.callers:
            caller.writer.transport.abort()


@dataclass
class Asked:
    """A port with models: version 1, and version 2, which isn't loaded before somebody asks for it."""

    port: Port
    gateway: RestGateway
    world: World
    told: list[Inferred]


@pytest.fixture
async def asked(context: ssl.SSLContext) -> AsyncIterator[Asked]:
    world = World(offered({"stable": 1}, release(1, 1), release(2, 2)))
    await world.served.look()
    asking, told = inference(world, waiting=1)
    gateway = RestGateway(asking, Anybody(), None)  # type: ignore[arg-type]
    async with listening(gateway.app(), context) as port:
        yield Asked(port, gateway, world, told)
    asking.close()


def post(path: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: x", f"content-length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


async def comes(holds: Callable[[], object]) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(5):
        while not holds():  # noqa: ASYNC110 - of what goes on in here, nobody tells
            await asyncio.sleep(0.001)


# Bytes that are no request, or two.


@pytest.mark.parametrize(
    "said",
    [
        b"\x16\x03\x01\r\n\r\n",
        b"GET /v2\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\nhost: x\r\nbad header: y\r\n\r\n",
        b"GET /v2 HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 10_000,
        b"GET /" + b"v" * 100_000,
        b"POST /v2/repository/index HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\ncontent-length: 4\r\n\r\n{}{}",
        b"POST /v2/repository/index HTTP/1.1\r\nhost: x\r\ncontent-length: -2\r\n\r\n{}",
        b"POST /v2/repository/index HTTP/1.1\r\nhost: x\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"POST /v2/repository/index HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\n",
    ],
    ids=[
        *("TLS in TLS", "no version", "no host", "a blank in a name", "headers without end", "a path without end"),
        *("two lengths", "less than nothing", "an unknown coding", "a chunk of no size"),
    ],
)
async def test_what_is_no_request_is_refused_and_hung_up_on(
    asked: Asked, said: bytes, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caller = await asked.port.call(said)
    status, headers, body = await caller.answer()
    assert (status, headers[ERROR_KEY]) == (400, "malformed-message") and b"error" in body
    assert await caller.is_hung_up_on()
    assert capfd.readouterr() == ("", "") and not caplog.records


async def test_a_request_with_two_ends_is_refused_and_no_other_one_found_behind_it(asked: Asked) -> None:
    """Somebody on the way may go by the other one: what is behind ours would be another caller's."""
    both = ("transfer-encoding: chunked",)
    caller = await asked.port.call(post("/v2/repository/index", b"0\r\n\r\n" + LIVE, *both))
    status, headers, _ = await caller.answer()
    assert (status, headers["connection"]) == (400, "close")
    assert await caller.is_hung_up_on()


async def test_a_body_that_breaks_off_is_refused_once(
    asked: Asked, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also by who doesn't notice the refusal, while the request itself runs out of time."""
    monkeypatch.setattr(http_exchange, "BODY_SECONDS", 0.05)
    monkeypatch.setattr(http_exchange, "LEFT_SECONDS", 0.05)
    caller = await asked.port.call()
    caller.writer.transport.pause_reading()  # type: ignore[attr-defined]
    await caller.say(IN_CHUNKS)
    await comes(lambda: asked.port.port._connections.tasks)
    await caller.say(b"ZZ\r\n")
    await comes(lambda: not asked.port.port._connections.tasks)
    gc.collect()
    caller.writer.transport.resume_reading()  # type: ignore[attr-defined]
    assert (await caller.answer())[0] == 400 and await caller.is_hung_up_on()
    assert not caplog.records


async def test_a_body_that_breaks_off_in_the_middle_of_its_answer_ends_both(
    context: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    async with listening(Reply([bytes(32 << 20)]), context) as port:
        caller = await port.call()
        caller.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await caller.say(IN_CHUNKS)
        await comes(lambda: port.port._connections.tasks)
        await caller.say(b"ZZ\r\n")
        await comes(lambda: not port.port._connections.connections)
    assert not caplog.records


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("content-encoding: gzip",), b"compressed"),
        (("inference-header-content-length: 13",) * 2, b"must be there once"),
        (("inference-header-content-length: 13",), b"is missing"),
    ],
    ids=["compressed", "two lengths of JSON", "one"],
)
async def test_headers_say_what_is_in_the_body(asked: Asked, more: tuple[str, ...], words: bytes) -> None:
    caller = await asked.port.call(post("/v2/models/m/infer", QUESTION, *more))
    got, _, body = await caller.answer()
    assert got == 400 and words in body


async def test_long_tokens_have_room_also_when_they_come_in_parts(context: ssl.SSLContext) -> None:
    async with listening(Reply([b"{}"]), context) as port:
        caller = await port.call(LIVE[:-2] + b"authorization: Bearer " + b"x" * 20_000)
        await comes(lambda: [one for one in port.port._connections.connections if one.conn.trailing_data[0]])
        await caller.say(b"\r\n\r\n")
        assert (await caller.answer())[0] == 200


async def test_a_body_of_no_told_length_is_refused_once_it_is_too_large(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rest, "MAX_QUESTION_BYTES", 20)
    said = IN_CHUNKS.replace(b"\r\n\r\n", b"\r\ninference-header-content-length: 13\r\n\r\n")
    caller = await asked.port.call(said + b"15\r\n" + QUESTION + b"12345678\r\n0\r\n\r\n")
    status, headers, _ = await caller.answer()
    assert (status, headers[ERROR_KEY]) == (413, "out-of-bounds")


async def test_requests_that_come_together_are_answered_in_their_order(asked: Asked) -> None:
    ready = LIVE.replace(b"live", b"ready")
    caller = await asked.port.call(LIVE + ready + post("/nowhere", b"{}") + LIVE)
    found = [await caller.answer() for _ in range(4)]
    assert [(status, body[:8]) for status, _, body in found] == [
        (200, b'{"live":'),
        (200, b'{"ready"'),
        (404, b'{"error"'),
        (200, b'{"live":'),
    ]


async def test_who_waits_to_be_told_to_go_on_gets_the_refusal_instead(asked: Asked) -> None:
    caller = await asked.port.call(
        b"POST /v2/models/m/infer HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 99999999\r\n\r\n"
    )
    status, headers, _ = await caller.answer()
    assert (status, headers["connection"], headers[ERROR_KEY]) == (413, "close", "out-of-bounds")
    assert await caller.is_hung_up_on()


# Those who never come to an end.


@pytest.mark.parametrize("said", [b"", b"GET /v2 HT", LIVE], ids=["nothing", "half a request", "nothing more"])
async def test_who_says_nothing_more_is_hung_up_on(
    context: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    monkeypatch.setattr(https_port, "QUIET_SECONDS", 0.1)
    async with listening(Reply([b"{}"]), context) as port:
        caller = await port.call(said)
        if said == LIVE:
            assert (await caller.answer())[0] == 200
        drip = asyncio.create_task(_drip(caller, b"a" * 100 if said.startswith(b"GET /v2 HT") else b""))
        assert await caller.is_hung_up_on(), "also who goes on byte by byte"
        drip.cancel()
        await asyncio.gather(drip, return_exceptions=True)


async def test_who_says_nothing_in_the_handshake_is_hung_up_on(
    context: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(https_port, "HANDSHAKE_SECONDS", 0.05)
    async with listening(Reply([b"{}"]), context) as port:
        caller = Caller(*await asyncio.open_connection("127.0.0.1", port.port.number))
        assert await caller.is_hung_up_on()
        caller.writer.close()


async def _drip(caller: Caller, data: bytes) -> None:
    for place in range(len(data)):
        await caller.say(data[place : place + 1])
        await asyncio.sleep(0.02)


async def test_a_body_that_does_not_come_is_refused_in_time(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_exchange, "BODY_SECONDS", 0.05)
    monkeypatch.setattr(http_exchange, "LEFT_SECONDS", 0.05)
    caller = await asked.port.call(post("/v2/models/m/infer", QUESTION)[:-3])
    status, headers, _ = await caller.answer()
    assert (status, headers["connection"], headers[ERROR_KEY]) == (408, "close", "unreachable")
    assert await caller.is_hung_up_on()


async def test_bodies_of_all_callers_together_have_only_so_much_room(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    question = post("/v2/models/m/infer", QUESTION)
    monkeypatch.setattr(asked.gateway, "_room", room := http_exchange.Room(20))
    first = await asked.port.call(question[:-1])
    await comes(lambda: room._left < 20)
    second = await asked.port.call(question)
    status, headers, _ = await second.answer()
    assert (status, headers[ERROR_KEY]) == (503, "unavailable")
    await first.say(question[-1:])
    assert (await first.answer())[0] == 400, "no input"
    await second.say(question)
    assert (await second.answer())[0] == 400, "there is room again"
    assert room._left == 20


async def test_who_does_not_read_the_answer_is_hung_up_on(
    context: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_exchange, "PIECE_SECONDS", 0.1)
    async with listening(Reply([bytes(32 << 20)]), context) as port:
        caller = await port.call()
        caller.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await caller.say(LIVE)
        await comes(lambda: port.port._connections.tasks)
        await comes(lambda: not port.port._connections.connections)


async def test_an_answer_of_many_pieces_arrives_whole(context: ssl.SSLContext) -> None:
    data = bytes(range(256)) * 8192
    async with listening(Reply([b"[", data, data[:7]]), context) as port:
        caller = await port.call(LIVE)
        assert (await caller.answer())[2] == b"[" + data + data[:7]
        (connection,) = port.port._connections.connections
        at_once = connection.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert at_once, "no piece waits until the one before is acknowledged"


async def test_more_connections_than_there_may_be_are_hung_up_on(
    context: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(https_port, "CONNECTIONS", 2)
    async with listening(Reply([b"{}"]), context) as port:
        first, second = [await port.call(LIVE) for _ in range(2)]
        assert (await first.answer())[0] == (await second.answer())[0] == 200
        assert await (await port.call()).is_hung_up_on()
        first.writer.close()
        await first.writer.wait_closed()
        assert (await (await port.call(LIVE)).answer())[0] == 200


@pytest.mark.parametrize("blanks", [0, 300_000], ids=["small", "large"])
async def test_who_hangs_up_in_the_middle_of_an_answer_leaves_room_and_a_record(asked: Asked, blanks: int) -> None:
    asked.world.shelf.going_on.clear()
    question = post("/v2/models/m/versions/2/infer", b" " * blanks + QUESTION)
    caller = await asked.port.call(question)
    other = await asked.port.call()
    await comes(lambda: asked.world.served._loading)
    await other.say(question)
    assert (await other.answer())[0] == 503, "there is room for one"
    caller.writer.transport.abort()
    await comes(lambda: len(asked.told) == 2)
    asked.world.shelf.going_on.set()
    await other.say(question)
    assert (await other.answer())[0] == 400, "no input"
    assert [(one.caller, one.outcome) for one in asked.told] == [
        ("operator:somebody", "unavailable"),
        ("operator:somebody", "cancelled"),
        ("operator:somebody", "input-mismatch"),
    ]


# The end.


async def test_at_the_end_who_is_being_answered_is_and_others_are_hung_up_on(asked: Asked) -> None:
    asked.world.shelf.going_on.clear()
    idle = await asked.port.call(LIVE)
    await idle.answer()
    half = await asked.port.call(LIVE[:9])
    busy = await asked.port.call(post("/v2/models/m/versions/2/infer", QUESTION) + LIVE)
    await comes(lambda: asked.world.served._loading)
    stopping = asyncio.create_task(asked.port.port.stop(5.0))
    assert await idle.is_hung_up_on() and await half.is_hung_up_on()
    with pytest.raises(OSError):
        await asked.port.call()
    asked.world.shelf.going_on.set()
    assert (await busy.answer())[0] == 400, "no input"
    assert await busy.is_hung_up_on(), "and what it said behind that isn't answered any more"
    await asyncio.wait_for(stopping, 2)


async def test_who_comes_through_the_handshake_after_the_end_is_hung_up_on(asked: Asked) -> None:
    late = Caller(*await asyncio.open_connection("127.0.0.1", asked.port.port.number))
    await (await asked.port.call(LIVE)).answer()  # so the one before has been taken too
    await asked.port.port.stop(0.0)
    with contextlib.suppress(OSError):
        await late.writer.start_tls(asked.port._context)
        await late.say(LIVE)
    assert await late.is_hung_up_on()
    late.writer.transport.abort()


async def test_the_end_waits_no_longer_than_it_may(asked: Asked) -> None:
    asked.world.shelf.going_on.clear()
    caller = await asked.port.call(post("/v2/models/m/versions/2/infer", QUESTION))
    await comes(lambda: asked.world.served._loading)
    await asyncio.wait_for(asked.port.port.stop(0.05), 2)
    assert await caller.is_hung_up_on()
    assert [one.outcome for one in asked.told] == ["cancelled"]
    asked.world.shelf.going_on.set()


async def test_a_port_that_is_taken_is_said_and_one_that_never_started_is_free_again() -> None:
    context = CERTIFICATE.context(AUTHORITY.certificate_pem, required=True)
    port = HttpsPort("127.0.0.1", 0, context)
    with pytest.raises(Unavailable, match="another coordinator"):
        HttpsPort("127.0.0.1", port.number, context)
    await port.stop(0.0)
    HttpsPort("127.0.0.1", port.number if port._socket.fileno() >= 0 else 0, context)._socket.close()


async def test_all_addresses_are_both_kinds_of_addresses() -> None:
    port = HttpsPort("::", 0, CERTIFICATE.context(AUTHORITY.certificate_pem, required=True))
    for address in ("127.0.0.1", "::1"):
        socket.create_connection((address, port.number)).close()
    await port.stop(0.0)


# The port's certificate.


async def test_each_handshake_shows_the_newest_certificate(context: ssl.SSLContext) -> None:
    """With a host's name and with an address: callers of an address name nobody."""
    clock = MovedClock(-RENEW_AFTER - 60.0)
    certificate = PortCertificate(AUTHORITY, ["localhost"], clock)
    port = HttpsPort("127.0.0.1", 0, certificate.context(AUTHORITY.certificate_pem, required=True))
    await port.start(Reply([b"{}"]))
    shown = []
    for ahead, host in itertools.product((-RENEW_AFTER - 60.0, 0.0), ("127.0.0.1", "localhost")):
        clock.ahead = ahead
        reader, writer = await asyncio.open_connection("127.0.0.1", port.number, ssl=context, server_hostname=host)
        writer.write(LIVE)
        assert await reader.readexactly(15) == b"HTTP/1.1 200 OK", "and the caller's is asked for as before"
        shown.append(writer.get_extra_info("ssl_object").getpeercert(binary_form=True))
        writer.transport.abort()
    assert shown[0] == shown[1] != shown[2] == shown[3]
    await port.stop(0.0)


def test_no_key_is_left_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    CERTIFICATE.context(AUTHORITY.certificate_pem, required=True)
    assert not list(tmp_path.iterdir())
