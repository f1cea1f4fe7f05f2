"""A version's lineage as the messages of `admin.proto`."""

from __future__ import annotations

from umbel.v1 import admin_pb2 as pb
from umbel_server.admin_messages import milliseconds, round_to_message
from umbel_server.audit import AuditRow
from umbel_server.json_text import to_text
from umbel_server.lineage import LineageStep, ReleaseStep, RolledOut


def lineage_to_message(step: LineageStep) -> pb.LineageStep:
    """Encode one version from end to end."""
    return pb.LineageStep(
        version=step.version.number,
        data_contract=to_text(dict(step.contract)),
        round=None if step.round is None else round_to_message(step.round),
        releases=map(_release_to_message, step.releases),
    )


def _release_to_message(step: ReleaseStep) -> pb.LineageRelease:
    return pb.LineageRelease(
        number=step.release.number,
        channel=step.release.channel,
        issued_at_ms=milliseconds(step.release.issued_at),
        content_of=step.content_of,
        rollouts=map(_rollout_to_message, step.rollouts),
        events=map(_event_to_message, step.steps),
    )


def _rollout_to_message(step: RolledOut) -> pb.LineageRollout:
    found = step.record.rollout
    return pb.LineageRollout(
        id=found.id,
        stage=found.stage.value,
        author=found.author,
        approved_by=found.approved_by,
        subject=found.approved_subject,
        reason=found.reason,
        counts=[
            pb.DeviceCount(release=number, outcome=outcome, devices=devices)
            for (number, outcome), devices in sorted(step.counts.items())
        ],
        events=map(_event_to_message, step.steps),
    )


def _event_to_message(row: AuditRow) -> pb.LineageEvent:
    return pb.LineageEvent(at_ms=milliseconds(row.at), actor=row.actor, action=row.action, audit_row=row.sequence)
