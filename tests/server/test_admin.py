"""The operators' port: every method refuses by default, and does its work for those who may."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.server.live import MODEL, POPULATION, TASK, Live, refused, serving
from umbel import errors
from umbel.clock import DAY
from umbel.fields import MAX_ENTRIES
from umbel.plan import Plan
from umbel.v1 import admin_pb2 as pb
from umbel.v1 import admin_pb2_grpc
from umbel_models.zoo import bundle_path
from umbel_server import admin, admin_messages
from umbel_server.authority import Authority, PeerKind, key_to_pem, make_request
from umbel_server.flower.spec import StrategySpec
from umbel_server.identity import Identity
from umbel_server.operators import REALM
from umbel_server.roles import ALLOWED, Role
from umbel_server.task import Task
from umbel_server.transfer import CHUNK_BYTES, BundleReceiver, FileStart
from umbel_server.validation import ValidationPolicy

SERVICE = pb.DESCRIPTOR.services_by_name["AdminService"]
METHODS = tuple(method.name for method in SERVICE.methods)
SPEC = Task(
    TASK,
    POPULATION,
    MODEL,
    Plan(epochs=3, hyperparameters={"lr": 0.05}),
    goal=4,
    minimum=2,
    rounds=7,
    strategy=StrategySpec("FedAdam", {"eta": 0.05}),
    validation=ValidationPolicy(max_accuracy_drop=0.2, history=3),
    updates_private=False,
    seed=11,
)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serving(tmp_path_factory.mktemp("admin") / "state") as live:
        live.admin()
        yield live


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Live]:
    with serving(tmp_path / "state") as live:
        live.add_model()
        yield live


def identity_of(live: Live, role: Role, name: str) -> Identity:
    key = ec.generate_private_key(ec.SECP256R1())
    request = pb.AddOperatorRequest(name=name, role=role.value, certificate_request=make_request(key))
    return Identity(live.admin().AddOperator(request).certificate_chain, key_to_pem(key), b"")


def call(channel: grpc.Channel, method: str, data: bytes = b"") -> None:
    """Call a method with these bytes as its one message."""
    described = SERVICE.methods_by_name[method]
    path = f"/{SERVICE.full_name}/{method}"
    match (described.client_streaming, described.server_streaming):
        case (False, False):
            channel.unary_unary(path)(data, timeout=10)
        case (False, True):
            next(iter(channel.unary_stream(path)(data, timeout=10)))
        case _:
            channel.stream_unary(path)(iter([data]), timeout=10)


# Deny by default.


@pytest.fixture(scope="module", params=[Role.VIEWER, Role.OPERATOR], ids=lambda role: role.value)
def lesser(request: pytest.FixtureRequest, live: Live) -> tuple[Role, grpc.Channel]:
    who = identity_of(live, request.param, f"lesser-{request.param.value}")
    return request.param, live.channel(live.addresses.admin, who.key, who.certificate)


@pytest.mark.parametrize("method", METHODS)
def test_a_role_that_does_not_reach_is_refused(lesser: tuple[Role, grpc.Channel], method: str) -> None:
    role, channel = lesser
    if role in ALLOWED[method]:
        if method != "Watch":  # it would wait for something to happen
            expect_no_refusal_of_rights(channel, method)
        return
    with refused() as found:
        call(channel, method)
    assert isinstance(found[0], errors.NotAllowed)
    assert f"yours is {role.value}" in str(found[0])


def expect_no_refusal_of_rights(channel: grpc.Channel, method: str) -> None:
    try:
        call(channel, method)
    except grpc.RpcError as error:
        assert isinstance(error, grpc.Call)
        assert error.code() not in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED)
        assert error.code() is not grpc.StatusCode.INTERNAL


@pytest.fixture(scope="module", params=["nobody", "foreign", "device", "server"])
def stranger(request: pytest.FixtureRequest, live: Live) -> grpc.Channel:
    key = ec.generate_private_key(ec.SECP256R1())
    now = live.clock.now()
    foreign = Authority.create("umbel operator authority", now)
    certificate = {
        "nobody": None,
        "foreign": foreign.issue(key.public_key(), PeerKind.OPERATOR, REALM, now, DAY),
        "device": live.parts.authorities.device.issue(key.public_key(), PeerKind.DEVICE, POPULATION, now, DAY),
        "server": live.parts.authorities.server.issue_server(key.public_key(), ["localhost"], now),
    }[request.param]
    return live.channel(live.addresses.admin, key_to_pem(key) if certificate else None, certificate)


@pytest.mark.parametrize("method", METHODS)
def test_a_strangers_certificate_does_not_get_past_the_handshake(stranger: grpc.Channel, method: str) -> None:
    with pytest.raises(grpc.RpcError) as raised:
        call(stranger, method)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.fixture(scope="module", params=["unknown", "device kind", "revoked"])
def unwelcome(request: pytest.FixtureRequest, live: Live) -> grpc.Channel:
    """Certificates that the operator authority did sign, and that open nothing all the same."""
    key = ec.generate_private_key(ec.SECP256R1())
    authority, now = live.parts.authorities.operator, live.clock.now()
    match request.param:
        case "unknown":
            who = Identity(authority.issue(key.public_key(), PeerKind.OPERATOR, REALM, now, DAY), key_to_pem(key), b"")
        case "device kind":
            who = Identity(authority.issue(key.public_key(), PeerKind.DEVICE, REALM, now, DAY), key_to_pem(key), b"")
        case _:
            who = identity_of(live, Role.ADMIN, "soon-gone")
            live.admin().RevokeOperator(pb.RevokeOperatorRequest(id="soon-gone"))
    return live.channel(live.addresses.admin, who.key, who.certificate)


@pytest.mark.parametrize("method", METHODS)
def test_a_certificate_without_standing_opens_nothing(unwelcome: grpc.Channel, method: str) -> None:
    with refused() as found:
        call(unwelcome, method)
    assert isinstance(found[0], errors.CertificateRefused)


def test_a_revoked_operator_is_refused_at_the_next_call_and_stops_to_watch(fresh: Live) -> None:
    who = identity_of(fresh, Role.OPERATOR, "ada")
    stub = fresh.admin(who)
    stub.GetStatus(pb.GetStatusRequest())
    watching = stub.Watch(pb.WatchRequest(), timeout=20)
    _until_watched(fresh)
    fresh.admin().RevokeOperator(pb.RevokeOperatorRequest(id="ada"))
    with refused() as found:
        stub.GetStatus(pb.GetStatusRequest())
    assert isinstance(found[0], errors.CertificateRefused)
    create(fresh)
    with refused() as found:
        list(watching)
    assert isinstance(found[0], errors.CertificateRefused)


def _until_watched(live: Live) -> None:
    """Wait for a call of `Watch` to have reached its subscription; what happened before isn't told."""
    for _ in range(1000):
        if live.parts.coordinator._watchers._queues:
            return
        time.sleep(0.01)
    raise AssertionError("nobody watches")


