"""host:port, as people write it and gRPC reads it: an IPv6 address stands in brackets."""

from __future__ import annotations

import errno
import socket

from umbel.errors import MalformedMessage
from umbel_server.authority import general_name


def host_and_port(address: str) -> tuple[str, int]:
    """The parts of host:port or [host]:port; raises `MalformedMessage`."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or int(port) > 65_535:
        raise MalformedMessage(f"{address!r} is no address; write it as host:port, such as helper.example.org:7446")
    host = host.removeprefix("[").removesuffix("]")
    general_name(host)
    return host, int(port)


def joined(host: str, port: int) -> str:
    """Undo `host_and_port`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def from_here(host: str, port: int) -> str:
    """Where programs of this machine call who listens at a host; all of its addresses have loopback among them."""
    return joined({"0.0.0.0": "127.0.0.1", "::": "127.0.0.1"}.get(host, host), port)  # noqa: S104 - to be called at


def why_not(host: str, port: int, program: str) -> str:
    """Why nobody can listen at a host and port, for a message to end with: what the system says of it.

    Args:
        host: name or address.
        port: of TCP.
        program: what usually has the port, where somebody has.
    """
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            return f": {error.strerror}"
    return f"; is another {program} running there?"
