"""Releases as operators make and see them: prepared in full or quantised, with their sizes and the deltas to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import sqlalchemy as sa

from umbel.digests import Digest
from umbel.errors import MalformedMessage, WrongState
from umbel_server import heads
from umbel_server.deltas import Deltas
from umbel_server.heads import Heads
from umbel_server.quantising import Quantising
from umbel_server.registry import Registry
from umbel_server.releases import Prepared
from umbel_server.requests import ANY, Call, answered, require_revision
from umbel_server.rollout_spec import EVERYBODY, Audience
from umbel_server.rollout_verbs import RolloutVerbs
from umbel_server.store import Store
from umbel_server.versions import FULL, INT8_DELTA, PublishedRelease, Version, encoding_of

ENCODINGS: Final = (FULL, INT8_DELTA)
_EARLIER: Final = 8
"""Releases of a channel from which deltas are told."""


@dataclass(frozen=True, slots=True)
class DeltaFrom:
    """What a device that has an earlier release fetches less by."""

    release: int
    size: int
    """Of the deltas together."""
    stands_for: int
    """Of the files that they rebuild."""


@dataclass(frozen=True, slots=True)
class ReleaseDetails:
    """A release, and what it takes to have it."""

    release: PublishedRelease
    encoding: str
    bundle: Digest
    size: int
    """Bytes of the bundle, all runtimes together."""
    size_by_runtime: Mapping[str, int]
    """What a device with nothing fetches."""
    deltas: tuple[DeltaFrom, ...]
    """From earlier releases of the channel, as far as anybody has asked for them."""
    standing: str
    """head: devices get it that no rollout takes; listed; waiting for signatures; or empty, for what rounds use."""
    head_of: tuple[str, ...] = ()
    """Of a head: the populations that get it; empty: all of the channel's."""


@dataclass(frozen=True, slots=True)
class Made:
    """A release that was prepared."""

    prepared: Prepared
    version: int
    """What is released: the version that was asked for, or its quantised neighbour."""


class Releasing:
    """What operators ask about releases; `verbs` and `quantising` are None where there is no release listing."""

    def __init__(
        self,
        store: Store,
        registry: Registry,
        deltas: Deltas,
        verbs: RolloutVerbs | None = None,
        quantising: Quantising | None = None,
    ) -> None:
        self._store = store
        self._registry = registry
        self._deltas = deltas
        self._verbs = verbs
        self._quantising = quantising

    async def prepare(
        self,
        model: str,
        version: int,
        channel: str,
        encoding: str,
        actor: str,
        call: Call = ANY,
        population: str = EVERYBODY,
    ) -> Made:
        """Make a version a release of a channel, in one of `ENCODINGS`, with the deltas that its devices will need.

        As `RolloutVerbs.prepare`.

        Raises:
            MalformedMessage: no such encoding.
            WrongState: there is no release listing; or what `Quantising.neighbour` and `ReleaseDesk.prepare` refuse.
            NotFound, NotAllowed: as those say.
        """
        if encoding not in ENCODINGS:
            raise MalformedMessage(f"no encoding {encoding[:40]!r}; there are {', '.join(ENCODINGS)}")
        if self._verbs is None or self._quantising is None:
            raise WrongState("this coordinator has no release listing; `umbel keys init` makes one")
        if encoding == INT8_DELTA and self._is_new(call, actor, model):
            version = (await self._quantising.neighbour(Audience(model, channel, population), version, actor)).number
            # Looked at above; since then the model has changed by that very neighbour.
            call = replace(call, expected_revision=None)
        prepared = self._verbs.prepare(model, version, channel, actor, call, population)
        with self._store.reading() as connection:
            after = self._version(connection, model, prepared.number)
            before = self._version(connection, model, prepared.head) if prepared.head else after
        await self._deltas.prepare(before.bundle, after.bundle)
        return Made(prepared, after.number)

    def _is_new(self, call: Call, actor: str, model: str) -> bool:
        """Whether a call wasn't carried out before; raises `WrongState` if its caller hasn't seen what changed."""
        with self._store.reading() as connection:
            if answered(connection, call, actor, "release.prepare", model) is not None:
                return False
            require_revision(connection, call, "release.prepare", model)
        return True

    def _version(self, connection: sa.Connection, model: str, release: int) -> Version:
        published = self._registry.published(connection, model, release)
        return self._registry.version(connection, model, published.version)

    def details(self, releases: Sequence[PublishedRelease]) -> list[ReleaseDetails]:
        """What there is to tell of each."""
        with self._store.reading() as connection:
            found = heads.read(connection)
            return [self._details(connection, release, found) for release in releases]

    def one(self, model: str, number: int) -> ReleaseDetails:
        """One release; raises `NotFound`."""
        with self._store.reading() as connection:
            release = self._registry.published(connection, model, number)
        return self.details([release])[0]

    # Inside.

    def _details(self, connection: sa.Connection, release: PublishedRelease, found: Heads) -> ReleaseDetails:
        version = self._registry.version(connection, release.model, release.version)
        manifest = self._registry.manifest(version.bundle)
        files = manifest.files.values()
        standing, head_of = "", found.populations_at(release.model, release.channel, release.number)
        if head_of:
            standing = "head"
        elif self._verbs is not None:
            standing = self._verbs.standing(connection, release.model, release.number)
        return ReleaseDetails(
            release=release,
            encoding=encoding_of(version),
            bundle=version.bundle,
            size=version.manifest_size + sum(ref.size for ref in files),
            size_by_runtime={
                runtime: version.manifest_size + sum(ref.size for ref in manifest.files_for(runtime).values())
                for runtime in sorted(manifest.graphs)
            },
            deltas=self._from_earlier(connection, release, version.bundle),
            standing=standing,
            head_of=tuple(population for population in head_of if population != EVERYBODY),
        )

    def _from_earlier(
        self, connection: sa.Connection, release: PublishedRelease, bundle: Digest
    ) -> tuple[DeltaFrom, ...]:
        sizes = {ref.digest: ref.size for ref in self._registry.manifest(bundle).files.values()}
        # One content may have several numbers: what was prepared to go back with has an older one's.
        oldest = {before: number for number, before in self._registry.earlier(connection, release, _EARLIER)}
        told = []
        for before, number in oldest.items():
            found = self._deltas.between(before, bundle)
            if found:
                whole = sum(sizes[delta.target] for delta in found)
                told.append(DeltaFrom(number, sum(delta.size for delta in found), whole))
        return tuple(told)