@pytest.mark.parametrize("method", METHODS)
def test_random_bytes_get_a_typed_status_and_change_nothing(live: Live, method: str) -> None:
    described = SERVICE.methods_by_name[method]
    channel = live.channel(live.addresses.admin, live.first_admin().key, live.first_admin().certificate)
    before = live.facts()

    @settings(max_examples=15, deadline=None)
    @given(junk=st.binary(min_size=1, max_size=100))
    def each(junk: bytes) -> None:
        message = GetMessageClass(described.input_type)()
        with contextlib.suppress(DecodeError):
            message.ParseFromString(junk)
            return  # a message after all, if an odd one: which it is isn't this test's matter
        with refused() as found:
            call(channel, method, junk)
        assert isinstance(found[0], errors.MalformedMessage)

    each()
    assert live.facts() == before


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_odd_messages_are_never_a_fault_inside(live: Live, data: st.DataObject) -> None:
    method = data.draw(st.sampled_from([name for name in METHODS if name not in ("Watch", "ExportVersion")]))
    message = GetMessageClass(SERVICE.methods_by_name[method].input_type)()
    for field in message.DESCRIPTOR.fields:
        if field.type == field.TYPE_STRING and not field.is_repeated and data.draw(st.booleans()):
            setattr(message, field.name, data.draw(st.text(max_size=40)))
        elif field.type in (field.TYPE_UINT64, field.TYPE_UINT32) and data.draw(st.booleans()):
            top = 2**64 if field.type == field.TYPE_UINT64 else 2**32
            setattr(message, field.name, data.draw(st.integers(0, top - 1) | st.integers(0, 3)))
    channel = live.channels[0]
    try:
        call(channel, method, message.SerializeToString())
    except grpc.RpcError as error:
        assert isinstance(error, grpc.Call)
        assert error.code() is not grpc.StatusCode.INTERNAL, (method, message)


