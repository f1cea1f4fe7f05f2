"""The TUF repository: which releases are authentic, and which metadata are the newest.

    change -> draft (unsigned) -> signatures, here or on another machine -> publish: verified, then visible

A role's files are written first and the timestamp last, so that a crash in between leaves what devices can't see yet.
What stands in the folder is public; any web server or mirror may hand it out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from securesystemslib.signer import CryptoSigner, Key
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Root,
    Signed,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from umbel import fields
from umbel.errors import AlreadyExists, NotFound, OutOfBounds, SignatureInvalid, WrongState
from umbel.listing import CHECKPOINT, ISSUED_AT, ListedRelease, facts_of, listed_from_target, target_path
from umbel_server.drafts import S, draft, parse, sign_draft, unborn
from umbel_server.keyring import RULES, Keyring, KeyStatus, rule_of
from umbel_server.metadata_files import MetadataFiles

Signable = Metadata[Root] | Metadata[Targets]
_RELEASES: Final = "releases-"


def role_of(model: str) -> str:
    """The name of the role that lists a model's releases."""
    return f"{_RELEASES}{fields.name(model, 'model')}"


def model_of(role: str) -> str:
    """The model whose releases a role lists; empty for a top-level role."""
    return role.removeprefix(_RELEASES) if role.startswith(_RELEASES) else ""


@dataclass(frozen=True, slots=True)
class Freshness:
    """When the metadata on offer stop being believed, in POSIX seconds by role."""

    role: str
    version: int
    expires_at: float


