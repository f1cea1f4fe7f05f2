"""Rounds and their sessions in the store: read whole, written as the difference between two values."""

from __future__ import annotations

import sqlalchemy as sa

from umbel.digests import Digest
from umbel.identity import DeviceId
from umbel.plan import Kind
from umbel_server import audit
from umbel_server.json_text import from_text, to_text
from umbel_server.round import Base, Round, RoundKey, RoundState, Session, SessionState
from umbel_server.tables import ROUNDS, SESSIONS

OPEN = (RoundState.COLLECTING.value, RoundState.AGGREGATING.value, RoundState.VALIDATING.value)
# Made once: to put such a statement together costs more than to run it.
_NEW_SESSION = SESSIONS.insert()
_CHANGED_SESSION = SESSIONS.update().where(SESSIONS.c.id == sa.bindparam("of"))
_CHANGED_ROUND = ROUNDS.update().where(
    ROUNDS.c.task == sa.bindparam("of_task"),
    ROUNDS.c.number == sa.bindparam("of_number"),
    ROUNDS.c.kind == sa.bindparam("of_kind"),
)
_SESSION_OF_REPORT = sa.select(SESSIONS.c.id).where(SESSIONS.c.report_id == sa.bindparam("report"))
_SESSION = sa.select(SESSIONS).where(SESSIONS.c.id == sa.bindparam("session"))


def open_round(connection: sa.Connection, opened: Round) -> None:
    """Write a new round, and its audit row."""
    connection.execute(ROUNDS.insert().values(_round_row(opened) | {"bytes_down": 0, "pending_state": None}))
    body = {"base": opened.base.version, "goal": opened.goal, "minimum": opened.minimum}
    audit.append(connection, opened.opened_at, audit.COORDINATOR, "round.open", str(opened.key), body)


def save(connection: sa.Connection, before: Round, after: Round, now: float, actor: str = audit.COORDINATOR) -> None:
    """Write what has changed from one value of a round to the next; a change of its state leaves an audit row."""
    for session in after.sessions.values():
        known = before.sessions.get(session.id)
        if known is None:
            connection.execute(_NEW_SESSION, _session_row(after.key, session))
        elif known is not session:
            connection.execute(_CHANGED_SESSION, _session_row(after.key, session) | {"of": session.id})
    if _facts(after) != _facts(before):
        of = {"of_task": after.key.task, "of_number": after.key.number, "of_kind": after.key.kind.value}
        connection.execute(_CHANGED_ROUND, _round_row(after) | of)
    if after.state is not before.state:
        action = f"round.{after.state.value}"
        audit.append(connection, now, actor, action, str(after.key), _audit_body(after))


def set_pending_state(connection: sa.Connection, key: RoundKey, digest: Digest | None) -> None:
    """Note the strategy's next state, which counts once the round's candidate is accepted."""
    connection.execute(ROUNDS.update().where(_is(key)).values(pending_state=digest))


def pending_state(connection: sa.Connection, key: RoundKey) -> Digest | None:
    """What `set_pending_state` noted."""
    return connection.scalar(sa.select(ROUNDS.c.pending_state).where(_is(key)))


def pending_states(connection: sa.Connection) -> list[Digest]:
    """What `set_pending_state` noted, of all rounds that still wait for their verdict."""
    found = connection.scalars(sa.select(ROUNDS.c.pending_state).where(ROUNDS.c.pending_state.is_not(None)))
    return [Digest(digest) for digest in found]


def count_fetched(connection: sa.Connection, key: RoundKey, size: int) -> None:
    """Add to what devices have fetched for a round."""
    connection.execute(ROUNDS.update().where(_is(key)).values(bytes_down=ROUNDS.c.bytes_down + size))


def load_open(connection: sa.Connection, task: str) -> list[Round]:
    """A task's rounds that aren't over: none, one, or a TRAIN round and the EVALUATE round of its candidate."""
    query = sa.select(ROUNDS).where(ROUNDS.c.task == task, ROUNDS.c.state.in_(OPEN)).order_by(ROUNDS.c.opened_at)
    return [_round(row, _sessions(connection, _key(row))) for row in connection.execute(query).all()]


def load(connection: sa.Connection, key: RoundKey) -> Round | None:
    """One round with its sessions."""
    row = connection.execute(sa.select(ROUNDS).where(_is(key))).first()
    return _round(row, _sessions(connection, key)) if row else None


def last_number(connection: sa.Connection, task: str) -> int:
    """The highest number of a task's rounds; 0 before the first."""
    return connection.scalar(sa.select(sa.func.max(ROUNDS.c.number)).where(ROUNDS.c.task == task)) or 0


def find_session(connection: sa.Connection, session_id: str) -> Session | None:
    """One session of any round, over or not."""
    row = connection.execute(_SESSION, {"session": session_id}).first()
    return _session(row) if row else None


def session_of_report(connection: sa.Connection, report_id: str) -> str | None:
    """The session that a report counts for, in any round, over or not."""
    found: str | None = connection.scalar(_SESSION_OF_REPORT, {"report": report_id})
    return found


def times_summed(connection: sa.Connection, task: str, device: DeviceId) -> int:
    """In how many sums of a task a device's report was."""
    joined = (SESSIONS.c.task == ROUNDS.c.task) & (SESSIONS.c.round == ROUNDS.c.number)
    joined &= SESSIONS.c.kind == ROUNDS.c.kind
    own = (SESSIONS.c.device == device) & (SESSIONS.c.state == SessionState.REPORTED.value)
    query = sa.select(sa.func.count()).select_from(SESSIONS.join(ROUNDS, joined))
    return connection.scalar(query.where(own, SESSIONS.c.task == task, ROUNDS.c.weight > 0)) or 0


