"""From sealed reports to what a strategy is given: a running sum, or (where a task says so) the single updates.

    accepted report --open--> bytes --decode--> Update --require_report--> add --close--> Collected

A report is refused before anything is added, so a bad one leaves the sum as it was, to the bit. Reports are added in
the order of their acceptance: floating-point addition isn't associative, so only that order makes a refolded sum equal
to an unbroken one.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from umbel.descriptor import RoundDescriptor
from umbel.errors import MalformedMessage, WrongState
from umbel.messages import update_from_bytes
from umbel.sealing import SEALED, Binding, Sealing, open_sealed
from umbel.secure_report import SealedShares
from umbel.secure_sum import HelperItem, open_as_leader
from umbel.shares import LeaderShare
from umbel.update import Aggregate, Metrics, Update, add_metrics
from umbel.weights import Shapes, Weights
from umbel_server.flower.spec import StrategySpec, needs_singles
from umbel_server.validation import ReportRules, require_report


class LeaderKey:
    """The coordinator's private key: reports are sealed to its public half."""

    __slots__ = ("_key",)

    def __init__(self, key: X25519PrivateKey) -> None:
        self._key = key

    @classmethod
    def generate(cls) -> LeaderKey:
        """A new key, from the operating system's randomness."""
        return cls(X25519PrivateKey.generate())

    @classmethod
    def from_bytes(cls, raw: bytes) -> LeaderKey:
        """Read what `to_bytes` wrote.

        Raises:
            MalformedMessage: not 32 bytes.
        """
        try:
            return cls(X25519PrivateKey.from_private_bytes(raw))
        except ValueError as error:
            raise MalformedMessage(f"not an X25519 private key: {error}") from error

    def to_bytes(self) -> bytes:
        """The secret itself, 32 bytes, to be kept where only the coordinator reads."""
        return self._key.private_bytes_raw()

    @property
    def sealing(self) -> Sealing:
        """What devices are told, to seal to this key."""
        return Sealing(SEALED, self._key.public_key().public_bytes_raw())

    @property
    def public_key(self) -> bytes:
        """X25519, raw."""
        return self._key.public_key().public_bytes_raw()

    def open_share(self, descriptor: RoundDescriptor, rd: bytes, shares: SealedShares, into: LeaderShare) -> HelperItem:
        """Open the leader's half of a private report; see `open_as_leader`."""
        return open_as_leader(descriptor, rd, shares, self._key, into)

    def open(self, sealed: bytes, binding: Binding) -> bytes:
        """Undo a device's `seal`; raises `SealBroken` for another key, round or report."""
        return open_sealed(sealed, self._key, binding)

    def __repr__(self) -> str:
        return f"LeaderKey({self.sealing.key_id})"


@dataclass(frozen=True, slots=True)
class SealedReport:
    """One accepted report, as it lies in the spool."""

    binding: Binding
    sealed: bytes
    sequence: int
    """Its place in the order of acceptance within the round; rises."""

    def __repr__(self) -> str:
        return f"SealedReport({self.binding.report_id}, {len(self.sealed)} bytes, {self.sequence})"


@dataclass(frozen=True, slots=True)
class Presummed:
    """A cohort as one sum: all that mean-based strategies need, and all that a secure sum can give."""

    aggregate: Aggregate
    within_clip: float | None = None
    """Share of the cohort whose deltas weren't clipped, with noise on it; None where that isn't summed."""

    @property
    def count(self) -> int:
        """How many reports are in it."""
        return self.aggregate.count

    @property
    def weight(self) -> float:
        """The sum of their weights."""
        return self.aggregate.weight

    @property
    def metrics(self) -> Metrics:
        """The sums of their metrics."""
        return self.aggregate.metrics


@dataclass(frozen=True, slots=True)
class Singles:
    """A cohort as single updates, in order of acceptance; each can be read as often as a strategy likes."""

    deltas: NDArray[np.float32]
    """[reports, numbers], read-only; backed by disk where `Spooled` made it."""
    shapes: Shapes
    weights: tuple[float, ...]
    single_metrics: tuple[Metrics, ...]

    @classmethod
    def of(cls, updates: list[Update]) -> Singles:
        """Updates that are in memory already (a simulation's, a test's); at least one."""
        deltas = np.stack([update.delta.to_vector() for update in updates])
        weights = tuple(update.weight for update in updates)
        return cls(deltas, updates[0].delta.shapes, weights, tuple(update.metrics for update in updates))

    def __iter__(self) -> Iterator[Update]:
        for delta, weight, metrics in zip(self.deltas, self.weights, self.single_metrics, strict=True):
            yield Update(Weights.from_vector(delta, self.shapes), weight, metrics)

    @property
    def count(self) -> int:
        """How many reports are in it."""
        return len(self.weights)

    @property
    def weight(self) -> float:
        """The sum of their weights."""
        return float(sum(self.weights))

    @property
    def metrics(self) -> Metrics:
        """The sums of their metrics."""
        total: Metrics = {}
        for metrics in self.single_metrics:
            total = add_metrics(total, metrics)
        return total


