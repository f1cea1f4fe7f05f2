"""The command line that the public TUF conformance suite drives: it initialises, refreshes, downloads, and refuses."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from umbel.clock import SystemClock
from umbel.digests import digest_of
from umbel.listing import ListedRelease, target_path
from umbel_client.tuf_conformance import main
from umbel_server.keyring import Keyring
from umbel_server.repository import Repository, role_of

CONTENT = b"a manifest" * 40
NAME = target_path("m", 1)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """A web server over a repository with one release, as any mirror would serve it."""
    keys, now = Keyring.create(tmp_path / "keys"), SystemClock().now()
    repository = Repository.create(tmp_path / "www" / "metadata", keys, now)
    role = role_of("m")
    signers = [signer.public_key for signer in keys.add(role)]
    repository.publish("targets", repository.sign(repository.draft_signers("m", signers, now), "targets"), now)
    repository.publish(role, repository.sign(repository.draft_empty("m", now), role), now)
    release = ListedRelease("m", 1, 1, "stable", digest_of(CONTENT), len(CONTENT))
    repository.publish(role, repository.sign(repository.draft_releases([release], now), role), now)
    target = tmp_path / "www" / "targets" / "models" / "m" / f"{digest_of(CONTENT)}.1.json"
    target.parent.mkdir(parents=True)
    target.write_bytes(CONTENT)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "www")))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def client(home: Path, address: str, *arguments: str) -> int:
    shared = ["--metadata-url", f"{address}/metadata", "--metadata-dir", str(home / "metadata")]
    targets = ["--target-name", NAME, "--target-base-url", f"{address}/targets", "--target-dir", str(home / "targets")]
    return main([*shared, *targets, *arguments])


@pytest.fixture
def home(tmp_path: Path, address: str) -> Path:
    """A client that has been given its trusted root."""
    made = tmp_path / "home"
    (made / "targets").mkdir(parents=True)
    assert client(made, address, "init", str(tmp_path / "www" / "metadata" / "1.root.json")) == 0
    return made


def test_it_refreshes_and_downloads_what_is_listed(home: Path, address: str) -> None:
    assert client(home, address, "refresh") == 0
    assert (home / "metadata" / "root.json").is_file()
    assert (home / "metadata" / "timestamp.json").is_file()
    assert client(home, address, "download") == 0
    [found] = (home / "targets").iterdir()
    assert found.read_bytes() == CONTENT


def test_a_broken_download_goes_on_and_a_poisoned_beginning_is_thrown_away(home: Path, address: str) -> None:
    part = home / f"{digest_of(CONTENT)}.part"
    part.write_bytes(b"poison")
    assert client(home, address, "download") == 1
    assert not part.exists()
    part.write_bytes(CONTENT[:100])
    assert client(home, address, "download") == 0
    [found] = (home / "targets").iterdir()
    assert found.read_bytes() == CONTENT


def test_tampered_metadata_and_a_tampered_target_are_refused(home: Path, address: str, tmp_path: Path) -> None:
    target = next((tmp_path / "www" / "targets").rglob("*.1.json"))
    target.write_bytes(CONTENT[::-1])
    assert client(home, address, "download") == 1
    assert not list((home / "targets").iterdir())
    timestamp = tmp_path / "www" / "metadata" / "timestamp.json"
    timestamp.write_bytes(timestamp.read_bytes().replace(b'"version":', b'"version":9', 1))
    assert client(home, address, "refresh") == 1
