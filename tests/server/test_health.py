"""What devices tell of their release is merged in the database itself, on SQLite and on PostgreSQL alike."""

from __future__ import annotations

from collections.abc import Mapping

import sqlalchemy as sa

from umbel.visit import Health
from umbel_server import health
from umbel_server.health import Told
from umbel_server.store import Store
from umbel_server.tables import HEALTH

NOTHING = Told("wrists", 5.0, 0, Health())


def kept(store: Store) -> Mapping[str, tuple[object, ...]]:
    columns = (HEALTH.c.at, HEALTH.c.release, HEALTH.c.troubles, *(HEALTH.c[name] for name in health.MEASURED))
    with store.reading() as connection:
        return {row[0]: tuple(row[1:]) for row in connection.execute(sa.select(HEALTH.c.device, *columns))}


def write(store: Store, **told: Told) -> None:
    with store.transaction() as connection:
        health.write(connection, told)


def test_what_a_device_does_not_tell_of_the_same_release_stays_and_its_troubles_add_up(store: Store) -> None:
    write(store, one=Told("wrists", 1.0, 7, Health(0.8, 0.1, None), troubles=2), other=NOTHING)
    write(store, one=Told("wrists", 2.0, 7, Health(None, 0.3, 50.0), troubles=1), third=NOTHING)
    assert kept(store) == {
        "one": (2.0, 7, 3, 0.8, 0.3, 50.0),
        "other": (5.0, 0, 0, None, None, None),
        "third": (5.0, 0, 0, None, None, None),
    }


def test_what_was_told_of_another_release_is_not_taken_for_this_one(store: Store) -> None:
    write(store, one=Told("wrists", 1.0, 7, Health(0.8, 0.1, 60.0), troubles=2))
    write(store, one=Told("wrists", 2.0, 8, Health(0.7, None, None)))
    assert kept(store) == {"one": (2.0, 8, 2, 0.7, None, None)}


def test_a_window_begins_with_what_stands_and_later_merges_leave_its_beginning(store: Store) -> None:
    write(store, one=Told("wrists", 1.0, 7, Health(0.8, 0.1, 50.0), troubles=2))
    with store.transaction() as connection:
        health.begin_window(connection, "wrists")
    write(store, one=Told("wrists", 2.0, 7, Health(0.9, None, 100.0), troubles=4))
    with store.reading() as connection:
        seen = health.seen_since(connection, "wrists", 1.5)["one"]
    assert (seen.troubles, seen.drift.latency_ratio, seen.drift.memory_ratio) == (4, 1.0, 2.0)


def test_nothing_told_writes_nothing(store: Store) -> None:
    write(store)
    assert kept(store) == {}
