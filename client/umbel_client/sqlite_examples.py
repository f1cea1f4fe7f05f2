"""Examples on disk, in one SQLite file: what was added stays added, and what was deleted leaves no bytes behind."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import numpy as np
import safetensors.numpy

from umbel.errors import MalformedMessage, Unavailable, unusable
from umbel_client.examples import (
    Arrays,
    Form,
    HeldBack,
    Record,
    Split,
    Stack,
    StoreLimits,
    StoreStats,
    form_of,
    held_back_keys,
    held_back_tags,
    is_surplus,
    newest_of,
    require_batch,
    require_form,
    surplus_keys,
)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS example (
    key INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, subject TEXT NOT NULL, held_back INTEGER,
    size INTEGER NOT NULL, arrays BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS example_at ON example (at, key);
CREATE TABLE IF NOT EXISTS fact (name TEXT PRIMARY KEY, value TEXT NOT NULL);
INSERT OR IGNORE INTO fact VALUES ('revision', '0'), ('forgotten', '0');
"""
_MAY_PASS = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
}
"""Primary codes of SQLite that tell of the disk, its rights or somebody else, not of what the file holds."""


class SqliteExamples:
    """An `ExampleStore` in a file; safe to use from several threads and processes.

    Args:
        path: made when it doesn't exist, readable by its user only.
        limits: quota, retention and split.

    Raises:
        MalformedMessage: `path` is something else than an example store.

    Each method raises `Unavailable` while the disk is full, or can't be written to.
    """

    def __init__(self, path: Path, limits: StoreLimits | None = None) -> None:
        self._path = path
        self._limits = limits or StoreLimits()
        self._lock = threading.Lock()
        self._is_made = False
        # A device whose disk takes nothing answers all the same: who asks for examples is told.
        with suppress(Unavailable), self._connected():
            pass

    def add(self, inputs: Arrays, targets: Arrays, *, at: float, subject: str = "", held_back: HeldBack = None) -> int:
        """Keep some examples; see `ExampleStore`."""
        count = require_batch(inputs, targets)
        packed = (_pack(inputs, targets, row) for row in range(count))
        tagged = zip(held_back_tags(held_back, count), packed, strict=True)
        rows = ((at, subject, tag, len(data), data) for tag, data in tagged)
        with self._transaction() as database:
            self._require_same_form(database, form_of(inputs, targets))
            database.executemany(
                "INSERT INTO example (at, subject, held_back, size, arrays) VALUES (?, ?, ?, ?, ?)", rows
            )
            _count(database, "revision")
            self._drop_surplus(database, at)
        return count

    def split(self, now: float) -> Split:
        """All examples; see `ExampleStore`."""
        with self._transaction() as database:
            self._drop_surplus(database, now)
            records = _records(database)
            held = held_back_keys(records, self._limits.held_back_share)
            training, held_back = Stack(len(records) - len(held)), Stack(len(held))
            for key, data in database.execute("SELECT key, arrays FROM example ORDER BY at, key"):
                (held_back if key in held else training).put(*_unpack(data))
        return Split(training.whole(), held_back.whole())

    def stats(self, now: float) -> StoreStats:
        """How much there is; see `ExampleStore`."""
        with self._transaction() as database:
            self._drop_surplus(database, now)
            # Counted where they lie: a record of each in Python takes ten times as long, in an app's event loop.
            groups = database.execute(
                "SELECT subject, held_back, count(*), sum(size) FROM example GROUP BY subject, held_back"
            ).fetchall()
        subjects: dict[str, int] = {}
        for who, _, count, _ in groups:
            subjects[who] = subjects.get(who, 0) + count
        untagged = sum(count for _, tag, count, _ in groups if tag is None)
        held = sum(count for _, tag, count, _ in groups if tag) + newest_of(untagged, self._limits.held_back_share)
        return StoreStats(sum(subjects.values()) - held, held, sum(size for *_, size in groups), subjects)

    def forget(self, subject: str | None) -> int:
        """Delete examples; see `ExampleStore`. Their pages are overwritten (SQLite's `secure_delete`)."""
        with self._transaction() as database:
            gone = [record.key for record in _records(database) if subject is None or record.subject == subject]
            _delete(database, gone)
            if gone:
                _count(database, "forgotten")
        return len(gone)

    def revision(self) -> int:
        """A number that changes whenever the examples do."""
        with self._transaction() as database:
            return int(_fact(database, "revision") or 0)

    def forgotten(self) -> int:
        """How often `forget` has deleted something."""
        with self._transaction() as database:
            return int(_fact(database, "forgotten") or 0)

    def _require_same_form(self, database: sqlite3.Connection, form: Form) -> None:
        kept = _fact(database, "form")
        if kept is not None and database.execute("SELECT 1 FROM example LIMIT 1").fetchone():
            require_form(form, {name: (dtype, tuple(shape)) for name, (dtype, shape) in json.loads(kept).items()})
        database.execute("INSERT OR REPLACE INTO fact VALUES ('form', ?)", (json.dumps(form),))

    def _drop_surplus(self, database: sqlite3.Connection, now: float) -> None:
        count, size, oldest = database.execute("SELECT count(*), total(size), min(at) FROM example").fetchone()
        if not is_surplus(self._limits, count, size, now - oldest if count else 0.0):
            return
        _delete(database, surplus_keys(_records(database), self._limits, now))

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        # A connection for each use: an app, its agent and a command may have the file open together.
        try:
            if not self._is_made:
                self._path.touch(mode=0o600)
            with self._lock, closing(sqlite3.connect(self._path, timeout=30, isolation_level=None)) as database:
                database.execute("PRAGMA secure_delete = ON")
                database.execute("PRAGMA synchronous = FULL")
                database.execute("PRAGMA cache_size = -512")  # kB; the usual 2 MB would stay with the process
                if not self._is_made:
                    database.executescript(_SCHEMA)
                    self._is_made = True
                yield database
        except OSError as error:
            raise Unavailable(f"{unusable(error)}; nothing was changed, try again") from error
        except sqlite3.DatabaseError as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in _MAY_PASS:
                raise Unavailable(f"can't use {self._path} now: {error}; nothing was changed, try again") from error
            raise MalformedMessage(f"{self._path} can't be used as an example store: {error}") from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._connected() as database:
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database
            except BaseException:
                # A full disk has rolled it back already.
                if database.in_transaction:
                    database.execute("ROLLBACK")
                raise
            database.execute("COMMIT")


