"""A wrong port is told in one line of words: what answers there, and what to look at."""

from __future__ import annotations

import json
import socket
import ssl
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.server.live import serving
from umbel.clock import SystemClock
from umbel_server.addresses import host_and_port
from umbel_server.folder import Folder
from umbel_server.helper.folder import HelperFolder, HelperSettings
from umbel_server.rpc import OF_STRANGERS


@pytest.fixture
def web_server() -> Iterator[str]:
    """Something that speaks, but not TLS."""
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    server.RequestHandlerClass.log_message = lambda *said: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_what_speaks_no_tls_is_no_coordinator(tmp_path: Path, web_server: str) -> None:
    state = tmp_path / "state"
    Folder.create(state, (), SystemClock().now())
    authority = str(state / "authority" / "server.pem")
    enrol = ["--home", str(tmp_path / "home"), "enrol", "--server", web_server, "--token", "t", "--ca", authority]
    for program, words in (
        ("umbel-device", ["-m", "umbel_client.cli", *enrol]),
        ("umbel", ["-m", "umbel_server.cli", "status", "--state", str(state), "--server", web_server]),
    ):
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stderr == (
            f"{program}: what answers at {web_server} speaks no TLS, so it is no coordinator; is the port right?\n"
        )


def test_who_connects_without_a_certificate_may_open_few_calls_at_a_time(tmp_path: Path) -> None:
    """Each that never comes to its end holds memory: one connection could have any number at a helper."""
    with serving(tmp_path / "state") as live:
        assert _streams_allowed(live.addresses.enrol) == OF_STRANGERS
    folder = HelperFolder.create(tmp_path / "helper", HelperSettings("00" * 32, port=0), "127.0.0.1:1", "", 0.0)
    command = [sys.executable, "-m", "umbel_server.cli", "helper", "run", "--state", str(folder.path), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as helper:
        assert helper.stdout is not None
        assert _streams_allowed(json.loads(helper.stdout.readline())["address"]) == OF_STRANGERS
        helper.terminate()


def _streams_allowed(address: str) -> int:
    """What a server says in its SETTINGS (RFC 9113, 6.5) about SETTINGS_MAX_CONCURRENT_STREAMS, which is 3."""
    context = ssl._create_unverified_context()
    context.set_alpn_protocols(["h2"])
    with socket.create_connection(host_and_port(address), 20) as plain, context.wrap_socket(plain) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
        with connection.makefile("rb") as answer:
            size = int.from_bytes(answer.read(9)[:3])
            return dict(struct.iter_unpack(">HI", answer.read(size)))[3]


def test_a_server_takes_all_the_connections_that_the_machine_allows_it() -> None:
    """The usual limit is 1,024: so many strangers who connect and say nothing left no file for the store."""
    code = (
        "import resource; from umbel_server.descriptors import take_all_that_are_allowed as take\n"
        "before = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (min(64, before[1]), before[1])); take()\n"
        "assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
