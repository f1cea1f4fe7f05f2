"""What only gRPC calls know: how many of each there were, how they ended, how long they took, and their bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from umbel.errors import UmbelError
from umbel_server.monitoring.families import SECONDS
from umbel_server.rpc import Call

_CALL: Final = ("service", "method")
_INSIDE: Final = UmbelError("")
_BEGIN_AT_0: Final = (("OK", ""), (_INSIDE.status.name, _INSIDE.code))
"""(status, error) of what alerts look for: a rise from nothing to 1 is none to Prometheus, one from 0 to 1 is."""


class Calls:
    """gRPC calls, and such as go by HTTP; `watch` is what `umbel_server.rpc.Service.add_to` takes."""

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

    def expect(self, service: str, methods: Iterable[str]) -> None:
        """Begin at 0 for what may be called."""
        self._open.labels(service)
        for method in methods:
            for status, error in _BEGIN_AT_0:
                self._ended.labels(service, method, status, error)

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
