"""A folder that any static web server can hand out: the release listing, and the files of all listed releases.

Devices that are told of it (`[mirror]` in `device.toml`) ask there first, and believe nothing for coming from there.
Files come before the metadata that name them, and the timestamp last, so that no device finds a listing whose files
aren't there yet. It may be filled again at any time, also while the coordinator runs.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from umbel.digests import Digest
from umbel.errors import NotFound
from umbel.manifest import Manifest
from umbel_server.files import PUBLIC, aside_of, drop_left, flush, write_file
from umbel_server.repository import Repository

TIMESTAMP = "timestamp.json"


@dataclass(frozen=True, slots=True)
class Mirrored:
    """What a mirror got."""

    releases: int
    files: int
    """Files of bundles that weren't there yet."""
    bytes: int


def write_mirror(repository: Repository, bundles: Path, folder: Path) -> Mirrored:
    """Fill `folder` with what is listed now.

    Args:
        repository: the release listing.
        bundles: the folder of bundle files, by digest.
        folder: made where it doesn't exist; `listing/` and `blobs/` in it.

    Raises:
        NotFound: a file of a listed release isn't in `bundles`.
    """
    listing, blobs = folder / "listing", folder / "blobs"
    for place in (listing, blobs):
        place.mkdir(parents=True, exist_ok=True)
        drop_left(place, listing / TIMESTAMP)
    listed = [release for model in repository.models() for release in repository.releases(model)]
    new = [size for release in listed for size in _copy_bundle(bundles, blobs, release.bundle)]
    names = sorted(repository.names(), key=lambda name: name == TIMESTAMP)
    for name in names:
        write_file(listing / name, repository.file(name), PUBLIC)
    return Mirrored(len(listed), len(new), sum(new))


def _copy_bundle(bundles: Path, blobs: Path, manifest: Digest) -> list[int]:
    """The sizes of the files that weren't there yet; the manifest comes last, so that a cut-off copy is made anew."""
    source = bundles / manifest
    if not source.is_file():
        raise NotFound(f"the listed bundle {manifest} isn't in {bundles}; is this the coordinator's own folder?")
    refs = Manifest.from_bytes(source.read_bytes()).files.values()
    wanted = [*(ref.digest for ref in refs), manifest]
    return [_copy(bundles / digest, blobs / digest) for digest in wanted if not (blobs / digest).exists()]


def _copy(source: Path, target: Path) -> int:
    beside = aside_of(target)
    try:
        shutil.copyfile(source, beside)
        flush(beside)
        beside.replace(target)
    except OSError as error:
        # Left beside, what found no room would take it from the next try.
        beside.unlink(missing_ok=True)
        if isinstance(error, FileNotFoundError):
            raise NotFound(f"a file of a listed bundle isn't there: {source}") from None
        raise
    return target.stat().st_size
