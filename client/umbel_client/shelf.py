"""What a device keeps on disk: blobs by content, and slots that say which of them serve.

All slots (`umbel_client.slots`) stand in one small file that is replaced whole, so that a switch happens entirely or
not at all. Personal weights, made of a person's examples, lie apart and go with their slot. Blobs beyond the size limit
go, least recently used first; those in a slot never.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Final

from umbel.bundle import Bundle
from umbel.digests import Digest, digest_of, digest_of_file
from umbel.errors import BundleInvalid, DigestMismatch, MalformedMessage, OutOfBounds, UmbelError
from umbel.file_delta import FileDelta
from umbel.holding import locked
from umbel.manifest import FileRef, Manifest
from umbel.weights import Weights
from umbel_client.files import BESIDE, Disk, make_folder, read, read_any, within
from umbel_client.slots import Personal as Personal
from umbel_client.slots import Slot as Slot
from umbel_client.slots import Slots, slots_from_tree

DEFAULT_LIMIT: Final = 512 << 20
PART: Final = ".part"
_EMPTY: Final = Slots()


class Shelf:
    """Blobs and slots in one folder.

    Args:
        folder: made when it doesn't exist.
        limit: bytes that blobs may take before unused ones go.
        disk: how to write durably.
    """

    def __init__(self, folder: Path, limit: int = DEFAULT_LIMIT, disk: Disk | None = None) -> None:
        self._blobs = within(folder, "blobs")
        self._own = within(folder, "personal")
        self._slots_file = within(folder, "slots.json")
        self._lock_file = within(folder, "slots.lock")
        self._limit = limit
        self._disk = disk or Disk()
        self._read_slots = b"", _EMPTY
        """The file's content when it was last read, and what it says: one value, for any thread."""
        for made in (self._blobs, self._own):
            make_folder(made)

    # Slots.

    @property
    def slots(self) -> Slots:
        """What the slots hold; all empty on a new shelf, or when their file was lost."""
        try:
            content, (before, slots) = read_any(self._slots_file), self._read_slots
            if content is None:
                return _EMPTY
            if content != before:
                slots = slots_from_tree(json.loads(content))
                self._read_slots = content, slots
        except (OSError, ValueError, KeyError, TypeError, MalformedMessage):
            return _EMPTY
        return slots

    def switch(self, slots: Slots) -> None:
        """Let `slots` serve from now on, in one step; personal weights that a slot named, and none does now, go."""
        before = self.slots
        # Blobs are flushed as they come, their names only here: no slot may name what a power cut takes away.
        self._disk.flush_folder(self._blobs)
        self._disk.flush_folder(self._own)
        self._disk.write(self._slots_file, json.dumps(asdict(slots)).encode())
        for own in (before.personal, before.previous_personal):
            if own is not None and own.weights not in _own_weights(slots):
                self._disk.remove(self._own / own.weights)

    def change(self, step: Callable[[Slots], Slots]) -> Slots:
        """Take one step of the slots, alone among all processes that use this shelf; returns what serves now."""
        with self._lock_file.open("ab") as lock, locked(lock.fileno()):
            before = self.slots
            after = step(before)
            if after != before:
                self.switch(after)
            return after

    def drop_personal(self) -> None:
        """Forget all personal weights, at once and for good."""
        self.change(Slots.without_personal)
        self._drop_own(kept=set())
        self._disk.flush_folder(self._own)

    def put_personal(self, weights: Weights) -> Digest:
        """Keep weights that were fine-tuned here, until a switch that doesn't name them."""
        data = weights.to_bytes()
        digest = digest_of(data)
        self._disk.write(self._own / digest, data)
        return digest

    def personal_weights(self, digest: Digest) -> Weights:
        """Weights that were fine-tuned here; raises as `bundle` does."""
        path = self._own / digest
        self._verified(path, digest)
        return Weights.of_file(path)

    def _drop_own(self, kept: set[str]) -> None:
        gone = [name for name in os.listdir(self._own) if name not in kept]  # noqa: PTH208 - nearly always none
        for name in gone:
            self._disk.remove(self._own / name)
        if gone:
            self._disk.flush_folder(self._own)

    # Blobs.

    def path(self, digest: Digest) -> Path:
        """Where a blob lies, if it does."""
        return within(self._blobs, digest)

    def part(self, digest: Digest) -> Path:
        """Where a blob grows while it is being fetched."""
        return self._blobs / (digest + PART)

    def holds(self, digest: Digest) -> bool:
        """Whether the blob is here, whole."""
        return os.path.isfile(self.path(digest))  # noqa: PTH113 - asked a dozen times for each bundle

    def put(self, data: bytes) -> Digest:
        """Keep some bytes under their digest."""
        digest = digest_of(data)
        if not self.holds(digest):
            beside = self.part(digest)
            beside.write_bytes(data)
            self.finish(digest)
        return digest

    def finish(self, digest: Digest) -> None:
        """Turn a part that was fetched to its end into a blob.

        Raises:
            DigestMismatch: the bytes aren't those that were asked for; the part is gone.
        """
        part = self.part(digest)
        found = digest_of_file(part)
        if found != digest:
            part.unlink()
            raise DigestMismatch(f"expected bytes with digest {digest}, got {found}; fetch them again")
        self._disk.flush_file(part)
        self._disk.move(part, self.path(digest))

    def rebuild(self, delta: FileDelta, target: FileRef) -> None:
        """Make a blob of another one and a delta, both here; only a whole and right one gets its name.

        Raises:
            MalformedMessage, OutOfBounds, DigestMismatch: the delta doesn't make this blob; fetch it whole.
            OSError: base or delta isn't here, or there is no room.
        """
        from umbel.delta import rebuild

        # Not the part of a fetch: what a bad delta leaves must never be gone on from.
        beside = self.path(target.digest).with_suffix(BESIDE)
        try:
            with (
                self.path(delta.digest).open("rb") as steps,
                self.path(delta.base).open("rb") as base,
                beside.open("wb") as out,
            ):
                rebuild(steps, base, out, delta.base, target)
            self._disk.flush_file(beside)
            self._disk.move(beside, self.path(target.digest))
        except (UmbelError, OSError):
            beside.unlink(missing_ok=True)
            raise
        self.part(target.digest).unlink(missing_ok=True)

    def drop(self, digest: Digest) -> None:
        """Remove a blob that nothing needs any more; it may be gone already."""
        self._disk.remove(self.path(digest))

    def bundle(self, digest: Digest, runtime: str | None = None) -> Bundle:
        """The bundle of this name, each of its files verified.

        Args:
            digest: of its manifest.
            runtime: open it with the files that this runtime needs; None means with all of them.

        Raises:
            BundleInvalid: its manifest or one of its files isn't here, or it has no graphs for this runtime.
            DigestMismatch: a file has been damaged; it is removed, so that it is fetched again.
        """
        manifest = self.manifest(digest)
        files = manifest.files if runtime is None else manifest.files_for(runtime)
        for ref in files.values():
            self._verified(self.path(ref.digest), ref.digest)
        return Bundle(manifest, {name: self.path(ref.digest) for name, ref in files.items()})

    def manifest(self, digest: Digest) -> Manifest:
        """The manifest of this name, verified; raises as `bundle`."""
        return Manifest.from_bytes(self._read(digest))

    def held_bundles(self, slots: Slots, also: Iterable[Digest] = ()) -> tuple[Digest, ...]:
        """The bundles in slots, and those of `also` that are still here: what a device tells when it checks in."""
        serving = [slot.bundle for slot in (slots.active, slots.previous) if slot is not None]
        return tuple(dict.fromkeys((*serving, *(bundle for bundle in also if self.holds(bundle)))))

    def require_room(self, size: int) -> None:
        """Raise `OutOfBounds` if a bundle of so many bytes can never fit beside nothing at all."""
        if size > self._limit:
            raise OutOfBounds(f"a bundle of {size} bytes; this shelf is limited to {self._limit}")

    def tidy(self) -> None:
        """Drop what was left half done, and the least recently used blobs beyond the limit."""
        slots = self.slots
        kept = [own for own in (slots.personal, slots.previous_personal) if own is not None]
        bundles = {*self.held_bundles(slots), *(own.bundle for own in kept)}
        pinned = set[str]().union(*(self._blobs_of(bundle) for bundle in bundles))
        self._drop_own(kept=_own_weights(slots))
        sizes: dict[tuple[int, str], int] = {}
        with os.scandir(self._blobs) as found:
            for entry in found:
                if entry.name.endswith(BESIDE):
                    self.path(Digest(entry.name)).unlink(missing_ok=True)
                else:
                    facts = entry.stat()
                    sizes[facts.st_mtime_ns, entry.name] = facts.st_size
        total = sum(sizes.values())
        if total > self._limit:
            self._make_room(total, {key: size for key, size in sizes.items() if key[1] not in pinned})

    def _make_room(self, total: int, sizes: Mapping[tuple[int, str], int]) -> None:
        """Drop blobs, given as (when last used, name) -> size, until those that take `total` bytes fit the limit."""
        for (_, name), size in sorted(sizes.items()):
            if total <= self._limit:
                break
            total -= size
            self.path(Digest(name)).unlink(missing_ok=True)

    def _blobs_of(self, bundle: Digest) -> set[str]:
        try:
            manifest = Manifest.from_bytes(read(self.path(bundle)))
        except (OSError, UmbelError):
            return {bundle}
        return {bundle, *(ref.digest for ref in manifest.files.values())}

    def _read(self, digest: Digest) -> bytes:
        self._verified(self.path(digest), digest)
        return read(self.path(digest))

    def _verified(self, path: Path, digest: Digest) -> None:
        if not os.path.isfile(path):  # noqa: PTH113 - as in `holds`
            raise BundleInvalid(f"blob {digest} isn't on this device's shelf; fetch the bundle again")
        # A disk that takes nothing: what is whole there can be used all the same.
        if digest_of_file(path) != digest:
            with suppress(OSError):
                path.unlink()
            raise DigestMismatch(f"blob {digest} on this device's shelf is damaged; it was removed, fetch it again")
        with suppress(OSError):
            os.utime(path)


def _own_weights(slots: Slots) -> set[str]:
    return {own.weights for own in (slots.personal, slots.previous_personal) if own is not None}
