"""What somebody who owns the database might do to the audit log; each returns how to undo it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import sqlalchemy as sa

from umbel_server.audit import GENESIS, AuditRow
from umbel_server.tables import AUDIT

Undo = Callable[[sa.Connection], None]
FIELDS = [column.name for column in AUDIT.columns]


def rows(connection: sa.Connection) -> list[AuditRow]:
    return [AuditRow(**row) for row in connection.execute(sa.select(AUDIT).order_by(AUDIT.c.sequence)).mappings()]


def write(connection: sa.Connection, found: list[AuditRow]) -> None:
    connection.execute(AUDIT.delete())
    for row in found:
        connection.execute(AUDIT.insert().values({name: getattr(row, name) for name in FIELDS}))


def _planted(change: Callable[[list[AuditRow]], list[AuditRow]]) -> Callable[[sa.Connection], Undo]:
    def plant(connection: sa.Connection) -> Undo:
        before = rows(connection)
        write(connection, change(before))
        return lambda later: write(later, before)

    return plant


def edited(row: AuditRow) -> AuditRow:
    return replace(row, actor="operator:nobody")


def _rewritten(found: list[AuditRow]) -> list[AuditRow]:
    """Another actor everywhere, and hashes that fit."""
    made, previous = [], GENESIS
    for row in found:
        changed = replace(edited(row), previous=previous)
        previous = changed.expected_hash()
        made.append(replace(changed, hash=previous))
    return made


PLANTS: Mapping[str, Callable[[sa.Connection], Undo]] = {
    "edit": _planted(lambda found: [found[0], edited(found[1]), *found[2:]]),
    "deletion": _planted(lambda found: [found[0], *found[2:]]),
    "truncation": _planted(lambda found: found[:-1]),
    "rewrite": _planted(_rewritten),
}
