"""What operators read: rounds, status, and what else is put together from several tables. Changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import sqlalchemy as sa

from umbel.errors import NotFound
from umbel.plan import Kind
from umbel.update import Metrics
from umbel_server import fleet, heads, task_records
from umbel_server.json_text import from_text
from umbel_server.registry import Registry
from umbel_server.round import RoundKey, RoundState, SessionState, bytes_per_weight
from umbel_server.round_records import OPEN
from umbel_server.tables import DEVICES, ROUNDS, SESSIONS, newest_first
from umbel_server.task_records import TaskRecord
from umbel_server.versions import CANDIDATE, TRAINING, PublishedRelease, accuracy_of


@dataclass(frozen=True, slots=True)
class RoundSummary:
    """One round, as operators see it."""

    key: RoundKey
    state: RoundState
    reason: str
    base_version: int
    version: int | None
    goal: int
    minimum: int
    sessions: Mapping[SessionState, int]
    opened_at: float
    deadline: float
    ended_at: float | None
    bytes_up: int
    bytes_down: int
    weights: int
    """Numbers of one device's delta."""
    metrics: Metrics
    """Sums over the cohort, as measured on the base version."""
    candidate_metrics: Metrics
    """Sums over the cohort that measured the candidate, if the task asks for that."""

    def told(self, waits: Mapping[str, str]) -> RoundSummary:
        """With what an open round waits for, by its task."""
        waiting = waits.get(self.key.task, "") if self.ended_at is None else ""
        return replace(self, reason=waiting) if waiting and not self.reason else self

    @property
    def assigned(self) -> int:
        """How many sessions there were, however they went."""
        return sum(self.sessions.values())

    @property
    def reports(self) -> int:
        """How many reports count."""
        return self.sessions.get(SessionState.REPORTED, 0)

    @property
    def bytes_per_weight(self) -> float | None:
        """Sealed bytes of one report for each number of its delta; `None` before the first, and without a delta."""
        return bytes_per_weight(self.bytes_up, self.reports, self.weights)

    @property
    def accuracy(self) -> float | None:
        """Of the base version, on the cohort's held-back examples."""
        return accuracy_of(self.metrics)

    @property
    def candidate_accuracy(self) -> float | None:
        """Of the candidate, on the held-back examples of the cohort that measured it."""
        return accuracy_of(self.candidate_metrics)

    @property
    def seconds(self) -> float | None:
        """From opening to end; `None` while it is open."""
        return None if self.ended_at is None else self.ended_at - self.opened_at


@dataclass(frozen=True, slots=True)
class StatusSummary:
    """Where everything stands."""

    devices: int
    devices_seen_lately: int
    tasks: list[TaskRecord]
    open_rounds: list[RoundSummary]
    newest_releases: list[PublishedRelease]
    bytes_up: int
    bytes_down: int
    shapes: Counter[str]

    def told(self, waits: Mapping[str, str]) -> StatusSummary:
        """With what open rounds wait for, by their tasks."""
        return replace(self, open_rounds=[held.told(waits) for held in self.open_rounds])


def rounds(connection: sa.Connection, task: str = "", limit: int = 100, only_open: bool = False) -> list[RoundSummary]:
    """Rounds, newest first; of one task or of all."""
    order = newest_first(ROUNDS.c.task, ROUNDS.c.number, ROUNDS.c.opened_at)
    query = sa.select(ROUNDS).order_by(*order, ROUNDS.c.kind).limit(limit)
    if task:
        query = query.where(ROUNDS.c.task == task)
    if only_open:
        query = query.where(ROUNDS.c.state.in_(OPEN))
    return [_summary(connection, row) for row in connection.execute(query).all()]


def one_round(connection: sa.Connection, task: str, number: int) -> RoundSummary:
    """A round by its number (of two, the training rather than its evaluation); raises `NotFound`."""
    query = sa.select(ROUNDS).where(ROUNDS.c.task == task, ROUNDS.c.number == number).order_by(ROUNDS.c.kind.desc())
    row = connection.execute(query).first()
    if row is None:
        raise NotFound(f"task {task!r} has no round {number}; `umbel rounds list` shows what there is")
    return _summary(connection, row)


def status(connection: sa.Connection, registry: Registry, now: float) -> StatusSummary:
    """Where everything stands at `now`."""
    up, down = connection.execute(sa.select(sa.func.sum(ROUNDS.c.bytes_up), sa.func.sum(ROUNDS.c.bytes_down))).one()
    lately = fleet.was_lately(now)
    return StatusSummary(
        devices=connection.scalar(sa.select(sa.func.count()).select_from(DEVICES)) or 0,
        devices_seen_lately=connection.scalar(sa.select(sa.func.count()).select_from(DEVICES).where(lately)) or 0,
        tasks=task_records.everything(connection),
        open_rounds=rounds(connection, only_open=True),
        newest_releases=_newest_releases(connection, registry),
        bytes_up=int(up or 0),
        bytes_down=int(down or 0),
        shapes=fleet.shapes(connection),
    )


def _newest_releases(connection: sa.Connection, registry: Registry) -> list[PublishedRelease]:
    """What devices get; where no listing keeps the heads of channels, that is the newest release of each."""
    stand = {(at.model, at.channel, number) for at, number in heads.read(connection).numbers.items()}
    if stand:
        return [registry.published(connection, model, number) for model, _, number in sorted(stand)]
    newest: dict[tuple[str, str], PublishedRelease] = {}
    for release in registry.releases(connection, limit=1_000):
        if release.channel not in (TRAINING, CANDIDATE):
            newest.setdefault((release.model, release.channel), release)
    return [newest[key] for key in sorted(newest)]


def _summary(connection: sa.Connection, row: sa.Row[tuple[object, ...]]) -> RoundSummary:
    this = (SESSIONS.c.task == row.task) & (SESSIONS.c.round == row.number) & (SESSIONS.c.kind == row.kind)
    counted = sa.select(SESSIONS.c.state, sa.func.count()).where(this).group_by(SESSIONS.c.state)
    evaluation = sa.select(ROUNDS.c.metrics_json).where(
        ROUNDS.c.task == row.task, ROUNDS.c.number == row.number, ROUNDS.c.kind == Kind.EVALUATE.value
    )
    measured = connection.scalar(evaluation) if row.kind == Kind.TRAIN.value else None
    return RoundSummary(
        key=RoundKey(row.task, row.number, Kind(row.kind)),
        state=RoundState(row.state),
        reason=row.reason,
        base_version=row.base_version,
        version=row.version,
        goal=row.goal,
        minimum=row.minimum,
        sessions={SessionState(state): count for state, count in connection.execute(counted)},
        opened_at=row.opened_at,
        deadline=row.deadline,
        ended_at=row.ended_at,
        bytes_up=row.bytes_up,
        bytes_down=row.bytes_down,
        weights=row.weights,
        metrics=from_text(row.metrics_json),
        candidate_metrics=from_text(measured) if measured else {},
    )
