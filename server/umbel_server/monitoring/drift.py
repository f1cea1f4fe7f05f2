"""Whether data have changed, by the windows of the settings: worked out once for each round, not for each scrape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress

import sqlalchemy as sa
from prometheus_client.core import Metric

from umbel.errors import UmbelError
from umbel_server.drift import Finding
from umbel_server.drift_report import gather, newest_counted, report
from umbel_server.drift_windows import Windows
from umbel_server.monitoring.families import gauge
from umbel_server.registry import Registry
from umbel_server.task import Task, TaskState
from umbel_server.task_records import TaskRecord

_LABELS = ("task", "what")


class Drift:
    """What was found of each task, kept until it has another round; to be read by one at a time."""

    def __init__(self, registry: Registry, windows: Windows) -> None:
        self._registry, self._windows = registry, windows
        self._found: dict[str, tuple[int, tuple[Finding, ...]]] = {}
        """By task: the newest round that counts, and what was found with it."""

    def read(self, connection: sa.Connection, tasks: Iterable[TaskRecord]) -> Iterator[Metric]:
        """Of tasks that aren't done, once they have rounds enough."""
        found = {
            (record.task.name, one.what): one
            for record in tasks
            if record.task.state is not TaskState.DONE
            for one in self._of(connection, record.task)
        }
        words = "How likely a task's recent rounds are to differ so much from its first ones by chance; small: drift."
        yield gauge("umbel_drift_p_value", words, _LABELS, {labels: one.p_value for labels, one in found.items()})
        words = "How far a histogram of a task's recent rounds is from that of its first ones (PSI)."
        psi = {labels: one.psi for labels, one in found.items() if one.psi is not None}
        yield gauge("umbel_drift_psi", words, _LABELS, psi)

    def _of(self, connection: sa.Connection, task: Task) -> tuple[Finding, ...]:
        newest = newest_counted(connection, task)
        if newest != self._found.get(task.name, (0, ()))[0]:
            with suppress(UmbelError, OSError):  # a manifest that can't be read takes no other number with it
                rounds = gather(connection, self._registry, task, self._windows)
                self._found[task.name] = (newest, report(rounds, self._windows).findings)
        return self._found.get(task.name, (0, ()))[1]
