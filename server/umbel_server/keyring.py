"""The keys that sign what devices trust: which there are, how many of them a role needs, and where they should live.

    root      3 of 5   offline    names all the others; replaces any of them, itself too
    targets   2 of 3   offline    names each model's signers
    releases  2 of 3   offline    one such role per model: what a release is
    snapshot  1        online     which metadata belong together
    timestamp 1        online     what is newest; signed anew all the time

For development all of them lie in one folder, which whoever reads it can release anything with: `status` says so.
For production the private keys of the offline roles are made and kept elsewhere, and only files travel
(`docs/how-to/roll-out-a-release.md`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from securesystemslib.signer import CryptoSigner, SSlibKey

from umbel import fields
from umbel.clock import DAY
from umbel.errors import AlreadyExists, MalformedMessage, NotFound
from umbel_server.files import write_file


@dataclass(frozen=True, slots=True)
class RoleRule:
    """How many keys a role has, how many must sign, whether they belong offline, and how long a signature holds."""

    keys: int
    threshold: int
    offline: bool
    lifetime_seconds: float


RULES: Final[Mapping[str, RoleRule]] = {
    "root": RoleRule(5, 3, offline=True, lifetime_seconds=365 * DAY),
    "targets": RoleRule(3, 2, offline=True, lifetime_seconds=90 * DAY),
    "releases": RoleRule(3, 2, offline=True, lifetime_seconds=90 * DAY),
    "snapshot": RoleRule(1, 1, offline=False, lifetime_seconds=7 * DAY),
    "timestamp": RoleRule(1, 1, offline=False, lifetime_seconds=DAY),
}
"""`releases` is the rule for each model's own role."""


def rule_of(role: str) -> RoleRule:
    """The rule of a top-level role, or of a model's role."""
    return RULES.get(role, RULES["releases"])


@dataclass(frozen=True, slots=True)
class KeyStatus:
    """One key, for a person to look at."""

    role: str
    key_id: str
    held_here: bool
    """Its private half lies on this machine."""
    offline: bool
    """It shouldn't."""


class Keyring:
    """Private keys in a folder, one file each, mode 0600: `<role>-<n>.key`, 32 bytes of Ed25519."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @classmethod
    def create(cls, folder: Path) -> Keyring:
        """Make all keys of the top-level roles.

        Raises:
            AlreadyExists: the folder holds keys already; replacing them would strand every device.
        """
        if folder.is_dir() and any(folder.glob("*.key")):
            raise AlreadyExists(f"{folder} holds keys already; rotate them one by one instead")
        ring = cls(folder)
        for role in ("root", "targets", "snapshot", "timestamp"):
            ring.add(role)
        return ring

    def add(self, role: str, count: int = 0) -> list[CryptoSigner]:
        """Make new keys for a role, beside those it has: as many as its rule says, or `count`."""
        fields.name(role, "role")
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        made = []
        taken = max((int(path.stem.rpartition("-")[2]) for path in self._folder.glob(f"{role}-*.key")), default=0)
        for number in range(taken + 1, taken + 1 + (count or rule_of(role).keys)):
            path = self._folder / f"{role}-{number}.key"
            new_key(path)
            made.append(read_key(path))
        return made

    def complete(self, role: str) -> list[CryptoSigner]:
        """A role's private keys, of which as many are made as its rule says and don't lie here yet."""
        here = self.signers(role)
        missing = rule_of(role).keys - len(here)
        return here if missing <= 0 else [*here, *self.add(role, missing)]

    def signers(self, role: str) -> list[CryptoSigner]:
        """The private keys of a role that lie here; empty when they are kept elsewhere."""
        return [read_key(path) for path in sorted(self._folder.glob(f"{role}-*.key"))]

    def public_keys(self, role: str) -> list[SSlibKey]:
        """The public halves of the keys that lie here."""
        return [signer.public_key for signer in self.signers(role)]

    def signer(self, key_id: str) -> CryptoSigner:
        """The key of this id; raises `NotFound` when it isn't kept here."""
        for path in sorted(self._folder.glob("*.key")):
            signer = read_key(path)
            if signer.public_key.keyid == key_id:
                return signer
        raise NotFound(f"key {key_id} isn't kept in {self._folder}; sign where it is")

    def forget(self, key_id: str) -> None:
        """Delete a private key, as after it was replaced or moved elsewhere."""
        for path in sorted(self._folder.glob("*.key")):
            if read_key(path).public_key.keyid == key_id:
                path.unlink()

    def __repr__(self) -> str:
        return f"Keyring({len(list(self._folder.glob('*.key')))} keys)"


def new_key(path: Path) -> str:
    """Make one key in a file, mode 0600; its public half (hexadecimal).

    Raises:
        AlreadyExists: there is a file of this name.
    """
    if path.exists():
        raise AlreadyExists(f"{path} is there already; keys are never overwritten")
    key = Ed25519PrivateKey.generate()
    write_file(path, key.private_bytes_raw())
    return key.public_key().public_bytes_raw().hex()


def public_key(text: str) -> SSlibKey:
    """A public key as `new_key` tells it; raises `MalformedMessage`."""
    try:
        return SSlibKey.from_crypto(Ed25519PublicKey.from_public_bytes(bytes.fromhex(text)))
    except ValueError as error:
        raise MalformedMessage(f"{text[:80]!r} is no public key: {error}; `umbel keys new` prints one") from error


def read_key(path: Path) -> CryptoSigner:
    """A private key's file; raises `MalformedMessage` if it is none."""
    try:
        return CryptoSigner(Ed25519PrivateKey.from_private_bytes(path.read_bytes()))
    except ValueError as error:
        raise MalformedMessage(f"{path} isn't an Ed25519 private key: {error}") from error
