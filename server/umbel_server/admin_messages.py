"""The coordinator's values <-> the messages of `admin.proto`, both ways.

As in `umbel.messages`: encoding can't fail, decoding checks and raises a `BadInput`.
"""

from __future__ import annotations

from collections.abc import Mapping

from google.protobuf.message import Message

from umbel import fields
from umbel.digests import digest_of
from umbel.errors import MalformedMessage
from umbel.messages import plan_from_message, plan_to_message, signed_to_message
from umbel.v1 import admin_pb2 as pb
from umbel_server.audit import AuditRow
from umbel_server.fleet import DeviceRecord
from umbel_server.flower.spec import StrategySpec, Value
from umbel_server.json_text import to_text
from umbel_server.operators import Operator
from umbel_server.privacy_settings import PrivacySettings
from umbel_server.registry import Model
from umbel_server.requests import Call
from umbel_server.round import SessionState
from umbel_server.task import Task
from umbel_server.task_records import TaskRecord
from umbel_server.validation import ValidationPolicy
from umbel_server.versions import PublishedRelease, Version
from umbel_server.views import RoundSummary, StatusSummary

MAX_LIMIT = 10_000


def limit_from_message(limit: int) -> int:
    """How many entries a list may have: the caller's wish, within bounds."""
    return min(limit or 100, MAX_LIMIT)


def milliseconds(instant: float | None) -> int:
    """An instant as it travels; 0 stands for none."""
    return 0 if instant is None else round(instant * 1000)


def number(value: int, what: str) -> int:
    """A number that counts from 1."""
    return fields.count(value, what, least=1)


def version_key(message: pb.GetVersionRequest | pb.GetLineageRequest) -> tuple[str, int]:
    """Which version of which model is asked for."""
    return fields.name(message.model, "model"), number(message.number, "version")


def call_from_message(message: Message) -> Call:
    """How a change is asked for: its request id, the revision that its caller has seen, and a digest of the rest."""
    rest = type(message)()
    rest.CopyFrom(message)
    for field in ("request_id", "expected_revision"):
        rest.ClearField(field)
    seen = message.expected_revision if message.HasField("expected_revision") else None  # type: ignore[attr-defined]
    request_id: str = message.request_id  # type: ignore[attr-defined]
    return Call(request_id, seen, digest_of(rest.SerializeToString(deterministic=True)))


# Tasks.


def task_to_message(task: Task) -> pb.TaskSpec:
    """Encode what a task is; its state travels beside it."""
    return pb.TaskSpec(
        name=task.name,
        population=task.population,
        model=task.model,
        plan=plan_to_message(task.plan),
        goal=task.goal,
        minimum=task.minimum,
        over_selection=task.over_selection,
        deadline_seconds=task.deadline_seconds,
        rounds=task.rounds,
        strategy=pb.Strategy(name=task.strategy.name, arguments=_arguments(task.strategy.arguments)),
        validation=_arguments(task.validation.to_tree()),
        evaluate_candidates=task.evaluate_candidates,
        updates_are_public=not task.updates_private,
        driven=task.driven,
        seed=task.seed,
        channel=task.channel,
        privacy=_arguments(task.privacy.to_tree()),
    )


def task_from_message(message: pb.TaskSpec) -> Task:
    """Decode a task; raises a `BadInput` for one that doesn't make sense."""
    if not message.HasField("plan") or not message.HasField("strategy"):
        raise MalformedMessage("a task needs a plan and a strategy")
    return Task(
        name=fields.name(message.name, "task"),
        population=fields.name(message.population, "population"),
        model=fields.name(message.model, "model"),
        plan=plan_from_message(message.plan),
        goal=message.goal,
        minimum=message.minimum,
        over_selection=message.over_selection,
        deadline_seconds=message.deadline_seconds,
        rounds=message.rounds,
        strategy=StrategySpec(fields.text(message.strategy.name, "strategy"), _values(message.strategy.arguments)),
        validation=ValidationPolicy.from_tree(_values(message.validation)),
        evaluate_candidates=message.evaluate_candidates,
        updates_private=not message.updates_are_public,
        driven=message.driven,
        seed=fields.count(message.seed, "seed"),
        channel=message.channel,
        privacy=PrivacySettings.from_tree(_values(message.privacy)),
    )


def _arguments(values: Mapping[str, Value]) -> dict[str, pb.Argument]:
    return {key: _argument(value) for key, value in values.items()}


def _argument(value: Value) -> pb.Argument:
    match value:
        case bool():
            return pb.Argument(flag=value)
        case int():
            return pb.Argument(integer=value)
        case float():
            return pb.Argument(number=value)
        case str():
            return pb.Argument(text=value)


def _values(arguments: Mapping[str, pb.Argument]) -> dict[str, Value]:
    fields.few(arguments, "arguments")
    return {fields.text(key, "argument"): _value(key, argument) for key, argument in arguments.items()}


