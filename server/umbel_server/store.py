"""The coordinator's truth: one SQL database, SQLite by default, PostgreSQL when one machine isn't enough.

Each change of state, its audit row and its outgoing work are one `transaction`. Calls are short and synchronous, from
the event loop's thread. `on_step` is told each durable step before it happens, so that a test can pull the plug there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from sqlite3 import Error as SqliteError
from threading import Lock
from typing import Any, Final

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy.engine import make_url

from umbel.errors import BadInput, Unavailable, Unreachable, WrongState
from umbel_server.files import make_file_private

MIGRATIONS: Final = Path(__file__).parent / "migrations"
PRAGMAS: Final = ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=10000")
"""How SQLite is opened: a commit that has returned survives a power cut."""
HASTY: Final = ("journal_mode=MEMORY", "synchronous=OFF", "foreign_keys=ON", "busy_timeout=10000")
"""How it is opened where only the death of the coordinator's own objects has to be survived: in simulations."""
KEEP_ALIVE: Final = ("tcp_keepalives_idle = 30", "tcp_keepalives_interval = 10", "tcp_keepalives_count = 3")
"""How soon PostgreSQL finds that a coordinator's machine is gone."""
_PATIENCE: Final = "lock_timeout = '3s'"
"""The server may take a moment to see that the coordinator before is gone."""
_OF_A_COORDINATOR: Final = "(hashtext('umbel'), hashtext(current_schema()))"
_STILL_THERE: Final = sa.text("SELECT 1")
_LOCK_NOT_AVAILABLE: Final = "55P03"
"""SQLSTATE."""
_READS: Final = "umbel_reads"
_ONE_AT_A_TIME: Final = Lock()
"""Alembic keeps the migration that is under way in the process's globals: threads that open stores take turns."""
OnStep = Callable[[str], None]


def ignore_step(step: str) -> None:
    """Let every durable step happen."""
    del step


class Store:
    """An open database whose tables are of this version."""

    def __init__(self, engine: sa.Engine, on_step: OnStep = ignore_step) -> None:
        self.engine = engine
        self._on_step = on_step
        self._in_doubt = False

    @classmethod
    def open(cls, url: str, on_step: OnStep = ignore_step, *, durable: bool = True) -> Store:
        """Connect, and bring the tables up to this version.

        Args:
            url: a SQLAlchemy URL, `sqlite:///path/to/file` or `postgresql+psycopg://…`.
            on_step: told each durable step before it happens.
            durable: False lets SQLite answer before the medium has it; for simulations only.

        Raises:
            BadInput: neither a SQLite file nor PostgreSQL.
            Unreachable: the database doesn't answer.
            WrongState: a newer version of Umbel has changed its tables; another coordinator is on this PostgreSQL.
        """
        engine = _engine(url, PRAGMAS if durable else HASTY)
        try:
            _migrate(engine)
        except WrongState:
            engine.dispose()
            raise
        except sa.exc.DBAPIError as error:
            engine.dispose()
            raise Unreachable(f"the database doesn't open: {error.orig}; check its address and its server") from error
        except CommandError as error:
            engine.dispose()
            raise WrongState(
                f"the database is of a newer version of Umbel ({error}); run that one, or restore an older database"
            ) from error
        if engine.dialect.driver == "psycopg":
            from umbel_server.postgresql import lose_patience

            lose_patience(engine)  # only now: a large database is brought up to date in minutes
        return cls(engine, on_step)

    @contextmanager
    def alone(self) -> Iterator[Callable[[], None]]:
        """Be the only coordinator on a PostgreSQL for as long as the block lasts; a SQLite file is its folder's.

        The server lets go of the lock when this process ends, or a minute after its machine went.

        Yields:
            What makes sure of it once more, to be called now and then: a server that was started anew, or that cut the
            connection, has let go of the lock. Raises as below, or what the database raises where it is away.

        Raises:
            WrongState: another coordinator is on it.
            Unavailable: as for `transaction`.
        """
        if self.engine.dialect.name != "postgresql":
            yield lambda: None
            return
        lock = _Lock(self.engine)
        lock.hold()

        def hold() -> None:
            self._require_certain()
            lock.hold()

        try:
            yield hold
        finally:
            lock.let_go()

    @contextmanager
    def transaction(self) -> Iterator[sa.Connection]:
        """All or nothing: commits at the end of the block, rolls back when it raises. Durable once left.

        Raises:
            Unavailable: PostgreSQL went away in a commit, earlier. Whether that was made, nobody knows, and what this
                process remembers may be behind the store: only one that reads it anew may write to it.
        """
        self._require_certain()
        with self.engine.connect() as connection, connection.begin() as transaction:
            yield connection
            self._on_step("commit")
            try:
                transaction.commit()
            except sa.exc.DBAPIError as error:
                # Of two threads that commit, one may lose its connection and the other be refused.
                self._in_doubt |= error.connection_invalidated
                raise
        self._on_step("committed")

    def _require_certain(self) -> None:
        if self._in_doubt:
            raise Unavailable(
                "PostgreSQL went away in the middle of a commit, and whether that was made, only the database knows; "
                "the coordinator has to be started anew, and goes on where its database says"
            )

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """One consistent view, for reading; whatever is written inside is rolled back."""
        with self.engine.connect() as connection:
            connection.execution_options(**{_READS: True})
            with connection.begin() as transaction:
                yield connection
                transaction.rollback()

    def close(self) -> None:
        """Let go of the connections."""
        self.engine.dispose()


