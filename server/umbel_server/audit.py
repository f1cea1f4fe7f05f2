"""Who did what, in order, in a form that shows when somebody changed it afterwards.

Rows are only ever added, inside the transaction of what they tell. Each carries the hash of the row before it, so an
edit, a deletion or an insertion anywhere but at the very end breaks the chain.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa

from umbel.digests import digest_of
from umbel.errors import DigestMismatch
from umbel_server.json_text import to_text
from umbel_server.tables import AUDIT

GENESIS: Final = "0" * 64
"""What stands in the first row's place for a hash before it."""
COORDINATOR: Final = "coordinator"
"""The actor of what no person asked for."""


@dataclass(frozen=True, slots=True)
class AuditRow:
    """One thing that was done."""

    sequence: int
    at: float
    actor: str
    action: str
    object: str
    request_id: str
    body_json: str
    previous: str
    hash: str

    def expected_hash(self) -> str:
        """SHA-256 over everything else in the row, as canonical JSON."""
        parts = (self.sequence, self.at, self.actor, self.action, self.object, self.request_id, self.body_json)
        return digest_of(to_text([*parts, self.previous]).encode())


def append(
    connection: sa.Connection,
    now: float,
    actor: str,
    action: str,
    subject: str,
    body: Mapping[str, object] | None = None,
    request_id: str = "",
) -> None:
    """Add a row to the transaction that does what it tells.

    Args:
        connection: of that transaction.
        now: POSIX seconds.
        actor: an operator's id, or `COORDINATOR`.
        action: such as `round.completed`.
        subject: what it was done to, such as `task/3`.
        body: whatever else there is to know; JSON, and never a secret.
        request_id: of the call that asked for it.
    """
    last = connection.execute(sa.select(AUDIT).order_by(AUDIT.c.sequence.desc()).limit(1)).first()
    sequence, previous = (last.sequence + 1, last.hash) if last else (1, GENESIS)
    row = AuditRow(sequence, now, actor, action, subject, request_id, to_text(body or {}), previous, "")
    values = {column: getattr(row, column) for column in AUDIT.columns.keys()}  # noqa: SIM118 - not a mapping
    connection.execute(AUDIT.insert().values(values | {"hash": row.expected_hash()}))


def rows(connection: sa.Connection, limit: int = 100, before: int | None = None) -> list[AuditRow]:
    """The newest rows, newest first; only those before sequence number `before`, if given."""
    query = sa.select(AUDIT).order_by(AUDIT.c.sequence.desc()).limit(limit)
    if before is not None:
        query = query.where(AUDIT.c.sequence < before)
    return [AuditRow(**found) for found in connection.execute(query).mappings()]


def verify(connection: sa.Connection) -> int:
    """Walk the whole chain, and return its length.

    Raises:
        DigestMismatch: naming the first row that doesn't fit.
    """
    return verify_rows(_all(connection))


def verify_rows(found: Iterable[AuditRow]) -> int:
    """The same of rows wherever they come from, oldest first."""
    length, previous = 0, GENESIS
    for row in found:
        if row.sequence != length + 1:
            raise DigestMismatch(f"audit row {length + 1} is missing; somebody deleted it")
        if row.previous != previous or row.hash != row.expected_hash():
            raise DigestMismatch(
                f"audit row {row.sequence} doesn't fit its hash; somebody changed it or the one before"
            )
        length, previous = row.sequence, row.hash
    return length


def _all(connection: sa.Connection) -> Iterator[AuditRow]:
    for found in connection.execute(sa.select(AUDIT).order_by(AUDIT.c.sequence)).mappings():
        yield AuditRow(**found)
