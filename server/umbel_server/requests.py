"""Calls that change something: made again under the same request id they are done once, and asked for by somebody who
hasn't seen what changed since they aren't done at all.

What takes a connection is part of its caller's transaction: the change, its audit row and the note that this request
was carried out are durable together, or not at all.

The revision of a thing is the number of the newest audit row that tells of a change to it: it rises with every change,
and 0 stands for a thing that isn't there yet. (A rollout counts its own revisions, as part of its state.)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import sqlalchemy as sa

from umbel import fields
from umbel.errors import AlreadyExists, OutOfBounds, WrongState
from umbel_server.tables import AUDIT, REQUESTS

MAX_ID_CHARS: Final = 64
_TOGETHER: Final = MappingProxyType(dict.fromkeys(("model", "version", "release"), ("model", "version", "release")))
"""Kinds of actions whose subject is one thing: all that happens to a model."""


@dataclass(frozen=True, slots=True)
class Call:
    """How a change was asked for."""

    request_id: str = ""
    """Drawn by the caller, one for each change that it wants; empty: a call that isn't made again."""
    expected_revision: int | None = None
    """The revision that the caller has seen; None: whichever it is."""
    body: str = ""
    """Digest of all else that was asked for: the same request id with another body is another call's."""


ANY: Final = Call()
"""Asked for once, whatever happened before."""


def enter(connection: sa.Connection, call: Call, actor: str, action: str, subject: str, now: float) -> str | None:
    """What was answered when this very request was carried out; None if it wasn't, and should be now.

    Raises:
        AlreadyExists: the request id was used for another call.
        WrongState: the thing has changed since the caller looked.
    """
    before = answered(connection, call, actor, action, subject)
    if before is not None:
        return before
    require_revision(connection, call, action, subject)
    if call.request_id:
        values = {"request_id": call.request_id, "actor": actor, "action": action, "subject": subject, "at": now}
        connection.execute(REQUESTS.insert().values(values | {"body": call.body, "answer": ""}))
    return None


def answered(connection: sa.Connection, call: Call, actor: str, action: str, subject: str) -> str | None:
    """As `enter`, without a note that it is carried out now."""
    if not call.request_id:
        return None
    _require_id(call.request_id)
    row = connection.execute(sa.select(REQUESTS).where(REQUESTS.c.request_id == call.request_id)).first()
    if row is None:
        return None
    if (row.actor, row.action, row.subject, row.body or "") != (actor, action, subject, call.body):
        raise AlreadyExists(f"request id {call.request_id} was used for another call; draw a new one for each")
    return row.answer or ""


def _require_id(request_id: str) -> None:
    fields.name(request_id, "request id")
    if len(request_id) > MAX_ID_CHARS:
        raise OutOfBounds(f"a request id of {len(request_id)} characters; the limit is {MAX_ID_CHARS}")


def note(connection: sa.Connection, call: Call, answer: str) -> None:
    """Keep what a call is answered with, where that can't be looked up from its subject."""
    if call.request_id:
        this = REQUESTS.c.request_id == call.request_id
        connection.execute(REQUESTS.update().where(this).values(answer=answer))


def require_revision(connection: sa.Connection, call: Call, action: str, subject: str) -> None:
    """Raise `WrongState` unless the caller has seen the newest revision, or doesn't care."""
    if call.expected_revision is None:
        return
    kind = action.partition(".")[0]
    found = revisions(connection, kind, [subject])[subject]
    if found != call.expected_revision:
        raise WrongState(
            f"{kind} {subject!r} is at revision {found}, not {call.expected_revision}; look again before you change it"
        )


def revisions(connection: sa.Connection, kind: str, subjects: Collection[str]) -> Mapping[str, int]:
    """Subject -> its revision; 0 for one that nothing was ever done to.

    Args:
        connection: to read by.
        kind: the first word of actions on such subjects, such as `task`.
        subjects: which ones.
    """
    kinds = _TOGETHER.get(kind, (kind,))
    acted = sa.or_(*(AUDIT.c.action.startswith(f"{one}.", autoescape=True) for one in kinds))
    query = sa.select(AUDIT.c.object, sa.func.max(AUDIT.c.sequence)).where(AUDIT.c.object.in_(list(subjects)), acted)
    found = {subject: int(newest) for subject, newest in connection.execute(query.group_by(AUDIT.c.object))}
    return {subject: found.get(subject, 0) for subject in subjects}
