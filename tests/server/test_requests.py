"""Every call that changes something: done once under its request id, refused to who hasn't seen the newest revision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor

from tests.server.live import MODEL, Live, refused, serving
from tests.server.test_admin import SPEC, bundle_files, upload
from umbel import errors
from umbel.errors import AlreadyExists, CertificateRefused, OutOfBounds, WrongState
from umbel.v1 import admin_pb2 as pb
from umbel_server import audit, requests
from umbel_server.access import Access, RefuseAll
from umbel_server.admin_messages import task_to_message
from umbel_server.authority import make_request
from umbel_server.operators import Operators
from umbel_server.requests import Call
from umbel_server.roles import Role
from umbel_server.store import Store

SERVICE = pb.DESCRIPTOR.services_by_name["AdminService"]
READS = ("Get", "List", "Watch", "Preview", "Verify", "Export", "Draft")
"""What a method that changes nothing begins with; every other one changes something."""
CHANGES = [method for method in SERVICE.methods if not method.name.startswith(READS)]


@pytest.mark.parametrize("method", CHANGES, ids=lambda method: method.name)
def test_a_call_that_changes_something_can_be_made_again_and_says_what_its_caller_has_seen(
    method: MethodDescriptor,
) -> None:
    asked = method.input_type
    if method.client_streaming and "begin" in asked.fields_by_name:
        asked = asked.fields_by_name["begin"].message_type
    fields = asked.fields_by_name
    assert fields["request_id"].type == FieldDescriptor.TYPE_STRING
    assert fields["expected_revision"].type == FieldDescriptor.TYPE_INT64


# What each does when it is made again, and when it comes late.


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serving(tmp_path_factory.mktemp("requests") / "state") as live:
        live.add_model()
        yield live


def asked_for(live: Live, method: str) -> tuple[str, str, Callable[..., Any]]:
    """(kind, subject, the call as a function of how it is asked for) of one change that is possible now."""
    stub, model = live.admin(), f"m-{method.lower()}"
    match method:
        case "AddModel":
            return "model", model, lambda **call: stub.AddModel(upload(model, bundle_files(), **call))
        case "AddHoldout":
            from umbel.digests import digest_of

            data = method.encode()
            return (
                "holdout",
                digest_of(data),
                lambda **call: stub.AddHoldout(iter([pb.AddHoldoutRequest(**call), pb.AddHoldoutRequest(chunk=data)])),
            )
        case "CreateTask":
            spec = task_to_message(replace(SPEC, name="t-create"))
            _end_tasks(live)
            return "task", "t-create", lambda **call: stub.CreateTask(pb.CreateTaskRequest(spec=spec, **call))
        case "PauseTask" | "ResumeTask" | "StopTask":
            _end_tasks(live)
            task = f"t-{method.lower()}"
            stub.CreateTask(pb.CreateTaskRequest(spec=task_to_message(replace(SPEC, name=task))))
            if method == "ResumeTask":
                stub.PauseTask(pb.PauseTaskRequest(name=task))
            kind = getattr(pb, f"{method}Request")
            return "task", task, lambda **call: getattr(stub, method)(kind(name=task, **call))
        case "Publish":
            return (
                "model",
                MODEL,
                lambda **call: stub.Publish(pb.PublishRequest(model=MODEL, version=1, channel="stable", **call)),
            )
        case "PrepareRelease":
            return (
                "model",
                MODEL,
                lambda **call: stub.PrepareRelease(
                    pb.PrepareReleaseRequest(model=MODEL, version=1, channel="stable", **call)
                ),
            )
        case "HoldReleases":
            return "model", MODEL, lambda **call: stub.HoldReleases(pb.HoldReleasesRequest(model=MODEL, **call))
        case "LiftHold":
            stub.HoldReleases(pb.HoldReleasesRequest(model=MODEL))
            return "model", MODEL, lambda **call: stub.LiftHold(pb.LiftHoldRequest(model=MODEL, **call))
        case "RevokeDevice":
            device = live.device().id
            return "device", device, lambda **call: stub.RevokeDevice(pb.RevokeDeviceRequest(id=device, **call))
        case "CreateTokens":
            return (
                "tokens",
                "p",
                lambda **call: stub.CreateTokens(
                    pb.CreateTokensRequest(population="p", count=1, lifetime_seconds=60, **call)
                ),
            )
        case "AddOperator":
            key = ec.generate_private_key(ec.SECP256R1())
            from umbel.identity import id_of_key

            request = {"name": "added", "role": "viewer", "certificate_request": make_request(key)}
            return (
                "operator",
                id_of_key(key.public_key()),
                lambda **call: stub.AddOperator(pb.AddOperatorRequest(**request, **call)),
            )
        case "RevokeOperator":
            key = ec.generate_private_key(ec.SECP256R1())
            added = stub.AddOperator(
                pb.AddOperatorRequest(name="gone", role="viewer", certificate_request=make_request(key))
            ).operator
            return "operator", added.id, lambda **call: stub.RevokeOperator(pb.RevokeOperatorRequest(id="gone", **call))
        case _:
            raise AssertionError(f"{method} changes something, and nobody has tried what it does when made again")


def _end_tasks(live: Live) -> None:
    stub = live.admin()
    for task in stub.ListTasks(pb.ListTasksRequest()).tasks:
        if task.state != "done":
            stub.StopTask(pb.StopTaskRequest(name=task.spec.name))


ELSEWHERE = {"SubmitListing", "CreateRollout", "EditRollout", "GoOnRollout", "DecideRollout", "StopRollout"}
"""Tried in tests/rollouts/test_controller_restart.py and below."""


@pytest.mark.parametrize("method", sorted({method.name for method in CHANGES} - ELSEWHERE))
def test_it_is_done_once_and_not_on_what_changed_meanwhile(live: Live, method: str) -> None:
    kind, subject, call = asked_for(live, method)

    def revision() -> int:
        return live.do(lambda: live.parts.coordinator.operations.revisions(kind, [subject])[subject])

    def rows() -> int:
        """What people have done; meanwhile the coordinator opens rounds of its own accord."""
        found = live.do(lambda: live.parts.coordinator.operations.audit_rows(10_000))
        return sum(row.actor != audit.COORDINATOR for row in found)

    seen, before = revision(), rows()
    with refused() as found:
        call(request_id=f"late-{method}", expected_revision=seen + 1)
    assert isinstance(found[0], errors.WrongState)
    assert "look again" in str(found[0])
    assert (revision(), rows()) == (seen, before)

    first = call(request_id=f"once-{method}", expected_revision=seen)
    after = rows()
    assert after > before and revision() > seen
    if method == "CreateTokens":
        with refused() as found:
            call(request_id=f"once-{method}", expected_revision=seen)
        assert isinstance(found[0], errors.AlreadyExists)
    else:
        again = call(request_id=f"once-{method}", expected_revision=seen)
        for certificate in ("certificate_chain",):  # signed anew, for the same key
            if certificate in first.DESCRIPTOR.fields_by_name:
                first.ClearField(certificate)
                again.ClearField(certificate)
        assert again == first
    assert rows() == after
    newest = live.admin().ListAudit(pb.ListAuditRequest(limit=20)).rows
    assert f"once-{method}" in {row.request_id for row in newest}


def test_a_version_that_is_brought_again_under_its_request_id_is_added_once(live: Live) -> None:
    stub, files = live.admin(), bundle_files()
    stub.AddModel(upload("line", files))
    first, again = (stub.AddModel(upload("line", files, parent=1, request_id="next")).version for _ in range(2))
    assert first.number == 2 and again == first
    assert [version.number for version in stub.ListVersions(pb.ListVersionsRequest(model="line")).versions] == [2, 1]


def test_nobody_moves_a_rollout_without_saying_what_was_seen_of_it(live: Live) -> None:
    """Inside, -1 stands for any revision; a caller can't have that."""
    with refused() as found:
        live.admin().GoOnRollout(pb.GoOnRolloutRequest(id="r", action="start", expected_revision=-1))
    assert isinstance(found[0], errors.WrongState)
    assert "revision" in str(found[0])


