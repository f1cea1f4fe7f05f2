"""What a device in JavaScript doesn't believe, and what it does when it isn't believed, heard, or answered."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.javascript import devices
from tests.javascript.between import Refusal, changed, cut_after, flipped, relayed
from tests.javascript.devices import MODEL, JavaScriptDevice, Parties
from tests.server.processes import wait_until
from umbel.digests import digest_of
from umbel.enrolment_code import EnrolmentCode
from umbel.participants import issue
from umbel.v1 import device_pb2 as pb
from umbel_models.zoo import bundle_path

pytestmark = pytest.mark.slow  # npm fetches packages for it, and the quick tests need pip alone


@pytest.fixture(scope="session")
def alone(real: Parties) -> JavaScriptDevice:
    """The only device of a private task that waits for two: each of its visits finds work, none may report."""
    real.task("alone", private=True)
    device = real.javascript("alone", private=True)
    while device.visit(minimum_cohort=99)["ending"] == "asleep":
        pass  # until the helper has signed the round
    return device


def with_base(change: Callable[[Any], None]) -> Callable[[Any], None]:
    return lambda answer: change(answer.assignment.base)


def other_plan(answer: Any) -> None:
    answer.assignment.plan.epochs += 1


def flip(message: str, field: str, place: int = -1) -> Callable[[Any], None]:
    def change(answer: Any) -> None:
        part = getattr(answer.assignment, message)
        setattr(part, field, flipped(getattr(part, field), place))

    return change


LIES = {
    "another base": (flip("base", "release"), "signature-invalid"),
    "a base signed by somebody": (flip("base", "signature"), "signature-invalid"),
    "another round": (flip("private_round", "descriptor"), "signature-invalid"),
    "a round that only the leader signed": (flip("private_round", "helper_signature"), "signature-invalid"),
    "a round that only the helper signed": (flip("private_round", "leader_signature"), "signature-invalid"),
    "another plan": (other_plan, "not-allowed"),
    "another task": (lambda answer: setattr(answer.assignment, "task", "other"), "not-allowed"),
    "no private round": (lambda answer: answer.assignment.ClearField("private_round"), "not-allowed"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_about_the_work_ends_the_session_before_anything_is_sent(
    real: Parties, alone: JavaScriptDevice, lie: str
) -> None:
    change, code = LIES[lie]
    with relayed(alone, real.operator.state, CheckIn=lambda data: changed(pb.CheckInResponse, data, change)) as relay:
        told = alone.visit()
    assert (told["ending"], told["error"], told["shape"]) == ("refused", code, "-*"), told
    assert {name for name, _ in relay.asked} == {"CheckIn"}


def test_a_round_below_the_devices_own_floor_is_not_joined_and_the_next_check_in_says_so(
    real: Parties, alone: JavaScriptDevice
) -> None:
    assert alone.visit(minimum_cohort=3)["error"] == "cohort-too-small"
    with relayed(alone, real.operator.state) as relay:
        assert alone.visit(minimum_cohort=3)["shape"] == "-#"
    (asked,) = relay.calls("CheckIn")
    (record,) = pb.CheckInRequest.FromString(asked).sessions
    assert (record.round, record.shape, record.error) == (1, "-#", "cohort-too-small")


def test_a_changed_file_is_refused_and_fetched_again(real: Parties) -> None:
    real.task("changed", devices=1)
    device = real.javascript("changed")

    def spoil(data: bytes) -> bytes:
        return changed(pb.FetchResponse, data, lambda answer: setattr(answer, "chunk", flipped(answer.chunk)))

    def grow(data: bytes) -> bytes:
        return changed(pb.FetchResponse, data, lambda answer: setattr(answer, "chunk", answer.chunk + b"more"))

    for change in (spoil, grow):
        with relayed(device, real.operator.state, Fetch=change) as relay:
            told = device.visit()
        assert (told["ending"], told["error"]) == ("refused", "digest-mismatch"), told
        assert relay.calls("Fetch")
        assert not relay.calls("Report")
        assert all(path.suffix != ".part" for path in (device.home / "shelf").glob("*"))
    device.contribute()
    assert real.round("changed")["reports"] == 1


def test_a_fetch_that_was_cut_goes_on_where_it_was(real: Parties) -> None:
    real.task("fetched", devices=1)
    device = real.javascript("fetched")
    answered = []

    def stop(data: bytes) -> bytes:
        answered.append(pb.FetchResponse.FromString(data))
        if len(answered) > 2:
            raise Refusal(grpc.StatusCode.UNAVAILABLE)
        return data

    with relayed(device, real.operator.state, Fetch=stop):
        told = device.visit()
    assert (told["ending"], told["error"]) == ("failed", "unreachable"), told
    held = {path.name for path in (device.home / "shelf").iterdir()}
    weights = bundle_path(MODEL) / "weights.safetensors"
    digest, half = digest_of(weights.read_bytes()), weights.read_bytes()[:20_000]
    assert held and digest not in held
    (device.home / "shelf" / f"{digest}.part").write_bytes(half)
    with relayed(device, real.operator.state) as relay:
        assert device.visit()["shape"] == "-!v[]+^"
    wanted = {it.digest: it.offset for it in map(pb.FetchRequest.FromString, relay.calls("Fetch"))}
    assert not held & set(wanted)
    assert wanted[digest] == len(half)


def test_a_report_whose_connection_is_cut_goes_through_at_the_next_try_and_counts_once(real: Parties) -> None:
    real.task("cut", devices=1)
    device = real.javascript("cut")
    with cut_after(device, 30_000) as sent:
        told = device.visit()
    assert (told["ending"], told["error"]) == ("failed", "unreachable"), told
    assert sent and max(sent) < 49_000, "it was cut within the report"
    kept = (device.home / "report.bin").read_bytes()
    before = json.loads((device.home / "session.json").read_text())["report"]
    with relayed(device, real.operator.state) as relay:
        told = device.visit()
    assert (told["ending"], told["shape"]) == ("contributed", "-v[]+!+^"), told
    begin, *chunks = (pb.ReportRequest.FromString(asked) for asked in relay.calls("Report"))
    assert begin.begin.report_id == before["report_id"]
    tail = b"".join(chunk.chunk for chunk in chunks)
    assert kept.endswith(tail)
    found = real.round("cut")
    assert (found["reports"], found["assigned"]) == (1, 1)
    assert not (device.home / "report.bin").exists()


def test_a_report_whose_acknowledgement_was_lost_counts_once_and_sends_no_byte_twice(real: Parties) -> None:
    real.task("lost", devices=1)
    device = real.javascript("lost")

    def lose(data: bytes) -> bytes:
        if pb.ReportResponse.FromString(data).HasField("accepted"):
            raise Refusal(grpc.StatusCode.UNAVAILABLE)
        return data

    with relayed(device, real.operator.state, Report=lose):
        assert device.visit()["ending"] == "failed"
    assert real.round("lost")["reports"] == 1
    with relayed(device, real.operator.state) as relay:
        assert device.visit()["shape"] == "-v[]+!+^"
    (asked,) = relay.calls("Report")
    assert pb.ReportRequest.FromString(asked).HasField("begin")
    assert real.round("lost")["reports"] == 1


def test_a_report_goes_on_at_the_offset_that_the_coordinator_names(real: Parties) -> None:
    real.task("offset", devices=1)
    device = real.javascript("offset")

    def pretend(data: bytes) -> bytes:
        return changed(pb.ReportResponse, data, lambda answer: setattr(answer.proceed, "offset", 20_000))

    with relayed(device, real.operator.state, Report=pretend) as relay:
        told = device.visit()
    # The coordinator misses bytes and says so; at the next try their digest doesn't fit; then all are sent again.
    assert (told["ending"], told["error"]) == ("failed", "interrupted"), told
    _, *chunks = (pb.ReportRequest.FromString(asked) for asked in relay.calls("Report"))
    assert b"".join(chunk.chunk for chunk in chunks) == (device.home / "report.bin").read_bytes()[20_000:]
    assert device.visit()["error"] == "digest-mismatch"
    assert device.visit()["shape"] == "-v[]+!+!+^"


def test_a_report_that_the_round_no_longer_wants_is_given_up_before_its_bytes(real: Parties) -> None:
    real.task("closed", devices=1)
    device = real.javascript("closed")

    def close(data: bytes) -> bytes:
        raise Refusal(grpc.StatusCode.ABORTED, "a-newer-code")

    with relayed(device, real.operator.state, Report=close) as relay:
        told = device.visit()
    assert (told["ending"], told["error"], told["shape"]) == ("refused", "round-closed", "-v[]+#"), told
    assert len(relay.calls("Report")) == 1
    assert not (device.home / "report.bin").exists()


PAUSES = {
    "unavailable": (Refusal(grpc.StatusCode.UNAVAILABLE), (1, 8)),
    "not allowed": (Refusal(grpc.StatusCode.PERMISSION_DENIED, "not-allowed"), (3600, 10_800)),
    "a newer code": (Refusal(grpc.StatusCode.INVALID_ARGUMENT, "no-longer-known"), (3600, 10_800)),
}


@pytest.mark.parametrize("refused", PAUSES)
def test_a_refused_check_in_is_followed_by_a_pause_of_its_kind(
    real: Parties, alone: JavaScriptDevice, refused: str
) -> None:
    refusal, (least, most) = PAUSES[refused]

    def refuse(data: bytes) -> bytes:
        raise refusal

    with relayed(alone, real.operator.state, CheckIn=refuse):
        told = alone.visit()
    assert told["ending"] == "failed", told
    assert least <= told["sleep"] <= most


def test_a_coordinator_of_another_authority_gets_nothing(real: Parties, alone: JavaScriptDevice) -> None:
    own = alone.identity()
    stranger = own | {"authority": json.loads(real.helper.card.read_text())["certificate"]}
    (alone.home / "identity.json").write_text(json.dumps(stranger))
    try:
        told = alone.visit()
    finally:
        (alone.home / "identity.json").write_text(json.dumps(own))
    assert (told["ending"], told["error"]) == ("failed", "unreachable"), told


def test_examples_that_make_no_sense_end_the_session_and_nothing_of_them_is_sent(
    real: Parties, monkeypatch: pytest.MonkeyPatch
) -> None:
    real.task("odd", devices=1)
    device = real.javascript("odd")
    x, y = devices.recordings(60)
    for odd, error in ((x * np.nan, "not-finite"), (x[:, :, :50], "runtime-failure")):
        monkeypatch.setattr(devices, "recordings", lambda count, *seed, odd=odd: (odd[:count], y[:count]))
        with relayed(device, real.operator.state) as relay:
            told = device.visit()
        assert (told["ending"], told["error"], told["shape"]) == ("refused", error, "-v[*"), told
        assert not relay.calls("Report")


def test_a_token_goes_to_nobody_but_the_coordinator_that_the_code_names(real: Parties) -> None:
    real.task("named", devices=1)
    code = EnrolmentCode.from_text(real.code("named"))
    device = JavaScriptDevice(real.scripts, real.folder / "javascript-named")
    stranger = replace(code, authority=json.loads(real.helper.card.read_text())["certificate"].encode())
    refused = subprocess.run(device.words("enrol", stranger.to_text()), capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "unreachable" in refused.stderr
    key = (device.home / "key.pem").read_bytes()
    device.call("enrol", code.to_text())
    device.call("enrol", code.to_text())  # as after a lost answer: the same key may ask again
    assert (device.home / "key.pem").read_bytes() == key


def test_certificates_are_renewed_before_they_end_and_not_used_afterwards(
    real: Parties, alone: JavaScriptDevice
) -> None:
    device = x509.load_pem_x509_certificate(alone.identity()["certificate"].encode())
    left = device.not_valid_after_utc.timestamp() - time.time()
    with relayed(alone, real.operator.state) as relay:
        assert alone.visit(ahead=0.4 * left)["ending"] == "refused"
        assert not relay.calls("Renew")
        told = alone.visit(ahead=0.8 * left)
        assert told["ending"] == "refused", told
        assert relay.calls("Renew")
        asked = len(relay.asked)
        told = alone.visit(ahead=1.1 * left)
        assert (told["ending"], told["error"]) == ("failed", "certificate-refused"), told
        assert len(relay.asked) == asked
    assert x509.load_pem_x509_certificate(alone.identity()["certificate"].encode()) != device


def test_a_participants_certificate_that_ends_soon_is_renewed_at_the_helper(
    real: Parties, alone: JavaScriptDevice
) -> None:
    pinned = json.loads((alone.home / "helper.json").read_text())
    authority = Ed25519PrivateKey.from_private_bytes((real.helper.state / "keys" / "authority.key").read_bytes())
    key = bytes.fromhex(pinned["certificate"]["public_key"]["hex"])
    soon = issue(alone.identity()["population"], key, time.time() + 86_400, authority)
    pinned["certificate"] |= {"not_after_ms": soon.not_after_ms, "signature": {"hex": soon.signature.hex()}}
    (alone.home / "helper.json").write_text(json.dumps(pinned))
    alone.visit(minimum_cohort=3)
    renewed = json.loads((alone.home / "helper.json").read_text())["certificate"]
    assert renewed["public_key"] == pinned["certificate"]["public_key"]
    assert renewed["not_after_ms"] > soon.not_after_ms + 50 * 86_400_000


def killed_in_training(device: JavaScriptDevice) -> None:
    session = device.home / "session.json"
    process = subprocess.Popen(device.words(*device.for_a_visit()), stdout=subprocess.DEVNULL)
    wait_until(lambda: session.exists() and 'v["' in session.read_text(), "it trains")
    process.kill()
    process.wait()


def test_a_process_lost_in_training_goes_on_at_the_next_visit(real: Parties) -> None:
    real.task("died", devices=1)
    device = real.javascript("died")
    killed_in_training(device)
    told = device.visit()
    assert (told["ending"], told["shape"]) == ("contributed", "-v[!v[]+^"), told


def test_a_process_lost_right_after_its_check_in_doesnt_ask_for_work_again(real: Parties) -> None:
    real.task("fetching", devices=1)
    device = real.javascript("fetching")
    running: list[subprocess.Popen[bytes]] = []

    def kill(data: bytes) -> bytes:
        running[0].kill()
        raise Refusal(grpc.StatusCode.UNAVAILABLE)

    with relayed(device, real.operator.state, Fetch=kill) as relay:
        running.append(subprocess.Popen(device.words(*device.for_a_visit()), stdout=subprocess.DEVNULL))
        running[0].wait()
        relay.answers.clear()
        assert device.visit()["shape"] == "-!v[]+^"
    assert len(relay.calls("CheckIn")) == 1


def test_a_session_whose_deadline_has_passed_is_told_as_lost(real: Parties) -> None:
    real.task("late", devices=1)
    device = real.javascript("late")
    killed_in_training(device)
    with relayed(device, real.operator.state) as relay:
        device.visit(ahead=3600.0)
    (record,) = pb.CheckInRequest.FromString(relay.calls("CheckIn")[0]).sessions
    assert record.shape == "-v[!"
    assert relay.asked[0][0] == "CheckIn"
