"""A coordinator's folder: its authorities, its keys, the first admin's identity, its settings and its data.

    config.toml                     settings; every line may go
    authority/{server,device,operator}.{pem,key}
    keys/{release,leader}.key       Ed25519 and X25519, raw
    release.pub                     the release key's public half, for a helper's operator; hex
    keys/audit.key                  signs checkpoints of the audit log; Ed25519, raw
    witness/checkpoints.txt         those checkpoints; keep a copy elsewhere
    keys/releases/                  the keys of the release listing, one file each
    listing/                        the release listing: TUF metadata, public
    admin/                          an operator's identity: what `umbel` calls with
    umbel.db, blobs/                data, unless the settings say otherwise
    addresses.json                  where the running coordinator listens

Private files have mode 0600, folders 0700.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Final, TypeVar

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from umbel.clock import DAY
from umbel.errors import AlreadyExists, BadInput, CertificateRefused, MalformedMessage
from umbel.holding import held
from umbel_server.access import Authorities
from umbel_server.aggregation import LeaderKey
from umbel_server.authority import Authority, PeerKind, general_name, key_to_pem
from umbel_server.checkpoints import Witness
from umbel_server.files import flush, make_private, read_file, write_file
from umbel_server.identity import ADDRESSES_FILE, Addresses, Identity
from umbel_server.keyring import Keyring
from umbel_server.operators import REALM
from umbel_server.repository import Repository
from umbel_server.signing import ReleaseSigner

T = TypeVar("T")
_AUTHORITIES: Final = ("server", "device", "operator")
FIRST_ADMIN_SECONDS: Final = 366 * DAY

_CONFIG = """\
# Settings of this coordinator. The command line and UMBEL_… in the environment go before what stands here;
# `umbel serve --help` and docs/reference/umbel-cli.md tell what there is.
profile = "development"
{names}"""


class Folder:
    """The folder of one coordinator."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, names: tuple[str, ...], now: float) -> Folder:
        """Make a folder with new authorities, keys and a first admin.

        Args:
            path: where; it may exist, but not hold a coordinator.
            names: host names and addresses of the coordinator, beside this machine's own.
            now: POSIX seconds.

        Raises:
            AlreadyExists: there is a coordinator in it.
            WrongState: one is being made in it.
            MalformedMessage: a name that no server can have.
        """
        folder = cls(path)
        for name in names:
            general_name(name)
        if not folder._is_made:
            make_private(path)
            with held(path, f"another `umbel init` is at work in {path}; choose another folder"):
                if not folder._is_made:
                    folder._create(names, now)
                    return folder
        raise AlreadyExists(f"{path} holds a coordinator already; choose another folder, or use `umbel serve`")

    @property
    def _is_made(self) -> bool:
        return (self.path / "authority").exists()

    def _create(self, names: tuple[str, ...], now: float) -> None:
        if any(self.release_keys.glob("*.key")):
            raise AlreadyExists(
                f"{self.path} holds release keys but no authorities. If `umbel init` was broken off there, delete it "
                "and begin again: nobody trusts those keys yet; else bring its `authority` folder back from a backup"
            )
        make_private(self.path / "keys")
        write_file(self.path / "keys" / "release.key", ReleaseSigner.generate().to_bytes())
        write_file(self.path / "keys" / "leader.key", LeaderKey.generate().to_bytes())
        write_file(self.path / "release.pub", f"{self.signer().public_key.hex()}\n".encode())
        config = _CONFIG.format(names=f"names = {json.dumps(['localhost', '127.0.0.1', '::1', *names])}\n")
        write_file(self.path / "config.toml", config.encode())
        write_file(self.path / "keys" / "audit.key", Ed25519PrivateKey.generate().private_bytes_raw())
        Repository.create(self.listing, Keyring.create(self.release_keys), now)
        self._create_authorities(now)

    def _create_authorities(self, now: float) -> None:
        # Written aside and renamed as a whole, last: a folder with authorities is a complete one.
        made = {name: Authority.create(f"umbel {name} authority", now) for name in _AUTHORITIES}
        self._first_admin(made["operator"], made["server"], now).write(self.path / "admin")
        aside = self.path / f".authority-{secrets.token_hex(4)}"
        make_private(aside)
        for name, authority in made.items():
            write_file(aside / f"{name}.key", authority.key_pem)
            write_file(aside / f"{name}.pem", authority.certificate_pem)
        aside.rename(self.path / "authority")
        flush(self.path)

    def _first_admin(self, operators: Authority, server: Authority, now: float) -> Identity:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = operators.issue(key.public_key(), PeerKind.OPERATOR, REALM, now, FIRST_ADMIN_SECONDS)
        return Identity(certificate, key_to_pem(key), server.certificate_pem)

    def authorities(self) -> Authorities:
        """The three certificate authorities; raises `NotFound` where `umbel init` hasn't been."""
        return Authorities(*(self._authority(name) for name in _AUTHORITIES))

    def _authority(self, name: str) -> Authority:
        certificate = self.path / "authority" / f"{name}.pem"
        try:
            return Authority.from_pem(read_file(certificate), read_file(certificate.with_suffix(".key")))
        except CertificateRefused as error:
            raise CertificateRefused(f"{certificate}: {error}") from error

    def signer(self) -> ReleaseSigner:
        """The key that signs releases."""
        return _understood(self.path / "keys" / "release.key", ReleaseSigner.from_bytes)

    def leader_key(self) -> LeaderKey:
        """The key that reports are sealed to."""
        return _understood(self.path / "keys" / "leader.key", LeaderKey.from_bytes)

    def witness(self) -> Witness:
        """Signs checkpoints of the audit log, and keeps them; raises `NotFound` where there is no key for it."""
        key = _understood(self.path / "keys" / "audit.key", Ed25519PrivateKey.from_private_bytes)
        return Witness(key, self.path / "witness" / "checkpoints.txt")

    @property
    def first_admin(self) -> Path:
        """The folder of the identity that `umbel init` made."""
        return self.path / "admin"

    @property
    def listing(self) -> Path:
        """The release listing: TUF metadata, public."""
        return self.path / "listing"

    @property
    def release_keys(self) -> Path:
        """The private keys of the release listing that lie on this machine."""
        return self.path / "keys" / "releases"

    def repository(self) -> tuple[Repository, Keyring]:
        """The release listing and its keys; raises `NotFound` where there is none."""
        keys = Keyring(self.release_keys)
        repository = Repository(self.listing, keys)
        _ = repository.first_root
        return repository, keys

    @property
    def blobs(self) -> Path:
        """Where blobs lie."""
        return self.path / "blobs"

    @property
    def inferences(self) -> Path:
        """Where records of questions to models lie."""
        return self.path / "inferences"

    def write_addresses(self, addresses: Addresses) -> None:
        """Tell other programs on this machine where the coordinator listens."""
        write_file(self.path / ADDRESSES_FILE, (json.dumps(asdict(addresses), indent=2) + "\n").encode())

    def forget_addresses(self) -> None:
        """Nobody listens any more; where that can't be written down, the next start does."""
        with suppress(OSError):
            (self.path / ADDRESSES_FILE).unlink()


def _understood(path: Path, reading: Callable[[bytes], T]) -> T:
    """What stands in a file; one that is damaged is named."""
    data = read_file(path)
    try:
        return reading(data)
    except (BadInput, ValueError) as error:
        raise MalformedMessage(f"{path} is damaged ({error}); restore it from a backup") from error
