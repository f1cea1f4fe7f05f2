"""What became of a release on a device, and how it does in use: values <-> v1 messages."""

from __future__ import annotations

from typing import Final

from umbel import fields
from umbel.errors import MalformedMessage, OutOfBounds
from umbel.v1 import device_pb2 as pb
from umbel.visit import Health, Outcome, ReleaseOutcome

_TO_WIRE: Final = {
    Outcome.ADOPTED: pb.ReleaseOutcome.OUTCOME_ADOPTED,
    Outcome.KEPT_OWN: pb.ReleaseOutcome.OUTCOME_KEPT_OWN,
    Outcome.FAILED: pb.ReleaseOutcome.OUTCOME_FAILED,
    Outcome.COMMITTED: pb.ReleaseOutcome.OUTCOME_COMMITTED,
    Outcome.REVERTED: pb.ReleaseOutcome.OUTCOME_REVERTED,
}
_FROM_WIRE: Final = {wire: outcome for outcome, wire in _TO_WIRE.items()}


def outcome_to_message(outcome: ReleaseOutcome) -> pb.ReleaseOutcome:
    """Encode an outcome."""
    return pb.ReleaseOutcome(
        model=outcome.model,
        number=outcome.number,
        outcome=_TO_WIRE[outcome.outcome],
        reason=fields.as_text(outcome.reason),
        execution=outcome.execution,
        accuracy_change=outcome.accuracy_change,
        latency_ratio=outcome.latency_ratio,
    )


def outcome_from_message(message: pb.ReleaseOutcome) -> ReleaseOutcome:
    """Decode an outcome: its numbers are finite, and a change of accuracy lies between -1 and 1."""
    if message.outcome not in _FROM_WIRE:
        raise MalformedMessage(f"release outcome {message.outcome} is not known here")
    change = fields.finite(message.accuracy_change, "accuracy_change") if message.HasField("accuracy_change") else None
    ratio = fields.finite(message.latency_ratio, "latency_ratio") if message.HasField("latency_ratio") else None
    if (change is not None and abs(change) > 1) or (ratio is not None and ratio <= 0):
        raise OutOfBounds("a change of accuracy lies between -1 and 1, and a ratio of latencies above 0")
    return ReleaseOutcome(
        model=fields.name(message.model, "model"),
        number=fields.count(message.number, "release number"),
        outcome=_FROM_WIRE[message.outcome],
        reason=fields.text(message.reason, "reason"),
        execution=fields.name(message.execution, "execution") if message.execution else "",
        accuracy_change=change,
        latency_ratio=ratio,
    )


def health_to_message(health: Health) -> pb.Health | None:
    """Encode what a device measures in use; None if it is nothing."""
    if health == Health():
        return None
    return pb.Health(accuracy=health.accuracy, latency_seconds=health.latency_seconds, memory_mb=health.memory_mb)


def health_from_message(message: pb.Health) -> Health:
    """Decode what a device measures in use: finite numbers, times and sizes above 0."""
    found = {
        field: fields.finite(getattr(message, field), field) if message.HasField(field) else None
        for field in ("accuracy", "latency_seconds", "memory_mb")
    }
    for field in ("latency_seconds", "memory_mb"):
        if (value := found[field]) is not None and value <= 0:
            raise OutOfBounds(f"{field} is {value}; it must lie above 0")
    return Health(**found)
