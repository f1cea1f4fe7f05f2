"""How those do that a coordinator leans on: its helper, and its database."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import sqlalchemy as sa
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from umbel.cohort_sum import HelperAnswer
from umbel.errors import UmbelError, Unreachable
from umbel.plan import Kind
from umbel.secure_sum import HelperItem
from umbel_server.helper.port import HelperPort, Prepared
from umbel_server.monitoring.families import SECONDS
from umbel_server.passing import may_pass


class DatabaseErrors:
    """How often the database, or the disk under it, didn't do."""

    def __init__(self, registry: CollectorRegistry, engine: sa.Engine) -> None:
        self._errors = Counter(
            "umbel_database_errors",
            "Statements that failed because the database or its disk didn't do.",
            registry=registry,
        )
        sa.event.listen(engine, "handle_error", self._count)

    def _count(self, context: sa.engine.ExceptionContext) -> None:
        if may_pass(context.original_exception):
            self._errors.inc()


class WatchedHelper:
    """A helper whose answers are counted; see `HelperPort`."""

    def __init__(self, helper: HelperPort, registry: CollectorRegistry) -> None:
        self._helper = helper
        words = "Whether the helper answered when it was asked last; NaN before."
        self._up = Gauge("umbel_helper_up", words, registry=registry)
        self._up.set(math.nan)
        self._calls = Counter(
            "umbel_helper_calls",
            "What the helper was asked, by Umbel's code of its refusal.",
            ("method", "error"),
            registry=registry,
        )
        self._seconds = Histogram(
            "umbel_helper_seconds",
            "How long the helper took, or was waited for.",
            ("method",),
            registry=registry,
            buckets=SECONDS,
        )

    @property
    def identity(self) -> bytes:
        """See `HelperPort`."""
        return self._helper.identity

    def offer_key(self, task: str, number: int, kind: Kind) -> bytes:
        """See `HelperPort`."""
        with self._asked("offer_key"):
            return self._helper.offer_key(task, number, kind)

    def countersign(self, statement: bytes, leader_signature: bytes) -> bytes:
        """See `HelperPort`."""
        with self._asked("countersign"):
            return self._helper.countersign(statement, leader_signature)

    def prepare(self, rd: bytes, items: Sequence[HelperItem]) -> Prepared:
        """See `HelperPort`."""
        with self._asked("prepare"):
            return self._helper.prepare(rd, items)

    def commit(self, rd: bytes, ids: Sequence[bytes]) -> HelperAnswer:
        """See `HelperPort`."""
        with self._asked("commit"):
            return self._helper.commit(rd, ids)

    @contextmanager
    def _asked(self, method: str) -> Iterator[None]:
        error = UmbelError.code
        with self._seconds.labels(method).time():
            try:
                yield
                error = ""
            except UmbelError as refusal:
                error = refusal.code
                raise
            finally:
                self._up.set(error != Unreachable.code)
                self._calls.labels(method, error).inc()
