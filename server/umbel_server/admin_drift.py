"""What is asked and told of drift <-> the messages of `admin.proto`."""

from __future__ import annotations

from dataclasses import replace

from umbel.v1 import admin_pb2 as pb
from umbel_server.drift import Finding
from umbel_server.drift_report import DriftReport
from umbel_server.drift_windows import Windows


def windows_from_message(message: pb.GetTaskDriftRequest, usual: Windows) -> Windows:
    """What is to be compared; raises `OutOfBounds` for what can't be."""
    return replace(
        usual,
        first=message.reference_first,
        last=message.reference_last,
        recent=message.recent or usual.recent,
        below=message.below or usual.below,
    )


def drift_to_message(report: DriftReport) -> pb.GetTaskDriftResponse:
    """Encode what was found."""
    return pb.GetTaskDriftResponse(
        reference=[it.number for it in report.rounds.reference],
        recent=[it.number for it in report.rounds.recent],
        below=report.below,
        problem=report.problem,
        passed_over=report.rounds.passed_over,
        left_out=[it.name for it in report.rounds.left_out] if report.findings else [],
        findings=map(_finding, report.findings),
    )


def _finding(found: Finding) -> pb.DriftFinding:
    return pb.DriftFinding(
        what=found.what,
        verdict=found.verdict.value,
        p_value=found.p_value,
        before=found.before,
        after=found.after,
        psi=found.psi,
        edges=found.edges,
        reference=found.reference,
        recent=found.recent,
    )
