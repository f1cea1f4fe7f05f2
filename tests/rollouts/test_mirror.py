"""Releases fetched from a web server that nobody has to trust: real HTTP on localhost, a real fleet behind it."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.power_cut import PowerCut, dies_at, fills_up_at
from tests.rollouts.fleet import AUTHOR, MODEL, DirectChannel, Fleet
from umbel.digests import digest_of
from umbel.errors import BadInput, MalformedMessage, NotFound, OutOfBounds, Unreachable
from umbel.manifest import Manifest
from umbel_client.config import load_config
from umbel_client.http_mirror import HttpFiles, Mirror
from umbel_server.mirroring import TIMESTAMP, write_mirror

NAME = "file.bin"


class Handler(SimpleHTTPRequestHandler):
    """A static web server that can resume, and notes what it was asked."""

    asked: list[tuple[str, str]]
    ranges = True
    cut_after: int | None = None

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers.get("Range", "")))
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data, start = path.read_bytes(), 0
        if self.ranges and (wanted := self.headers.get("Range")):
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start : None if self.cut_after is None else start + self.cut_after])

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@contextmanager
def serving(folder: Path, **behaviour: Any) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    asked: list[tuple[str, str]] = []
    kind = type("Kind", (Handler,), {"asked": asked, **behaviour})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(kind, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


def mirrored(fleet: Fleet) -> Path:
    folder = fleet.folder / "www"
    write_mirror(fleet.repository, fleet.folder / "blobs" / "bundles", folder)
    return folder


def with_mirror(fleet: Fleet, address: str) -> Mirror:
    mirror = Mirror(address)
    fleet.reopen(0, mirror=mirror)
    return mirror


def channel(fleet: Fleet) -> DirectChannel:
    found = fleet.devices[0].kit.channel
    assert isinstance(found, DirectChannel)
    return found


@pytest.fixture
async def fleet(tmp_path: Path) -> Fleet:
    made = Fleet(tmp_path, devices=1)
    made.verbs.publish(MODEL, made.good_version(), "stable", AUTHOR)
    return made


async def test_metadata_and_files_come_from_the_mirror_and_nothing_from_the_coordinator(fleet: Fleet) -> None:
    fleet.steer()
    with serving(mirrored(fleet)) as (address, asked):
        mirror = with_mirror(fleet, address)
        await fleet.devices[0].wake()
        assert 0 not in fleet.releases()
        state = fleet.devices[0].kit.memory.state
    assert channel(fleet).traffic.down == 0
    assert {path.split("/")[1] for path, _ in asked} == {"listing", "blobs"}
    assert mirror.came > state.fetched.bytes == state.fetched.from_mirror > 0
    assert state.bytes_today == mirror.came, "what comes from a mirror counts against the day's budget too"


async def test_a_release_that_the_mirror_lacks_comes_from_the_coordinator(fleet: Fleet) -> None:
    fleet.steer()
    folder = mirrored(fleet)
    number = fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    fleet.steer()
    with serving(folder) as (address, asked):
        with_mirror(fleet, address)
        await fleet.devices[0].wake()
    assert fleet.releases() == [number]
    assert asked and channel(fleet).traffic.down > 0


async def test_tampered_content_and_tampered_metadata_of_a_mirror_are_thrown_away(fleet: Fleet) -> None:
    fleet.steer()
    folder = mirrored(fleet)
    for path in (*(folder / "blobs").iterdir(), folder / "listing" / "snapshot.json"):
        path.write_bytes(path.read_bytes()[:-1] + b"!" if path.exists() else b"{}")
    with serving(folder) as (address, _):
        with_mirror(fleet, address)
        visit = await fleet.devices[0].wake()
    assert visit.error is None and visit.release is not None and visit.release.outcome.value == "adopted"
    assert 0 not in fleet.releases()


async def test_a_mirror_that_tampers_and_then_falls_silent_holds_nobody_back(fleet: Fleet) -> None:
    fleet.steer()
    folder = mirrored(fleet)
    for path in (folder / "blobs").iterdir():
        path.write_bytes(b"!" * 500 + path.read_bytes()[500:])
    with serving(folder, cut_after=1_000) as (address, _):
        with_mirror(fleet, address)
        visit = await fleet.devices[0].wake()
    assert visit.error is None and 0 not in fleet.releases()


async def test_truncated_content_of_a_mirror_goes_on_from_the_coordinator(fleet: Fleet) -> None:
    fleet.steer()
    with serving(mirrored(fleet), cut_after=1_000) as (address, asked):
        with_mirror(fleet, address)
        await fleet.devices[0].wake()
    assert 0 not in fleet.releases()
    assert sum(path.startswith("/blobs/") for path, _ in asked) == 1, "what failed once isn't waited for at each file"
    fetched = fleet.devices[0].kit.memory.state.fetched
    whole = sum(path.stat().st_size for path in fleet.devices[0].kit.shelf.path("0" * 64).parent.glob("[0-9a-f]*"))
    assert (fetched.bytes, fetched.from_mirror) == (whole, 1_000), "not a byte came twice"


async def test_a_mirror_that_is_gone_holds_nobody_back(fleet: Fleet) -> None:
    with serving(fleet.folder) as (address, _):
        pass
    with_mirror(fleet, address)
    await fleet.devices[0].wake()
    assert 0 not in fleet.releases()


@pytest.mark.parametrize("form", [f"http://{'a' * 64}.example", "http://../x", "{}/\N{SNOWMAN}"])
async def test_a_mirror_that_cant_be_asked_holds_nobody_back(fleet: Fleet, form: str) -> None:
    with serving(fleet.folder) as (address, _):
        with_mirror(fleet, form.format(address))
        await fleet.devices[0].wake()
    assert 0 not in fleet.releases()


# The fetcher alone.


async def collected(files: HttpFiles, offset: int = 0) -> bytes:
    return b"".join([chunk async for chunk in files.stream(NAME, offset)])


@pytest.mark.parametrize("ranges", [True, False], ids=["a server that resumes", "one that can't"])
async def test_a_download_goes_on_where_it_stopped(tmp_path: Path, ranges: bool) -> None:
    data = bytes(range(256)) * 1_000
    (tmp_path / NAME).write_bytes(data)
    with serving(tmp_path, ranges=ranges) as (address, asked):
        files = HttpFiles(address)
        assert await collected(files) == data
        assert await collected(files, 100_001) == data[100_001:]
    assert asked[-1] == (f"/{NAME}", "bytes=100001-")


async def test_endless_data_is_cut_off(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b" " * 1_000_000)
    with serving(tmp_path) as (address, _):
        with pytest.raises(OutOfBounds):
            await HttpFiles(address).fetch(NAME, 999_999)
        assert len(await HttpFiles(address).fetch(NAME, 1_000_000)) == 1_000_000


async def test_slow_retrieval_ends_at_one_deadline_for_the_whole_file(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"x")

    def dripping(self: Handler) -> None:
        self.send_response(200)
        self.end_headers()
        with pytest.raises(OSError):
            while True:
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.02)

    with serving(tmp_path, do_GET=dripping) as (address, _), pytest.raises(Unreachable, match="too slow"):
        await HttpFiles(address, seconds=0.3).fetch(NAME, 1_000_000)


async def test_what_is_not_there_and_what_is_no_answer_are_told_apart(tmp_path: Path) -> None:
    def teapot(self: Handler) -> None:
        self.send_error(418)

    def other_range(self: Handler) -> None:
        self.send_response(206)
        self.send_header("Content-Range", "bytes 0-9/10")
        self.end_headers()

    with serving(tmp_path) as (address, _), pytest.raises(NotFound):
        await HttpFiles(address).fetch("nothing", 10)
    for behaviour in (teapot, other_range):
        with serving(tmp_path, do_GET=behaviour) as (address, _), pytest.raises(Unreachable):
            async for _chunk in HttpFiles(address).stream(NAME, 5):
                pass


@pytest.mark.parametrize(
    "address",
    [
        "", "ftp://host/x", "//host", "https://", "https://host/x?y=1", "host/path", "https://host:port/x", "https://host:0",
        "https://host:65536/x", "https://a host/x", "https://[host/x",
    ],
)  # fmt: skip
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(BadInput):
        Mirror(address)


def test_a_device_is_told_of_its_mirror_in_its_settings(tmp_path: Path) -> None:
    (tmp_path / "device.toml").write_text('[mirror]\naddress = "https://cdn.example.org/umbel"\nseconds = 60.0\n')
    assert load_config(tmp_path).mirror.seconds == 60.0
    (tmp_path / "device.toml").write_text("[mirror]\naddress = 7\n")
    with pytest.raises(MalformedMessage):
        load_config(tmp_path)


# What a mirror is filled with.


async def test_a_mirror_is_filled_again_without_copying_anything_twice(fleet: Fleet) -> None:
    fleet.steer()
    folder, bundles = fleet.folder / "www", fleet.folder / "blobs" / "bundles"
    first = write_mirror(fleet.repository, bundles, folder)
    assert first.releases == 1 and first.files > 3
    assert write_mirror(fleet.repository, bundles, folder).files == 0
    for path in (folder / "blobs").iterdir():
        assert digest_of(path.read_bytes()) == path.name
    fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    fleet.steer()
    again = write_mirror(fleet.repository, bundles, folder)
    assert again.releases == 2 and 0 < again.files < first.files, "graphs are shared"
    assert (folder / "listing" / "timestamp.json").read_bytes() == fleet.repository.file("timestamp.json")
    await asyncio.sleep(0)


async def test_a_listed_bundle_that_is_gone_is_named(fleet: Fleet, tmp_path: Path) -> None:
    fleet.steer()
    with pytest.raises(NotFound, match="listed bundle"):
        write_mirror(fleet.repository, tmp_path / "elsewhere", tmp_path / "www")


def listed_files(mirror: Path) -> list[Path]:
    """All that a client who believes a mirror's timestamp will ask it for."""

    def signed(name: str) -> Any:
        return json.loads((mirror / "listing" / name).read_bytes())["signed"]

    snapshot = signed(f"{signed('timestamp.json')['meta']['snapshot.json']['version']}.snapshot.json")
    metadata = [f"{meta['version']}.{name}" for name, meta in snapshot["meta"].items()]
    targets = [target for name in metadata for target in signed(name).get("targets", {}).values()]
    manifests = [mirror / "blobs" / target["hashes"]["sha256"] for target in targets]
    files = [ref for manifest in manifests for ref in Manifest.from_bytes(manifest.read_bytes()).files.values()]
    return [*manifests, *(mirror / "blobs" / ref.digest for ref in files)]


def test_a_mirror_never_names_what_is_not_there_wherever_its_filling_was_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet, bundles = Fleet(tmp_path), tmp_path / "blobs" / "bundles"
    fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    write_mirror(fleet.repository, bundles, tmp_path / "first")
    fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    for cut, last in itertools.product((dies_at, fills_up_at), range(0, 40, 3)):
        mirror = shutil.copytree(tmp_path / "first", tmp_path / f"{cut.__name__}-{last}")
        for named in (TIMESTAMP, "1.root.json"):
            os.utime(mirror / "listing" / named, (1.0, 1.0))
        with monkeypatch.context() as patch, suppress(PowerCut, OSError):
            cut(patch, last)
            write_mirror(fleet.repository, bundles, mirror)
        assert [path.name for path in listed_files(mirror) if digest_of(path.read_bytes()) != path.name] == []
        write_mirror(fleet.repository, bundles, mirror)
        assert len(listed_files(mirror)) > len(listed_files(tmp_path / "first"))
        write_mirror(fleet.repository, bundles, mirror)
        assert not list(mirror.rglob(".*")), "scraps of what was cut off"
