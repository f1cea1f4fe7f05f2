"""One round's aggregator, kept in step with what the store says: after a restart, or a doubt, it is refolded.

The store and the spool are the truth; the sum in memory is only a way to have it at hand when the round closes.
"""

from __future__ import annotations

from collections.abc import Callable

from umbel.digests import Digest
from umbel.plan import Kind, Plan
from umbel.sealing import OVERHEAD, Binding
from umbel_server.aggregation import Aggregator, LeaderKey, SealedReport, Spooled, aggregator_for
from umbel_server.blobs import Blobs
from umbel_server.flower import needed_metrics
from umbel_server.registry import Registry
from umbel_server.round import Round, RoundKey, Session
from umbel_server.secure_aggregation import Reread, SecureSum
from umbel_server.task import Task
from umbel_server.validation import report_rules

METRICS_BYTES = 64 << 10
"""Room in a report for everything but its delta."""


MakeSecureSum = Callable[[Round, Plan, Reread], SecureSum]
"""The secure sum of a private round; raises `WrongState` before the helper has agreed to it."""


class Fold:
    """The running aggregation of one round. Called from one thread at a time."""

    def __init__(self, key: LeaderKey, registry: Registry, blobs: Blobs, secure: MakeSecureSum) -> None:
        self._key = key
        self._registry = registry
        self._blobs = blobs
        self._secure = secure
        self._digests: dict[str, Digest] = {}
        self._aggregator: Aggregator | None = None
        self._round: RoundKey | None = None

    def forget(self) -> None:
        """Doubt the sum in memory: the next use folds the spool again."""
        self._aggregator = None

    def add(self, task: Task, held: Round, session: Session, report_id: str, digest: Digest) -> None:
        """Open, check and add one settled report, as the next in the order of acceptance.

        Raises:
            BadInput, NotAuthentic: the report can't be counted, and nothing was.
        """
        aggregator = self.up_to_date(task, held)
        aggregator.accept(self._sealed(held, session, report_id, digest, len(held.reports)))

    def up_to_date(self, task: Task, held: Round) -> Aggregator:
        """The aggregator with exactly the reports that count for the round."""
        if self._aggregator is None or self._round != held.key:
            self._aggregator = None
            fresh = self._fresh(task, held)
            for session in held.reports:
                if session.report_id and session.sealed_digest and session.sequence is not None:
                    report = (session.report_id, session.sealed_digest)
                    fresh.accept(self._sealed(held, session, *report, session.sequence))
            self._aggregator, self._round = fresh, held.key
        return self._aggregator

    def _fresh(self, task: Task, held: Round) -> Aggregator:
        bundle = self._registry.bundle(held.base.bundle)
        plan = task.plan_for(held.key.kind)
        self._digests = {}
        if task.updates_private:
            return self._secure(held, plan, self._reread)
        norm = bundle.shared_weights().norm() if held.key.kind is Kind.TRAIN else 0.0
        rules = report_rules(plan, bundle.manifest, norm, task.validation, needed_metrics(task.strategy))
        if task.driven:
            return Spooled(self._key, rules, self._blobs.spool)
        return aggregator_for(task.strategy, self._key, rules, self._blobs.spool)

    def _reread(self, report_id: bytes) -> bytes:
        return self._blobs.read_report(report_id.hex(), self._digests[report_id.hex()])

    def _sealed(self, held: Round, session: Session, report_id: str, digest: Digest, sequence: int) -> SealedReport:
        binding = Binding(held.key.task, held.key.number, session.id, report_id, held.base.bundle)
        self._digests[report_id] = digest
        return SealedReport(binding, self._blobs.read_report(report_id, digest), sequence)


def largest_report(numbers: int) -> int:
    """How many sealed bytes a report with a delta of so many numbers may have."""
    return 4 * numbers + METRICS_BYTES + OVERHEAD