# What operators do.


def create(live: Live) -> pb.Task:
    spec = admin_messages.task_to_message(Task(TASK, POPULATION, MODEL, goal=1, updates_private=False))
    return live.admin().CreateTask(pb.CreateTaskRequest(spec=spec)).task


def upload(name: str, files: dict[str, bytes], **call: Any) -> Iterator[pb.AddModelRequest]:
    yield pb.AddModelRequest(begin=pb.AddModelBegin(name=name, **call))
    for file_name, data in files.items():
        yield pb.AddModelRequest(file=pb.BundleFile(name=file_name, size=len(data)))
        for start in range(0, len(data), CHUNK_BYTES):
            yield pb.AddModelRequest(chunk=data[start : start + CHUNK_BYTES])


def bundle_files() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(bundle_path(MODEL).iterdir()) if path.is_file()}


def test_a_model_goes_up_and_comes_back_the_same(live: Live) -> None:
    added = live.admin().AddModel(upload("roundtrip", bundle_files())).version
    assert (added.model, added.number, added.parent, added.registered_by) == ("roundtrip", 1, 0, "operator:first-admin")
    back: dict[str, bytes] = {}
    current = ""
    for step in live.admin().ExportVersion(pb.ExportVersionRequest(model="roundtrip", version=1)):
        if step.HasField("file"):
            current = step.file.name
            back[current] = b""
        else:
            back[current] += step.chunk
    assert back == bundle_files()
    models = live.admin().ListModels(pb.ListModelsRequest()).models
    assert [model.newest_version for model in models if model.name == "roundtrip"] == [1]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"weights.safetensors": b"other"}, errors.DigestMismatch),
        ({"manifest.json": b"{}"}, errors.MalformedMessage),
        ({"../escape": b"x"}, errors.MalformedMessage),
        ({".hidden": b"x"}, errors.MalformedMessage),
        ({"manifest.json": None}, errors.BundleInvalid),
    ],
    ids=["changed weights", "no manifest's content", "escape", "hidden", "no manifest"],
)
def test_a_bundle_that_does_not_hold_together_is_not_registered(
    live: Live, change: dict[str, bytes | None], error: type[errors.UmbelError]
) -> None:
    files = {name: data for name, data in (bundle_files() | change).items() if data is not None}
    before = live.facts()
    with refused() as found:
        live.admin().AddModel(upload("broken", files))
    assert type(found[0]) in (error, errors.BundleInvalid)
    assert live.facts() == before


@pytest.mark.parametrize(
    "steps",
    [
        [],
        [pb.AddModelRequest(chunk=b"x")],
        [pb.AddModelRequest(begin=pb.AddModelBegin(name="../up"))],
        [pb.AddModelRequest(begin=pb.AddModelBegin(name="short")), pb.AddModelRequest(chunk=b"x")],
        [
            pb.AddModelRequest(begin=pb.AddModelBegin(name="short")),
            pb.AddModelRequest(file=pb.BundleFile(name="manifest.json", size=9)),
            pb.AddModelRequest(chunk=b"x"),
        ],
        [
            pb.AddModelRequest(begin=pb.AddModelBegin(name="twice")),
            pb.AddModelRequest(file=pb.BundleFile(name="a", size=0)),
            pb.AddModelRequest(file=pb.BundleFile(name="a", size=0)),
        ],
    ],
    ids=["nothing", "chunk first", "bad name", "chunk of nothing", "cut short", "twice"],
)
def test_an_upload_out_of_order_is_refused(live: Live, steps: list[pb.AddModelRequest]) -> None:
    before = live.facts()
    with refused() as found:
        live.admin().AddModel(iter(steps))
    assert isinstance(found[0], errors.BadInput)
    assert live.facts() == before


