"""Tasks, rounds and sessions, as the store has them.

Rounds that are over never change, and a task opens one when the one before has ended: so each is read once, and a
scrape reads what came since the one before, however long the store grows.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import sqlalchemy as sa
from prometheus_client.core import Metric

from umbel_server.monitoring.families import Spread, counter, gauge, histogram
from umbel_server.round import RoundState, SessionState
from umbel_server.tables import ROUNDS, SESSIONS
from umbel_server.task import TaskState
from umbel_server.task_records import TaskRecord

Kind = tuple[str, str]
"""(task, kind of the round)"""
_Found = tuple[Any, Counter[str]]
"""(row of a round, how many of its sessions are in which state)"""
_KIND: Final = ("task", "kind")
_OVER: Final = tuple(state.value for state in RoundState if state.is_over)
_ENDED: Final = tuple(state.value for state in SessionState if state is not SessionState.ASSIGNED)
_LENGTHS: Final = (10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 7200.0, 21_600.0, 86_400.0)
"""Seconds that rounds take."""
_COLUMNS: Final = ROUNDS.c[
    "task", "number", "kind", "state", "goal", "minimum", "opened_at", "deadline", "ended_at", "bytes_up", "bytes_down"
]
_ROUNDS: Final = (
    sa.select(*_COLUMNS)
    .where(ROUNDS.c.task == sa.bindparam("of"), ROUNDS.c.number > sa.bindparam("beyond"))
    .order_by(ROUNDS.c.number)
)
_SESSIONS: Final = (
    sa.select(SESSIONS.c.round, SESSIONS.c.kind, SESSIONS.c.state, sa.func.count())
    .where(SESSIONS.c.task == sa.bindparam("of"), SESSIONS.c.round > sa.bindparam("beyond"))
    .group_by(SESSIONS.c.round, SESSIONS.c.kind, SESSIONS.c.state)
)


@dataclass(slots=True)
class _Sums:
    """What rounds came to; adds up."""

    rounds: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    sessions: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    reports: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    received: Counter[Kind] = field(default_factory=Counter)
    sent: Counter[Kind] = field(default_factory=Counter)
    seconds: dict[Kind, Spread] = field(default_factory=dict)

    def copy(self) -> _Sums:
        """The same, to go on with."""
        seconds = {kind: spread.copy() for kind, spread in self.seconds.items()}
        counts = (self.rounds.copy(), self.sessions.copy(), self.reports.copy())
        return _Sums(*counts, self.received.copy(), self.sent.copy(), seconds)

    def add(self, row: Any, sessions: Counter[str]) -> None:
        """One more round, over or not: of one that isn't, what stays true whatever becomes of it."""
        this = (row.task, row.kind)
        for state in _ENDED:
            self.sessions[*this, state] += sessions[state]
        self.received[this] += row.bytes_up
        self.sent[this] += row.bytes_down
        spread = self.seconds.setdefault(this, Spread(_LENGTHS))
        for state in _OVER:
            self.rounds[*this, state] += row.state == state
            self.reports[*this, state] += (row.state == state) * sessions[SessionState.REPORTED.value]
        if row.state in _OVER:
            spread.add(max(0.0, row.ended_at - row.opened_at))

    def metrics(self) -> Iterator[Metric]:
        outcome = (*_KIND, "outcome")
        yield counter("umbel_rounds", "Rounds that are over, by how they ended.", outcome, self.rounds)
        yield histogram("umbel_round_seconds", "How long rounds took that are over.", _KIND, self.seconds.items())
        words = "Sessions of devices that have ended; only those that reported were of use."
        yield counter("umbel_sessions", words, outcome, self.sessions)
        words = "Reports of rounds that are over, by how these ended; only those of completed ones were of use."
        yield counter("umbel_round_reports", words, outcome, self.reports)
        yield counter("umbel_round_received_bytes", "Bytes of reports that count.", _KIND, self.received)
        yield counter("umbel_round_sent_bytes", "Bytes that devices fetched for rounds.", _KIND, self.sent)


class Rounds:
    """The rounds of all tasks; to be read by one at a time."""

    def __init__(self) -> None:
        self._over = _Sums()
        self._up_to: dict[str, int] = {}
        """Of each task, the round up to which all are over and added up."""

    def read(self, connection: sa.Connection, tasks: Iterable[TaskRecord]) -> list[Metric]:
        """What stands in the store now."""
        going_on = [found for record in tasks for found in self._beyond(connection, record.task.name)]
        sums = self._over.copy()
        for row, sessions in going_on:
            sums.add(row, sessions)
        return [*sums.metrics(), *_open_rounds([found for found in going_on if found[0].state not in _OVER])]

    def _beyond(self, connection: sa.Connection, task: str) -> list[_Found]:
        """A task's rounds that may still change; those before are added up once and for all."""
        since = {"of": task, "beyond": self._up_to.get(task, 0)}
        rows = connection.execute(_ROUNDS, since).all()
        sessions = defaultdict[tuple[int, str], Counter[str]](Counter)
        for number, kind, state, count in connection.execute(_SESSIONS, since):
            sessions[number, kind][state] = count
        found = [(row, sessions[row.number, row.kind]) for row in rows]
        # What devices fetched last for a round is written after its end: the newest ones are read once more.
        newest = rows[-1].number if rows else 0
        final = min([newest - 1, *(row.number for row in rows if row.state not in _OVER)])
        for row, counted in found:
            if row.number < final:
                self._over.add(row, counted)
                self._up_to[task] = row.number
        return [one for one in found if one[0].number >= final]


def _open_rounds(found: list[_Found]) -> Iterator[Metric]:
    states = {(row.task, row.kind, row.state): 1.0 for row, _ in found}
    words = "1 for each round that isn't over, with where it stands."
    yield gauge("umbel_open_round", words, (*_KIND, "state"), states)
    reported, assigned = SessionState.REPORTED.value, SessionState.ASSIGNED.value
    told: tuple[tuple[str, str, Callable[[Any, Counter[str]], float]], ...] = (
        ("reports", "Reports that the open round has.", lambda row, sessions: sessions[reported]),
        ("sessions", "Devices that work for the open round now.", lambda row, sessions: sessions[assigned]),
        ("goal", "Reports at which the open round closes.", lambda row, sessions: row.goal),
        (
            "minimum",
            "Reports without which the open round comes to nothing at its deadline.",
            lambda row, sessions: row.minimum,
        ),
        ("start_timestamp_seconds", "When the open round began.", lambda row, sessions: row.opened_at),
        (
            "deadline_timestamp_seconds",
            "When the open round closes at the latest, one way or the other.",
            lambda row, sessions: row.deadline,
        ),
    )
    for name, words, value in told:
        values = {(row.task, row.kind): value(row, sessions) for row, sessions in found}
        yield gauge(f"umbel_open_round_{name}", words, _KIND, values)


def tasks_by_state(tasks: Iterable[TaskRecord]) -> Metric:
    """How many tasks there are."""
    counts = Counter({(state.value,): 0 for state in TaskState})
    counts.update((record.task.state.value,) for record in tasks)
    return gauge("umbel_tasks", "Tasks, by state.", ("state",), counts)
