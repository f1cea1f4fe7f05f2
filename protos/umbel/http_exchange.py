"""One HTTP request, made in a thread that another one may cut short.

A socket's timeout bounds the wait for each piece, and a server that drips never runs into it. Whoever keeps to one
deadline for everything stops waiting for the thread, and ends the exchange, which ends the thread too.
"""

from __future__ import annotations

import http.client
import socket
from collections.abc import Mapping
from contextlib import suppress


class Exchange:
    """One GET and its answer, on a connection of its own; `ask` and `read` block, `end` may be called meanwhile."""

    def __init__(self, connection: http.client.HTTPConnection) -> None:
        self._connection = connection
        self._connection.auto_open = 0  # one that was ended while it connected would connect anew
        self._socket: socket.socket | None = None
        self._answer: http.client.HTTPResponse | None = None
        self._ended = False

    def ask(self, target: str, headers: Mapping[str, str]) -> http.client.HTTPResponse:
        """Ask for a path; raises `OSError`, `ValueError` (a host that IDNA can't spell) or `HTTPException`."""
        self._connection.connect()
        self._socket = self._connection.sock
        if self._ended:
            self.end()
        self._connection.request("GET", target, headers=headers)
        self._answer = self._connection.getresponse()
        return self._answer

    def read(self, most: int) -> bytes:
        """The next piece of the answer; nothing at the end."""
        return self._answer.read1(most) if self._answer else b""

    def end(self) -> None:
        """Hang up."""
        self._ended = True
        if self._socket is not None:
            # Wakes a thread that still reads; without that, closing would wait for it.
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        if self._answer is not None:
            self._answer.close()
        self._connection.close()