def _records(database: sqlite3.Connection) -> list[Record]:
    rows = database.execute("SELECT key, at, subject, held_back, size FROM example")
    return [Record(key, at, who, None if held is None else bool(held), size) for key, at, who, held, size in rows]


def _delete(database: sqlite3.Connection, keys: Sequence[int]) -> None:
    if keys:
        database.executemany("DELETE FROM example WHERE key = ?", [(key,) for key in keys])
        _count(database, "revision")


def _count(database: sqlite3.Connection, name: str) -> None:
    database.execute("UPDATE fact SET value = CAST(value AS INTEGER) + 1 WHERE name = ?", (name,))


def _fact(database: sqlite3.Connection, name: str) -> str | None:
    row = database.execute("SELECT value FROM fact WHERE name = ?", (name,)).fetchone()
    return None if row is None else str(row[0])


def _pack(inputs: Arrays, targets: Arrays, row: int) -> bytes:
    # Copied, not made contiguous in place: that would turn a number without a dimension into an array of one.
    arrays = {f"in/{name}": np.array(array[row], order="C") for name, array in inputs.items()}
    arrays |= {f"out/{name}": np.array(array[row], order="C") for name, array in targets.items()}
    return safetensors.numpy.save(arrays)


def _unpack(data: bytes) -> tuple[Arrays, Arrays]:
    arrays = safetensors.numpy.load(data)
    inputs = {name.removeprefix("in/"): array for name, array in arrays.items() if name.startswith("in/")}
    targets = {name.removeprefix("out/"): array for name, array in arrays.items() if name.startswith("out/")}
    return inputs, targets
