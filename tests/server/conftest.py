"""Databases for the coordinator's tests: SQLite and a real PostgreSQL, the same tests on both."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.databases import new_postgresql, new_sqlite
from tests.server.driving import World
from umbel_server.store import Store


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh database on each of the two."""
    if request.param == "sqlite":
        return new_sqlite(tmp_path / "umbel.db")
    return new_postgresql(request.getfixturevalue("postgresql"))


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return new_sqlite(tmp_path / "umbel.db")


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    """An empty store, on each database."""
    store = Store.open(database_url)
    yield store
    store.close()


@pytest.fixture
def world(database_url: str, tmp_path: Path) -> Iterator[World]:
    """A coordinator with a model and no task, on each database."""
    world = World(database_url, tmp_path / "blobs")
    yield world
    world.store.close()


@pytest.fixture
def small_world(sqlite_url: str, tmp_path: Path) -> Iterator[World]:
    """The same, on SQLite only, for what has nothing to do with the database."""
    world = World(sqlite_url, tmp_path / "blobs")
    yield world
    world.store.close()


@pytest.fixture
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody cuts the power here: where only processes die, nothing need be synced."""
    monkeypatch.setattr("umbel_server.blobs.flush", lambda path: None)
    monkeypatch.setattr("umbel_server.store.PRAGMAS", ("journal_mode=WAL", "synchronous=OFF", "foreign_keys=ON"))
