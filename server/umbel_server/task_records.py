"""Tasks in the store, with what moves with them from round to round."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from umbel.digests import Digest
from umbel.errors import NotFound
from umbel_server.tables import TASKS
from umbel_server.task import Task, TaskState


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """A task and how far it has come."""

    task: Task
    created_at: float
    judged_rounds: int = 0
    """Rounds that got as far as a verdict, good or bad."""
    steps: int = 0
    """Candidates accepted: the strategy's own count of its steps."""
    strategy_state: Digest | None = None
    """What the strategy remembers; `None` before its first step."""
    clip_norm: float | None = None
    """The next round's clip, where it moves (`umbel_server.adaptive_clip`)."""

    @property
    def clip(self) -> float:
        """The largest norm of one device's delta in the next round; 0 for no bound."""
        return self.task.plan.clip_norm if self.clip_norm is None else self.clip_norm

    @property
    def wants_a_round(self) -> bool:
        """Whether its next round opens by itself, once none is open."""
        task = self.task
        return not task.driven and task.state is TaskState.RUNNING and self.judged_rounds < task.rounds


def insert(connection: sa.Connection, record: TaskRecord) -> None:
    """Write a new task."""
    fixed = {
        "name": record.task.name,
        "model": record.task.model,
        "population": record.task.population,
        "task_json": record.task.to_json(),
        "created_at": record.created_at,
    }
    connection.execute(TASKS.insert().values(fixed | _moving(record)))


def update(connection: sa.Connection, record: TaskRecord) -> None:
    """Write how far a task has come."""
    connection.execute(TASKS.update().where(TASKS.c.name == record.task.name).values(_moving(record)))


def find(connection: sa.Connection, name: str) -> TaskRecord | None:
    """One task."""
    row = connection.execute(sa.select(TASKS).where(TASKS.c.name == name)).first()
    return _record(row) if row else None


def get(connection: sa.Connection, name: str) -> TaskRecord:
    """One task; raises `NotFound`."""
    record = find(connection, name)
    if record is None:
        raise NotFound(f"no task is called {name!r}; `umbel tasks list` shows what there is")
    return record


def everything(connection: sa.Connection) -> list[TaskRecord]:
    """All tasks, in the order in which they were made."""
    query = sa.select(TASKS).order_by(TASKS.c.created_at, TASKS.c.name)
    return [_record(row) for row in connection.execute(query)]


def _moving(record: TaskRecord) -> dict[str, object]:
    return {
        "state": record.task.state.value,
        "judged_rounds": record.judged_rounds,
        "steps": record.steps,
        "strategy_state": record.strategy_state,
        "clip_norm": record.clip_norm,
    }


def _record(row: sa.Row[tuple[object, ...]]) -> TaskRecord:
    task = Task.from_json(row.task_json, TaskState(row.state))
    state = Digest(row.strategy_state) if row.strategy_state else None
    return TaskRecord(task, row.created_at, row.judged_rounds, row.steps, state, row.clip_norm)
