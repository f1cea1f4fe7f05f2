"""One HTTP request that is cut short from outside; mirrors and providers have their own tests of all the rest."""

from __future__ import annotations

import http.client
import socket

import pytest

from umbel.http_exchange import Exchange


def test_what_is_ended_while_its_host_is_still_looked_up_asks_nothing_later() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        exchange = Exchange(http.client.HTTPConnection(*server.getsockname(), timeout=5.0))
        exchange.end()
        with pytest.raises(http.client.NotConnected):
            exchange.ask("/", {})
        accepted, _ = server.accept()
        with accepted:
            assert accepted.recv(1) == b""
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
