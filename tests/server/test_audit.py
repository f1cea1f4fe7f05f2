"""Whoever changes the audit afterwards is found out."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from umbel.errors import DigestMismatch
from umbel_server import audit
from umbel_server.store import Store
from umbel_server.tables import AUDIT


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    store = Store.open(database_url)
    for number in range(5):
        with store.transaction() as connection:
            audit.append(connection, 100.25 + number, "operator:ann", "task.pause", f"task-{number}", {"n": number})
    yield store
    store.close()


def tamper(store: Store, statement: sa.Executable) -> None:
    with store.transaction() as connection:
        connection.execute(statement)


def verify(store: Store) -> int:
    with store.reading() as connection:
        return audit.verify(connection)


def test_an_untouched_chain_verifies(store: Store) -> None:
    assert verify(store) == 5
    with store.reading() as connection:
        assert [row.sequence for row in audit.rows(connection, limit=3)] == [5, 4, 3]
        assert [row.object for row in audit.rows(connection, before=3)] == ["task-1", "task-0"]


@pytest.mark.parametrize(
    "change",
    [
        {"at": 1.0},
        {"actor": "operator:bob"},
        {"action": "x"},
        {"object": "x"},
        {"request_id": "x"},
        {"body_json": "{}"},
    ],
    ids=str,
)
def test_an_edited_row_is_named(store: Store, change: dict[str, object]) -> None:
    tamper(store, AUDIT.update().where(AUDIT.c.sequence == 3).values(change))
    with pytest.raises(DigestMismatch, match="row 3"):
        verify(store)


def test_an_edited_row_with_a_hash_of_its_own_breaks_the_next(store: Store) -> None:
    with store.reading() as connection:
        third = audit.rows(connection, limit=3)[-1]
    forged = audit.AuditRow(3, third.at, "operator:bob", *(getattr(third, f) for f in ("action", "object")), "", "{}",
                            third.previous, "")  # fmt: skip
    tamper(store, AUDIT.update().where(AUDIT.c.sequence == 3).values(
        actor=forged.actor, body_json="{}", hash=forged.expected_hash()))  # fmt: skip
    with pytest.raises(DigestMismatch, match="row 4"):
        verify(store)


def test_a_deleted_row_is_missed(store: Store) -> None:
    tamper(store, AUDIT.delete().where(AUDIT.c.sequence == 2))
    with pytest.raises(DigestMismatch, match="row 2 is missing"):
        verify(store)


def test_a_row_is_written_with_what_it_tells_or_not_at_all(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), store.transaction() as connection:
        audit.append(connection, 1.0, "a", "b", "c")
        raise ZeroDivisionError
    assert verify(store) == 5