Collected = Presummed | Singles


class Aggregator(Protocol):
    """Collects one round's reports."""

    def accept(self, report: SealedReport) -> None:
        """Open, check and add one report; when it raises, nothing has changed.

        Raises:
            SealBroken, MalformedMessage, WeightsMismatch, NotFinite, OutOfBounds: the report can't be counted.
            WrongState: it comes out of order.
        """

    def close(self) -> Collected:
        """What has been collected."""


class PlainSum:
    """The running sum of the opened updates: O(model) memory, whatever the cohort's size."""

    def __init__(self, key: LeaderKey, rules: ReportRules) -> None:
        self._gate = _Gate(key, rules)
        self._total = Aggregate.zero(rules.shapes)

    def accept(self, report: SealedReport) -> None:
        """Open, check and add one report; see `Aggregator.accept`."""
        update = self._gate.open(report)
        self._total.accumulate(update)
        self._gate.passed(report)

    def close(self) -> Presummed:
        """The sum."""
        return Presummed(self._total)


class Spooled:
    """Single updates on disk, for robust strategies: memory holds one at a time while they come in.

    Only for tasks that openly say that their updates aren't private. The file has no name, so nothing is left behind,
    however the process ends; after a restart it is filled again from the sealed reports.
    """

    def __init__(self, key: LeaderKey, rules: ReportRules, directory: Path | None = None) -> None:
        self._gate = _Gate(key, rules)
        self._shapes = rules.shapes
        self._file = _nameless_file(directory)
        self._weights: list[float] = []
        self._metrics: list[Metrics] = []
        self._size = 4 * sum(int(np.prod(shape)) for shape in rules.shapes.values())
        weakref.finalize(self, os.close, self._file)

    def accept(self, report: SealedReport) -> None:
        """Open, check and keep one report; see `Aggregator.accept`."""
        update = self._gate.open(report)
        _write_at(self._file, update.delta.to_vector().data.cast("B"), len(self._weights) * self._size)
        self._weights.append(update.weight)
        self._metrics.append(update.metrics)
        self._gate.passed(report)

    def close(self) -> Singles:
        """The single updates, mapped from disk."""
        count, numbers = len(self._weights), self._size // 4
        deltas = np.zeros((count, numbers), np.float32)
        if deltas.size:
            mapped = mmap.mmap(self._file, count * self._size, access=mmap.ACCESS_READ)
            deltas = np.frombuffer(mapped, np.float32).reshape(count, numbers)
        return Singles(deltas, self._shapes, tuple(self._weights), tuple(self._metrics))


def aggregator_for(
    strategy: StrategySpec, key: LeaderKey, rules: ReportRules, directory: Path | None = None
) -> Aggregator:
    """The aggregator that a strategy needs; `directory` is where single updates may lie while a round lasts."""
    if needs_singles(strategy) and rules.shapes:
        return Spooled(key, rules, directory)
    return PlainSum(key, rules)


class _Gate:
    """What every report passes, whatever is then done with it."""

    def __init__(self, key: LeaderKey, rules: ReportRules) -> None:
        self._key = key
        self._rules = rules
        self._last = -1

    def open(self, report: SealedReport) -> Update:
        if report.sequence <= self._last:
            raise WrongState(
                f"report {report.sequence} after {self._last}; add reports once, in the order of their acceptance"
            )
        plaintext = self._key.open(report.sealed, report.binding)
        update = update_from_bytes(plaintext, self._rules.shapes, self._rules.max_weight)
        require_report(update, self._rules)
        return update

    def passed(self, report: SealedReport) -> None:
        self._last = report.sequence


def _nameless_file(directory: Path | None) -> int:
    descriptor, path = tempfile.mkstemp(dir=directory)
    Path(path).unlink()
    return descriptor


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
