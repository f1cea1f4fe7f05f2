"""`python -m umbel_client.tuf_conformance`: the command line that the public TUF conformance suite drives a client by.

    --metadata-dir DIR init ROOT
    --metadata-url URL --metadata-dir DIR refresh
    --metadata-url URL --metadata-dir DIR --target-name NAME --target-base-url URL --target-dir DIR download

Exit code 0, or 1 when something was refused. It runs the very `Listing` that devices run, over plain HTTP.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import os
import sys
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from umbel.clock import SystemClock
from umbel.errors import DigestMismatch, NotFound, OutOfBounds, UmbelError, Unreachable
from umbel_client.listing import Listing

SECONDS: Final = 10.0
PIECE: Final = 64 << 10


class HttpMirror:
    """Files below an address, read with a limit; a mirror needn't be trusted.

    Args:
        address: http(s)://host[:port]/path of the folder.
    """

    def __init__(self, address: str) -> None:
        self._address = address.rstrip("/")

    async def fetch(self, name: str, limit: int) -> bytes:
        """One file of at most `limit` bytes; raises `NotFound`, `OutOfBounds` or `Unreachable`."""
        return await asyncio.to_thread(self._get, name, limit, 0)

    async def resume(self, name: str, part: Path, size: int) -> None:
        """Let `part` grow to the file's `size`, from where it stands."""
        await asyncio.to_thread(self._resume, name, part, size)

    def _resume(self, name: str, part: Path, size: int) -> None:
        offset = part.stat().st_size if part.exists() else 0
        if offset < size:
            data = self._get(name, size - offset, offset)
            with part.open("ab") as file:
                file.write(data)

    def _get(self, name: str, limit: int, offset: int) -> bytes:
        parts = urllib.parse.urlsplit(f"{self._address}/{name}")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.netloc, timeout=SECONDS)
        try:
            connection.request("GET", parts.path, headers={"Range": f"bytes={offset}-"} if offset else {})
            answer = connection.getresponse()
            if answer.status in (403, 404):
                raise NotFound(f"{name} isn't there ({answer.status})")
            if answer.status not in (200, 206):
                raise Unreachable(f"{name}: the mirror answered {answer.status}")
            if offset and answer.status == 200:
                answer.read(offset)  # it can't resume, so what is here already is skipped
            data = answer.read(limit + 1)
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(f"{name}: {error}") from error
        finally:
            connection.close()
        if len(data) > limit:
            raise OutOfBounds(f"{name} is longer than {limit} bytes; the rest was left")
        return data


async def download(listing: Listing, metadata: HttpMirror, targets: HttpMirror, name: str, folder: Path) -> None:
    """Fetch a listed target into a folder, going on where an earlier try stopped, verified before it gets its name."""
    target = await listing.target(metadata.fetch, SystemClock().now(), name)
    if target is None:
        raise NotFound(f"{name} isn't listed")
    place = folder / urllib.parse.quote(name, "")
    digest = next(iter(target.hashes.values()))
    parent, slash, base = name.rpartition("/")
    prefixed = f"{parent}{slash}{digest}.{base}" if listing.consistent else name
    part = folder.parent / f"{digest}.part"
    if place.exists() and _fits(target, place):
        return
    await targets.resume(prefixed, part, target.length)
    if not _fits(target, part):
        part.unlink()
        raise DigestMismatch(f"{name} isn't what is listed; it was thrown away")
    os.replace(part, place)  # noqa: PTH105 - it says what it does


def _fits(target: object, path: Path) -> bool:
    from tuf.api.exceptions import LengthOrHashMismatchError
    from tuf.api.metadata import TargetFile

    assert isinstance(target, TargetFile)  # noqa: S101 - python-tuf's own type
    try:
        target.verify_length_and_hashes(path.read_bytes())
    except LengthOrHashMismatchError:
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Do one command of the suite; without `arguments`, as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m umbel_client.tuf_conformance", description=__doc__)
    parser.add_argument("--metadata-url", default="")
    parser.add_argument("--metadata-dir", type=Path, required=True)
    parser.add_argument("--target-name", action="append", default=[])
    parser.add_argument("--target-dir", type=Path)
    parser.add_argument("--target-base-url", default="")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("init").add_argument("root", type=Path)
    commands.add_parser("refresh")
    commands.add_parser("download")
    chosen = parser.parse_args(arguments)
    try:
        asyncio.run(_run(chosen))
    except UmbelError as error:
        sys.stderr.write(f"{error.code}: {error}\n")
        return 1
    return 0


async def _run(chosen: argparse.Namespace) -> None:
    history = chosen.metadata_dir / "root_history"
    if chosen.command == "init":
        Listing(chosen.metadata_dir, chosen.root.read_bytes()).pin()
        return
    pinned = min(history.glob("*.root.json"), key=lambda path: int(path.name.split(".")[0]))
    listing, metadata = Listing(chosen.metadata_dir, pinned.read_bytes()), HttpMirror(chosen.metadata_url)
    if chosen.command == "refresh":
        await listing.refresh(metadata.fetch, SystemClock().now())
        return
    for name in chosen.target_name:
        await download(listing, metadata, HttpMirror(chosen.target_base_url), name, chosen.target_dir)


if __name__ == "__main__":
    sys.exit(main())