def _value(key: str, argument: pb.Argument) -> Value:
    match argument.WhichOneof("value"):
        case "number":
            return fields.finite(argument.number, key)
        case "integer":
            return argument.integer
        case "flag":
            return argument.flag
        case "text":
            return fields.text(argument.text, key)
        case _:
            raise MalformedMessage(f"argument {key!r} has no value")


# What is only told.


def record_to_message(record: TaskRecord, revision: int = 0) -> pb.Task:
    """Encode a task and how far it has come."""
    return pb.Task(
        spec=task_to_message(record.task),
        state=record.task.state.value,
        judged_rounds=record.judged_rounds,
        steps=record.steps,
        created_at_ms=milliseconds(record.created_at),
        revision=revision,
    )


def round_to_message(found: RoundSummary) -> pb.Round:
    """Encode a round."""
    return pb.Round(
        task=found.key.task,
        number=found.key.number,
        kind=found.key.kind.value,
        state=found.state.value,
        reason=found.reason,
        base_version=found.base_version,
        version=found.version or 0,
        assigned=found.assigned,
        open=found.sessions.get(SessionState.ASSIGNED, 0),
        reports=found.reports,
        expired=found.sessions.get(SessionState.EXPIRED, 0),
        aborted=found.sessions.get(SessionState.ABORTED, 0),
        failed=found.sessions.get(SessionState.FAILED, 0),
        goal=found.goal,
        minimum=found.minimum,
        opened_at_ms=milliseconds(found.opened_at),
        deadline_ms=milliseconds(found.deadline),
        ended_at_ms=milliseconds(found.ended_at),
        seconds=found.seconds,
        bytes_up=found.bytes_up,
        bytes_down=found.bytes_down,
        bytes_per_weight=found.bytes_per_weight,
        metrics=dict(found.metrics),
        accuracy=found.accuracy,
        candidate_metrics=dict(found.candidate_metrics),
        candidate_accuracy=found.candidate_accuracy,
    )


def status_to_message(status: StatusSummary, now: float) -> pb.Status:
    """Encode where everything stands."""
    return pb.Status(
        now_ms=milliseconds(now),
        devices=status.devices,
        devices_seen_lately=status.devices_seen_lately,
        tasks=map(record_to_message, status.tasks),
        open_rounds=map(round_to_message, status.open_rounds),
        newest_releases=map(release_to_message, status.newest_releases),
        bytes_up=status.bytes_up,
        bytes_down=status.bytes_down,
        shapes=dict(status.shapes),
    )


def device_to_message(device: DeviceRecord, revision: int = 0) -> pb.Device:
    """Encode a device."""
    return pb.Device(
        id=device.id,
        population=device.population,
        enrolled_at_ms=milliseconds(device.enrolled_at),
        last_seen_ms=milliseconds(device.last_seen),
        revoked_at_ms=milliseconds(device.revoked_at),
        sdk=device.sdk,
        runtimes=device.runtimes,
        visits=device.visits,
        reports=device.reports,
        revision=revision,
    )


def model_to_message(model: Model, revision: int) -> pb.Model:
    """Encode a model."""
    return pb.Model(
        name=model.name,
        newest_version=model.newest_version,
        created_at_ms=milliseconds(model.created_at),
        revision=revision,
    )


def version_to_message(version: Version) -> pb.Version:
    """Encode a version and where it came from."""
    lineage = version.lineage
    return pb.Version(
        model=version.model,
        number=version.number,
        parent=version.parent or 0,
        bundle_digest=version.bundle,
        state=version.state.value,
        created_at_ms=milliseconds(version.created_at),
        registered_by=lineage.registered_by,
        task=lineage.task,
        round=lineage.round,
        cohort=lineage.cohort,
        weight=lineage.weight,
        strategy=lineage.strategy,
        step_norm=lineage.step_norm,
        verdict=lineage.verdict,
        metrics=dict(version.metrics),
        plan_json=to_text(dict(lineage.plan)),
        accuracy=version.accuracy,
    )


def release_to_message(release: PublishedRelease) -> pb.PublishedRelease:
    """Encode a release."""
    return pb.PublishedRelease(
        model=release.model,
        number=release.number,
        version=release.version,
        channel=release.channel,
        issued_at_ms=milliseconds(release.issued_at),
        signed=signed_to_message(release.signed),
    )


def operator_to_message(operator: Operator, revision: int = 0) -> pb.Operator:
    """Encode an operator."""
    return pb.Operator(
        id=operator.id,
        name=operator.name,
        role=operator.role.value,
        added_at_ms=milliseconds(operator.added_at),
        revoked_at_ms=milliseconds(operator.revoked_at),
        revision=revision,
    )


def audit_to_message(row: AuditRow) -> pb.AuditRow:
    """Encode an audit row."""
    return pb.AuditRow(
        sequence=row.sequence,
        at_ms=milliseconds(row.at),
        at=row.at,
        actor=row.actor,
        action=row.action,
        subject=row.object,
        detail=row.body_json,
        previous_hash=row.previous,
        hash=row.hash,
        request_id=row.request_id,
    )
