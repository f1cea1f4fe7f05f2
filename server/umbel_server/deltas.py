"""Deltas for devices that hold an older version: made when first asked for, kept by content, offered when small enough.

    check-in (holds bundles) + what it is to fetch  ->  for each file that differs: a delta, if it is worth it

A release that was *defined* by a delta has that one. All others are a cache over the registry's files: they may be
deleted at any time, and are made again. What a device says that it holds costs at most a look; what it makes of a delta
it judges by the digest in the signed manifest, so nothing here needs to be believed.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Final

import structlog

from umbel.delta import Ends, is_worth_it, write_lossless
from umbel.digests import Digest
from umbel.errors import MalformedMessage, UmbelError, unusable
from umbel.file_delta import FileDelta
from umbel.manifest import FileRef
from umbel.messages import release_from_bytes
from umbel.offer import offer_of_statement
from umbel.visit import Assignment, CheckInReply
from umbel_server.blobs import Blobs
from umbel_server.registry import Registry
from umbel_server.surroundings import Offload

BUNDLES: Final = 4
"""How many of the bundles that a device holds are looked at."""
BASES: Final = 8
"""Deltas made to any one file: a device that makes up what it holds can't have the coordinator compress for ever."""
KEPT: Final = 64
LEAST_BYTES: Final = 4_096
MOST_BYTES: Final = 256 << 20
"""Between larger files no delta is made while a device waits; `umbel releases prepare` makes it beforehand."""
_REMEMBERED: Final = 1_024
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two files of one name and size, in two bundles of one architecture."""

    base: FileRef
    target: FileRef


class Deltas:
    """The deltas of one coordinator.

    Args:
        registry: knows bundles, and the deltas that releases were defined by.
        blobs: where deltas are kept.
        offload: compresses away from the event loop.
    """

    def __init__(self, registry: Registry, blobs: Blobs, offload: Offload) -> None:
        self._registry = registry
        self._blobs = blobs
        self._offload = offload
        self._kept = {(delta.base, delta.target): delta for delta in blobs.deltas()}
        self._useless: dict[tuple[Digest, Digest], None] = {}
        """Pairs whose delta was too large, oldest first."""
        self._files: dict[Digest, Mapping[str, FileRef]] = {}
        """Of bundles that devices have named, the first named first; not whole manifests, of which each is large."""
        self._making = asyncio.Lock()

    async def added(self, answer: CheckInReply, held: tuple[Digest, ...]) -> CheckInReply:
        """The answer to a check-in, with the deltas that its device can use."""
        found: dict[Digest, FileDelta] = {}
        for bundle in _bundles_of(answer):
            if held and bundle not in held:
                found |= {delta.target: delta for delta in await self.to(bundle, held)}
        return replace(answer, deltas=tuple(found.values())) if found else answer

    async def to(self, bundle: Digest, held: tuple[Digest, ...]) -> list[FileDelta]:
        """For each file of a bundle that differs, the smallest delta from a bundle that a device holds."""
        best: dict[Digest, FileDelta] = {}
        for pair in self._pairs(bundle, held):
            delta = self.known(bundle, pair.base, pair.target)
            if delta is None and pair.target.size <= MOST_BYTES:
                async with self._making:
                    delta = self._kept.get(_key(pair)) or await self._make(pair)
            if delta is not None and (pair.target.digest not in best or delta.size < best[pair.target.digest].size):
                best[pair.target.digest] = delta
        return list(best.values())

    def known(self, bundle: Digest, base: FileRef, target: FileRef) -> FileDelta | None:
        """The delta between two files as far as there is one: what the bundle was defined by, or what was made."""
        defined = self._registry.defined_by(bundle)
        if defined is not None and (defined.base, defined.target) == (base.digest, target.digest):
            return defined
        return self._kept.get((base.digest, target.digest))

    def between(self, base: Digest, bundle: Digest) -> list[FileDelta]:
        """The deltas that there are from one bundle to another, for people to see; makes none."""
        pairs = self._pairs(bundle, (base,))
        found = [self.known(bundle, pair.base, pair.target) for pair in pairs]
        return [delta for delta in found if delta is not None]

    async def prepare(self, base: Digest, bundle: Digest) -> None:
        """Make the deltas from one bundle to another now, of whatever size: many devices will ask."""
        for pair in self._pairs(bundle, (base,)):
            if self.known(bundle, pair.base, pair.target) is None:
                async with self._making:
                    await self._make(pair)

    def path(self, digest: Digest) -> Path | None:
        """Where a delta lies, if this is the digest of one that was made here."""
        for (base, target), delta in self._kept.items():
            if delta.digest == digest:
                return self._blobs.delta_path(base, target, digest)
        return None

    # Inside.

    def _pairs(self, bundle: Digest, held: Iterable[Digest]) -> list[_Pair]:
        wanted, pairs = self._files_of(bundle), []
        for one in tuple(held)[:BUNDLES]:
            before = self._files_of(one)
            for name, target in wanted.items():
                base = before.get(name)
                if base is None or base.digest == target.digest or base.size != target.size:
                    continue
                if target.size >= LEAST_BYTES and (base.digest, target.digest) not in self._useless:
                    pairs.append(_Pair(base, target))
        return pairs

    def _files_of(self, bundle: Digest) -> Mapping[str, FileRef]:
        """The files of a version's bundle by name; none for whatever else a device may name."""
        if bundle not in self._files:
            while len(self._files) >= _REMEMBERED:
                self._files.pop(next(iter(self._files)))
            try:
                self._registry.fetchable(bundle)
                self._files[bundle] = self._registry.manifest(bundle).files
            except UmbelError:
                self._files[bundle] = {}
        return self._files[bundle]

    async def _make(self, pair: _Pair) -> FileDelta | None:
        if sum(target == pair.target.digest for _, target in (*self._kept, *self._useless)) >= BASES:
            return None
        try:
            made: FileDelta | None = await self._offload(_write, self._blobs, pair)
        except OSError as error:
            # A device can do without: it has its session already, and fetches the whole file.
            _log.warning("no room for a delta", reason=unusable(error))
            return None
        if made is None:
            self._useless[_key(pair)] = None
            while len(self._useless) > _REMEMBERED:
                self._useless.pop(next(iter(self._useless)))
        else:
            self._kept[_key(pair)] = made
        while len(self._kept) > KEPT:
            oldest = self._kept.pop(next(iter(self._kept)))
            self._blobs.drop_delta(oldest)
        return made