@pytest.mark.parametrize(
    "files",
    [{"weights": 2**60}, {"manifest.json": 5 << 20}, {"a": 9 << 30, "b": 9 << 30}],
    ids=lambda files: str(files),
)
def test_a_bundle_too_large_is_refused_when_it_is_announced(tmp_path: Path, files: dict[str, int]) -> None:
    receiver = BundleReceiver(tmp_path)
    *first, (last, size) = files.items()
    for name, announced in first:
        receiver.take(FileStart(name, announced))
        receiver._missing = 0  # as if all of it had come
    with pytest.raises(errors.OutOfBounds, match=last):
        receiver.take(FileStart(last, size))
    receiver.close()


def test_a_bundle_of_more_files_than_any_has_is_refused(tmp_path: Path) -> None:
    receiver = BundleReceiver(tmp_path)
    for number in range(MAX_ENTRIES):
        receiver.take(FileStart(f"file-{number}", 0))
    with pytest.raises(errors.OutOfBounds, match="files"):
        receiver.take(FileStart("one-more", 0))
    receiver.close()


def test_held_out_examples_without_end_are_refused(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "MAX_HOLDOUT_BYTES", 100)
    with refused() as found:
        live.admin().AddHoldout(iter([pb.AddHoldoutRequest(chunk=bytes(60))] * 2))
    assert isinstance(found[0], errors.OutOfBounds)


def test_a_task_travels_whole() -> None:
    assert admin_messages.task_from_message(admin_messages.task_to_message(SPEC)) == SPEC


@pytest.mark.parametrize("missing", ["plan", "strategy", "name", "model"])
def test_half_a_task_is_refused(live: Live, missing: str) -> None:
    spec = admin_messages.task_to_message(SPEC)
    spec.ClearField(missing)
    with refused() as found:
        live.admin().CreateTask(pb.CreateTaskRequest(spec=spec))
    assert isinstance(found[0], errors.BadInput)


def test_a_task_is_created_paused_resumed_and_stopped(fresh: Live) -> None:
    stub = fresh.admin()
    create(fresh)
    states = [
        stub.PauseTask(pb.PauseTaskRequest(name=TASK)).task.state,
        stub.ResumeTask(pb.ResumeTaskRequest(name=TASK)).task.state,
        stub.StopTask(pb.StopTaskRequest(name=TASK)).task.state,
    ]
    assert states == ["paused", "running", "done"]
    with refused() as found:
        stub.ResumeTask(pb.ResumeTaskRequest(name=TASK))
    assert isinstance(found[0], errors.WrongState)
    assert [task.state for task in stub.ListTasks(pb.ListTasksRequest()).tasks] == ["done"]


def test_watching_tells_what_happens(fresh: Live) -> None:
    stub = fresh.admin()
    watching = iter(stub.Watch(pb.WatchRequest(), timeout=20))
    _until_watched(fresh)
    create(fresh)
    happening = next(watching)
    assert (happening.kind, happening.subject.split("/")[0]) == ("round.open", TASK)
    assert isinstance(json.loads(happening.detail), dict)


