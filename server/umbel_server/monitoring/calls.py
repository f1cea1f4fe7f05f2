"""What only calls know: how many there were of each, how they ended, how long they took, how many bytes went by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Final

import sqlalchemy as sa
from google.protobuf.descriptor import ServiceDescriptor
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from umbel.cohort_sum import HelperAnswer
from umbel.errors import UmbelError, Unreachable
from umbel.plan import Kind
from umbel.secure_sum import HelperItem
from umbel_server.helper.port import HelperPort, Prepared
from umbel_server.monitoring.families import SECONDS
from umbel_server.passing import may_pass
from umbel_server.rpc import Call

_CALL: Final = ("service", "method")
_INSIDE: Final = UmbelError("")
_BEGIN_AT_0: Final = (("OK", ""), (_INSIDE.status.name, _INSIDE.code))
"""(status, error) of what alerts look for: a rise from nothing to 1 is none to Prometheus, one from 0 to 1 is."""


class Calls:
    """gRPC calls; `watch` is what `umbel_server.rpc.Service.add_to` takes."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._ended = Counter(
            "umbel_rpc_calls",
            "Calls that have ended, by gRPC status and Umbel's own error code.",
            (*_CALL, "status", "error"),
            registry=registry,
        )
        self._open = Gauge("umbel_rpc_calls_open", "Calls that go on now.", ("service",), registry=registry)
        self._seconds = Histogram(
            "umbel_rpc_seconds",
            "How long calls took, streams from their first message to their last.",
            _CALL,
            registry=registry,
            buckets=SECONDS,
        )
        self._received = Counter(
            "umbel_rpc_received_bytes", "Bytes of messages that callers sent.", _CALL, registry=registry
        )
        self._sent = Counter("umbel_rpc_sent_bytes", "Bytes of messages that callers got.", _CALL, registry=registry)

    def expect(self, service: ServiceDescriptor) -> None:
        """Begin at 0 for what may be called."""
        self._open.labels(service.name)
        for method in service.methods:
            for status, error in _BEGIN_AT_0:
                self._ended.labels(service.name, method.name, status, error)

    @contextmanager
    def watch(self, call: Call) -> Iterator[None]:
        """Count a call, inside of which it goes on."""
        began = perf_counter()
        with self._open.labels(call.service).track_inprogress():
            try:
                yield
            finally:
                this = (call.service, call.method)
                self._ended.labels(*this, call.status, call.error).inc()
                self._seconds.labels(*this).observe(perf_counter() - began)
                self._received.labels(*this).inc(call.received)
                self._sent.labels(*this).inc(call.sent)


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
        self._up = Gauge("umbel_helper_up", "Whether the helper answered when it was asked last.", registry=registry)
        self._up.set(1)
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
        error = ""
        with self._seconds.labels(method).time():
            try:
                yield
            except UmbelError as refusal:
                error = refusal.code
                raise
            finally:
                self._up.set(error != Unreachable.code)
                self._calls.labels(method, error).inc()
