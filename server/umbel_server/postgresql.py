"""Connections to PostgreSQL that wait for no server without an end: the whole coordinator waits with them.

A way that is gone is found by the kernel. A server that stands still (paused, swapped out, a statement behind somebody
else's lock) goes on acknowledging what it is sent: only whoever waits can give it up.
"""

from __future__ import annotations

import time
from typing import Any, Final

import psycopg
import sqlalchemy as sa
from psycopg.abc import RV, PQGen
from sqlalchemy.engine import URL

NO_ANSWER: Final = {
    "connect_timeout": "5",
    "tcp_user_timeout": "20000",
    "keepalives_idle": "20",
    "keepalives_interval": "5",
    "keepalives_count": "3",
}
"""How soon a coordinator finds that the way to PostgreSQL is gone (libpq's words)."""
ANSWER_SECONDS: Final = 10.0
"""Within which a statement has to be answered."""
REST_SECONDS: Final = 15.0
"""After a server gave no answer, it is asked again; whoever needs it meanwhile is refused at once."""


class Connection(psycopg.Connection[Any]):
    """One that is closed once a statement has waited too long."""

    def wait(self, gen: PQGen[RV], *words: Any, **more: Any) -> RV:
        """As psycopg's, but not for ever."""
        return super().wait(self._for_a_while(gen), *words, **more)

    def _for_a_while(self, steps: PQGen[RV]) -> PQGen[RV]:
        end = time.monotonic() + ANSWER_SECONDS
        try:
            wanted = next(steps)
            while True:
                ready = yield wanted
                if not ready and time.monotonic() >= end:
                    # Its answer may still come, and must not be taken for that to another statement.
                    self.close()
                    raise psycopg.OperationalError(f"PostgreSQL gave no answer within {ANSWER_SECONDS:g} seconds")
                wanted = steps.send(ready)
        except StopIteration as done:
            answer: RV = done.value
            return answer


class _Caller:
    """Connects, and lets a server rest that didn't answer."""

    def __init__(self) -> None:
        self._again_at = 0.0

    def connect(self, dialect: Any, record: Any, arguments: list[Any], words: dict[str, Any]) -> Connection:
        """In the place of `psycopg.connect`, as an event of SQLAlchemy."""
        del dialect, record
        if time.monotonic() < self._again_at:
            raise psycopg.OperationalError("PostgreSQL gave no answer a moment ago; it is asked again soon")
        try:
            return Connection.connect(*arguments, **words)
        except psycopg.errors.ConnectionTimeout:
            self._again_at = time.monotonic() + REST_SECONDS
            raise


def engine_at(address: URL) -> sa.Engine:
    """Asks a PostgreSQL, and waits for its answer as long as its machine is there.

    Raises:
        ImportError: psycopg, the extra `postgres`, isn't installed.
    """
    # What the address itself says goes before.
    patient = address.set(query={**NO_ANSWER, **address.query})
    return sa.create_engine(patient, pool_pre_ping=True, isolation_level="REPEATABLE READ", hide_parameters=True)


def lose_patience(engine: sa.Engine) -> None:
    """From now on, give up on a server that stands still."""
    engine.dispose()
    sa.event.listen(engine, "do_connect", _Caller().connect)
