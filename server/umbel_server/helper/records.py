"""What the helper remembers, in one SQLite file of its own: rounds, spent reports, participants, tokens.

A round's HPKE key lives here from its offer to its commit; then only the answer is left, until the round expires.
What is deleted leaves neither the database nor its write-ahead log holding a copy. Private: mode 0600.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from umbel.errors import WrongState
from umbel.plan import Kind
from umbel_server.files import make_file_private

_VERSION: Final = 1
"""Of the tables; raised with each change that an older helper would miscount by."""
_SCHEMA: Final = f"""
PRAGMA user_version = {_VERSION};
CREATE TABLE IF NOT EXISTS rounds (
  task TEXT NOT NULL, round INTEGER NOT NULL, kind TEXT NOT NULL,
  private_key BLOB, rd BLOB UNIQUE, statement BLOB, not_after REAL,
  ids BLOB, answer BLOB, signature BLOB,
  PRIMARY KEY (task, round, kind)
);
CREATE TABLE IF NOT EXISTS latest (task TEXT PRIMARY KEY, round INTEGER NOT NULL, step INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS spent (report_id BLOB PRIMARY KEY, at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS participations (participant BLOB NOT NULL, task TEXT NOT NULL, at REAL NOT NULL);
CREATE INDEX IF NOT EXISTS participations_by_key ON participations (participant, at);
CREATE TABLE IF NOT EXISTS earlier (
  participant BLOB NOT NULL, task TEXT NOT NULL, times INTEGER NOT NULL, PRIMARY KEY (participant, task)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS participants (
  public_key BLOB PRIMARY KEY, population TEXT NOT NULL, enrolled_at REAL NOT NULL, revoked_at REAL
);
CREATE TABLE IF NOT EXISTS tokens (
  digest TEXT PRIMARY KEY, population TEXT NOT NULL, expires_at REAL NOT NULL, used_by BLOB
);
"""


@dataclass(frozen=True, slots=True)
class HelperRound:
    """Where one round stands at the helper."""

    task: str
    round: int
    kind: Kind
    private_key: bytes | None
    """Raw; gone once the round is summed or has expired."""
    rd: bytes | None
    statement: bytes | None
    ids: bytes | None
    """The set that it was summed over, concatenated; None before."""
    answer: bytes | None
    signature: bytes | None

    def __repr__(self) -> str:
        state = "summed" if self.ids is not None else "countersigned" if self.rd else "offered"
        return f"HelperRound({self.task}/{self.round}/{self.kind.value}, {state})"


_FIELDS: Final = "task, round, kind, private_key, rd, statement, ids, answer, signature"


class Records:
    """The helper's store, for any thread. Every change of a round is one transaction, durable when it returns.

    Raises:
        WrongState: a newer version of Umbel has changed its tables.
    """

    def __init__(self, path: Path | None = None) -> None:
        # One connection for all threads: without the lock, one's statements would become part of another's transaction.
        self._lock = threading.RLock()
        if path is not None:
            make_file_private(path)
        self._connection = sqlite3.connect(path or ":memory:", isolation_level=None, check_same_thread=False)
        self._connection.execute("PRAGMA journal_mode=WAL")
        self._connection.execute("PRAGMA synchronous=FULL")
        # Keys and seeds that are deleted are overwritten, not just unlinked.
        self._connection.execute("PRAGMA secure_delete=ON")
        (version,) = self._row("PRAGMA user_version")
        if version > _VERSION:
            self._connection.close()
            raise WrongState("the helper's store is of a newer version of Umbel; run that one, or restore a backup")
        self._connection.executescript(_SCHEMA)
        self._forget_log()  # the process may have died between a key's end and this

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, and alone."""
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                # A full disk may have rolled it back already; or left it open, and then no other could begin.
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    # Rounds.

    def round(self, task: str, number: int, kind: Kind) -> HelperRound | None:
        """A round by its name."""
        return self._one(f"SELECT {_FIELDS} FROM rounds WHERE task=? AND round=? AND kind=?", task, number, kind.value)  # noqa: S608

    def round_by_rd(self, rd: bytes) -> HelperRound | None:
        """A countersigned round."""
        return self._one(f"SELECT {_FIELDS} FROM rounds WHERE rd=?", rd)  # noqa: S608

    def latest(self, task: str) -> tuple[int, int] | None:
        """The newest round of a task, and 0 for its training or 1 for its evaluation; also of rounds long deleted."""
        row = self._row("SELECT round, step FROM latest WHERE task=?", task)
        return None if row is None else (row[0], row[1])

    def offer(self, task: str, order: tuple[int, int], kind: Kind, private_key: bytes, not_after: float) -> None:
        """A key for a new round."""
        with self.transaction():
            self._execute("REPLACE INTO latest (task, round, step) VALUES (?, ?, ?)", task, *order)
            self._execute(
                "INSERT INTO rounds (task, round, kind, private_key, not_after) VALUES (?, ?, ?, ?, ?)",
                task, order[0], kind.value, private_key, not_after,
            )  # fmt: skip

    def countersign(self, held: HelperRound, rd: bytes, statement: bytes, not_after: float) -> None:
        """The one descriptor of a round."""
        self._execute(
            "UPDATE rounds SET rd=?, statement=?, not_after=? WHERE task=? AND round=? AND kind=?",
            rd, statement, not_after, held.task, held.round, held.kind.value,
        )  # fmt: skip

    def commit(
        self, rd: bytes, task: str, ids: bytes, answer: bytes, signature: bytes,
        spent: list[bytes], participants: list[bytes], now: float,
    ) -> None:  # fmt: skip
        """The one sum of a round: its answer is kept, its key deleted, all its reports spent."""
        with self.transaction():
            update = "UPDATE rounds SET ids=?, answer=?, signature=?, private_key=NULL WHERE rd=?"
            self._execute(update, ids, answer, signature, rd)
            self._connection.executemany("INSERT OR IGNORE INTO spent VALUES (?, ?)", [(one, now) for one in spent])
            self._connection.executemany(
                "INSERT INTO participations VALUES (?, ?, ?)", [(one, task, now) for one in participants]
            )
        self._forget_log()

    def is_spent(self, report_id: bytes) -> bool:
        """Whether a report has been in a sum, or was shown for one."""
        return self._row("SELECT 1 FROM spent WHERE report_id=?", report_id) is not None

    def lately(self, participant: bytes, since: float) -> int:
        """How often a participant has been summed since then, a day ago at most."""
        return self._count("SELECT count(*) FROM participations WHERE participant=? AND at>=?", participant, since)

    def participations(self, participant: bytes, task: str) -> int:
        """How often a participant has been summed for a task, ever."""
        new = "SELECT count(*) AS times FROM participations WHERE participant=? AND task=?"
        old = "SELECT times FROM earlier WHERE participant=? AND task=?"
        query = f"SELECT sum(times) FROM ({new} UNION ALL {old})"  # noqa: S608
        return self._count(query, participant, task, participant, task)

    def sweep(self, now: float, keep_seconds: float) -> None:
        """Delete the keys, answers and statements of rounds that have expired; of old sums only numbers stay."""
        with self.transaction():
            gone = self._execute("DELETE FROM rounds WHERE not_after < ?", now)
            # A report opens for one descriptor only, and that has expired by then.
            self._execute("DELETE FROM spent WHERE at < ?", now - keep_seconds)
            self._execute(
                "INSERT INTO earlier SELECT participant, task, count(*) FROM participations WHERE at < ? GROUP BY 1, 2 "
                "ON CONFLICT DO UPDATE SET times = times + excluded.times",
                now - keep_seconds,
            )
            self._execute("DELETE FROM participations WHERE at < ?", now - keep_seconds)
        if gone:
            self._forget_log()

    def counts(self) -> dict[str, int]:
        """How many rounds are open and summed, how many participants there are."""
        queries = {
            "rounds_open": "SELECT count(*) FROM rounds WHERE ids IS NULL",
            "rounds_summed": "SELECT count(*) FROM rounds WHERE ids IS NOT NULL",
            "participants": "SELECT count(*) FROM participants WHERE revoked_at IS NULL",
        }
        return {what: self._count(query) for what, query in queries.items()}

    # People.

    def add_token(self, digest: str, population: str, expires_at: float) -> None:
        """A token that lets one device in."""
        self._execute("INSERT INTO tokens VALUES (?, ?, ?, NULL)", digest, population, expires_at)

    def token(self, digest: str) -> tuple[str, float, bytes | None] | None:
        """Population, expiry and user of a token."""
        row = self._row("SELECT population, expires_at, used_by FROM tokens WHERE digest=?", digest)
        return None if row is None else (row[0], row[1], row[2])

    def enrol(self, digest: str, public_key: bytes, population: str, now: float) -> None:
        """A token is used up, a participant is known."""
        with self.transaction():
            self._execute("UPDATE tokens SET used_by=? WHERE digest=?", public_key, digest)
            self._execute("INSERT OR IGNORE INTO participants VALUES (?, ?, ?, NULL)", public_key, population, now)

    def is_participant(self, public_key: bytes) -> bool:
        """Whether a key was enrolled here and not revoked since."""
        query = "SELECT 1 FROM participants WHERE public_key=? AND revoked_at IS NULL"
        return self._row(query, public_key) is not None

    def revoke(self, public_key: bytes, now: float) -> bool:
        """Shut a participant out from now on; False if there is no such one."""
        query = "UPDATE participants SET revoked_at=? WHERE public_key=? AND revoked_at IS NULL"
        return self._execute(query, now, public_key) > 0

    # Inside.

    def _execute(self, query: str, *values: Any) -> int:
        """Change rows; returns how many."""
        with self._lock:
            return self._connection.execute(query, values).rowcount

    def _row(self, query: str, *values: Any) -> Any:
        """The first row; None if there is none."""
        with self._lock:
            return self._connection.execute(query, values).fetchone()

    def _count(self, query: str, *values: Any) -> int:
        return int(self._row(query, *values)[0])

    def _one(self, query: str, *values: Any) -> HelperRound | None:
        row = self._row(query, *values)
        return None if row is None else HelperRound(row[0], row[1], Kind(row[2]), *row[3:])

    def _forget_log(self) -> None:
        """Empty the write-ahead log: it holds pages as they were before, with the keys that have just been deleted."""
        with self._lock:
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
