"""Models, their immutable versions with where each came from, and the signed releases of them.

Blobs come first and rows after: a crash in between leaves files that nothing names, never a row that names nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import sqlalchemy as sa

from umbel.bundle import Bundle
from umbel.digests import Digest
from umbel.errors import AlreadyExists, NotFound, OutOfBounds, WrongState
from umbel.fields import name as checked_name
from umbel.file_delta import FileDelta
from umbel.manifest import MAX_MANIFEST_BYTES, Manifest
from umbel.release import Release, SignedRelease
from umbel.update import Metrics
from umbel.weights import require_shapes
from umbel_server import audit
from umbel_server.blobs import Blobs
from umbel_server.json_text import from_text, to_text
from umbel_server.requests import ANY, Call, enter, note
from umbel_server.signing import ReleaseSigner
from umbel_server.store import Store
from umbel_server.tables import MODELS, RELEASES, VERSION_FILES, VERSIONS, newest_first
from umbel_server.versions import (
    CANDIDATE,
    TRAINING,
    Lineage,
    PublishedRelease,
    Version,
    VersionState,
    delta_of,
    release_from_row,
    require_open,
    require_releasable,
    version_from_row,
    version_to_row,
)


@dataclass(frozen=True, slots=True)
class Model:
    """A line of versions under one name."""

    name: str
    created_at: float
    newest_version: int


class Registry:
    """The registry over a store and a folder of blobs."""

    def __init__(self, store: Store, blobs: Blobs, signer: ReleaseSigner) -> None:
        self._store = store
        self._blobs = blobs
        self._signer = signer
        self._newest: dict[tuple[str, str], PublishedRelease | None] = {}
        self._fetchable: set[Digest] = set()
        self._defined: dict[Digest, FileDelta | None] = {}

    # Bundles.

    def keep_bundle(self, bundle: Bundle) -> None:
        """Write all of a bundle's files and its manifest to the blobs; durable when it returns."""
        for path in bundle.paths.values():
            self._blobs.put_bundle_file(path.read_bytes())
        self._blobs.put_bundle_file(bundle.manifest.to_bytes())

    def keep_successor(self, manifest: Manifest, files: Mapping[str, bytes]) -> None:
        """Write what a new version has of its own."""
        for data in files.values():
            self._blobs.put_bundle_file(data)
        self._blobs.put_bundle_file(manifest.to_bytes())

    def manifest(self, digest: Digest) -> Manifest:
        """The manifest of this digest; raises `NotFound`, and `OutOfBounds` for a file that is too large to be one."""
        path = self._blobs.bundle_path(digest)
        # Devices say which bundles they hold: naming a file of weights must not bring it into memory.
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise OutOfBounds(f"blob {digest} is larger than a manifest may be ({MAX_MANIFEST_BYTES} bytes)")
        return Manifest.from_bytes(path.read_bytes())

    def bundle(self, digest: Digest) -> Bundle:
        """The bundle whose manifest has this digest; raises `NotFound`."""
        manifest = self.manifest(digest)
        return Bundle(manifest, {name: self._blobs.bundle_path(ref.digest) for name, ref in manifest.files.items()})

    def defined_by(self, bundle: Digest) -> FileDelta | None:
        """The delta that defines the weights of a quantised version, by its bundle; None for all other versions."""
        if bundle not in self._defined:
            query = sa.select(VERSIONS.c.lineage_json).where(VERSIONS.c.bundle == bundle).limit(1)
            with self._store.reading() as connection:
                text = connection.scalar(query.where(VERSIONS.c.state == VersionState.QUANTISED.value))
            self._defined[bundle] = delta_of(Lineage(**from_text(text))) if text else None
        return self._defined[bundle]

    def fetchable(self, digest: Digest) -> Path:
        """Where a file lies that devices may fetch; raises `NotFound` for anything that no version lists."""
        if digest not in self._fetchable:
            query = sa.select(VERSION_FILES.c.digest).where(VERSION_FILES.c.digest == digest).limit(1)
            with self._store.reading() as connection:
                if connection.execute(query).first() is None:
                    raise NotFound(f"no version has a file with the digest {digest}; check in for the newest release")
            self._fetchable.add(digest)
        return self._blobs.bundle_path(digest)

    # Models and versions. What takes a connection is part of its caller's transaction.

    def add_model(self, model: str, bundle: Bundle, actor: str, now: float, call: Call = ANY) -> Version:
        """Register a new model; the bundle becomes its version 1, released for training.

        Raises:
            AlreadyExists: the name is taken.
        """
        checked_name(model, "model")
        self.keep_bundle(bundle)
        with self._store.transaction() as connection:
            if enter(connection, call, actor, "model.add", model, now) is not None:
                return self.version(connection, model, 1)
            if connection.execute(sa.select(MODELS).where(MODELS.c.name == model)).first():
                raise AlreadyExists(
                    f"a model {model!r} exists already; choose another name, or add to it with --parent"
                )
            connection.execute(MODELS.insert().values(name=model, next_release=1, created_at=now))
            lineage = Lineage(registered_by=actor)
            version = self.add_version(connection, model, None, bundle.manifest, lineage, now, VersionState.ACCEPTED)
            self.release(connection, version, TRAINING, now)
            audit.append(connection, now, actor, "model.add", model, {"bundle": version.bundle}, call.request_id)
        return version

    def add_next(self, model: str, parent: int, bundle: Bundle, actor: str, now: float, call: Call = ANY) -> Version:
        """Register a version that an operator brings, as a child of `parent`.

        Raises:
            NotFound: no such parent.
            WeightsMismatch: it isn't of the same architecture.
        """
        with self._store.reading() as connection:
            before = self.bundle(self.version(connection, model, parent).bundle).manifest
        require_shapes(bundle.manifest.shared_shapes, before.shared_shapes)
        self.keep_bundle(bundle)
        with self._store.transaction() as connection:
            answered = enter(connection, call, actor, "version.add", model, now)
            if answered is not None:
                return self.version(connection, model, int(answered))
            lineage = Lineage(registered_by=actor)
            version = self.add_version(connection, model, parent, bundle.manifest, lineage, now, VersionState.ACCEPTED)
            self.release(connection, version, TRAINING, now)
            body = {"version": version.number, "parent": parent}
            audit.append(connection, now, actor, "version.add", model, body, call.request_id)
            note(connection, call, str(version.number))
        return version

    def add_version(
        self,
        connection: sa.Connection,
        model: str,
        parent: int | None,
        manifest: Manifest,
        lineage: Lineage,
        now: float,
        state: VersionState,
        also: Iterable[Digest] = (),
    ) -> Version:
        """Write the next version of a model, whose files are in the blobs; devices may fetch those, and `also`."""
        last = connection.scalar(sa.select(sa.func.max(VERSIONS.c.number)).where(VERSIONS.c.model == model))
        size = len(manifest.to_bytes())
        version = Version(model, (last or 0) + 1, parent, state, manifest.digest, size, now, lineage)
        connection.execute(VERSIONS.insert().values(version_to_row(version)))
        digests = {manifest.digest, *(ref.digest for ref in manifest.files.values()), *also}
        rows = [{"model": model, "version": version.number, "digest": digest} for digest in sorted(digests)]
        connection.execute(VERSION_FILES.insert(), rows)
        return version

    def settle(self, connection: sa.Connection, version: Version, state: VersionState, verdict: str) -> None:
        """Turn a candidate into an accepted or refused version.

        Raises:
            WrongState: it isn't a candidate.
        """
        if version.state is not VersionState.CANDIDATE:
            raise WrongState(f"version {version.number} of {version.model!r} is {version.state.value} already")
        lineage = replace(version.lineage, verdict=verdict)
        changed = version_to_row(replace(version, state=state, lineage=lineage))
        connection.execute(_this(version.model, version.number).values(changed))

    def measured(self, connection: sa.Connection, model: str, number: int, metrics: Metrics) -> None:
        """Keep what a cohort has measured of a version on its held-back examples."""
        connection.execute(_this(model, number).values(metrics_json=to_text(dict(metrics))))

    def release(self, connection: sa.Connection, version: Version, channel: str, now: float) -> PublishedRelease:
        """Sign a version's next release on a channel. Numbers rise by model, over all its channels."""
        model = connection.execute(sa.select(MODELS).where(MODELS.c.name == version.model)).one()
        connection.execute(
            MODELS.update().where(MODELS.c.name == version.model).values(next_release=model.next_release + 1)
        )
        release = Release(
            version.model, model.next_release, version.number, channel, version.bundle, version.manifest_size, now
        )
        signed = self._signer.sign(release)
        published = PublishedRelease(version.model, release.number, version.number, channel, now, signed)
        connection.execute(RELEASES.insert().values(_release_row(published)))
        self._newest.pop((version.model, channel), None)
        return published

    def publish(
        self, model: str, number: int, channel: str, actor: str, now: float, call: Call = ANY
    ) -> PublishedRelease:
        """Release an accepted version on a channel, on an operator's word; an older one too: going back is forward.

        Raises:
            NotFound: no such version.
            WrongState: a candidate, or a refused version.
            NotAllowed: a channel that the coordinator keeps for its rounds.
        """
        require_open(channel)
        with self._store.transaction() as connection:
            answered = enter(connection, call, actor, "release.publish", model, now)
            if answered is not None:
                return self.published(connection, model, int(answered))
            version = self.version(connection, model, number)
            require_releasable(version)
            published = self.release(connection, version, channel, now)
            body = {"version": number, "channel": channel, "number": published.number}
            audit.append(connection, now, actor, "release.publish", model, body, call.request_id)
            note(connection, call, str(published.number))
        return published

    # Reading.

    def newest_release(self, model: str, channel: str) -> PublishedRelease | None:
        """The newest release on a channel, if there is any."""
        key = (model, channel)
        if key not in self._newest:
            query = sa.select(RELEASES).where(RELEASES.c.model == model, RELEASES.c.channel == channel)
            with self._store.reading() as connection:
                row = connection.execute(query.order_by(RELEASES.c.number.desc()).limit(1)).first()
            self._newest[key] = release_from_row(row) if row else None
        return self._newest[key]

    def signed_release(self, connection: sa.Connection, model: str, number: int) -> SignedRelease:
        """One release by its number, as it is signed; raises `NotFound`."""
        return self.published(connection, model, number).signed

    def published(self, connection: sa.Connection, model: str, number: int) -> PublishedRelease:
        """One release by its number; raises `NotFound`."""
        query = sa.select(RELEASES).where(RELEASES.c.model == model, RELEASES.c.number == number)
        row = connection.execute(query).first()
        if row is None:
            raise NotFound(f"{model!r} has no release {number}")
        return release_from_row(row)

    def releases(self, connection: sa.Connection, model: str = "", limit: int = 100) -> list[PublishedRelease]:
        """Releases, newest first; of one model or of all."""
        order = newest_first(RELEASES.c.model, RELEASES.c.number, RELEASES.c.issued_at)
        query = sa.select(RELEASES).order_by(*order).limit(limit)
        if model:
            query = query.where(RELEASES.c.model == model)
        return [release_from_row(row) for row in connection.execute(query)]

    def earlier(self, connection: sa.Connection, release: PublishedRelease, limit: int) -> list[tuple[int, Digest]]:
        """(number, bundle) of the releases of a channel before one, newest first."""
        this = (RELEASES.c.model == release.model) & (RELEASES.c.channel == release.channel)
        same = (VERSIONS.c.model == RELEASES.c.model) & (VERSIONS.c.number == RELEASES.c.version)
        query = sa.select(RELEASES.c.number, VERSIONS.c.bundle).join(VERSIONS, same).where(this)
        query = query.where(RELEASES.c.number < release.number).order_by(RELEASES.c.number.desc()).limit(limit)
        return [(row.number, Digest(row.bundle)) for row in connection.execute(query)]

    def models(self, connection: sa.Connection) -> list[Model]:
        """All models, by name."""
        newest = sa.select(VERSIONS.c.model, sa.func.max(VERSIONS.c.number).label("number")).group_by(VERSIONS.c.model)
        found = newest.subquery()
        query = sa.select(MODELS, found.c.number).join(found, found.c.model == MODELS.c.name).order_by(MODELS.c.name)
        return [Model(row.name, row.created_at, row.number) for row in connection.execute(query)]

    def version(self, connection: sa.Connection, model: str, number: int) -> Version:
        """One version; raises `NotFound`."""
        query = sa.select(VERSIONS).where(VERSIONS.c.model == model, VERSIONS.c.number == number)
        row = connection.execute(query).first()
        if row is None:
            raise NotFound(f"{model!r} has no version {number}; `umbel versions list` shows what there is")
        return version_from_row(row)

    def version_of(self, connection: sa.Connection, model: str, bundle: Digest) -> Version | None:
        """The newest version with this bundle, in whatever state, if there is one."""
        query = sa.select(VERSIONS).where(VERSIONS.c.model == model, VERSIONS.c.bundle == bundle)
        row = connection.execute(query.order_by(VERSIONS.c.number.desc()).limit(1)).first()
        return version_from_row(row) if row else None

    def versions(self, connection: sa.Connection, model: str, limit: int = 100) -> list[Version]:
        """A model's versions, newest first."""
        query = sa.select(VERSIONS).where(VERSIONS.c.model == model).order_by(VERSIONS.c.number.desc()).limit(limit)
        return [version_from_row(row) for row in connection.execute(query)]

    def newest_accepted(self, connection: sa.Connection, model: str) -> Version:
        """The version that the next round starts from; raises `NotFound` for an unknown model."""
        accepted = (VERSIONS.c.model == model) & (VERSIONS.c.state == VersionState.ACCEPTED.value)
        row = connection.execute(sa.select(VERSIONS).where(accepted).order_by(VERSIONS.c.number.desc())).first()
        if row is None:
            raise NotFound(f"no model is called {model!r}; add it first")
        return version_from_row(row)

    def training_release(self, connection: sa.Connection, version: Version) -> PublishedRelease:
        """The release under which rounds hand a version out; raises `NotFound`."""
        return self._release_on(connection, version, TRAINING)

    def base_release(self, connection: sa.Connection, version: Version) -> PublishedRelease:
        """The release under which a round hands out a version that may be a candidate; raises `NotFound`."""
        accepted = version.state is VersionState.ACCEPTED
        return self._release_on(connection, version, TRAINING if accepted else CANDIDATE)

    def _release_on(self, connection: sa.Connection, version: Version, channel: str) -> PublishedRelease:
        query = sa.select(RELEASES).where(
            RELEASES.c.model == version.model, RELEASES.c.version == version.number, RELEASES.c.channel == channel
        )
        row = connection.execute(query.order_by(RELEASES.c.number.desc()).limit(1)).first()
        if row is None:
            raise NotFound(f"version {version.number} of {version.model!r} has no release on {channel!r}")
        return release_from_row(row)

    def lineage(self, connection: sa.Connection, model: str, number: int) -> list[Version]:
        """A version, its parent, and so on back to the first."""
        chain = [self.version(connection, model, number)]
        while (parent := chain[-1].parent) is not None:
            chain.append(self.version(connection, model, parent))
        return chain


def _this(model: str, number: int) -> sa.Update:
    return VERSIONS.update().where(VERSIONS.c.model == model, VERSIONS.c.number == number)


def _release_row(published: PublishedRelease) -> dict[str, object]:
    return {
        "model": published.model,
        "number": published.number,
        "version": published.version,
        "channel": published.channel,
        "statement": published.signed.statement,
        "key_id": published.signed.key_id,
        "signature": published.signed.signature,
        "issued_at": published.issued_at,
    }


def require_model(connection: sa.Connection, model: str) -> None:
    """Raise `NotFound` unless a model is called so."""
    if connection.scalar(sa.select(MODELS.c.name).where(MODELS.c.name == model)) is None:
        raise NotFound(f"no model is called {model!r}; `umbel models list` shows what there is")
