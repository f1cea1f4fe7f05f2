"""One place guards, decodes and answers every call: nothing is forgotten, and nothing inside leaks out."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import grpc
import pytest
from structlog.testing import capture_logs

from umbel import errors
from umbel.errors import ERROR_KEY
from umbel.v1 import device_pb2 as pb
from umbel_server.rpc import MAX_MESSAGE_BYTES, Call, Requests, Service

DEVICE = pb.DESCRIPTOR.services_by_name["DeviceService"]


class Probe:
    """A service whose answers are set by each test."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.refusal: Exception | None = None
        self.failure: Exception | None = None
        self.closed = asyncio.Event()
        self.enough = False
        self.watched = asyncio.Queue[Call]()

    def guard(self, method: str, certificate: bytes | None) -> str:
        assert certificate is None
        self.calls.append(method)
        if self.refusal is not None:
            raise self.refusal
        return "caller"

    async def check_in(self, caller: str, request: pb.CheckInRequest) -> pb.CheckInResponse:
        self.calls.append(f"{caller} {request.population}")
        if self.failure is not None:
            raise self.failure
        return pb.CheckInResponse(retry=pb.Retry(reason="later"))

    async def renew(self, caller: str, request: pb.RenewRequest) -> pb.RenewResponse:
        return pb.RenewResponse(certificate_chain=bytes(2 * MAX_MESSAGE_BYTES))

    async def fetch(self, caller: str, request: pb.FetchRequest) -> AsyncIterator[pb.FetchResponse]:
        try:
            yield pb.FetchResponse(total_size=1)
            if self.failure is not None:
                raise self.failure
            await asyncio.Event().wait()
        finally:
            self.closed.set()

    async def report(self, caller: str, requests: Requests) -> AsyncIterator[pb.ReportResponse]:
        async for request in requests:
            yield pb.ReportResponse(proceed=pb.ReportProceed(offset=len(request.chunk)))
            if self.enough:
                return

    @contextmanager
    def watch(self, call: Call) -> Iterator[None]:
        try:
            yield
        finally:
            self.watched.put_nowait(call)

    def service(self) -> Service[str]:
        methods = {"CheckIn": self.check_in, "Renew": self.renew, "Fetch": self.fetch, "Report": self.report}
        methods["ReadListing"] = self.renew
        return Service(DEVICE, self.guard, methods)


@pytest.fixture
def probe() -> Probe:
    return Probe()


