"""The operators' service: messages in, `Operations`, `Access` and `Operators` asked, messages out. No decisions.

Who calls, and whether their role reaches, is settled before any of this runs (`Operators.authorize`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from umbel.clock import Clock
from umbel.errors import DigestMismatch, MalformedMessage, OutOfBounds
from umbel.fields import name, text
from umbel.v1 import admin_pb2 as pb
from umbel_server import admin_messages as codec
from umbel_server.access import Access
from umbel_server.admin_drift import drift_to_message, windows_from_message
from umbel_server.admin_releases import release_details_to_message
from umbel_server.admin_rollouts import RolloutGateway
from umbel_server.coordinator import Coordinator
from umbel_server.drift_windows import Windows
from umbel_server.fleet import DeviceRecord
from umbel_server.json_text import to_text
from umbel_server.lineage_messages import lineage_to_message
from umbel_server.operators import Operator, Operators
from umbel_server.requests import ANY
from umbel_server.roles import parse_role
from umbel_server.rpc import Requests, Service, Stream, Unary
from umbel_server.task_records import TaskRecord
from umbel_server.token_operators import TokenOperators
from umbel_server.transfer import BundleReceiver, FileStart, Step, send_bundle

MAX_HOLDOUT_BYTES: Final = 1 << 30
_ADMIN = pb.DESCRIPTOR.services_by_name["AdminService"]


class AdminGateway:
    """AdminService."""

    def __init__(
        self,
        coordinator: Coordinator,
        access: Access,
        operators: Operators,
        clock: Clock,
        warnings: tuple[str, ...],
        windows: Windows,
    ) -> None:
        self._coordinator = coordinator
        self._operations = coordinator.operations
        self._access = access
        self._operators = operators
        self._clock = clock
        self._started_at = clock.now()
        self._warnings = warnings
        self._windows = windows

    def service(self, tokens: TokenOperators | None = None) -> Service[Operator]:
        """Ready to be added to a gRPC server, for callers with certificates, or for such with tokens."""
        methods: dict[str, Unary[Operator] | Stream[Operator]] = {
            "AddModel": self._add_model,
            "AddHoldout": self._add_holdout,
            "ListModels": self._list_models,
            "CreateTask": self._create_task,
            "ListTasks": self._list_tasks,
            "GetTask": self._get_task,
            "GetTaskDrift": self._get_task_drift,
            "GetTaskPrivacy": self._get_task_privacy,
            "PauseTask": self._pause_task,
            "ResumeTask": self._resume_task,
            "StopTask": self._stop_task,
            "ListRounds": self._list_rounds,
            "GetRound": self._get_round,
            "Watch": self._watch,
            "ListVersions": self._list_versions,
            "GetVersion": self._get_version,
            "GetLineage": self._get_lineage,
            "Publish": self._publish,
            "ExportVersion": self._export_version,
            "ListReleases": self._list_releases,
            "ListDevices": self._list_devices,
            "GetDevice": self._get_device,
            "RevokeDevice": self._revoke_device,
            "CreateTokens": self._create_tokens,
            "AddOperator": self._add_operator,
            "ListOperators": self._list_operators,
            "RevokeOperator": self._revoke_operator,
            "ListAudit": self._list_audit,
            "VerifyAudit": self._verify_audit,
            "GetStatus": self._get_status,
            **RolloutGateway(self._coordinator).methods(),
        }
        return Service(_ADMIN, self._operators.authorize, methods, tokens.authorize if tokens else None)

    # Models and versions.

    async def _add_model(self, operator: Operator, messages: Requests) -> pb.AddModelResponse:
        first = await anext(messages, None)
        if first is None or first.WhichOneof("step") != "begin":
            raise MalformedMessage("a model starts with `begin`, then come its files")
        model, call = name(first.begin.name, "model"), codec.call_from_message(first.begin)
        with self._operations.drafts() as folder:
            await _receive(folder, messages)
            # Verified and registered in one go, in the loop's thread like every other change of the store.
            if first.begin.parent:
                parent = codec.number(first.begin.parent, "parent")
                added = self._operations.add_version(model, parent, folder, operator.actor, call)
            else:
                added = self._operations.add_model(model, folder, operator.actor, call)
            return pb.AddModelResponse(version=codec.version_to_message(added))

    async def _add_holdout(self, operator: Operator, messages: Requests) -> pb.AddHoldoutResponse:
        data, call = bytearray(), ANY
        async for message in messages:
            if message.request_id or message.HasField("expected_revision"):
                call = codec.call_from_message(pb.AddHoldoutRequest(**_asked(message)))
            data += message.chunk
            if len(data) > MAX_HOLDOUT_BYTES:
                raise OutOfBounds(f"held-out examples of more than {MAX_HOLDOUT_BYTES} bytes; choose fewer")
        return pb.AddHoldoutResponse(digest=self._operations.add_holdout(bytes(data), operator.actor, call))

    async def _list_models(self, operator: Operator, message: pb.ListModelsRequest) -> pb.ListModelsResponse:
        found = self._operations.models()
        revisions = self._operations.revisions("model", [model.name for model in found])
        return pb.ListModelsResponse(models=[codec.model_to_message(it, revisions[it.name]) for it in found])

    async def _list_versions(self, operator: Operator, message: pb.ListVersionsRequest) -> pb.ListVersionsResponse:
        found = self._operations.versions(text(message.model, "model"), codec.limit_from_message(message.limit))
        return pb.ListVersionsResponse(versions=map(codec.version_to_message, found))

    async def _get_version(self, operator: Operator, message: pb.GetVersionRequest) -> pb.GetVersionResponse:
        return pb.GetVersionResponse(
            version=codec.version_to_message(self._operations.version(*codec.version_key(message)))
        )

    async def _get_lineage(self, operator: Operator, message: pb.GetLineageRequest) -> pb.GetLineageResponse:
        found = self._operations.trace(*codec.version_key(message))
        return pb.GetLineageResponse(
            versions=[codec.version_to_message(step.version) for step in found],
            steps=map(lineage_to_message, found),
        )

    async def _publish(self, operator: Operator, message: pb.PublishRequest) -> pb.PublishResponse:
        model, number = name(message.model, "model"), codec.number(message.version, "version")
        release = self._operations.publish(
            model, number, message.channel, operator.actor, codec.call_from_message(message)
        )
        return pb.PublishResponse(release=codec.release_to_message(release))

    async def _export_version(
        self, operator: Operator, message: pb.ExportVersionRequest
    ) -> AsyncIterator[pb.ExportVersionResponse]:
        number = codec.number(message.version, "version")
        steps = send_bundle(self._operations.bundle(name(message.model, "model"), number))
        while (step := await asyncio.to_thread(next, steps, None)) is not None:
            match step:
                case FileStart(file_name, size):
                    yield pb.ExportVersionResponse(file=pb.BundleFile(name=file_name, size=size))
                case bytes():
                    yield pb.ExportVersionResponse(chunk=step)

    async def _list_releases(self, operator: Operator, message: pb.ListReleasesRequest) -> pb.ListReleasesResponse:
        found = self._operations.releases(text(message.model, "model"), codec.limit_from_message(message.limit))
        details = self._coordinator.releasing.details(found)
        return pb.ListReleasesResponse(releases=map(release_details_to_message, details))

    # Tasks and rounds.

    async def _create_task(self, operator: Operator, message: pb.CreateTaskRequest) -> pb.CreateTaskResponse:
        call = codec.call_from_message(message)
        record = self._operations.create_task(codec.task_from_message(message.spec), operator.actor, call)
        return pb.CreateTaskResponse(task=self._tasks([record])[0])

    async def _list_tasks(self, operator: Operator, message: pb.ListTasksRequest) -> pb.ListTasksResponse:
        return pb.ListTasksResponse(tasks=self._tasks(self._operations.tasks()))

    async def _get_task(self, operator: Operator, message: pb.GetTaskRequest) -> pb.GetTaskResponse:
        record = self._operations.task(name(message.name, "task"))
        return pb.GetTaskResponse(task=self._tasks([record])[0])

    def _tasks(self, records: Sequence[TaskRecord]) -> list[pb.Task]:
        revisions = self._operations.revisions("task", [record.task.name for record in records])
        return [codec.record_to_message(record, revisions[record.task.name]) for record in records]

    async def _get_task_privacy(
        self, operator: Operator, message: pb.GetTaskPrivacyRequest
    ) -> pb.GetTaskPrivacyResponse:
        found = self._operations.privacy(name(message.name, "task"))
        return pb.GetTaskPrivacyResponse(**asdict(found))

    async def _get_task_drift(self, operator: Operator, message: pb.GetTaskDriftRequest) -> pb.GetTaskDriftResponse:
        asked = name(message.name, "task"), windows_from_message(message, self._windows)
        return drift_to_message(await asyncio.to_thread(self._operations.drift, *asked))

    async def _pause_task(self, operator: Operator, message: pb.PauseTaskRequest) -> pb.PauseTaskResponse:
        call = codec.call_from_message(message)
        record = self._operations.pause_task(name(message.name, "task"), operator.actor, call)
        return pb.PauseTaskResponse(task=self._tasks([record])[0])

    async def _resume_task(self, operator: Operator, message: pb.ResumeTaskRequest) -> pb.ResumeTaskResponse:
        call = codec.call_from_message(message)
        record = self._operations.resume_task(name(message.name, "task"), operator.actor, call)
        return pb.ResumeTaskResponse(task=self._tasks([record])[0])

    async def _stop_task(self, operator: Operator, message: pb.StopTaskRequest) -> pb.StopTaskResponse:
        call = codec.call_from_message(message)
        record = self._operations.stop_task(name(message.name, "task"), operator.actor, call)
        return pb.StopTaskResponse(task=self._tasks([record])[0])

    async def _list_rounds(self, operator: Operator, message: pb.ListRoundsRequest) -> pb.ListRoundsResponse:
        found = self._operations.rounds(text(message.task, "task"), codec.limit_from_message(message.limit))
        return pb.ListRoundsResponse(rounds=map(codec.round_to_message, found))

    async def _get_round(self, operator: Operator, message: pb.GetRoundRequest) -> pb.GetRoundResponse:
        found = self._operations.round(name(message.task, "task"), codec.number(message.number, "round"))
        return pb.GetRoundResponse(round=codec.round_to_message(found))

    async def _watch(self, operator: Operator, message: pb.WatchRequest) -> AsyncIterator[pb.WatchResponse]:
        async for event in self._coordinator.subscribe():
            # A revoked operator stops to see at once, not at the next call.
            self._operators.require_active(operator)
            yield pb.WatchResponse(
                at_ms=codec.milliseconds(event.at),
                kind=event.kind,
                subject=event.subject,
                detail=to_text(dict(event.detail)),
            )

    # Devices.

    async def _list_devices(self, operator: Operator, message: pb.ListDevicesRequest) -> pb.ListDevicesResponse:
        population, after = text(message.population, "population"), text(message.after, "after")
        found = self._operations.devices(population, codec.limit_from_message(message.limit), after)
        return pb.ListDevicesResponse(devices=self._device_messages(found))

    async def _get_device(self, operator: Operator, message: pb.GetDeviceRequest) -> pb.GetDeviceResponse:
        found = self._operations.device(text(message.id, "device"))
        return pb.GetDeviceResponse(device=self._device_messages([found])[0])

    def _device_messages(self, found: Sequence[DeviceRecord]) -> list[pb.Device]:
        revisions = self._operations.revisions("device", [device.id for device in found])
        return [codec.device_to_message(device, revisions[device.id]) for device in found]

    async def _revoke_device(self, operator: Operator, message: pb.RevokeDeviceRequest) -> pb.RevokeDeviceResponse:
        call = codec.call_from_message(message)
        self._access.revoke(operator.actor, text(message.id, "device"), message.reason, call)
        return pb.RevokeDeviceResponse(device=self._device_messages([self._operations.device(message.id)])[0])

    async def _create_tokens(self, operator: Operator, message: pb.CreateTokensRequest) -> pb.CreateTokensResponse:
        tokens, expires_at = self._access.create_tokens(
            operator.actor,
            message.population,
            message.count,
            message.lifetime_seconds,
            codec.call_from_message(message),
        )
        return pb.CreateTokensResponse(
            tokens=tokens, expires_at_ms=codec.milliseconds(expires_at), population=message.population
        )

    # Operators, audit, status.

    async def _add_operator(self, operator: Operator, message: pb.AddOperatorRequest) -> pb.AddOperatorResponse:
        role = parse_role(message.role)
        call = codec.call_from_message(message)
        added, certificate = self._operators.add(operator, message.name, role, message.certificate_request, call)
        return pb.AddOperatorResponse(operator=self._people([added])[0], certificate_chain=certificate)

    async def _list_operators(self, operator: Operator, message: pb.ListOperatorsRequest) -> pb.ListOperatorsResponse:
        return pb.ListOperatorsResponse(operators=self._people(self._operators.all()))

    def _people(self, found: Sequence[Operator]) -> list[pb.Operator]:
        revisions = self._operations.revisions("operator", [one.id for one in found])
        return [codec.operator_to_message(one, revisions[one.id]) for one in found]

    async def _revoke_operator(
        self, operator: Operator, message: pb.RevokeOperatorRequest
    ) -> pb.RevokeOperatorResponse:
        call = codec.call_from_message(message)
        revoked = self._operators.revoke(operator, text(message.id, "operator"), call)
        return pb.RevokeOperatorResponse(operator=self._people([revoked])[0])

    async def _list_audit(self, operator: Operator, message: pb.ListAuditRequest) -> pb.ListAuditResponse:
        before = codec.number(message.before, "before") if message.before else None
        found = self._operations.audit_rows(codec.limit_from_message(message.limit), before)
        return pb.ListAuditResponse(rows=map(codec.audit_to_message, found))

    async def _verify_audit(self, operator: Operator, message: pb.VerifyAuditRequest) -> pb.VerifyAuditResponse:
        try:
            rows = await asyncio.to_thread(self._operations.verify_audit)
            return pb.VerifyAuditResponse(intact=True, rows=rows)
        except DigestMismatch as error:
            return pb.VerifyAuditResponse(intact=False, problem=str(error))

    async def _get_status(self, operator: Operator, message: pb.GetStatusRequest) -> pb.GetStatusResponse:
        status = codec.status_to_message(self._operations.status(), self._clock.now())
        status.started_at_ms = codec.milliseconds(self._started_at)
        status.warnings.extend(self._warnings)
        return pb.GetStatusResponse(status=status)


def _asked(message: pb.AddHoldoutRequest) -> dict[str, Any]:
    """How it was asked for, without the data: those are named by their digest."""
    asked = {"request_id": message.request_id}
    return asked | ({"expected_revision": message.expected_revision} if message.HasField("expected_revision") else {})


async def _receive(folder: Path, messages: Requests) -> None:
    receiver = BundleReceiver(folder)
    try:
        async for message in messages:
            receiver.take(_step(message))
        receiver.finish()
    finally:
        receiver.close()


def _step(message: pb.AddModelRequest) -> Step:
    match message.WhichOneof("step"):
        case "file":
            return FileStart(message.file.name, message.file.size)
        case "chunk":
            return message.chunk
        case _:
            raise MalformedMessage("after `begin` a model is made of files and chunks")