def session_times(connection: sa.Connection, task: str, kind: Kind, limit: int = 200) -> list[float]:
    """Seconds that a task's last sessions took.

    One that ran out of time counts as if it had reported at its end: it would have taken at least as long. Without
    these nobody who is slower than a limit could ever move it.
    """
    ended = (SessionState.REPORTED.value, SessionState.EXPIRED.value)
    query = (
        sa.select(SESSIONS.c.assigned_at, SESSIONS.c.deadline, SESSIONS.c.ended_at, SESSIONS.c.sequence)
        .where(SESSIONS.c.task == task, SESSIONS.c.kind == kind.value, SESSIONS.c.state.in_(ended))
        .order_by(SESSIONS.c.round.desc(), SESSIONS.c.ended_at.desc(), SESSIONS.c.id)
        .limit(limit)
    )
    rows = connection.execute(query)
    return [(row.deadline if row.sequence is None else row.ended_at) - row.assigned_at for row in rows]


def report_delays(connection: sa.Connection, task: str, kind: Kind, limit: int = 200) -> list[float]:
    """Seconds from their rounds' openings to a task's last reports."""
    joined = (SESSIONS.c.task == ROUNDS.c.task) & (SESSIONS.c.round == ROUNDS.c.number)
    joined &= SESSIONS.c.kind == ROUNDS.c.kind
    query = (
        sa.select(SESSIONS.c.ended_at, ROUNDS.c.opened_at)
        .join(ROUNDS, joined)
        .where(SESSIONS.c.task == task, SESSIONS.c.kind == kind.value, SESSIONS.c.sequence.is_not(None))
        .order_by(SESSIONS.c.round.desc(), SESSIONS.c.sequence.desc())
        .limit(limit)
    )
    return [row.ended_at - row.opened_at for row in connection.execute(query)]


def _facts(held: Round) -> tuple[object, ...]:
    return (held.state, held.reason, held.ended_at, held.version, held.weight, dict(held.metrics), held.bytes_up)


def _audit_body(held: Round) -> dict[str, object]:
    # Report ids and counts; nothing that depends on when a device asked or what it was handed.
    reports = [session.report_id for session in held.reports]
    return {"reason": held.reason, "reports": reports, "version": held.version, "weight": held.weight}


def _is(key: RoundKey) -> sa.ColumnElement[bool]:
    return (ROUNDS.c.task == key.task) & (ROUNDS.c.number == key.number) & (ROUNDS.c.kind == key.kind.value)


def _key(row: sa.Row[tuple[object, ...]]) -> RoundKey:
    return RoundKey(row.task, row.number, Kind(row.kind))


def _round_row(held: Round) -> dict[str, object]:
    return {
        "task": held.key.task,
        "number": held.key.number,
        "kind": held.key.kind.value,
        "state": held.state.value,
        "reason": held.reason,
        "base_version": held.base.version,
        "base_release": held.base.release,
        "base_bundle": held.base.bundle,
        "goal": held.goal,
        "minimum": held.minimum,
        "slots": held.slots,
        "session_seconds": held.session_seconds,
        "opened_at": held.opened_at,
        "due": held.due,
        "deadline": held.deadline,
        "weights": held.weights,
        "ended_at": held.ended_at,
        "version": held.version,
        "weight": held.weight,
        "metrics_json": to_text(dict(held.metrics)),
        "bytes_up": held.bytes_up,
    }


def _round(row: sa.Row[tuple[object, ...]], sessions: dict[str, Session]) -> Round:
    return Round(
        key=_key(row),
        base=Base(row.base_version, row.base_release, Digest(row.base_bundle)),
        goal=row.goal,
        minimum=row.minimum,
        slots=row.slots,
        session_seconds=row.session_seconds,
        opened_at=row.opened_at,
        due=row.due,
        deadline=row.deadline,
        weights=row.weights,
        state=RoundState(row.state),
        reason=row.reason,
        sessions=sessions,
        ended_at=row.ended_at,
        version=row.version,
        weight=row.weight,
        metrics=from_text(row.metrics_json),
    )


def _sessions(connection: sa.Connection, key: RoundKey) -> dict[str, Session]:
    wanted = (SESSIONS.c.task == key.task) & (SESSIONS.c.round == key.number) & (SESSIONS.c.kind == key.kind.value)
    query = sa.select(SESSIONS).where(wanted).order_by(SESSIONS.c.assigned_at, SESSIONS.c.id)
    return {row.id: _session(row) for row in connection.execute(query)}


def _session_row(key: RoundKey, session: Session) -> dict[str, object]:
    return {
        "id": session.id,
        "task": key.task,
        "round": key.number,
        "kind": key.kind.value,
        "device": session.device,
        "token_digest": session.token_digest,
        "state": session.state.value,
        "detail": session.detail,
        "assigned_at": session.assigned_at,
        "deadline": session.deadline,
        "ended_at": session.ended_at,
        "report_id": session.report_id,
        "sequence": session.sequence,
        "sealed_digest": session.sealed_digest,
        "sealed_size": session.sealed_size,
    }


def _session(row: sa.Row[tuple[object, ...]]) -> Session:
    return Session(
        id=row.id,
        device=DeviceId(row.device),
        token_digest=row.token_digest,
        assigned_at=row.assigned_at,
        deadline=row.deadline,
        state=SessionState(row.state),
        detail=row.detail,
        ended_at=row.ended_at,
        report_id=row.report_id,
        sequence=row.sequence,
        sealed_digest=Digest(row.sealed_digest) if row.sealed_digest else None,
        sealed_size=row.sealed_size,
    )
