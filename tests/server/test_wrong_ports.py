"""A wrong port is told in one line of words: what answers there, and what to look at."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from umbel.clock import SystemClock
from umbel_server.folder import Folder


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


def test_a_server_takes_all_the_connections_that_the_machine_allows_it() -> None:
    """The usual limit is 1,024: so many strangers who connect and say nothing left no file for the store."""
    code = (
        "import resource; from umbel_server.descriptors import take_all_that_are_allowed as take\n"
        "before = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (min(64, before[1]), before[1])); take()\n"
        "assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
