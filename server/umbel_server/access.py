"""Which devices may call: enrolment by single-use tokens, short-lived certificates, a deny-list asked at each call.

The store is the truth. The deny-list is kept in memory because every call asks it, and what is new of it is read every
second, so that several processes share it.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import sqlalchemy as sa

from umbel.clock import DAY, Clock, is_recent
from umbel.errors import AlreadyExists, CertificateRefused, EnrolmentRefused, NotAllowed, NotFound, OutOfBounds
from umbel.fields import name, text
from umbel.identity import DeviceId, id_of_key
from umbel_server import audit
from umbel_server.authority import Authority, Peer, PeerKind, key_of_request
from umbel_server.requests import ANY, Call, enter
from umbel_server.store import Store
from umbel_server.tables import DEVICES, TOKENS

TOKENS_AT_ONCE: Final = 10_000
MAX_TOKEN_SECONDS: Final = 366 * DAY
MAX_ATTESTATION_BYTES: Final = 64 << 10
LOOK_SECONDS: Final = 1.0
SKEW_SECONDS: Final = 300.0


class Attestation(Protocol):
    """Decides whether a device has shown that it is what it claims to be (Play Integrity, App Attest, a TPM …)."""

    def verify(self, evidence: bytes, device: DeviceId) -> None:
        """Return if `evidence` convinces for this device's key; raise `EnrolmentRefused` if not."""


class RefuseAll:
    """Convinced by nothing: what a coordinator has until it is given a verifier."""

    def verify(self, evidence: bytes, device: DeviceId) -> None:
        """Refuse."""
        del evidence
        raise EnrolmentRefused(f"device {device} can't enrol: this coordinator has no verifier of attestations")


class AcceptAll:
    """Asks for nothing: development trust."""

    def verify(self, evidence: bytes, device: DeviceId) -> None:
        """Accept."""


@dataclass(frozen=True, slots=True)
class Authorities:
    """The three certificate authorities of a coordinator."""

    server: Authority
    device: Authority
    operator: Authority


@dataclass(frozen=True, slots=True)
class Enrolled:
    """What a device gets for its token."""

    device: DeviceId
    population: str
    certificate_chain: bytes