def test_a_round_with_reports_is_told_in_numbers(fresh: Live) -> None:
    create(fresh)
    fresh.run(fresh.parts.coordinator.tick())
    device = fresh.device()
    begin, data = device.sealed(device.assignment())
    device.report(begin, [data[start : start + 50_000] for start in range(0, len(data), 50_000)])
    fresh.run(fresh.parts.coordinator.tick())
    stub = fresh.admin()
    found = stub.GetRound(pb.GetRoundRequest(task=TASK, number=1)).round
    assert (found.state, found.reports, found.assigned, found.bytes_up) == ("completed", 1, 1, len(data))
    numbers = fresh.parts.coordinator.operations.bundle(MODEL, 1).manifest.shared_numbers
    assert found.bytes_per_weight == len(data) / numbers > 4
    assert (found.base_version, found.version, found.accuracy) == (1, 2, pytest.approx(0.8))
    told = stub.GetLineage(pb.GetLineageRequest(model=MODEL, number=2))
    assert [(version.number, version.parent, version.cohort) for version in told.versions] == [(2, 1, 1), (1, 0, 0)]
    assert [(step.version, step.HasField("round")) for step in told.steps] == [(2, True), (1, False)]
    assert (told.steps[0].round.reports, told.steps[0].round.metrics) == (1, found.metrics)
    contract = json.loads(told.steps[0].data_contract)
    assert (contract["population"], contract["updates_private"]) == (POPULATION, False)
    assert contract["inputs"][0]["shape"][0] is None and len(contract["labels"]) == 7
    assert "population" not in json.loads(told.steps[1].data_contract)
    status = stub.GetStatus(pb.GetStatusRequest()).status
    assert (status.devices, status.bytes_up) == (1, len(data))
    assert [(task.spec.name, task.steps) for task in status.tasks] == [(TASK, 1)]
    devices = stub.ListDevices(pb.ListDevicesRequest(population=POPULATION)).devices
    assert [(found.id, found.reports) for found in devices] == [(device.id, 1)]


def test_going_back_is_a_new_release_of_an_old_version(fresh: Live) -> None:
    stub = fresh.admin()
    numbers = [
        stub.Publish(pb.PublishRequest(model=MODEL, version=1, channel="stable")).release.number for _ in range(2)
    ]
    assert numbers[1] > numbers[0]
    listed = stub.ListReleases(pb.ListReleasesRequest(model=MODEL)).releases
    assert [release.number for release in listed][:2] == numbers[::-1]


@pytest.mark.parametrize(("version", "channel"), [(99, "stable"), (0, "stable"), (2**63, "stable"), (1, "../x")])
def test_what_does_not_exist_is_not_published(fresh: Live, version: int, channel: str) -> None:
    before = fresh.facts()
    with refused():
        fresh.admin().Publish(pb.PublishRequest(model=MODEL, version=version, channel=channel))
    assert fresh.facts() == before


def test_a_revoked_device_shows_as_revoked(fresh: Live) -> None:
    device = fresh.device()
    revoked = fresh.admin().RevokeDevice(pb.RevokeDeviceRequest(id=device.id, reason="lost")).device
    assert revoked.revoked_at_ms > 0
    with refused() as found:
        device.check_in()
    assert isinstance(found[0], errors.CertificateRefused)


def test_held_out_examples_are_named_by_their_digest(live: Live) -> None:
    data = (bundle_path(MODEL) / "golden.safetensors").read_bytes()
    answer = live.admin().AddHoldout(
        iter([pb.AddHoldoutRequest(chunk=data[:100]), pb.AddHoldoutRequest(chunk=data[100:])])
    )
    assert answer.digest == hashlib.sha256(data).hexdigest()


def test_the_audit_names_who_asked(live: Live) -> None:
    stub = live.admin()
    stub.CreateTokens(pb.CreateTokensRequest(population=POPULATION, count=2, lifetime_seconds=60))
    newest = stub.ListAudit(pb.ListAuditRequest(limit=1)).rows[0]
    assert (newest.actor, newest.action, newest.subject) == ("operator:first-admin", "tokens.create", POPULATION)
    verified = stub.VerifyAudit(pb.VerifyAuditRequest())
    assert verified.intact
    assert verified.rows == newest.sequence


def test_an_edited_audit_row_is_found(fresh: Live) -> None:
    from sqlalchemy import update

    from umbel_server.tables import AUDIT

    with fresh.parts.store.transaction() as connection:
        connection.execute(update(AUDIT).where(AUDIT.c.sequence == 1).values(actor="operator:somebody-else"))
    verified = fresh.admin().VerifyAudit(pb.VerifyAuditRequest())
    assert not verified.intact
    assert "row 1" in verified.problem


def test_the_stub_and_the_role_table_agree() -> None:
    stub = admin_pb2_grpc.AdminServiceStub(grpc.insecure_channel("127.0.0.1:1"))
    assert all(hasattr(stub, method) for method in METHODS)
