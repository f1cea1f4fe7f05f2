"""The audit, what private tasks have spent, certificates that end, and the disk that all of it lies on."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import sqlalchemy as sa
from prometheus_client.core import Metric

from umbel_server import privacy_ledger
from umbel_server.authority import end_of
from umbel_server.monitoring.families import counter, gauge, number
from umbel_server.private_rounds import PrivateRounds
from umbel_server.tables import AUDIT, CHECKPOINTS, PRIVATE_ROUNDS
from umbel_server.task import TaskState
from umbel_server.task_records import TaskRecord


def audit(connection: sa.Connection) -> Iterator[Metric]:
    """How long the chain is, and how much of it others have seen."""
    rows = connection.scalar(sa.select(sa.func.max(AUDIT.c.sequence))) or 0
    yield counter("umbel_audit_rows", "Rows of the audit's chain.", (), {(): rows})
    seen = connection.scalar(sa.select(sa.func.max(CHECKPOINTS.c.size))) or 0
    yield number(
        "umbel_audit_witnessed_rows", "Rows of the audit's chain that the newest signed checkpoint covers.", seen
    )


class Privacy:
    """What private tasks have spent; worked out again only once there were more rounds."""

    def __init__(self, private: PrivateRounds) -> None:
        self._private = private
        self._spent: dict[str, tuple[int, float]] = {}

    def read(self, connection: sa.Connection, tasks: Iterable[TaskRecord]) -> Iterator[Metric]:
        """By task, beside what each may spend."""
        private = [record.task for record in tasks if record.task.updates_private]
        counts = sa.select(PRIVATE_ROUNDS.c.task, sa.func.count()).group_by(PRIVATE_ROUNDS.c.task)
        rounds = {task: int(count) for task, count in connection.execute(counts)}
        for task in private:
            if self._spent.get(task.name, (0, 0.0))[0] != rounds.get(task.name, 0):
                past = self._private.spent(task.name)
                self._spent[task.name] = (len(past), privacy_ledger.epsilon(past, task.privacy))
        spent = {(task.name,): self._spent.get(task.name, (0, 0.0))[1] for task in private}
        words = "Epsilon that a private task's rounds have cost; infinite where a round had no noise."
        yield gauge("umbel_privacy_epsilon_spent", words, ("task",), spent)
        going_on = [task for task in private if task.state is not TaskState.DONE]
        budgets = {(task.name,): task.privacy.epsilon for task in going_on if task.privacy.epsilon}
        yield gauge(
            "umbel_privacy_epsilon_budget",
            "Epsilon that a task which isn't done may spend, where that was set.",
            ("task",),
            budgets,
        )


def certificates(pems: Mapping[str, bytes]) -> Metric:
    """When certificates end that don't renew themselves."""
    words = "When a certificate ends that doesn't renew itself."
    ends = {(name,): end_of(pem) for name, pem in pems.items()}
    return gauge("umbel_certificate_expiry_timestamp_seconds", words, ("certificate",), ends)


def disk(folder: Path) -> Iterator[Metric]:
    """The disk that a folder lies on."""
    usage = shutil.disk_usage(folder)
    yield number("umbel_disk_size_bytes", "Size of the disk that the folder lies on.", usage.total)
    yield number("umbel_disk_free_bytes", "Bytes that are free there.", usage.free)