def _key(pair: _Pair) -> tuple[Digest, Digest]:
    return pair.base.digest, pair.target.digest


def _bundles_of(answer: CheckInReply) -> list[Digest]:
    """The bundles that a device may fetch after this answer, which the coordinator itself has just named."""
    statements = [answer.newest.statement] if answer.newest else []
    if isinstance(answer.reply, Assignment):
        statements.append(answer.reply.base.statement)
    found = [release_from_bytes(statement).bundle for statement in statements]
    if answer.offer is not None:
        found.append(offer_of_statement(answer.offer.statement).bundle)
    return list(dict.fromkeys(found))


class _TooLarge(Exception):
    """The delta would be no use."""


class _Bounded:
    """Writes a delta, hashes it, and gives up once it is no use."""

    def __init__(self, file: IO[bytes], full_size: int) -> None:
        self._file = file
        self._full_size = full_size
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> None:
        """Take the next bytes."""
        self.size += len(data)
        if not is_worth_it(self.size, self._full_size):
            raise _TooLarge
        self._hash.update(data)
        self._file.write(data)

    @property
    def digest(self) -> Digest:
        """Of what was written."""
        return Digest(self._hash.hexdigest())


def _write(blobs: Blobs, pair: _Pair) -> FileDelta | None:
    """Make a delta of two files and keep it; None if it is too large to be worth it. Runs in any thread."""
    aside = blobs.delta_aside()
    ends = Ends(pair.base.digest, pair.target.digest, pair.target.size)
    old, new = blobs.bundle_path(pair.base.digest), blobs.bundle_path(pair.target.digest)
    try:
        with old.open("rb") as base, new.open("rb") as target, aside.open("wb") as file:
            out = _Bounded(file, pair.target.size)
            write_lossless(ends, base, target, out)
    except (_TooLarge, MalformedMessage):
        aside.unlink()
        return None
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    made = FileDelta(ends.base, ends.target, out.digest, out.size)
    blobs.settle_delta(aside, made)
    return made
