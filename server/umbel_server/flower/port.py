"""Where a `DeviceGrid` meets a live coordinator: a driven task, its population, its rounds.

The coordinator lives on its event loop; Flower's programs wait in a thread of their own, and each call crosses over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from concurrent.futures import CancelledError, Future
from threading import Lock
from typing import Any, TypeVar

from umbel.errors import WrongState
from umbel.identity import DeviceId
from umbel.manifest import Manifest
from umbel.plan import Kind, Plan
from umbel.update import Update
from umbel.weights import Shapes
from umbel_server.cohort import CohortOrder
from umbel_server.coordinator import Coordinator
from umbel_server.task import Task
from umbel_server.validation import ReportRules, report_rules

T = TypeVar("T")


class CoordinatorPort:
    """A `CohortPort` to the devices of one driven task.

    Args:
        coordinator: runs the task.
        task: its name; created with `driven = true`.
        loop: the coordinator's own. Calls come from other threads.
    """

    def __init__(self, coordinator: Coordinator, task: str, loop: asyncio.AbstractEventLoop) -> None:
        self._coordinator = coordinator
        self._task = task
        self._loop = loop
        self._waiting: set[Future[Any]] = set()
        self._lock = Lock()
        self._is_closed = False

    @property
    def plan(self) -> Plan:
        """The task's own plan, which a program's messages may change."""
        return self._known().plan_for(Kind.TRAIN)

    def shapes(self) -> Shapes:
        """Names and shapes of the model's shared weights."""
        return self._manifest().shared_shapes

    def rules(self, order: CohortOrder) -> ReportRules:
        """What the coordinator holds each report to, by the task's policy."""
        return report_rules(order.plan, self._manifest(), order.weights.norm(), self._known().validation)

    def device_ids(self) -> Sequence[DeviceId]:
        """Devices of the task's population that have called lately."""

        async def read() -> list[DeviceId]:
            return self._coordinator.devices_of(self._task)

        return self._call(read())

    def run(self, order: CohortOrder, timeout: float | None) -> Sequence[tuple[DeviceId, Update]]:
        """One round of the task; see `umbel_server.cohort.run_cohort`."""
        return self._call(self._coordinator.run_cohort(self._task, order, timeout))

    def close(self) -> None:
        """Let go of whoever waits, and refuse further calls; from any thread."""
        with self._lock:
            self._is_closed, waiting = True, list(self._waiting)
        for future in waiting:
            future.cancel()

    def _manifest(self) -> Manifest:
        async def read() -> Manifest:
            operations = self._coordinator.operations
            # What is asked of it here is the same for all versions of a model.
            return operations.bundle(operations.task(self._task).task.model, 1).manifest

        return self._call(read())

    def _known(self) -> Task:
        async def read() -> Task:
            return self._coordinator.operations.task(self._task).task

        return self._call(read())

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        with self._lock:
            if self._is_closed:
                work.close()
                raise WrongState("the coordinator stops; run the program again when it is back")
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
            self._waiting.add(future)
        try:
            return future.result()
        except CancelledError:
            raise WrongState("the coordinator stopped while the program waited; run it again") from None
        finally:
            self._waiting.discard(future)
