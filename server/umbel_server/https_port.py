"""HTTP/1.1 over TLS on the coordinator's own loop: uvicorn reads and writes, and what it leaves open is bounded here.

uvicorn's own `Server` isn't used: it takes the process's signals, writes a log of its own, and may leave connections
behind when it ends. Its protocol knows no deadline before a request's first byte, nor while one arrives or an answer
isn't read; this one does, and hands the caller's certificate to the application.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import ssl
from typing import Any, Final, cast

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from umbel.errors import ERROR_KEY, MalformedMessage, Unavailable
from umbel_server.addresses import joined, why_not

HEADER_BYTES: Final = 32 << 10
"""Of a request's line and headers together; tokens with many groups are large."""
CONNECTIONS: Final = 1_024
QUIET_SECONDS: Final = 60
"""Until a connection's first request has begun, until its next, and until the rest of one that was refused is there."""
HANDSHAKE_SECONDS: Final = 10.0
CONNECTION: Final = "connection"
"""Where in a request's state the application finds its `Connection`."""

_SILENT = logging.Logger("umbel_server.https_port", logging.CRITICAL + 1)
"""What uvicorn would say of requests that are none goes to their senders only."""


class HttpsPort:
    """A port; it takes callers once it is started.

    Args:
        host: address to listen at.
        port: 0 for any free one.
        context: whom callers meet, and what they must show.

    Raises:
        Unavailable: the port is taken.
    """

    def __init__(self, host: str, port: int, context: ssl.SSLContext) -> None:
        self._socket = _bound(host, port)
        self._context = context
        self._connections = _Connections()
        self._server: asyncio.Server | None = None

    @property
    def number(self) -> int:
        """The port, with what 0 became."""
        return int(self._socket.getsockname()[1])

    async def start(self, app: Any) -> None:
        """Have an ASGI application answer."""
        config = Config(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            workers=1,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=QUIET_SECONDS,
            h11_max_incomplete_event_size=HEADER_BYTES,
        )
        config.load()
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: Connection(config, self._connections, {}, loop),
            sock=self._socket,
            ssl=self._context,
            ssl_handshake_timeout=HANDSHAKE_SECONDS,
            ssl_shutdown_timeout=1.0,
        )

    async def stop(self, drain: float) -> None:
        """Take no new requests, let those under way be answered within this time, then close everything."""
        if self._server is None:
            self._socket.close()
            return
        self._connections.are_ending = True
        self._server.close()
        open_ones = [cast(Connection, connection) for connection in self._connections.connections]
        for connection in open_ones:
            connection.shutdown()
        if open_ones:
            await asyncio.wait([connection.gone for connection in open_ones], timeout=drain)
        for connection in open_ones:
            connection.transport.abort()
        tasks = list(self._connections.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Connections(ServerState):
    """Those that are open, and the requests under way."""

    are_ending = False


class Connection(H11Protocol):
    """One caller's connection."""

    certificate: bytes | None = None
    """The caller's (PEM), which the handshake has shown to be of the port's authority; None if they have none."""
    task: asyncio.Task[Any] | None = None
    """That answers the request under way, for the application to set; ended when the caller hangs up."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.logger = self.access_logger = _SILENT
        self.access_log = False
        self.gone = self.loop.create_future()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as its parent does
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        self.app_state = {CONNECTION: self}
        # An answer is several writes; without this the kernel keeps the second back until the first is acknowledged.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        shown = transport.get_extra_info("ssl_object").getpeercert(binary_form=True)
        self.certificate = ssl.DER_cert_to_PEM_cert(shown).encode() if shown else None
        if len(self.connections) > CONNECTIONS or cast(_Connections, self.server_state).are_ending:
            transport.abort()
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def data_received(self, data: bytes) -> None:
        """Take what came; time goes on until a whole header is there, and not only its first byte."""
        self.conn.receive_data(data)
        self.handle_events()

    def timeout_keep_alive_handler(self) -> None:
        """Hang up on who takes too long."""
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        if self.task is not None:
            self.task.cancel()
        if not self.gone.done():
            self.gone.set_result(None)

    def shutdown(self) -> None:
        """Take no request after the one that is under way."""
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()
        else:
            self.cycle.keep_alive = False

    def send_400_response(self, msg: str) -> None:
        """Refuse what isn't HTTP, in the form of all refusals; nothing that follows can be understood either."""
        words = f"this is no HTTP/1.1 request with headers of at most {HEADER_BYTES >> 10} KB and one length"
        body = json.dumps({"error": words}).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        try:
            response = h11.Response(status_code=400, headers=[*headers, (ERROR_KEY, MalformedMessage.code)])
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        except h11.LocalProtocolError:  # in the middle of an answer
            self.transport.abort()
        self.transport.close()


def _bound(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        both = host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server((host, port), family=family, dualstack_ipv6=both)
    except OSError as error:
        raise Unavailable(f"can't listen at {joined(host, port)}{why_not(host, port, 'coordinator')}") from error
