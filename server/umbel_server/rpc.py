"""gRPC on one side, plain functions on the other: who may call, what was sent, and how a refusal travels.

A `Service` is built from a proto's own service descriptor, so that no method can be forgotten: each is guarded first
(by the caller's certificate or token, before a byte of the message is looked at), decoded second, and answered third.
Every `UmbelError` becomes its gRPC status, its message as details, and its code in the trailing metadata `umbel-error`;
any other exception is logged with its traceback and answered without one. A full disk, or a database that is away, is
`Unavailable`: whoever called keeps what it has, and comes again.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final, Generic, NoReturn, TypeVar

import grpc
import structlog
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from umbel.errors import ERROR_KEY
from umbel.messages import parse
from umbel_server.passing import told_outside

C = TypeVar("C")

MAX_MESSAGE_BYTES: Final = 1 << 20
"""Largest single message on all ports but that for questions to models; what is larger travels in chunks."""
STREAMS: Final = 128
"""Calls that one connection may have open, of a caller whose certificate was looked at before."""
OF_STRANGERS: Final = 16
"""Where anybody may connect: a call that never comes to its end takes some kilobytes of memory."""
_DETAILS = 1_000
"""Characters of a refusal's message: it travels in a header, and headers are small."""

Guard = Callable[[str, bytes | None], C]
"""(method name, the caller's certificate in PEM) -> who calls; raises `NotAuthentic` or `NotAllowed`."""
TokenGuard = Callable[[str, str], Awaitable[C]]
"""(method name, the caller's bearer token, "" without one) -> who calls; raises as a `Guard` does."""
Unary = Callable[[C, Any], Awaitable[Message]]
"""(caller, request) -> response."""
Stream = Callable[[C, Any], AsyncIterator[Message]]
"""(caller, request or iterator of requests) -> responses."""
Requests = AsyncIterator[Any]


@dataclass(slots=True)
class Call:
    """One call as it goes, for who counts them."""

    service: str
    method: str
    received: int = 0
    """Bytes of messages."""
    sent: int = 0
    status: str = "CANCELLED"
    """A gRPC status code's name; this one until it has come to an end."""
    error: str = ""
    """The `UmbelError.code` that it was refused with."""


Watch = Callable[[Call], AbstractContextManager[object]]
"""What a call goes on inside of; see `umbel_server.monitoring.calls`."""

_log = structlog.get_logger(__name__)


def port_options(streams: int, message_bytes: int = MAX_MESSAGE_BYTES) -> tuple[tuple[str, int], ...]:
    """How a port is opened on which one connection may have so many calls, and each message may be so large."""
    return (
        ("grpc.so_reuseport", 0),  # a port that another process holds is an error, not a lottery
        ("grpc.max_receive_message_length", message_bytes),
        ("grpc.max_concurrent_streams", streams),
        ("grpc.server_handshake_timeout_ms", 30_000),  # who connects and says nothing
        ("grpc.max_connection_idle_ms", 10 * 60_000),
        # Devices ask every minute whether this is still here, operators and leaders every 10 s.
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        # And a caller who vanished without a word holds no stream for ever.
        ("grpc.keepalive_time_ms", 5 * 60_000),
        ("grpc.keepalive_permit_without_calls", 1),
    )


