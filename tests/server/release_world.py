"""A release listing with its keys, and devices that read it through a mirror that may lie."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, TargetFile

from umbel.digests import digest_of
from umbel.errors import (
    OutOfBounds,
)
from umbel.listing import ListedRelease
from umbel_client.listing import Listing
from umbel_server.drafts import sign_draft
from umbel_server.keyring import Keyring
from umbel_server.repository import Repository, role_of

NOW = 1_790_000_000.0
MODEL = "shoulder"
ROLE = role_of(MODEL)


def listed(number: int, version: int | None = None, **facts: Any) -> ListedRelease:
    version = version or number
    return ListedRelease(MODEL, number, version, "stable", digest_of(f"manifest {version}".encode()), 900, **facts)


@dataclass
class World:
    """A repository with its keys, and devices that read it through a mirror that may lie."""

    folder: Path
    keys: Keyring = field(init=False)
    repository: Repository = field(init=False)
    lies: dict[str, bytes] = field(default_factory=dict)
    devices: int = 0

    def __post_init__(self) -> None:
        self.keys = Keyring.create(self.folder / "keys")
        self.repository = Repository.create(self.metadata, self.keys, NOW)
        self.name_signers(MODEL)

    @property
    def metadata(self) -> Path:
        return self.folder / "metadata"

    def name_signers(self, model: str) -> None:
        signers = [signer.public_key for signer in self.keys.add(role_of(model))]
        self.publish("targets", self.repository.draft_signers(model, signers, NOW))
        self.publish(role_of(model), self.repository.draft_empty(model, NOW))

    def publish(self, role: str, draft: bytes, now: float = NOW) -> None:
        self.repository.publish(role, self.repository.sign(draft, role), now)

    def release(self, *releases: ListedRelease, now: float = NOW) -> None:
        self.publish(ROLE, self.repository.draft_releases(releases, now), now)

    def device(self) -> Listing:
        self.devices += 1
        return Listing(self.folder / f"device-{self.devices}", self.repository.first_root, seconds=5.0)

    async def fetch(self, name: str, limit: int) -> bytes:
        data = self.lies.get(name) or self.repository.file(name)
        if len(data) > limit:
            raise OutOfBounds(f"{name} is longer than {limit}")
        return data

    def snapshot_of_now(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.metadata.glob("*.json")}

    def current(self, role: str) -> tuple[str, Metadata[Any]]:
        newest = max(self.metadata.glob(f"*.{role}.json"), key=lambda path: int(path.name.split(".")[0]))
        return newest.name, Metadata.from_bytes(newest.read_bytes())

    def forge(self, role: str, metadata: Metadata[Any], signers: list[CryptoSigner]) -> None:
        """Publish by force, as somebody would who owns the folder, the online keys, and `signers`."""
        metadata.signatures.clear()
        metadata.signed.version += 1
        name = f"{metadata.signed.version}.{role}.json"
        (self.metadata / name).write_bytes(sign_draft(metadata.to_bytes(), signers))
        if role == "snapshot":
            self.repository._stamp(metadata.signed.version, NOW, "")
        elif role != "root":
            self.repository._follow({role: metadata.signed.version}, NOW)


def with_evil(world: World) -> Metadata[Any]:
    _, metadata = world.current(ROLE)
    path = f"models/{MODEL}/66.json"
    metadata.signed.targets[path] = TargetFile(6, {"sha256": digest_of(b"evil")}, path)
    return metadata