def test_what_is_listed_tells_its_revision(live: Live) -> None:
    stub = live.admin()
    found = stub.ListModels(pb.ListModelsRequest()).models[0]
    assert found.revision > 0
    with refused() as late:
        stub.HoldReleases(pb.HoldReleasesRequest(model=found.name, expected_revision=0))
    assert isinstance(late[0], errors.WrongState)
    assert all(one.revision for one in stub.ListOperators(pb.ListOperatorsRequest()).operators)
    device = live.device()
    assert stub.GetDevice(pb.GetDeviceRequest(id=device.id)).device.revision > 0


def test_a_request_id_belongs_to_one_call_with_all_that_it_asks_for(live: Live) -> None:
    stub = live.admin()
    stub.CreateTokens(pb.CreateTokensRequest(population="q", count=1, lifetime_seconds=60, request_id="mine"))
    for other in (
        pb.CreateTokensRequest(population="q", count=2, lifetime_seconds=60, request_id="mine"),
        pb.CreateTokensRequest(population="r", count=1, lifetime_seconds=60, request_id="mine"),
    ):
        with refused() as found:
            stub.CreateTokens(other)
        assert isinstance(found[0], errors.AlreadyExists)
        assert "another call" in str(found[0])
    with refused() as found:
        stub.HoldReleases(pb.HoldReleasesRequest(model=MODEL, request_id="mine"))
    assert isinstance(found[0], errors.AlreadyExists)