@dataclass(frozen=True)
class Service(Generic[C]):
    """One proto service: its descriptor, its guard, and a function for each of its methods."""

    descriptor: ServiceDescriptor
    guard: Guard[C]
    methods: Mapping[str, Unary[C] | Stream[C]]
    tokens: TokenGuard[C] | None = None
    """In the guard's place, on a port where callers bring tokens."""

    def __post_init__(self) -> None:
        wanted = {method.name for method in self.descriptor.methods}
        if wanted != set(self.methods):
            raise TypeError(f"{self.descriptor.full_name} has methods {wanted ^ set(self.methods)} on one side only")

    def add_to(self, server: grpc.aio.Server, watch: Watch = nullcontext) -> None:
        """Serve it."""
        handlers = {method.name: self._handler(method, watch) for method in self.descriptor.methods}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(self.descriptor.full_name, handlers),))

    def _handler(self, method: MethodDescriptor, watch: Watch) -> grpc.RpcMethodHandler[Any, Any]:
        call = self._streaming(method, watch) if method.server_streaming else self._single(method, watch)
        match (method.client_streaming, method.server_streaming):
            case (False, False):
                return grpc.unary_unary_rpc_method_handler(call)
            case (False, True):
                return grpc.unary_stream_rpc_method_handler(call)
            case (True, False):
                return grpc.stream_unary_rpc_method_handler(call)
            case _:
                return grpc.stream_stream_rpc_method_handler(call)

    async def _caller(self, method: MethodDescriptor, context: grpc.aio.ServicerContext[Any, Any]) -> C:
        if self.tokens is not None:
            sent = context.invocation_metadata() or ()
            return await self.tokens(method.name, bearer([str(value) for key, value in sent if key == "authorization"]))
        return self.guard(method.name, _certificate(context))

    def _single(self, method: MethodDescriptor, watch: Watch) -> Callable[..., Any]:
        function = self.methods[method.name]

        async def answer(sent: Any, context: grpc.aio.ServicerContext[Any, Any], told: Call) -> bytes:
            caller = await self._caller(method, context)
            async with _decoded(method, sent, context, told) as request:
                answered = function(caller, request)
                if not inspect.isawaitable(answered):
                    raise TypeError(f"{method.full_name} must be answered by one message")
                return (await answered).SerializeToString()

        async def call(sent: Any, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
            with watch(told := Call(self.descriptor.name, method.name)):
                try:
                    given = await answer(sent, context, told)
                    told.sent, told.status = len(given), "OK"
                    return given
                except Exception as error:  # noqa: BLE001 - the edge: whatever it is, the caller gets a status
                    failure = error
                del sent  # gRPC keeps how a call was refused, and so this frame, until Python looks for cycles
                return await _refuse(context, method, failure, told)

        return call

    def _streaming(self, method: MethodDescriptor, watch: Watch) -> Callable[..., Any]:
        function = self.methods[method.name]

        async def call(sent: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[bytes]:
            with watch(told := Call(self.descriptor.name, method.name)):
                try:
                    caller = await self._caller(method, context)
                    async with _decoded(method, sent, context, told) as request:
                        answers = function(caller, request)
                        if not isinstance(answers, AsyncGenerator):
                            raise TypeError(f"{method.full_name} must be answered by a stream")
                        async with contextlib.aclosing(answers):  # a caller who hangs up ends the function too, at once
                            async for answer in answers:
                                part = answer.SerializeToString()
                                told.sent += len(part)
                                yield part
                    told.status = "OK"
                    return
                except Exception as error:  # noqa: BLE001 - the edge: whatever it is, the caller gets a status
                    failure = error
                await _refuse(context, method, failure, told)

        return call


@contextlib.asynccontextmanager
async def _decoded(
    method: MethodDescriptor, sent: Any, context: grpc.aio.ServicerContext[Any, Any], told: Call
) -> AsyncIterator[Any]:
    """The request, or the requests that follow one another: they end with the call, also where nobody reads them all.

    gRPC's own iterator would keep the message that it gave last until Python looks for cycles, which is thousands of
    reports later.
    """
    kind = GetMessageClass(method.input_type)
    if not method.client_streaming:
        told.received = len(sent)
        yield parse(kind, sent)
        return

    async def requests() -> AsyncGenerator[Message, None]:
        while (data := await context.read()) is not grpc.aio.EOF:
            told.received += len(data)
            yield parse(kind, data)

    async with contextlib.aclosing(requests()) as following:
        yield following


def _certificate(context: grpc.aio.ServicerContext[Any, Any]) -> bytes | None:
    found = context.auth_context().get("x509_pem_cert")
    return next(iter(found), None) if found else None


def bearer(headers: Sequence[str]) -> str:
    """The token in the one `authorization` header (RFC 6750, 2.1); "" if there is none, or more than one."""
    scheme, _, token = headers[0].partition(" ") if len(headers) == 1 else ("", "", "")
    return token.strip() if scheme.lower() == "bearer" else ""


async def _refuse(
    context: grpc.aio.ServicerContext[Any, Any], method: MethodDescriptor, error: Exception, call: Call
) -> NoReturn:
    told = told_outside(_log, error, method.full_name)
    call.status, call.error = told.status.name, told.code
    await context.abort(
        grpc.StatusCode[told.status.name],
        str(told)[:_DETAILS],
        trailing_metadata=((ERROR_KEY, told.code),),
    )
    raise told  # never reached: abort raises
