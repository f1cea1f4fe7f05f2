"""Random bytes and mutated messages at every call of the devices' ports: a typed refusal, and nothing has changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.server.live import MODEL, POPULATION, TASK, Live, LiveDevice, serving
from umbel import errors, messages
from umbel.digests import digest_of
from umbel.errors import ERROR_KEY
from umbel.sealing import SEALED
from umbel.v1 import device_pb2 as pb
from umbel.visit import CheckIn, Outcome, ReleaseOutcome, SessionRecord
from umbel_models.zoo import bundle_path
from umbel_server.authority import make_request
from umbel_server.task import Task

MANY = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
METHODS = ("CheckIn", "Renew", "Fetch", "Report", "Enrol")
KEY = ec.generate_private_key(ec.SECP256R1())
OFFER = CheckIn(
    POPULATION,
    ("onnx",),
    (SEALED,),
    held_bundles=(digest_of(b"bundle"),),
    training_examples=0,  # so that no mutation makes it an offer that is taken
    sessions=(SessionRecord(TASK, 1, "-v[]+^"),),
    outcomes=(ReleaseOutcome(MODEL, 1, Outcome.ADOPTED),),
    offers_work=False,
)


@dataclasses.dataclass
class Target:
    """A coordinator with a running task, and a device with an assignment that it hasn't reported on."""

    live: Live
    device: LiveDevice
    good: dict[str, bytes]
    """A good message for each call."""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with serving(tmp_path_factory.mktemp("malformed") / "state") as live:
        live.add_model()
        task = Task(TASK, POPULATION, MODEL, goal=2, rounds=1, updates_private=False)
        live.do(lambda: live.parts.coordinator.operations.create_task(task, "operator:test"))
        live.run(live.parts.coordinator.tick())
        device = live.device()
        begin, _ = device.sealed(device.assignment())
        request = pb.ReportRequest(begin=messages.report_begin_to_message(begin))
        live.enrolment()
        yield Target(live, device, good_messages(request.SerializeToString()))


def good_messages(report: bytes) -> dict[str, bytes]:
    weights = digest_of((bundle_path(MODEL) / "weights.safetensors").read_bytes())
    return {
        "CheckIn": messages.check_in_to_message(OFFER).SerializeToString(),
        "Renew": pb.RenewRequest(certificate_request=make_request(KEY)).SerializeToString(),
        "Fetch": pb.FetchRequest(digest=weights, offset=5).SerializeToString(),
        "Report": report,
        "Enrol": pb.EnrolRequest(token="guess", certificate_request=make_request(KEY)).SerializeToString(),
    }


def send(target: Target, method: str, data: bytes) -> grpc.StatusCode:
    """Send raw bytes as a message; what comes back is OK or carries an error's code that fits its status."""
    if method == "Enrol":
        channel, service = target.live.channels[-1], "EnrolmentService"
    else:
        channel, service = target.device.channel, "DeviceService"
    path = f"/umbel.v1.{service}/{method}"
    try:
        if method == "Fetch":
            list(channel.unary_stream(path)(data, timeout=20))
        elif method == "Report":
            list(channel.stream_stream(path)(iter([data]), timeout=20))
        else:
            channel.unary_unary(path)(data, timeout=20)
    except grpc.RpcError as error:
        assert isinstance(error, grpc.Call)
        code = dict(error.trailing_metadata() or ())[ERROR_KEY]
        assert isinstance(code, str)
        assert errors.BY_CODE[code].status.name == error.code().name
        return error.code()
    return grpc.StatusCode.OK


def mutated(data: st.DataObject, good: bytes) -> bytes:
    """A good message with a few bytes changed, dropped or put in."""
    found = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, len(found) - 1)))
        match data.draw(st.sampled_from(["set", "drop", "put", "cut"])):
            case "set" if found:
                found[at] = data.draw(st.integers(0, 255))
            case "drop":
                del found[at : at + data.draw(st.integers(1, 8))]
            case "cut":
                del found[at:]
            case _:
                found[at:at] = data.draw(st.binary(max_size=8))
    return bytes(found)


@pytest.mark.parametrize("method", METHODS)
def test_random_bytes_get_a_typed_status_and_change_nothing(target: Target, method: str) -> None:
    before = target.live.facts()

    @MANY
    @given(junk=st.binary(max_size=300))
    def each(junk: bytes) -> None:
        assert send(target, method, junk) is not grpc.StatusCode.INTERNAL

    each()
    assert target.live.facts() == before


@pytest.mark.parametrize("method", METHODS)
def test_mutated_messages_get_a_typed_status_and_change_nothing(target: Target, method: str) -> None:
    before = target.live.facts()

    @MANY
    @given(data=st.data())
    def each(data: st.DataObject) -> None:
        assert send(target, method, mutated(data, target.good[method])) is not grpc.StatusCode.INTERNAL

    each()
    assert target.live.facts() == before


def test_the_good_messages_themselves_are_understood(target: Target) -> None:
    found = {method: send(target, method, good) for method, good in target.good.items()}
    assert found == {
        "CheckIn": grpc.StatusCode.OK,
        "Renew": grpc.StatusCode.PERMISSION_DENIED,
        "Fetch": grpc.StatusCode.OK,
        "Report": grpc.StatusCode.UNAVAILABLE,  # it ends before its first chunk: begin again
        "Enrol": grpc.StatusCode.UNAUTHENTICATED,
    }