class Access:
    """Devices' rights to call."""

    def __init__(
        self,
        store: Store,
        authorities: Authorities,
        attestation: Attestation,
        clock: Clock,
        certificate_seconds: float,
        look_seconds: float = LOOK_SECONDS,
    ) -> None:
        self._store = store
        self._authorities = authorities
        self._attestation = attestation
        self._clock = clock
        self._certificate_seconds = certificate_seconds
        self._look_seconds = look_seconds
        self._revoked: set[str] = set()
        self._newest = self._looked_at = float("-inf")
        self._look()

    @property
    def server_authority(self) -> bytes:
        """The certificate that devices pin, in PEM."""
        return self._authorities.server.certificate_pem

    def device(self, certificate: bytes | None) -> Peer:
        """Which device calls.

        Raises:
            CertificateRefused: no certificate, or one that is foreign, out of time or revoked.
        """
        if certificate is None:
            raise CertificateRefused("call with the certificate that enrolment gave")
        peer = self._authorities.device.verify(certificate, PeerKind.DEVICE, self._clock.now())
        if self._is_revoked(peer.id):
            raise CertificateRefused(f"device {peer.id} was revoked by an operator")
        return peer

    def create_tokens(
        self, actor: str, population: str, count: int, seconds: float, call: Call = ANY
    ) -> tuple[list[str], float]:
        """Make `count` single-use tokens for a population; only their hashes are kept.

        Returns:
            The tokens, and the instant (POSIX seconds) at which they stop to count.

        Raises:
            MalformedMessage: the population isn't a name.
            OutOfBounds: none or too many tokens, or a lifetime that makes no sense.
            AlreadyExists: this request made them before; nobody can read them any more.
        """
        name(population, "population")
        if not 1 <= count <= TOKENS_AT_ONCE:
            raise OutOfBounds(f"{count} tokens at once; ask for 1 to {TOKENS_AT_ONCE}")
        if not 0 < seconds <= MAX_TOKEN_SECONDS:
            raise OutOfBounds(f"a token can't live for {seconds} seconds; choose a time of up to a year")
        now = self._clock.now()
        # Hexadecimal: it may stand on a command line, which would take one that begins with a dash for an option.
        tokens = [secrets.token_hex(24) for _ in range(count)]
        row = {"population": population, "created_by": actor, "created_at": now, "expires_at": now + seconds}
        body = {"count": count, "seconds": seconds}
        with self._store.transaction() as connection:
            if enter(connection, call, actor, "tokens.create", population, now) is not None:
                raise AlreadyExists(f"request {call.request_id} made its tokens before; make new ones under a new id")
            connection.execute(sa.insert(TOKENS), [{"digest": _hash(token)} | row for token in tokens])
            audit.append(connection, now, actor, "tokens.create", population, body, call.request_id)
        return tokens, now + seconds

    def enrol(self, token: str, request: bytes, attestation: bytes) -> Enrolled:
        """Trade a token and a certificate request (PKCS #10, DER) for a certificate.

        A device that lost the answer may ask again with the same key while the token lasts.

        Raises:
            MalformedMessage: not a certificate request.
            EnrolmentRefused: the token, the key's proof or the attestation doesn't do.
        """
        key = key_of_request(request)
        device = id_of_key(key)
        if self._is_revoked(device):
            raise EnrolmentRefused(f"device {device} was revoked; it needs a new key and an operator's leave")
        if len(attestation) > MAX_ATTESTATION_BYTES:
            raise EnrolmentRefused(f"attestation of {len(attestation)} bytes; the limit is {MAX_ATTESTATION_BYTES}")
        self._attestation.verify(attestation, device)
        now = self._clock.now()
        with self._store.transaction() as connection:
            population = _redeem(connection, _hash(token), device, now)
            if _register(connection, device, population, now):
                audit.append(connection, now, f"device:{device}", "device.enrol", device, {"population": population})
        return Enrolled(device, population, self._issue(request, population, now))

    def renew(self, device: Peer, request: bytes) -> bytes:
        """A new certificate (PEM chain) for the key that a device calls with.

        Raises:
            MalformedMessage: not a certificate request.
            EnrolmentRefused: the request doesn't prove its key.
            NotAllowed: it is for another key.
        """
        if id_of_key(key_of_request(request)) != device.id:
            raise NotAllowed("a certificate is renewed for the same key; for a new key, enrol again")
        return self._issue(request, device.realm, self._clock.now())

    def admit(self, actor: str, population: str, devices: Sequence[DeviceId]) -> None:
        """Enrol devices whose keys are known by other means than a token, many at once: a factory's, a simulation's.

        They get no certificate here. Those that are enrolled already stay as they are.

        Raises:
            MalformedMessage: the population isn't a name.
        """
        name(population, "population")
        now = self._clock.now()
        fresh = {"population": population, "enrolled_at": now, "runtimes": "", "sdk": "", "visits": 0, "reports": 0}
        with self._store.transaction() as connection:
            known = set(connection.scalars(sa.select(DEVICES.c.id)))
            rows = [{"id": device} | fresh for device in dict.fromkeys(devices) if device not in known]
            if rows:
                connection.execute(sa.insert(DEVICES), rows)
                audit.append(connection, now, actor, "devices.admit", population, {"count": len(rows)})

    def known(self, device: DeviceId, population: str) -> Peer:
        """Which device calls, for channels that know it without a certificate: those inside one process.

        Raises:
            CertificateRefused: it was revoked.
        """
        if self._is_revoked(device):
            raise CertificateRefused(f"device {device} was revoked by an operator")
        return Peer(device, PeerKind.DEVICE, population, 0.0, float("inf"))

    def revoke(self, actor: str, device: str, reason: str, call: Call = ANY) -> None:
        """Refuse a device from its next call on; again is the same as once.

        Raises:
            NotFound: no such device.
            BadInput: a reason that is too long, or not printable.
        """
        text(reason, "reason")
        now = self._clock.now()
        with self._store.transaction() as connection:
            if enter(connection, call, actor, "device.revoke", device, now) is not None:
                return
            once = sa.func.coalesce(DEVICES.c.revoked_at, now)
            found = connection.execute(sa.update(DEVICES).where(DEVICES.c.id == device).values(revoked_at=once))
            if found.rowcount != 1:
                raise NotFound(f"no device {device[:80]!r}; `umbel devices list` tells who is enrolled")
            audit.append(connection, now, actor, "device.revoke", device, {"reason": reason}, call.request_id)
        self._revoked.add(device)

    def _is_revoked(self, device: str) -> bool:
        """Asked at each call; what another process has revoked is known here within `look_seconds`."""
        if not is_recent(self._looked_at, self._clock.now(), self._look_seconds):
            self._look()
        return device in self._revoked

    def _look(self) -> None:
        """Read what was revoked since the last look, and a little before it: clocks of two processes differ."""
        self._looked_at = self._clock.now()
        query = sa.select(DEVICES.c.id, DEVICES.c.revoked_at).where(DEVICES.c.revoked_at > self._newest - SKEW_SECONDS)
        with self._store.reading() as connection:
            for row in connection.execute(query):
                self._revoked.add(row.id)
                self._newest = max(self._newest, row.revoked_at)

    def _issue(self, request: bytes, population: str, now: float) -> bytes:
        key = key_of_request(request)
        return self._authorities.device.issue(key, PeerKind.DEVICE, population, now, self._certificate_seconds)


def _hash(token: str) -> str:
    # A token has 192 random bits: one round of SHA-256 is enough to keep it from whoever reads the table.
    return hashlib.sha256(token.encode(errors="surrogatepass")).hexdigest()


def _redeem(connection: sa.Connection, digest: str, device: DeviceId, now: float) -> str:
    unused_or_own = TOKENS.c.used_by.is_(None) | (TOKENS.c.used_by == device)
    claimed = connection.execute(
        sa.update(TOKENS)
        .where(TOKENS.c.digest == digest, TOKENS.c.expires_at > now, unused_or_own)
        .values(used_by=device, used_at=now)
    )
    if claimed.rowcount != 1:
        # One message for the three cases: a guesser learns nothing.
        raise EnrolmentRefused("the token is unknown, used up or too old; ask an operator for a new one")
    return str(connection.scalar(sa.select(TOKENS.c.population).where(TOKENS.c.digest == digest)))


def _register(connection: sa.Connection, device: DeviceId, population: str, now: float) -> bool:
    """Write the device down; False if it already was."""
    known = connection.scalar(sa.select(DEVICES.c.population).where(DEVICES.c.id == device))
    if known is not None and known != population:
        raise EnrolmentRefused(f"this key is enrolled in another population; make a new key for {population!r}")
    if known is None:
        connection.execute(
            sa.insert(DEVICES).values(
                id=device,
                population=population,
                enrolled_at=now,
                runtimes="",
                sdk="",
                visits=0,
                reports=0,
            )
        )
    return known is None
