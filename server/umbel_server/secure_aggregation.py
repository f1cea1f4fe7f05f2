"""The leader's half of a private round: shares are added as they come, and mean nothing until the helper has answered.

    accept   opens the leader's half of a report, adds it, keeps the helper's capsule
    close    prepare -> take back what the helper refused -> commit -> combine

Memory is one running total and one buffer, whatever the cohort's size. Nothing here is needed after a restart: the
spool holds the reports, the helper holds its one answer, and closing again gives the same sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from umbel.cohort_sum import combine
from umbel.descriptor import RoundDescriptor, SignedDescriptor, layout_of, rd_of, verify_descriptor
from umbel.errors import MalformedMessage, WrongState
from umbel.secure_report import SealedShares, report_from_bytes
from umbel.secure_sum import HelperItem
from umbel.shares import LeaderShare, LeaderTotal
from umbel.update import Aggregate
from umbel.weights import Shapes
from umbel_server.aggregation import LeaderKey, Presummed, SealedReport
from umbel_server.helper.port import HelperPort, Prepared

Reread = Callable[[bytes], bytes]
"""A settled report's bytes by its id, from the spool."""


@dataclass(frozen=True, slots=True)
class PrivateRound:
    """A round that both aggregators have signed."""

    descriptor: RoundDescriptor
    signed: SignedDescriptor

    @classmethod
    def verified(cls, signed: SignedDescriptor, leader: bytes, helper: bytes) -> PrivateRound:
        """Believe a stored or received descriptor; raises `SignatureInvalid`."""
        return cls(verify_descriptor(signed, leader, helper), signed)

    @property
    def rd(self) -> bytes:
        """The round's name."""
        return rd_of(self.signed.statement)


class SecureSum:
    """The `Aggregator` of private rounds."""

    def __init__(
        self,
        agreed: PrivateRound,
        key: LeaderKey,
        helper: HelperPort,
        shapes: Shapes,
        weight_unit: float,
        reread: Reread,
    ) -> None:
        self._agreed = agreed
        self._key = key
        self._helper = helper
        self._shapes = shapes
        self._weight_unit = weight_unit
        self._reread = reread
        layout = layout_of(agreed.descriptor)
        self._total = LeaderTotal(layout)
        self._buffer = LeaderShare(layout, np.empty(layout.size, np.uint8))
        self._items: dict[bytes, HelperItem] = {}
        self._counted: set[bytes] = set()
        self._last = -1
        self._closed: Presummed | None = None
        self.prepared: Prepared | None = None
        """What the helper said about the reports, once it was asked."""

    def accept(self, report: SealedReport) -> None:
        """Open the leader's half and add it; when it raises, nothing has changed.

        Raises:
            MalformedMessage, OutOfBounds, WeightsMismatch, SealBroken: the report can't be counted.
            WrongState: it comes out of order.
        """
        if report.sequence <= self._last:
            raise WrongState(
                f"report {report.sequence} after {self._last}; add reports once, in the order of their acceptance"
            )
        shares = report_from_bytes(report.sealed)
        if shares.report_id.hex() != report.binding.report_id or shares.report_id in self._items:
            raise MalformedMessage("the report goes by another id than its upload, or by one that is taken")
        item = self._open(shares)
        self._total.add(self._buffer)
        self._items[item.report_id] = item
        self._counted.add(item.report_id)
        self._last = report.sequence

    def close(self) -> Presummed:
        """The cohort's sum; asked again, the same.

        Raises:
            Unreachable: the helper is away; close again later, nothing is lost and nothing is known.
            CohortTooSmall, SetRefused, RoundClosed: the helper won't sum this round.
            SignatureInvalid, SumImplausible: what it answered, or what came out, can't be believed.
        """
        if self._closed is None:
            agreed = self._agreed
            self.prepared = self._helper.prepare(agreed.rd, list(self._items.values()))
            self._count_only(set(self.prepared.accepted))
            answer = self._helper.commit(agreed.rd, self.prepared.accepted)
            found = combine(
                agreed.descriptor, agreed.rd, self._helper.identity, self._total, self.prepared.accepted, answer
            )
            # The ring counts weights in steps; from here on sum and weight are both in examples.
            unit = self._weight_unit
            deltas = np.multiply(found.total, np.float32(unit), out=found.total) if unit != 1.0 else found.total
            total = Aggregate(dict(self._shapes), deltas, found.weight * unit, found.count, found.metrics)
            self._closed = Presummed(total, found.within_clip)
        return self._closed

    def _count_only(self, wanted: set[bytes]) -> None:
        """Make the total that of exactly these reports, from wherever an earlier try has left it."""
        if not wanted <= set(self._items):
            raise WrongState("the helper summed reports that this leader doesn't hold; the round is lost")
        for report_id in sorted(self._counted ^ wanted):
            self._open(report_from_bytes(self._reread(report_id)))
            if report_id in wanted:
                self._total.add(self._buffer)
            else:
                self._total.remove(self._buffer)
            self._counted ^= {report_id}

    def _open(self, shares: SealedShares) -> HelperItem:
        agreed = self._agreed
        return self._key.open_share(agreed.descriptor, agreed.rd, shares, self._buffer)
