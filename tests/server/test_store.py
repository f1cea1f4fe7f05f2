"""The store and the blobs keep what was committed, all of it or nothing, on SQLite and on PostgreSQL."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import fields
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from tests.databases import empty_database
from tests.server.driving import Crash, Plug
from umbel.digests import Digest, digest_of
from umbel.errors import BadInput, DigestMismatch, MalformedMessage, NotFound, Unavailable, Unreachable, WrongState
from umbel.plan import Kind, Plan
from umbel_server import app, heads
from umbel_server import postgresql as patience
from umbel_server import store as store_module
from umbel_server.blobs import AREAS, Blobs
from umbel_server.flower.spec import StrategySpec
from umbel_server.gates import GatePolicy
from umbel_server.postgresql import NO_ANSWER
from umbel_server.privacy_settings import PrivacySettings
from umbel_server.rollout import Rollout, Stage
from umbel_server.rollout_spec import Audience, ExperimentArm, OnFailure, Promotion, RolloutSpec, Wave
from umbel_server.store import MIGRATIONS, Store
from umbel_server.tables import METADATA, MODELS
from umbel_server.task import Task
from umbel_server.validation import ValidationPolicy
from umbel_server.versions import Lineage

ROW = {"name": "model", "next_release": 1, "created_at": 0.1}
KEPT_AS_JSON = (
    *(Task, Plan, StrategySpec, ValidationPolicy, PrivacySettings, Lineage),
    *(Rollout, RolloutSpec, Wave, ExperimentArm, GatePolicy),
)
Opened = Callable[..., Store]


@pytest.fixture
def opened() -> Iterator[Opened]:
    """Opens stores that are closed where a test fails, too: what it left open would fail another one."""
    with ExitStack() as stores:
        yield lambda url, *more: stores.enter_context(closing(Store.open(url, *more)))


def names(store: Store) -> list[str]:
    with store.reading() as connection:
        return list(connection.scalars(sa.select(MODELS.c.name)))


def test_the_migrations_build_exactly_the_tables_that_the_code_names(store: Store) -> None:
    with store.reading() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, METADATA) == []


def test_what_is_kept_as_json_changes_with_a_revision_so_that_older_programs_refuse_it_by_name() -> None:
    """A field that an older coordinator doesn't know would end it in the middle of its work, or its calls.

    Where this fails, add a migration (an empty one, where no table changes), and write its number down here.
    """
    names = [[kind.__name__, *sorted(entry.name for entry in fields(kind))] for kind in KEPT_AS_JSON]
    names += [[kind.__name__, *sorted(value.value for value in kind)] for kind in (Kind, Stage, Promotion, OnFailure)]
    revision = ScriptDirectory(str(MIGRATIONS)).get_current_head()
    assert (revision, digest_of(repr(names).encode())[:12]) == ("0008", "03775618496e")


def test_the_heads_of_an_older_database_stay_everybodys(opened: Opened, database_url: str) -> None:
    store = opened(database_url)
    with store.transaction() as connection:
        for statement in (
            "DROP TABLE channel_heads",
            "CREATE TABLE channel_heads (model VARCHAR(100) NOT NULL, channel VARCHAR(100) NOT NULL, "
            "number INTEGER NOT NULL, CONSTRAINT pk_channel_heads PRIMARY KEY (model, channel))",
            "INSERT INTO channel_heads VALUES ('watch', 'stable', 7), ('watch', 'beta', 9)",
            "UPDATE alembic_version SET version_num = '0007'",
        ):
            connection.execute(sa.text(statement))
    store.close()
    with opened(database_url).reading() as connection:
        found = heads.read(connection)
        assert compare_metadata(MigrationContext.configure(connection), METADATA) == []
    assert found.numbers == {Audience("watch", "stable"): 7, Audience("watch", "beta"): 9}
    assert found.of(Audience("watch", "stable", "wrists")) == 7


def test_opening_again_keeps_what_is_there(opened: Opened, database_url: str) -> None:
    store = opened(database_url)
    with store.transaction() as connection:
        connection.execute(MODELS.insert().values(ROW))
    store.close()
    again = opened(database_url)
    with again.reading() as connection:
        assert connection.execute(sa.select(MODELS)).one() == ("model", 1, 0.1)


def test_a_postgresql_has_one_coordinator_at_a_time(
    opened: Opened, postgresql: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_PATIENCE", "lock_timeout = '50ms'")
    url = empty_database(postgresql)
    first, second = opened(url), opened(url)
    with first.transaction() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '0007'"))
    with first.alone():
        with pytest.raises(WrongState, match="another coordinator uses this database"):
            opened(url)
        with first.reading() as connection:
            found = MigrationContext.configure(connection).get_current_revision()
        assert found == "0007", "a newer one would change the tables under an older one that runs"
        with pytest.raises(WrongState, match="another coordinator uses this database"), second.alone():
            pass
        assert names(second) == [], "reading is for anybody"
    with first.transaction() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '0008'"))
    with second.alone():
        first.close()


def test_a_coordinator_whose_connection_was_cut_holds_its_database_again_or_hears_who_took_it(
    opened: Opened, postgresql: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_PATIENCE", "lock_timeout = '50ms'")
    url = empty_database(postgresql)
    first, second = opened(url), opened(url)

    def cut() -> None:
        with second.reading() as connection:
            connection.execute(
                sa.text("SELECT pg_terminate_backend(pid, 5000) FROM pg_locks WHERE locktype = 'advisory'")
            )

    with first.alone() as hold:
        hold()
        cut()
        hold()
        with pytest.raises(WrongState, match="another coordinator uses this database"), second.alone():
            pass
        cut()
        with second.alone(), pytest.raises(WrongState, match="another coordinator uses this database"):
            hold()
        hold()


async def test_a_coordinator_ends_once_another_has_its_database_and_not_while_the_database_is_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(app, "HOLD_SECONDS", 0.0)
    looks: list[Exception | None] = [None, ConnectionError(), None, WrongState("another has it")]

    def hold() -> None:
        if (found := looks.pop(0)) is not None:
            raise found

    with pytest.raises(WrongState, match="another has it"):
        await app._alone_while(hold)
    assert looks == []


def test_a_postgresql_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is served while a coordinator waits for it."""
    monkeypatch.setitem(NO_ANSWER, "connect_timeout", "2")
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(Unreachable, match="timeout"):
        Store.open(f"postgresql+psycopg://umbel@127.0.0.1:{silent.getsockname()[1]}/umbel")


