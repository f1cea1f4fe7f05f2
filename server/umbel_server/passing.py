"""What may pass by itself: a disk that is full, a database that is away, full, or takes no writes for now."""

from __future__ import annotations

from typing import Final

_OF_DRIVERS: Final = {"OperationalError", "ReadOnlySqlTransaction"}
"""sqlite3 and psycopg call it alike; the second is PostgreSQL's, of a server that follows another one."""


def may_pass(error: BaseException) -> bool:
    """Whether it says that the disk or the database doesn't do just now."""
    # SQLAlchemy wraps what its driver raised; neither need be loaded here.
    cause = getattr(error, "orig", error)
    return isinstance(cause, OSError) or not _OF_DRIVERS.isdisjoint(kind.__name__ for kind in type(cause).__mro__)