class Repository:
    """The metadata in a folder, and those of its keys that lie on this machine."""

    def __init__(self, folder: Path, keys: Keyring) -> None:
        self._files = MetadataFiles(folder)
        self._keys = keys

    # Beginning.

    @classmethod
    def create(cls, folder: Path, keys: Keyring, now: float) -> Repository:
        """A repository without releases, signed by the keys of `keys`, which must hold those of every top-level role.

        Raises:
            AlreadyExists: there is one already.
        """
        if (folder / "timestamp.json").exists():
            raise AlreadyExists(f"{folder} holds a repository already")
        repository = cls(folder, keys)
        root = Root(consistent_snapshot=True)
        for role in ("root", "targets", "snapshot", "timestamp"):
            _name_signers(root, role, keys.public_keys(role))
        repository._finish(unborn(root), "root", now)
        repository._finish(unborn(Targets()), "targets", now)
        return repository

    # Reading.

    def file(self, name: str) -> bytes:
        """A metadata file by its name, as devices and mirrors ask for it; raises `NotFound`."""
        return self._files.read(name)

    def names(self) -> list[str]:
        """All metadata files."""
        return self._files.names()

    @property
    def first_root(self) -> bytes:
        """What devices pin when they enrol; root metadata lead from it to the newest."""
        return self.file("1.root.json")

    def releases(self, model: str) -> list[ListedRelease]:
        """What is listed of a model, lowest number first."""
        try:
            targets = self._load(role_of(model), Targets).signed.targets
        except NotFound:
            return []
        found = [listed_from_target(path, file.length, file.hashes, file.custom) for path, file in targets.items()]
        return sorted(found, key=lambda release: release.number)

    def models(self) -> list[str]:
        """The models that have signers."""
        delegations = self._load("targets", Targets).signed.delegations
        roles = delegations.roles if delegations and delegations.roles else {}
        return sorted(map(model_of, roles))

    def key_status(self) -> list[KeyStatus]:
        """Every key that devices trust, whether its private half lies here, and whether it should."""
        root, targets = self._root().signed, self._load("targets", Targets).signed
        named = [(role, root.roles[role].keyids) for role in ("root", "targets", "snapshot", "timestamp")]
        if targets.delegations and targets.delegations.roles:
            named += [(name, role.keyids) for name, role in targets.delegations.roles.items()]
        held = {role: {key.keyid for key in self._keys.public_keys(role)} for role, _ in named}
        return [
            KeyStatus(role, key_id, key_id in held[role], rule_of(role).offline)
            for role, key_ids in named
            for key_id in key_ids
        ]

    @property
    def changed(self) -> int:
        """When a file last came or went, in nanoseconds: the same number, the same files."""
        return self._files.folder.stat().st_mtime_ns

    def versions(self, role: str) -> list[int]:
        """The published versions of a role that are kept, lowest first; of root all that there ever were."""
        return [version for version in self._files.versions(role) if version <= self._version(role)]

    def keys_named(self, role: str, version: int) -> dict[str, Any]:
        """Which keys a version of `root` or `targets` gives to whom, how many must sign, and whose keys signed that.

        Raises:
            NotFound: it isn't kept any more.
        """
        metadata = parse(self.file(f"{version}.{role}.json"))
        named = metadata.signed.roles if role == "root" else getattr(metadata.signed.delegations, "roles", None) or {}
        keys = {name: {"keys": sorted(it.keyids), "threshold": it.threshold} for name, it in named.items()}
        return {"roles": keys, "signed_by": sorted(metadata.signatures)}

    def freshness(self) -> list[Freshness]:
        """How long each role's metadata will be believed."""
        loaded: list[tuple[str, Signed]] = [("root", self._root().signed)]
        # A model whose signers were named may wait for its first listing: keys travel.
        listed = [role_of(model) for model in self.models() if self.has_listing(model)]
        loaded += [(role, self._load(role, Targets).signed) for role in ("targets", *listed)]
        loaded += [("snapshot", self._load("snapshot", Snapshot).signed)]
        loaded += [("timestamp", self._load("timestamp", Timestamp).signed)]
        return [Freshness(role, signed.version, signed.expires.timestamp()) for role, signed in loaded]

    def is_believed(self, role: str) -> bool:
        """Whether enough of a role's keys have signed what is published of it.

        They haven't where a process died after it had replaced one of them, and before the new one signed.
        """
        try:
            self._verify(role, self._published(role))
        except SignatureInvalid:
            return False
        return True

    # Changing. Each draft is unsigned; `publish` takes it once it is signed.

    def draft_signers(self, model: str, keys: Iterable[Key], now: float) -> bytes:
        """Name a model's signers: the draft of `targets`. The model's own listing is drafted by `draft_empty` after it.

        Raises:
            AlreadyExists: it has signers already; rotate them instead.
            OutOfBounds: fewer than have to sign together, so that nobody could ever release it.
        """
        targets = self._load("targets", Targets)
        if model in self.models():
            raise AlreadyExists(f"model {model!r} has signers already")
        delegations = targets.signed.delegations or Delegations({}, {})
        rule, signers = RULES["releases"], {key.keyid: key for key in keys}
        if len(signers) < rule.threshold:
            raise OutOfBounds(f"{rule.threshold} signers have to sign together; name as many different keys, or more")
        role = DelegatedRole(role_of(model), [], rule.threshold, terminating=True, paths=[f"models/{model}/*"])
        delegations.roles = {**(delegations.roles or {}), role.name: role}
        targets.signed.delegations = delegations
        for key in signers.values():
            targets.signed.add_key(key, role.name)
        return draft(targets, "targets", now)

    def has_listing(self, model: str) -> bool:
        """Whether a model's own listing, empty or not, is published."""
        return self._version(role_of(model)) > 0

    def draft_empty(self, model: str, now: float) -> bytes:
        """A model's own listing, without releases yet."""
        return draft(unborn(Targets()), role_of(model), now)

    def draft_releases(self, releases: Iterable[ListedRelease], now: float, passed: Collection[int] = ()) -> bytes:
        """List more releases of one model, all under one signature: also those to go back with, beforehand.

        Those in `passed` aren't listed any more, since no device moves to them.

        Raises:
            NotFound: the model has no signers.
            AlreadyExists: a number is taken by another content.
            WrongState: numbers that don't rise.
        """
        added = sorted(releases, key=lambda release: release.number)
        metadata = self._load(role_of(added[0].model), Targets)
        newest = max((release.number for release in self.releases(added[0].model)), default=0)
        for release in added:
            path = target_path(release.model, release.number)
            if path in metadata.signed.targets:
                raise AlreadyExists(f"release {release.number} of {release.model!r} is listed already")
            if release.model != added[0].model or release.number < newest:
                raise WrongState(f"release {release.number} of {release.model!r} isn't newer than {newest}")
            metadata.signed.targets[path] = TargetFile(
                release.manifest_size, {"sha256": release.bundle}, path, {"custom": facts_of(release)}
            )
        for number in passed:
            metadata.signed.targets.pop(target_path(added[0].model, number), None)
        return draft(metadata, role_of(added[0].model), now)

    def draft_rotation(self, role: str, old_key_id: str, new_key: Key, now: float) -> bytes:
        """Replace one key of a top-level role or of a model's role: the draft of `root` or of `targets`.

        Raises:
            NotFound: the role has no such key.
        """
        holder: Metadata[Root] | Metadata[Targets] = self._root()
        if role not in RULES:
            holder = self._load("targets", Targets)
        try:
            holder.signed.revoke_key(old_key_id, role)
        except ValueError as error:
            raise NotFound(f"{role} has no key {old_key_id}: {error}") from error
        holder.signed.add_key(new_key, role)
        return draft(holder, "root" if role in RULES else "targets", now)

    def draft_renewal(self, role: str, now: float) -> bytes:
        """The same for longer, before an offline role's date comes: its draft; raises `NotFound`."""
        return draft(self._published(role), role, now)

    def sign(self, unsigned: bytes, role: str) -> bytes:
        """Add the signatures of those of the role's keys that lie here, as many as are needed and no more."""
        metadata = parse(unsigned)
        trusted = self._trusted(role, metadata)
        usable = [signer for signer in self._keys.signers(role) if signer.public_key.keyid in trusted]
        return sign_draft(unsigned, usable[: max(0, rule_of(role).threshold - len(metadata.signatures))])

    def publish(self, role: str, signed: bytes, now: float) -> None:
        """Take signed metadata: verify, write, and let snapshot and timestamp follow; the same again changes nothing.

        Raises:
            SignatureInvalid: not signed by enough of the role's keys.
            WrongState: not the successor of what is published: somebody else published in between.
        """
        with self._files.alone():
            self._publish(role, signed, now)

    def _publish(self, role: str, signed: bytes, now: float) -> None:
        metadata = parse(signed)
        current = self._version(role)
        if metadata.signed.version == current and self.file(f"{current}.{role}.json") == signed:
            return
        if metadata.signed.version != current + 1:
            raise WrongState(f"{role} is at version {current}; this is {metadata.signed.version}, draft it again")
        self._verify(role, metadata)
        self._files.write(f"{metadata.signed.version}.{role}.json", signed)
        if role != "root":
            self._follow({role: metadata.signed.version}, now)
        elif "timestamp.json" in self.names():
            # New keys of the online roles take effect at once, and a stolen one's signatures end.
            self._follow({}, now)

    def keep_fresh(self, now: float, checkpoint: str = "") -> bool:
        """Sign snapshot and timestamp anew where that is due, or there is a new checkpoint to witness.

        Returns whether anything was signed.
        """
        with self._files.alone():
            return self._keep_fresh(now, checkpoint)

    def _keep_fresh(self, now: float, checkpoint: str) -> bool:
        snapshot, timestamp = self._load("snapshot", Snapshot), self._load("timestamp", Timestamp)
        old = timestamp.signed.unrecognized_fields.get(CHECKPOINT, "")
        if self._is_due("snapshot", snapshot, now):
            self._follow({}, now, checkpoint or old)
        elif self._is_due("timestamp", timestamp, now) or (checkpoint and checkpoint != old):
            self._stamp(snapshot.signed.version, now, checkpoint or old)
        else:
            return False
        return True

    # Small parts.

    def _is_due(self, role: str, metadata: Metadata[Any], now: float) -> bool:
        """Half of its time is over, or it is from a clock that was ahead; or who signed it isn't believed any more: a
        process died that replaced the key.
        """
        left, life = metadata.signed.expires.timestamp() - now, RULES[role].lifetime_seconds
        signers = self._root().signed.roles[role].keyids
        return not life / 2 <= left <= life or metadata.signatures.keys().isdisjoint(signers)

    def _finish(self, metadata: Signable, role: str, now: float) -> None:
        self.publish(role, self.sign(draft(metadata, role, now), role), now)

    def _follow(self, changed: dict[str, int], now: float, checkpoint: str = "") -> None:
        """Let snapshot and timestamp follow; what nobody can ask for any more goes."""
        try:
            snapshot = self._load("snapshot", Snapshot)
        except NotFound:
            snapshot = unborn(Snapshot())
        for role, version in changed.items():
            snapshot.signed.meta[f"{role}.json"] = MetaFile(version)
        data = sign_draft(draft(snapshot, "snapshot", now), self._online("snapshot"))
        version = parse(data).signed.version
        self._files.write(f"{version}.snapshot.json", data)
        self._stamp(version, now, checkpoint)
        for role in ("snapshot", *changed):
            self._files.drop_old(role)

    def _stamp(self, snapshot: int, now: float, checkpoint: str) -> None:
        try:
            timestamp = self._load("timestamp", Timestamp)
        except NotFound:
            timestamp = unborn(Timestamp())
        timestamp.signed.snapshot_meta = MetaFile(snapshot)
        extra = timestamp.signed.unrecognized_fields
        extra[ISSUED_AT] = int(now)
        if checkpoint:
            extra[CHECKPOINT] = checkpoint
        self._files.write("timestamp.json", sign_draft(draft(timestamp, "timestamp", now), self._online("timestamp")))

    def _online(self, role: str) -> list[CryptoSigner]:
        trusted = set(self._root().signed.roles[role].keyids)
        found = [signer for signer in self._keys.signers(role) if signer.public_key.keyid in trusted]
        if not found:
            raise NotFound(f"the {role} key isn't kept here; the coordinator needs it to tell what is newest")
        return found[:1]

    def _version(self, role: str) -> int:
        try:
            return self._published(role).signed.version
        except NotFound:
            return 0

    def _trusted(self, role: str, metadata: Metadata[Any]) -> set[str]:
        """The keys that may sign this draft; for a new root those that both it and the one before it name."""
        if role == "root":
            named = set(metadata.signed.roles["root"].keyids)
            return named if metadata.signed.version == 1 else named & set(self._root().signed.roles["root"].keyids)
        holder = self._root().signed if role in RULES else self._load("targets", Targets).signed
        return set(holder.get_delegated_role(role).keyids)

    def _verify(self, role: str, metadata: Metadata[Any]) -> None:
        try:
            if role == "root":
                metadata.verify_delegate(role, metadata)
            if (role in RULES and metadata.signed.version > 1) or role == "targets":
                self._root().verify_delegate(role, metadata)
            elif role not in RULES:
                self._load("targets", Targets).verify_delegate(role, metadata)
        except (RepositoryError, ValueError) as error:
            raise SignatureInvalid(f"{role} needs {rule_of(role).threshold} of its signers: {error}") from error

    def _published(self, role: str) -> Signable:
        return self._root() if role == "root" else self._load(role, Targets)

    def _root(self) -> Metadata[Root]:
        numbers = self._files.versions("root")
        if not numbers:
            raise NotFound(f"{self._files.folder} holds no repository; run `umbel keys init`")
        return cast("Metadata[Root]", parse(self.file(f"{max(numbers)}.root.json")))

    def _load(self, role: str, kind: type[S]) -> Metadata[S]:
        if kind is Timestamp:
            return cast("Metadata[S]", parse(self.file("timestamp.json")))
        if kind is Snapshot:
            version = self._load("timestamp", Timestamp).signed.snapshot_meta.version
            return cast("Metadata[S]", parse(self.file(f"{version}.snapshot.json")))
        meta = self._load("snapshot", Snapshot).signed.meta.get(f"{role}.json")
        if meta is None:
            raise NotFound(f"{role!r} has nothing to sign by hand; root, targets and listed releases-MODEL have")
        return cast("Metadata[S]", parse(self.file(f"{meta.version}.{role}.json")))


def _name_signers(root: Root, role: str, keys: Iterable[Key]) -> None:
    for key in keys:
        root.add_key(key, role)
    root.roles[role].threshold = RULES[role].threshold