def test_a_way_to_postgresql_that_is_gone_is_found_within_seconds_unless_its_address_says_otherwise(
    opened: Opened,
    postgresql: str,
) -> None:
    store = opened(f"{empty_database(postgresql)}&keepalives_idle=77")
    with store.reading() as connection:
        driver: Any = connection.connection.dbapi_connection
        told = driver.info.get_parameters()
    assert {name: told[name] for name in NO_ANSWER} == {**NO_ANSWER, "keepalives_idle": "77"}


@contextmanager
def standing_still(*pids: int) -> Iterator[None]:
    """Processes of a server stop, as in a paused container; what they are sent is still acknowledged."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def serving(connection: sa.Connection) -> int:
    return int(connection.scalar(sa.text("SELECT pg_backend_pid()")) or 0)


def test_a_postgresql_that_stands_still_in_a_statement_is_given_up_and_asked_anew(
    opened: Opened, postgresql: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "ANSWER_SECONDS", 0.2)
    store = opened(empty_database(postgresql))
    with store.reading() as connection, standing_still(serving(connection)):
        with pytest.raises(sa.exc.OperationalError, match=r"no answer within 0\.2 s"):
            connection.execute(sa.select(MODELS))
        assert names(store) == [], "by another process of the server's"


def test_a_postgresql_that_stands_still_keeps_nobody_waiting_who_asks_a_moment_later(
    opened: Opened, postgresql: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Health, streams and SIGTERM have their turn between two tries."""
    monkeypatch.setattr(patience, "ANSWER_SECONDS", 0.2)
    monkeypatch.setitem(NO_ANSWER, "connect_timeout", "2")
    store = opened(empty_database(postgresql))
    with store.reading() as connection:
        folder = connection.scalar(sa.text("SHOW data_directory"))
        pids = serving(connection), int((Path(str(folder)) / "postmaster.pid").read_text().split()[0])
    with standing_still(*pids):
        with pytest.raises(sa.exc.OperationalError, match="timeout"):
            names(store)
        with pytest.raises(sa.exc.OperationalError, match="no answer a moment ago"):
            names(store)