class _Lock:
    """PostgreSQL's lock of a coordinator, on a connection of its own."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._connection: sa.Connection | None = None

    def hold(self) -> None:
        """Hold it from now on, or still."""
        try:
            if self._connection is not None:
                self._connection.execute(_STILL_THERE)
                return
        except sa.exc.DBAPIError:
            self.let_go()
        # No transaction: an open one would keep the server from clearing up, for as long as we live.
        connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        connection.detach()  # back in the pool it would hold the lock on
        try:
            for setting in KEEP_ALIVE:
                connection.execute(sa.text(f"SET {setting}"))
            _take(connection, f"SET {_PATIENCE}", f"SELECT pg_advisory_lock{_OF_A_COORDINATOR}")
        except BaseException:
            connection.close()
            raise
        self._connection = connection

    def let_go(self) -> None:
        """Hold it no longer."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _take(connection: sa.Connection, *statements: str) -> None:
    """Take PostgreSQL's lock of a coordinator; raises `WrongState` where another one has it."""
    try:
        for statement in statements:
            connection.execute(sa.text(statement))
    except sa.exc.DBAPIError as error:
        if getattr(error.orig, "sqlstate", "") != _LOCK_NOT_AVAILABLE:
            raise
        raise WrongState(
            "another coordinator uses this database; stop it first, or name another database: two would each "
            "count half of the reports"
        ) from None


def _engine(url: str, pragmas: Sequence[str]) -> sa.Engine:
    try:
        parsed = make_url(url)
    except (sa.exc.ArgumentError, ValueError):
        # Not what is wrong with it: that may be a part of its password.
        raise BadInput(
            "not a database's address; use sqlite:///PATH or postgresql+psycopg://USER:PASSWORD@HOST:PORT/NAME, with "
            "%40 in place of an @ in the password"
        ) from None
    if parsed.drivername == "sqlite" and parsed.database not in (None, "", ":memory:"):
        with suppress(OSError):  # whatever is wrong with its place, connecting tells it better
            make_file_private(Path(parsed.database))
        engine = sa.create_engine(parsed, hide_parameters=True)
        sa.event.listen(engine, "connect", lambda connection, entry: _prepare_sqlite(connection, pragmas))
        sa.event.listen(engine, "begin", _begin_sqlite)
        return engine
    if parsed.drivername in ("postgresql", "postgresql+psycopg"):
        from umbel_server.postgresql import engine_at

        return engine_at(parsed)
    raise BadInput(f"a store is sqlite:///PATH or postgresql+psycopg://…, not {parsed.render_as_string()!r}")


def _prepare_sqlite(connection: Any, pragmas: Sequence[str]) -> None:
    # The driver would begin transactions by itself, and only at the first write; `_begin_sqlite` does it.
    connection.isolation_level = None
    for pragma in pragmas:
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: sa.Connection) -> None:
    # IMMEDIATE: two writers queue up here, and never meet half-way; readers need not queue.
    reads = connection.get_execution_options().get(_READS, False)
    begin = "BEGIN" if reads else "BEGIN IMMEDIATE"
    try:
        # Straight to the driver: by way of a statement of SQLAlchemy's it takes longer than a small transaction itself.
        connection.connection.cursor().execute(begin)
    except SqliteError:
        # Once more, for an error as all others come.
        connection.exec_driver_sql(begin)


@cache
def _newest() -> tuple[str, ...]:
    """Up to which step this version of Umbel brings the tables."""
    return tuple(ScriptDirectory(str(MIGRATIONS)).get_heads())


def _migrate(engine: sa.Engine) -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            # A newer version must not change the tables under an older one that runs.
            _take(connection, f"SET LOCAL {_PATIENCE}", f"SELECT pg_advisory_xact_lock{_OF_A_COORDINATOR}")
            connection.execute(sa.text("SET LOCAL lock_timeout = 0"))
        if MigrationContext.configure(connection).get_current_heads() == _newest():
            return  # to look takes a tenth of the time of going through the steps
        config.attributes["connection"] = connection
        with _ONE_AT_A_TIME:
            command.upgrade(config, "head")
