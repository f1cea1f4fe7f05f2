"""Which operators may call, and what: their certificates say who they are, the store says what they may.

A role can so be taken away at once; the operators are kept in memory, because every call asks, and read again every
second, so that several processes share them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import sqlalchemy as sa

from umbel.clock import Clock, is_recent
from umbel.errors import AlreadyExists, CertificateRefused, NotFound, OutOfBounds, TokenRefused, WrongState
from umbel.fields import name
from umbel.identity import DeviceId, id_of_key
from umbel_server import audit
from umbel_server.authority import Authority, PeerKind, key_of_request
from umbel_server.requests import ANY, Call, enter
from umbel_server.roles import Role, require_role
from umbel_server.store import Store
from umbel_server.tables import OPERATORS

REALM: Final = "operators"
FIRST: Final = "first-admin"
LOOK_SECONDS: Final = 1.0
MAX_NAME_CHARS: Final = 90
"""Beside `operator:`, what the store keeps of who did something has room for no more."""


@dataclass(frozen=True, slots=True)
class Operator:
    """Someone who may call the admin port."""

    id: DeviceId
    name: str
    role: Role
    added_at: float
    revoked_at: float | None = None
    kind: str = "operator"
    """What let them in: a certificate (`operator`) or a token (`token`)."""
    until: float | None = None
    """POSIX seconds at which a token ends; a certificate is looked at in each handshake."""

    @property
    def actor(self) -> str:
        """How the audit names this operator."""
        return f"{self.kind}:{self.name}"


class Operators:
    """The operators of one coordinator."""

    def __init__(self, store: Store, authority: Authority, clock: Clock, certificate_seconds: float) -> None:
        self._store = store
        self._authority = authority
        self._clock = clock
        self._certificate_seconds = certificate_seconds
        self._known: dict[DeviceId, Operator] = {}
        self._looked_at = float("-inf")
        self._look()

    def authorize(self, method: str, certificate: bytes | None) -> Operator:
        """Who calls `method`, once it has been shown that they may.

        Raises:
            CertificateRefused: no certificate, or one that is foreign, out of time or revoked.
            NotAllowed: the role doesn't reach.
        """
        if certificate is None:
            raise CertificateRefused("call with an operator's certificate")
        peer = self._authority.verify(certificate, PeerKind.OPERATOR, self._clock.now())
        operator = self._active(peer.id)
        require_role(method, operator.role)
        return operator

    def require_active(self, operator: Operator) -> None:
        """Raise `NotAuthentic` if the operator has been revoked since its call began, or its token has run out."""
        if operator.until is None:
            self._active(operator.id)
        elif self._clock.now() >= operator.until:
            raise TokenRefused("the token has expired; log in again")

    def _look(self) -> None:
        """Read who there is: another process may have added or revoked somebody."""
        self._looked_at = self._clock.now()
        with self._store.reading() as connection:
            self._known = {row.id: _from_row(row) for row in connection.execute(sa.select(OPERATORS))}

    def _active(self, operator_id: DeviceId) -> Operator:
        known = operator_id in self._known
        if not (known and is_recent(self._looked_at, self._clock.now(), LOOK_SECONDS)):
            self._look()
        operator = self._known.get(operator_id)
        if operator is None or operator.revoked_at is not None:
            raise CertificateRefused(f"operator {operator_id} isn't known here, or was revoked")
        return operator

    def all(self) -> list[Operator]:
        """Everyone who is or was an operator, the first one first."""
        return sorted(self._known.values(), key=lambda operator: (operator.added_at, operator.name))

    def bootstrap(self, certificate: bytes) -> None:
        """In a store that never had an operator, make this certificate's holder the first admin.

        Raises:
            CertificateRefused: not an operator's certificate of this coordinator.
        """
        if not self._known:
            peer = self._authority.verify(certificate, PeerKind.OPERATOR, self._clock.now())
            self._insert("coordinator", Operator(peer.id, FIRST, Role.ADMIN, self._clock.now()))

    def add(self, by: Operator, called: str, role: Role, request: bytes, call: Call = ANY) -> tuple[Operator, bytes]:
        """Make the key of a certificate request an operator; known and unrevoked, it gets a new certificate.

        Returns:
            The operator and its certificate (PEM chain).

        Raises:
            MalformedMessage, OutOfBounds, EnrolmentRefused: the name or the request doesn't do.
            AlreadyExists: the name is another key's, or the key has another name, another role or was revoked.
        """
        key = key_of_request(request)
        now = self._clock.now()
        operator = Operator(id_of_key(key), name(called, "operator"), role, now)
        if len(called) > MAX_NAME_CHARS:
            raise OutOfBounds(f"an operator's name of {len(called)} characters; the limit is {MAX_NAME_CHARS}")
        self._look()
        known = self._known.get(operator.id)
        if known is None:
            if any(other.name == called for other in self._known.values()):
                raise AlreadyExists(f"there is or was an operator called {called!r}; choose another name")
            self._insert(by.actor, operator, call)
        elif (known.name, known.role, known.revoked_at) != (called, role, None):
            raise AlreadyExists("this key is or was an operator under other terms; make a new key")
        certificate = self._authority.issue(key, PeerKind.OPERATOR, REALM, now, self._certificate_seconds)
        return self._known[operator.id], certificate

    def revoke(self, by: Operator, operator_id: str, call: Call = ANY) -> Operator:
        """Refuse an operator from the next call on; again is the same as once.

        Raises:
            NotFound: no such operator.
            WrongState: the last admin can't be revoked.
        """
        self._look()
        found = self._known.get(DeviceId(operator_id)) or self._called(operator_id)
        if found is None:
            raise NotFound(f"no operator {operator_id[:80]!r}; `umbel operators list` tells who there is")
        if found.revoked_at is not None:
            return found
        admins = [other for other in self._known.values() if other.role is Role.ADMIN and other.revoked_at is None]
        if admins == [found]:
            raise WrongState(f"{found.name!r} is the last admin; add another one first")
        now = self._clock.now()
        with self._store.transaction() as connection:
            enter(connection, call, by.actor, "operator.revoke", found.id, now)
            connection.execute(sa.update(OPERATORS).where(OPERATORS.c.id == found.id).values(revoked_at=now))
            audit.append(connection, now, by.actor, "operator.revoke", found.id, {"name": found.name}, call.request_id)
        self._known[found.id] = replace(found, revoked_at=now)
        return self._known[found.id]

    def _called(self, text: str) -> Operator | None:
        return next((operator for operator in self._known.values() if operator.name == text), None)

    def _insert(self, actor: str, operator: Operator, call: Call = ANY) -> None:
        with self._store.transaction() as connection:
            enter(connection, call, actor, "operator.add", operator.id, operator.added_at)
            connection.execute(
                sa.insert(OPERATORS).values(
                    id=operator.id,
                    name=operator.name,
                    role=operator.role.value,
                    added_by=actor,
                    added_at=operator.added_at,
                )
            )
            detail = {"name": operator.name, "role": operator.role.value}
            audit.append(connection, operator.added_at, actor, "operator.add", operator.id, detail, call.request_id)
        self._known[operator.id] = operator


def was_revoked(connection: sa.Connection, actor: str) -> bool:
    """Whether an operator whom the audit names so was revoked; of those with tokens only their provider can tell."""
    kind, _, called = actor.partition(":")
    gone = sa.select(OPERATORS.c.id).where(OPERATORS.c.name == called, OPERATORS.c.revoked_at.is_not(None))
    return kind == "operator" and connection.scalar(gone) is not None


def _from_row(row: sa.Row[tuple[object, ...]]) -> Operator:
    values = row._mapping
    return Operator(
        DeviceId(values["id"]), values["name"], Role(values["role"]), values["added_at"], values["revoked_at"]
    )
