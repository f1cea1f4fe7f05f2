"""What is said to be kept outlives a power cut: on the server, on a device, and in a folder with a bundle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.power_cut import unflushed
from umbel.bundle import Bundle, write_bundle
from umbel.digests import digest_of
from umbel_client.files import Disk
from umbel_client.shelf import Shelf
from umbel_client.slots import Slots
from umbel_models.zoo import bundle_path
from umbel_server.blobs import Blobs
from umbel_server.files import write_file


def a_file_of_the_server(folder: Path) -> None:
    write_file(folder / "release.key", b"key")


def a_file_of_a_bundle_on_the_server(folder: Path) -> None:
    Blobs(folder).put_bundle_file(b"weights")


def an_accepted_report(folder: Path) -> None:
    blobs, digest = Blobs(folder), digest_of(b"sealed")
    blobs.partial_path("r", digest).write_bytes(b"sealed")
    blobs.settle_report("r", digest)


def a_file_of_a_device(folder: Path) -> None:
    Disk().write(folder / "known.json", b"{}")


def a_blob_that_a_device_serves_from(folder: Path) -> None:
    shelf = Shelf(folder)
    shelf.put(b"weights")
    shelf.switch(Slots())


def a_bundle_in_a_folder(folder: Path) -> None:
    packaged = Bundle.open(bundle_path("smartwatch"))
    files = {name: path.read_bytes() for name, path in packaged.paths.items()}
    write_bundle(folder / "bundle", packaged.manifest, files)


@pytest.mark.parametrize(
    "kept",
    [
        a_file_of_the_server,
        a_file_of_a_bundle_on_the_server,
        an_accepted_report,
        a_file_of_a_device,
        a_blob_that_a_device_serves_from,
        a_bundle_in_a_folder,
    ],
)
def test_what_is_kept_is_on_the_medium(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: Callable[[Path], None]
) -> None:
    assert unflushed(monkeypatch, lambda: kept(tmp_path)) == []
