"""What may pass by itself: a disk that is full, a database that is away, full, or takes no writes for now; and what
callers are told of that, and of any other failure.
"""

from __future__ import annotations

from typing import Any, Final

from umbel.errors import UmbelError, Unavailable

_OF_DRIVERS: Final = {"OperationalError", "ReadOnlySqlTransaction"}
"""sqlite3 and psycopg call it alike; the second is PostgreSQL's, of a server that follows another one."""


def may_pass(error: BaseException) -> bool:
    """Whether it says that the disk or the database doesn't do just now; of a group, whether all in it do."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(may_pass, error.exceptions))
    # SQLAlchemy wraps what its driver raised; neither need be loaded here.
    cause = getattr(error, "orig", error)
    return isinstance(cause, OSError) or not _OF_DRIVERS.isdisjoint(kind.__name__ for kind in type(cause).__mro__)


def tell(log: Any, event: str, error: Exception, **what: object) -> None:
    """Log a failure: one that may pass in a line, as a whole fleet calls; others with all that led to them."""
    if may_pass(error):
        log.error(event, **what, reason=_reason(error))
        log.debug(event, exc_info=error)
    else:
        log.error(event, **what, exc_info=error)


def told_outside(log: Any, error: Exception, method: str) -> UmbelError:
    """What the caller of a method hears of a failure: a refusal as it is; what is wrong in here is for the log only.

    Whoever keeps it keeps nothing else: a traceback holds all that was sent, in a circle with who holds the traceback.
    """
    if may_pass(error):
        tell(log, "disk or database don't do", error, method=method)
        return Unavailable("the server's disk or database doesn't do just now; its log tells more. Try again later")
    if not isinstance(error, UmbelError):
        tell(log, "unexpected error", error, method=method)
        return UmbelError("the coordinator failed inside; its log tells more. Try again later")
    return error.with_traceback(None)


def _reason(error: BaseException) -> str:
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(dict.fromkeys(map(_reason, error.exceptions)))
    return " ".join(str(getattr(error, "orig", error)).split())