@pytest.mark.parametrize("request_id", ["x" * 65, "a b", "é", "\n"])
def test_a_request_id_is_a_short_name(live: Live, request_id: str) -> None:
    with refused() as found:
        live.admin().HoldReleases(pb.HoldReleasesRequest(model=MODEL, request_id=request_id))
    assert isinstance(found[0], errors.BadInput)


# The store's side, on both databases.


def test_a_change_that_fails_leaves_its_request_id_free(store: Store) -> None:
    with pytest.raises(OutOfBounds), store.transaction() as connection:
        requests.enter(connection, Call("r"), "ada", "task.pause", "t", 1.0)
        raise OutOfBounds("no")
    with store.transaction() as connection:
        assert requests.enter(connection, Call("r"), "ada", "task.pause", "t", 1.0) is None
    with store.transaction() as connection:
        assert requests.enter(connection, Call("r"), "ada", "task.pause", "t", 1.0) == ""
    with pytest.raises(AlreadyExists), store.transaction() as connection:
        requests.enter(connection, Call("r"), "eve", "task.pause", "t", 1.0)


def test_a_revision_rises_with_what_is_done_to_that_very_thing(store: Store) -> None:
    with store.transaction() as connection:
        assert requests.revisions(connection, "task", ["t"]) == {"t": 0}
        audit.append(connection, 1.0, "ada", "task.create", "t")
        audit.append(connection, 1.0, "ada", "model.add", "t")
        audit.append(connection, 1.0, "ada", "tasks.else", "t")
        audit.append(connection, 1.0, "ada", "release.hold", "u")
        assert requests.revisions(connection, "task", ["t", "u"]) == {"t": 1, "u": 0}
        assert requests.revisions(connection, "model", ["t", "u"]) == {"t": 2, "u": 4}
    with pytest.raises(WrongState, match="revision 1"), store.transaction() as connection:
        requests.enter(connection, Call("", 0), "ada", "task.pause", "t", 1.0)


# Several processes.


def test_who_is_revoked_in_one_process_is_refused_in_another_within_a_second(live: Live) -> None:
    device = live.device()
    parts, settings = live.parts, live.settings
    other = Store.open(settings.effective_database_url)
    try:
        elsewhere = Access(other, parts.authorities, RefuseAll(), live.clock, 60.0)
        elsewhere.device(device.certificate)
        people = Operators(other, parts.authorities.operator, live.clock, 60.0)
        key = ec.generate_private_key(ec.SECP256R1())
        admin = people.authorize("ListOperators", live.first_admin().certificate)
        _, certificate = people.add(admin, "short", Role.VIEWER, make_request(key))
        assert live.do(lambda: parts.operators.authorize("GetStatus", certificate)).name == "short"
        live.admin().RevokeDevice(pb.RevokeDeviceRequest(id=device.id))
        live.admin().RevokeOperator(pb.RevokeOperatorRequest(id="short"))
        live.clock.ahead += 1.0
        with pytest.raises(CertificateRefused, match="revoked"):
            elsewhere.device(device.certificate)
        with pytest.raises(CertificateRefused, match="revoked"):
            people.authorize("GetStatus", certificate)
    finally:
        other.close()
