"""`python -m umbel_client.tuf_conformance`: the command line that the public TUF conformance suite drives a client by.

    --metadata-dir DIR init ROOT
    --metadata-url URL --metadata-dir DIR refresh
    --metadata-url URL --metadata-dir DIR --target-name NAME --target-base-url URL --target-dir DIR download

Exit code 0, or 1 when something was refused. It runs the very `Listing` that devices run, over plain HTTP.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import urllib.parse
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path

from umbel.clock import SystemClock
from umbel.errors import DigestMismatch, NotFound, UmbelError
from umbel_client.http_mirror import HttpFiles
from umbel_client.listing import Listing


async def download(listing: Listing, metadata: HttpFiles, targets: HttpFiles, name: str, folder: Path) -> None:
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
    await _resume(targets, prefixed, part, target.length)
    if not _fits(target, part):
        part.unlink()
        raise DigestMismatch(f"{name} isn't what is listed; it was thrown away")
    os.replace(part, place)  # noqa: PTH105 - it says what it does


async def _resume(files: HttpFiles, name: str, part: Path, size: int) -> None:
    """Let `part` grow to the file's `size`, from where it stands; not a byte more is taken."""
    with part.open("ab") as file:
        async with aclosing(files.stream(name, file.tell())) as chunks:
            async for chunk in chunks:
                file.write(chunk)
                if file.tell() > size:
                    break


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
    listing, metadata = Listing(chosen.metadata_dir, pinned.read_bytes()), HttpFiles(chosen.metadata_url)
    if chosen.command == "refresh":
        await listing.refresh(metadata.fetch, SystemClock().now())
        return
    for name in chosen.target_name:
        await download(listing, metadata, HttpFiles(chosen.target_base_url), name, chosen.target_dir)


if __name__ == "__main__":
    sys.exit(main())