def test_nothing_is_written_any_more_once_nobody_knows_whether_a_commit_was_made(
    opened: Opened, postgresql: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the process remembers may be behind the database: it ends, and the next one reads what stands there."""
    monkeypatch.setattr(patience, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(app, "HOLD_SECONDS", 0.0)
    url, stopped = empty_database(postgresql), ExitStack()
    store = opened(url)
    with store.alone() as hold, stopped:
        with pytest.raises(sa.exc.OperationalError), store.transaction() as connection:
            connection.execute(MODELS.insert().values(ROW))
            stopped.enter_context(standing_still(serving(connection)))
        with pytest.raises(Unavailable, match="has to be started anew"), store.transaction():
            pass
        with pytest.raises(Unavailable, match="has to be started anew"):
            asyncio.run(app._alone_while(hold))
    store.close()
    again = opened(url)
    while names(again) != ["model"]:  # it was sent, and what stood still makes it
        pass


ONCE = sa.text("CREATE TABLE once (one int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
TWICE = sa.text("INSERT INTO once VALUES (1), (1)")


def test_a_refused_commit_leaves_no_doubt(opened: Opened, postgresql: str) -> None:
    store = opened(empty_database(postgresql))
    with store.transaction() as connection:
        connection.execute(ONCE)
    with pytest.raises(sa.exc.IntegrityError), store.transaction() as connection:
        connection.execute(TWICE)
    with store.transaction() as connection:
        connection.execute(MODELS.insert().values(ROW))
    assert names(store) == ["model"]


def test_a_refused_commit_takes_no_doubt_away_that_another_one_has_left_meanwhile(
    opened: Opened, postgresql: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "ANSWER_SECONDS", 0.2)
    store = opened(empty_database(postgresql))
    with store.transaction() as connection:
        connection.execute(ONCE)
    with pytest.raises(sa.exc.IntegrityError), store.transaction() as refused:
        refused.execute(TWICE)
        with ExitStack() as stopped, pytest.raises(sa.exc.OperationalError), store.transaction() as lost:
            stopped.enter_context(standing_still(serving(lost)))
    with pytest.raises(Unavailable, match="has to be started anew"), store.transaction():
        pass


def test_no_error_of_the_database_tells_what_was_to_be_written(store: Store) -> None:
    """It goes to a log."""
    with pytest.raises(sa.exc.IntegrityError) as found, store.transaction() as connection:
        for _ in range(2):
            connection.execute(MODELS.insert().values(ROW | {"next_release": 424242}))
    assert "424242" not in str(found.value)


def test_a_transaction_that_raises_leaves_nothing(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), store.transaction() as connection:
        connection.execute(MODELS.insert().values(ROW))
        raise ZeroDivisionError
    assert names(store) == []


def test_dying_before_the_commit_leaves_nothing_and_after_it_everything(opened: Opened, database_url: str) -> None:
    plug = Plug({1, 4})
    store = opened(database_url, plug)
    with pytest.raises(Crash), store.transaction() as connection:
        connection.execute(MODELS.insert().values(ROW))
    assert names(store) == []
    plug.steps.append("skipped")
    with pytest.raises(Crash, match="committed"), store.transaction() as connection:
        connection.execute(MODELS.insert().values(ROW))
    assert names(store) == ["model"]


def test_what_is_written_while_reading_is_lost(store: Store) -> None:
    with store.reading() as connection:
        connection.execute(MODELS.insert().values(ROW))
    assert names(store) == []


@pytest.mark.parametrize(
    "url",
    [
        *("", "nonsense", "sqlite://", "sqlite:///:memory:", "mysql://somewhere/db", "oracle://x"),
        *("postgresql+psycopg://umbel:p@x:s3cret@h/d", "postgresql+asyncpg://umbel:s3cret@h/d", "umbel:s3cret@h/d"),
    ],
)
def test_an_address_of_no_store_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(BadInput, match="sqlite:///PATH or postgres") as refused:
        Store.open(url)
    assert "s3cret" not in str(refused.value)


def test_threads_open_stores_of_their_own_at_once(tmp_path: Path) -> None:
    """Two simulations in one process."""
    together = Barrier(3)

    def opened(number: int) -> None:
        together.wait(10)
        Store.open(f"sqlite:///{tmp_path / str(number)}").close()

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(opened, range(3)))


def test_a_database_that_does_not_open_says_so(tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="check its address"):
        Store.open(f"sqlite:///{tmp_path / 'no such folder' / 'umbel.db'}")
    (tmp_path / "text.db").write_text("this is no database" * 100)
    with pytest.raises(Unreachable):
        Store.open(f"sqlite:///{tmp_path / 'text.db'}")
    with pytest.raises(Unreachable):
        Store.open(f"postgresql+psycopg://postgres@/postgres?host={tmp_path}")


def test_a_blob_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path, Plug({1}))
    with pytest.raises(Crash):
        blobs.put_bundle_file(b"graph")
    with pytest.raises(NotFound):
        blobs.bundle_path(digest_of(b"graph"))
    assert blobs.bundle_path(blobs.put_bundle_file(b"graph")).read_bytes() == b"graph"


def test_what_a_dead_process_wrote_aside_is_swept(tmp_path: Path) -> None:
    Blobs(tmp_path)
    (tmp_path / "bundles" / "aside-1234").write_bytes(b"half")
    coming_in = Blobs(tmp_path).drafts()
    (coming_in.__enter__() / "weights").write_bytes(b"half")
    Blobs(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.name not in AREAS] == []


def test_the_areas_never_mix(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    state = blobs.put_state("task", b"moments")
    assert state is not None
    held_out = blobs.put_holdout(b"examples")
    for digest in (state, held_out):
        with pytest.raises(NotFound):
            blobs.bundle_path(digest)
    with pytest.raises(NotFound):
        blobs.holdout(state)


def test_a_tasks_state_is_kept_by_its_own_name_only(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    mine, old, other = blobs.put_state("a", b"new"), blobs.put_state("a", b"old"), blobs.put_state("a.b", b"old")
    blobs.keep_states("a", mine)
    assert blobs.state("a", mine) == b"new"
    assert blobs.state("a.b", other) == b"old"
    with pytest.raises(NotFound):
        blobs.state("a", old)
    assert blobs.put_state("a", b"") is None
    assert blobs.state("a", None) == b""


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    digest = blobs.put_state("a", b"moments")
    (tmp_path / "state" / f"a.{digest}").write_bytes(b"momentz")
    with pytest.raises(DigestMismatch):
        blobs.state("a", digest)
    examples = blobs.put_holdout(b"examples")
    (tmp_path / "holdout" / examples).write_bytes(b"changed")
    with pytest.raises(DigestMismatch):
        blobs.holdout(examples)


def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MalformedMessage):
        Blobs(tmp_path).holdout("../state/a")


def test_a_report_with_changed_bytes_is_dropped(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    report = ("0" * 32, digest_of(b"sealed"))
    blobs.partial_path(*report).write_bytes(b"sealer")
    with pytest.raises(DigestMismatch, match="first byte"):
        blobs.settle_report(*report)
    assert blobs.held(*report) == 0


def test_the_sweep_spares_what_counts_and_what_may_go_on(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    wanted, orphan, growing = ((f"{n:032x}", Digest(str(n) * 64)) for n in (1, 2, 3))
    blobs.report_path(*wanted).write_bytes(b"1")
    blobs.report_path(*orphan).write_bytes(b"2")
    blobs.partial_path(*growing).write_bytes(b"3")
    blobs.sweep_spool({wanted}, drop_partial=False)
    assert (blobs.held(*wanted), blobs.held(*orphan), blobs.held(*growing)) == (1, 0, 1)
    blobs.sweep_spool({wanted}, drop_partial=True)
    assert blobs.held(*growing) == 0
