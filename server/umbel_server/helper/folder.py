"""A helper's folder: its keys, its config file, its store, and the card that it hands out.

    helper.toml                     settings; see `HelperSettings`
    keys/{identity,authority}.key   Ed25519, raw: countersigns and signs sums; certifies participants
    keys/tls.{key,pem}              of its port; the certificate is pinned by all who call
    card.json                       what coordinator and devices need; public
    helper.db                       SQLite

Private files have mode 0600, folders 0700.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from umbel.errors import AlreadyExists, MalformedMessage, NotFound
from umbel.helper_card import HelperCard
from umbel.holding import held
from umbel_server.addresses import host_and_port
from umbel_server.authority import general_name, key_to_pem
from umbel_server.files import PUBLIC, make_private, read_file, read_toml, write_file
from umbel_server.helper.core import HelperPolicy
from umbel_server.json_text import like, texts

TLS_DAYS: Final = 20 * 365
"""Coordinator and devices pin this very certificate, beside `identity.key`, which has no end: after it, each of them
would need a new card."""

_CONFIG: Final = """\
# Settings of this helper; docs/how-to/run-the-helper.md explains them.

# The coordinator that it helps: 64 hex digits, from release.pub in its folder. No other leader is answered.
leader = "{leader}"

# Where it listens, and what its port is called by others.
host = "{host}"
port = {port}
health_port = 0

# What it asks of every round. Raise minimum_cohort for a real fleet: a sum over five says a lot about each.
minimum_cohort = {minimum_cohort}
max_reports_per_day = 1000
max_reports_per_task = 0
minimum_noise_multiplier = 0.0
certificate_days = 90.0
"""


@dataclass(frozen=True, slots=True)
class HelperSettings:
    """What stands in `helper.toml`."""

    leader: str
    host: str = "127.0.0.1"
    port: int = 7446
    health_port: int = 0
    """Of the pages that tell how it is (`/healthz`, `/metrics`), plain HTTP on the same host; 0: none."""
    populations: tuple[str, ...] = ()
    minimum_cohort: int = 5
    max_reports_per_day: int = 1000
    max_reports_per_task: int = 0
    minimum_noise_multiplier: float = 0.0
    certificate_days: float = 90.0

    @property
    def policy(self) -> HelperPolicy:
        """What it asks of rounds."""
        return HelperPolicy(
            leader=parse_key(self.leader),
            populations=self.populations,
            minimum_cohort=self.minimum_cohort,
            max_reports_per_day=self.max_reports_per_day,
            max_reports_per_task=self.max_reports_per_task,
            minimum_noise_multiplier=self.minimum_noise_multiplier,
        )


class HelperFolder:
    """The folder of one helper."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, settings: HelperSettings, address: str, operator: str, now: float) -> HelperFolder:
        """Make a folder with new keys.

        Args:
            path: where; it may exist, but not hold a helper.
            settings: what goes into its config file.
            address: host:port by which others reach it.
            operator: who runs it, in words; empty: whoever runs the coordinator.
            now: POSIX seconds.

        Raises:
            AlreadyExists: there is a helper in it.
            WrongState: one is being made in it.
            MalformedMessage: the leader's key isn't one, or the address.
        """
        parse_key(settings.leader)
        host_and_port(address)
        folder = cls(path)
        if not folder._is_made:
            make_private(path)
            with held(path, f"another `umbel helper init` is at work in {path}; choose another folder"):
                if not folder._is_made:
                    folder._create(settings, address, operator, now)
                    return folder
        raise AlreadyExists(f"{path} holds a helper already; choose another folder")

    @property
    def _is_made(self) -> bool:
        return (self.path / "card.json").exists()

    def _create(self, settings: HelperSettings, address: str, operator: str, now: float) -> None:
        path, (host, _) = self.path, host_and_port(address)
        make_private(path / "keys")
        identity, authority = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
        write_file(path / "keys" / "identity.key", identity.private_bytes_raw())
        write_file(path / "keys" / "authority.key", authority.private_bytes_raw())
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _certificate(key, host, now)
        write_file(path / "keys" / "tls.key", key_to_pem(key))
        write_file(path / "keys" / "tls.pem", certificate)
        values = {one.name: getattr(settings, one.name) for one in fields(settings)}
        write_file(path / "helper.toml", _CONFIG.format(**values).encode())
        card = HelperCard(address, identity.public_key().public_bytes_raw(), certificate, operator)
        # Last: a folder with a card is a complete one.
        write_file(path / "card.json", card.to_text().encode(), PUBLIC)

    def settings(self, **chosen: Any) -> HelperSettings:
        """What stands in the config file; `None` among `chosen` means not chosen.

        Raises:
            NotFound: no helper here.
            MalformedMessage: not TOML, or with names or values that don't belong there.
        """
        tree = read_toml(self.path / "helper.toml")
        tree |= {name: value for name, value in chosen.items() if value is not None}
        try:
            if "populations" in tree:
                tree["populations"] = texts("populations", tree["populations"])
            settings = HelperSettings(**like(HelperSettings, tree, "helper.toml"))
        except TypeError as error:
            raise MalformedMessage(f"helper.toml: {error}") from error
        _ = settings.policy
        return settings

    def identity(self) -> Ed25519PrivateKey:
        """Countersigns descriptors and signs sums."""
        return self._key("identity")

    def authority(self) -> Ed25519PrivateKey:
        """Certifies participants."""
        return self._key("authority")

    def tls(self) -> tuple[bytes, bytes]:
        """Key and certificate of its port, PEM."""
        return read_file(self.path / "keys" / "tls.key"), read_file(self.path / "keys" / "tls.pem")

    def card(self) -> HelperCard:
        """What it hands out; raises `NotFound` where `umbel helper init` hasn't been."""
        return HelperCard.from_text(read_file(self.path / "card.json"))

    def write_address(self, address: str) -> HelperCard:
        """Put the address that it really listens at into its card."""
        old = self.card()
        card = HelperCard(address, old.identity, old.certificate, old.operator)
        write_file(self.path / "card.json", card.to_text().encode(), PUBLIC)
        return card

    @property
    def database(self) -> Path:
        """Its store; raises `NotFound` where `umbel helper init` hasn't been."""
        if not self._is_made:
            raise NotFound(f"{self.path} holds no helper; make one with `umbel helper init`")
        return self.path / "helper.db"

    def _key(self, name: str) -> Ed25519PrivateKey:
        return Ed25519PrivateKey.from_private_bytes(read_file(self.path / "keys" / f"{name}.key"))


def parse_key(text: str) -> bytes:
    """A public key from its 64 hex digits; raises `MalformedMessage`."""
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != 32:
        raise MalformedMessage(f"a key is 64 hex digits, not {text[:80]!r}")
    return key


def _certificate(key: ec.EllipticCurvePrivateKey, host: str, now: float) -> bytes:
    """A self-signed certificate for the names that the helper is reached by; PEM."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "umbel helper")])
    begin = datetime.datetime.fromtimestamp(now, datetime.UTC)
    names = sorted({host, "localhost", "127.0.0.1"})
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin - datetime.timedelta(hours=1))
        .not_valid_after(begin + datetime.timedelta(days=TLS_DAYS))
        .add_extension(x509.SubjectAlternativeName([general_name(one) for one in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    )
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