@pytest.fixture
async def channel(probe: Probe) -> AsyncIterator[grpc.aio.Channel]:
    server = grpc.aio.server(options=(("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),))
    port = server.add_insecure_port("127.0.0.1:0")
    probe.service().add_to(server, probe.watch)
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(None)


def path(method: str) -> str:
    return f"/{DEVICE.full_name}/{method}"


async def refused(call: grpc.aio.Call) -> tuple[grpc.StatusCode, str, str | None]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    metadata = dict(raised.value.trailing_metadata())
    return raised.value.code(), raised.value.details(), metadata.get(ERROR_KEY)


@pytest.mark.parametrize(
    "kind", sorted(errors.BY_CODE.values(), key=lambda kind: kind.code), ids=lambda kind: kind.code
)
async def test_every_error_travels_as_its_status_code_and_words(
    probe: Probe, channel: grpc.aio.Channel, kind: type[errors.UmbelError]
) -> None:
    probe.failure = kind("what happened; what to do – naïve 100 %")
    found = await refused(channel.unary_unary(path("CheckIn"))(b""))
    assert found == (grpc.StatusCode[kind.status.name], "what happened; what to do – naïve 100 %", kind.code)
    call = await asyncio.wait_for(probe.watched.get(), 5)
    assert (call.status, call.error) == (kind.status.name, kind.code)


async def test_who_may_not_call_is_not_read(probe: Probe, channel: grpc.aio.Channel) -> None:
    probe.refusal = errors.NotAllowed("not yours")
    for call in (
        channel.unary_unary(path("CheckIn"))(b"\xff not a message"),
        channel.unary_stream(path("Fetch"))(b"\xff not a message").read(),
    ):
        assert (await refused(call))[2] == "not-allowed"
    assert sorted(probe.calls) == ["CheckIn", "Fetch"]


async def test_bytes_that_are_no_message_are_malformed_not_internal(channel: grpc.aio.Channel) -> None:
    for call in (
        channel.unary_unary(path("CheckIn"))(b"\xff"),
        channel.unary_stream(path("Fetch"))(b"\xff").read(),
        channel.stream_stream(path("Report"))(iter([b"\xff"])).read(),
    ):
        assert (await refused(call))[0::2] == (grpc.StatusCode.INVALID_ARGUMENT, "malformed-message")


async def test_a_fault_inside_tells_the_caller_nothing_and_the_log_everything(
    probe: Probe, channel: grpc.aio.Channel
) -> None:
    probe.failure = ZeroDivisionError("secret-7")
    with capture_logs() as logs:
        found = await refused(channel.unary_unary(path("CheckIn"))(b""))
    assert found[0::2] == (grpc.StatusCode.INTERNAL, "internal")
    assert "secret-7" not in found[1]
    assert [entry["exc_info"] for entry in logs if entry["event"] == "unexpected error"] == [probe.failure]


async def test_a_fault_in_the_middle_of_a_stream_travels_too(probe: Probe, channel: grpc.aio.Channel) -> None:
    probe.failure = errors.NotFound("gone")
    call = channel.unary_stream(path("Fetch"))(b"")
    assert await call.read()
    assert (await refused(call.read()))[2] == "not-found"


async def test_a_caller_who_hangs_up_ends_the_function(probe: Probe, channel: grpc.aio.Channel) -> None:
    call = channel.unary_stream(path("Fetch"))(b"")
    assert await call.read()
    call.cancel()
    await asyncio.wait_for(probe.closed.wait(), 5)
    watched = await asyncio.wait_for(probe.watched.get(), 5)
    assert (watched.service, watched.method, watched.status) == ("DeviceService", "Fetch", "CANCELLED")
    assert watched.sent == len(pb.FetchResponse(total_size=1).SerializeToString())


async def test_who_watches_is_told_of_every_byte(probe: Probe, channel: grpc.aio.Channel) -> None:
    probe.enough = True
    sent = pb.ReportRequest(chunk=bytes(1000)).SerializeToString()
    call = channel.stream_stream(path("Report"))()
    await call.write(sent)
    got = [await call.read(), await channel.unary_unary(path("CheckIn"))(b"")]
    assert await call.read() is grpc.aio.EOF
    watched = [await asyncio.wait_for(probe.watched.get(), 5) for _ in got]
    told = {it.method: (it.status, it.received, it.sent) for it in watched}
    assert told == {"Report": ("OK", len(sent), len(got[0])), "CheckIn": ("OK", 0, len(got[1]))}


async def test_a_message_beyond_the_limit_is_not_taken(probe: Probe, channel: grpc.aio.Channel) -> None:
    found = await refused(channel.unary_unary(path("CheckIn"))(bytes(MAX_MESSAGE_BYTES + 1)))
    assert found[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "caller " not in probe.calls


async def test_long_words_are_cut_so_that_they_fit_a_header(probe: Probe, channel: grpc.aio.Channel) -> None:
    probe.failure = errors.NotFound("x" * 100_000)
    assert (await refused(channel.unary_unary(path("CheckIn"))(b"")))[2] == "not-found"


async def test_a_call_that_is_over_keeps_no_message(probe: Probe, channel: grpc.aio.Channel) -> None:
    """A report's function never reads past its last chunk; each kept a chunk until Python looked for cycles."""
    size, calls = 500_000, 8
    probe.enough = True
    with no_search_for_cycles():
        for _ in range(calls):
            call = channel.stream_stream(path("Report"))()
            await call.write(pb.ReportRequest(chunk=bytes(size)).SerializeToString())
            assert await call.read()
            assert await call.read() is grpc.aio.EOF
            del call
        await asyncio.sleep(0.01)
        assert tracemalloc.get_traced_memory()[0] < 2 * size


@contextmanager
def no_search_for_cycles() -> Iterator[None]:
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()
        gc.enable()


def test_a_method_without_a_function_is_a_fault_at_the_start(probe: Probe) -> None:
    methods = dict(probe.service().methods)
    del methods["Renew"]
    with pytest.raises(TypeError, match="Renew"):
        Service(DEVICE, probe.guard, methods)
    with pytest.raises(TypeError, match="Forgotten"):
        Service(DEVICE, probe.guard, {**probe.service().methods, "Forgotten": probe.renew})
