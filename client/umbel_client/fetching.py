"""Fetch what the shelf lacks: bounded by sizes known in advance, resumable, verified before use.

Only what this device runs: the files that all need, and the graphs of its own runtime. What lies on the shelf under
its digest already is never asked for again; what the coordinator has a delta for is rebuilt from what is here, and
fetched whole if anything about the delta is wrong.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Protocol

from umbel.bundle import Bundle
from umbel.delta import is_worth_it
from umbel.digests import Digest
from umbel.errors import DigestMismatch, NotFound, UmbelError, Unavailable, Unreachable
from umbel.file_delta import FileDelta
from umbel.manifest import FileRef, Manifest
from umbel.release import Release
from umbel_client.http_mirror import Mirror
from umbel_client.kit import Kit
from umbel_client.shelf import Shelf
from umbel_client.state import Fetched


async def fetch_bundle(kit: Kit, release: Release, deltas: tuple[FileDelta, ...] = ()) -> Bundle:
    """The bundle of a verified release, after fetching those of its files that this device needs and hasn't.

    Args:
        kit: what the visit works with.
        release: verified; everything that is fetched is bound to it by digests.
        deltas: unsigned hints of shorter ways.

    Raises:
        BundleInvalid: it has no graphs for this runtime, or its manifest contradicts itself.
        OutOfBounds: it is larger than the shelf.
        DigestMismatch: the far side sent other bytes than those asked for.
        Unreachable: the stream broke; what came stays, and the next try goes on from there.
        Interrupted: the device is needed; likewise.
    """
    fetching = _Fetching(kit, deltas)
    try:
        return await fetching.bundle(release)
    finally:
        kit.memory.note(replace(kit.memory.state, fetched=kit.memory.state.fetched + fetching.fetched))


class _Fetching:
    """One bundle on its way to the shelf, and what that costs."""

    def __init__(self, kit: Kit, deltas: tuple[FileDelta, ...]) -> None:
        self._deltas = deltas
        self._offload = kit.offload
        self._require_free = kit.require_free
        self._channel = kit.channel
        self._mirror, self._trusts_parts = kit.mirror, kit.mirror is None
        self._shelf = kit.shelf
        self._runtime = kit.runtime.name
        self.fetched = Fetched()

    async def bundle(self, release: Release) -> Bundle:
        """See `fetch_bundle`."""
        is_new = not self._shelf.holds(release.bundle)
        await self._fetch(FileRef(release.bundle, release.manifest_size))
        manifest = self._shelf.manifest(release.bundle)
        files = manifest.files_for(self._runtime)
        self._shelf.require_room(release.manifest_size + sum(ref.size for ref in files.values()))
        if is_new:
            self._note_spared(manifest, files)
        for ref in files.values():
            await self._fetch(ref)
        try:
            return self._shelf.bundle(release.bundle, self._runtime)
        except DigestMismatch:
            # A blob from an earlier visit has rotted, and is gone now: one more look fetches it again.
            for ref in files.values():
                await self._fetch(ref)
            return self._shelf.bundle(release.bundle, self._runtime)

    async def _fetch(self, ref: FileRef) -> None:
        if self._shelf.holds(ref.digest):
            return
        self._require_free()
        for delta in self._deltas:
            if self._saves(delta, ref) and await self._rebuilt(delta, ref):
                return
        if self._mirror is not None and await self._is_mirrored(self._mirror, ref):
            return
        if not self._trusts_parts:
            # Where the coordinator goes on from other bytes than it would have sent, they are thrown away here.
            with suppress(DigestMismatch):
                await self._whole(self._channel, ref)
                return
        await self._whole(self._channel, ref)

    async def _is_mirrored(self, mirror: Mirror, ref: FileRef) -> bool:
        """Fetch a file from the mirror, if it can; one that stands still or lies isn't asked for the next file."""
        before = self.fetched.bytes
        try:
            await self._whole(mirror, ref)
        except NotFound:
            return False
        except UmbelError:
            self._mirror = None
            return False
        finally:
            self.fetched += Fetched(from_mirror=self.fetched.bytes - before)
        return True

    async def _whole(self, source: Source, ref: FileRef) -> None:
        await fetch_blob(source, self._shelf, ref.digest, ref.size, self._came)
        self.fetched += Fetched(files=1)

    def _saves(self, delta: FileDelta, ref: FileRef) -> bool:
        """Whether a delta makes this file of one that is here, in fewer bytes than are missing of it."""
        if delta.target != ref.digest or not self._shelf.holds(delta.base):
            return False
        part = self._shelf.part(ref.digest)
        missing = ref.size - (part.stat().st_size if part.exists() else 0)
        return is_worth_it(delta.size, ref.size) and delta.size < missing

    async def _rebuilt(self, delta: FileDelta, ref: FileRef) -> bool:
        """Rebuild a file; False, with nothing left of the delta, if that can't be done.

        Raises:
            Unavailable: the way there broke; the part that came stays.
        """
        try:
            if not self._shelf.holds(delta.digest):
                await fetch_blob(self._channel, self._shelf, delta.digest, delta.size, self._came)
            await self._offload(lambda: self._shelf.rebuild(delta, ref))
        except Unavailable:
            raise
        except (UmbelError, OSError):
            self._shelf.drop(delta.digest)
            return False
        self._shelf.drop(delta.digest)
        self.fetched += Fetched(deltas=1, spared_by_deltas=ref.size - delta.size)
        return True

    def _came(self, size: int) -> None:
        self.fetched += Fetched(bytes=size)

    def _note_spared(self, manifest: Manifest, files: dict[str, FileRef]) -> None:
        here = sum(ref.size for ref in files.values() if self._shelf.holds(ref.digest))
        # Graphs that an earlier bundle listed too would have come with that one.
        seen = {ref.digest for bundle in self._shelf.held_bundles(self._shelf.slots) for ref in self._files_of(bundle)}
        others = sum(ref.size for name, ref in manifest.files.items() if name not in files and ref.digest not in seen)
        self.fetched += Fetched(spared_by_reuse=here, spared_by_runtime=others)

    def _files_of(self, bundle: Digest) -> Iterable[FileRef]:
        try:
            return self._shelf.manifest(bundle).files.values()
        except UmbelError:
            return ()


class Source(Protocol):
    """Where blobs come from: a coordinator's channel, or a mirror."""

    def fetch(self, digest: Digest, offset: int) -> AsyncGenerator[bytes, None]:
        """A blob's bytes from `offset` on, in chunks; nothing about them may be believed yet."""


async def fetch_blob(
    source: Source, shelf: Shelf, digest: Digest, size: int, came: Callable[[int], None] | None = None
) -> None:
    """Put one blob on the shelf, going on where an earlier try stopped.

    Args:
        source: where to fetch from.
        shelf: where to put it.
        digest: its name.
        size: its bytes, as a signed or verified source told; not one more is taken.
        came: hears of bytes as they come.
    """
    part = shelf.part(digest)
    offset = part.stat().st_size if part.exists() else 0
    if offset > size:
        part.unlink()
        offset = 0
    with part.open("ab") as file:
        if offset < size:
            async with aclosing(source.fetch(digest, offset)) as chunks:
                async for chunk in chunks:
                    if came is not None:
                        came(len(chunk))
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
