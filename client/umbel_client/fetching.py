"""Fetch what the shelf lacks: bounded by sizes known in advance, resumable, verified before use."""

from __future__ import annotations

from contextlib import aclosing

from umbel.bundle import Bundle
from umbel.digests import Digest
from umbel.errors import BundleInvalid, DigestMismatch, UmbelError, Unreachable
from umbel.manifest import Manifest
from umbel.release import Release
from umbel_client.channel import Channel
from umbel_client.shelf import Shelf


async def fetch_bundle(channel: Channel, shelf: Shelf, release: Release, runtime: str) -> Bundle:
    """The bundle of a verified release, after fetching those of its files that aren't here.

    Raises:
        BundleInvalid: it has no graphs for this runtime, or its manifest contradicts itself.
        OutOfBounds: it is larger than the shelf.
        DigestMismatch: the far side sent other bytes than those asked for.
        Unreachable: the stream broke; what came stays, and the next try goes on from there.
    """
    await fetch_blob(channel, shelf, release.bundle, release.manifest_size)
    manifest = Manifest.from_bytes(shelf.path(release.bundle).read_bytes())
    if runtime not in manifest.graphs:
        raise BundleInvalid(f"the bundle has graphs for {sorted(manifest.graphs)}, this device runs {runtime!r}")
    shelf.require_room(release.manifest_size + sum(ref.size for ref in manifest.files.values()))
    for ref in manifest.files.values():
        await fetch_blob(channel, shelf, ref.digest, ref.size)
    try:
        return shelf.bundle(release.bundle)
    except DigestMismatch:
        # A blob from an earlier visit has rotted, and is gone now: one more look fetches it again.
        for ref in manifest.files.values():
            await fetch_blob(channel, shelf, ref.digest, ref.size)
        return shelf.bundle(release.bundle)


async def fetch_blob(channel: Channel, shelf: Shelf, digest: Digest, size: int) -> None:
    """Put one blob on the shelf, going on where an earlier try stopped.

    Args:
        channel: where to fetch from.
        shelf: where to put it.
        digest: its name.
        size: its bytes, as a signed or verified source told; not one more is taken.
    """
    if shelf.holds(digest):
        return
    part = shelf.part(digest)
    offset = part.stat().st_size if part.exists() else 0
    if offset > size:
        part.unlink()
        offset = 0
    with part.open("ab") as file:
        if offset < size:
            async with aclosing(channel.fetch(digest, offset)) as chunks:
                async for chunk in chunks:
                    offset += len(chunk)
                    if offset > size:
                        break
                    file.write(chunk)
    if offset > size:
        part.unlink()
        raise DigestMismatch(f"blob {digest} should have {size} bytes, the far side sends more; the rest was left")
    if offset < size:
        raise Unreachable(f"the stream of blob {digest} ended after {offset} of {size} bytes; it goes on next time")
    shelf.finish(digest)


def is_fault_of_release(error: UmbelError) -> bool:
    """Whether an error while taking a release over lies in the release, and not on the way to it."""
    return not isinstance(error, Unreachable)
