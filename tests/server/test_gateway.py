"""The devices' ports over real sockets with real certificates: enrol, renew, check in, fetch, report."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from tests.server.live import MODEL, POPULATION, TASK, Live, LiveDevice, refused, serving
from umbel import errors, messages
from umbel.clock import DAY
from umbel.digests import digest_of
from umbel.v1 import device_pb2 as pb
from umbel.visit import ReportBegin, Retry
from umbel_models.zoo import bundle_path
from umbel_server.authority import Authority, PeerKind, key_to_pem, make_request
from umbel_server.gateway import CHUNK_BYTES, STREAMS_PER_DEVICE
from umbel_server.task import Task


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    with serving(tmp_path / "state") as live:
        live.add_model()
        yield live


@pytest.fixture
def device(live: Live) -> LiveDevice:
    return live.device()


def start_task(live: Live, goal: int = 2) -> None:
    task = Task(TASK, POPULATION, MODEL, goal=goal, over_selection=3.0, updates_private=False)
    live.do(lambda: live.parts.coordinator.operations.create_task(task, "operator:test"))
    live.run(live.parts.coordinator.tick())


def chunks(data: bytes, size: int = 10_000) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


# Enrolment and certificates.


def test_enrolment_tells_a_device_whom_to_trust_and_where_to_call(live: Live) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    request = pb.EnrolRequest(token=live.token(), certificate_request=make_request(key))
    answer = live.enrolment().Enrol(request)
    assert answer.population == POPULATION
    assert answer.release_key == live.parts.release_key
    assert answer.server_authority == live.parts.authorities.server.certificate_pem
    assert answer.device_address == ":" + live.addresses.device.rpartition(":")[2]
    assert isinstance(LiveDevice(live, key, answer.certificate_chain).check_in().reply, Retry)


def test_a_bad_enrolment_is_refused_with_a_status(live: Live) -> None:
    request = make_request(ec.generate_private_key(ec.SECP256R1()))
    with refused() as found:
        live.enrolment().Enrol(pb.EnrolRequest(token="guess", certificate_request=request))
    assert isinstance(found[0], errors.EnrolmentRefused)
    with refused() as found:
        live.enrolment().Enrol(pb.EnrolRequest(token=live.token(), certificate_request=b"nonsense"))
    assert isinstance(found[0], errors.MalformedMessage)


def test_renewal_gives_a_longer_certificate_for_the_same_key(live: Live, device: LiveDevice) -> None:
    live.clock.ahead = 6 * DAY
    answer = device.stub.Renew(pb.RenewRequest(certificate_request=make_request(device.key)))
    live.clock.ahead = 8 * DAY
    with refused() as found:
        device.check_in()
    assert isinstance(found[0], errors.CertificateRefused)
    renewed = live.parts.authorities.device.verify(answer.certificate_chain, PeerKind.DEVICE, live.clock.now())
    assert renewed.id == device.id
    with refused() as found:
        request = make_request(ec.generate_private_key(ec.SECP256R1()))
        live.clock.ahead = 0.0
        device.stub.Renew(pb.RenewRequest(certificate_request=request))
    assert isinstance(found[0], errors.NotAllowed)


def test_a_revoked_device_is_refused_at_its_next_call_on_the_same_connection(live: Live, device: LiveDevice) -> None:
    device.check_in()
    live.do(lambda: live.parts.access.revoke("operator:test", device.id, "lost"))
    for call in (device.check_in, lambda: device.fetch("0" * 64), lambda: list(device.stub.Report(iter([])))):
        with refused() as found:
            call()
        assert isinstance(found[0], errors.CertificateRefused)


@pytest.mark.parametrize("stranger", ["nobody", "foreign", "operator"])
def test_who_is_not_a_device_does_not_get_past_the_handshake(live: Live, stranger: str) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    now = live.clock.now()
    foreign = Authority.create("umbel device authority", now)
    certificate = {
        "nobody": None,
        "foreign": foreign.issue(key.public_key(), PeerKind.DEVICE, POPULATION, now, DAY),
        "operator": live.first_admin().certificate,
    }[stranger]
    private = live.first_admin().key if stranger == "operator" else key_to_pem(key)
    channel = live.channel(live.addresses.device, private if certificate else None, certificate)
    with pytest.raises(grpc.RpcError) as raised:
        channel.unary_unary("/umbel.v1.DeviceService/CheckIn")(b"", timeout=5)
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE


def test_a_device_speaks_for_its_own_population_only(device: LiveDevice) -> None:
    with refused() as found:
        device.check_in("others")
    assert isinstance(found[0], errors.NotAllowed)


# Fetch.


def test_a_published_file_is_fetched_whole_and_from_any_offset(live: Live, device: LiveDevice) -> None:
    weights = (bundle_path(MODEL) / "weights.safetensors").read_bytes()
    digest = digest_of(weights)
    assert device.fetch(digest) == weights
    for offset in (1, 777, len(weights) - 1, len(weights)):
        assert device.fetch(digest, offset) == weights[offset:]
    first = next(iter(device.stub.Fetch(pb.FetchRequest(digest=digest, offset=len(weights)))))
    assert (first.total_size, first.chunk) == (len(weights), b"")


@pytest.mark.parametrize(
    ("digest", "offset", "error"),
    [
        ("0" * 64, 0, errors.NotFound),
        ("../../keys/release.key", 0, errors.MalformedMessage),
        ("", 0, errors.MalformedMessage),
        (None, 2**63, errors.OutOfBounds),
        (None, 10**9, errors.OutOfBounds),
    ],
)
def test_what_can_not_be_fetched_is_refused(
    device: LiveDevice, digest: str | None, offset: int, error: type[errors.UmbelError]
) -> None:
    known = digest_of((bundle_path(MODEL) / "weights.safetensors").read_bytes())
    with refused() as found:
        device.fetch(known if digest is None else digest, offset)
    assert type(found[0]) is error


def test_reports_and_the_strategys_memory_are_not_fetchable(live: Live, device: LiveDevice) -> None:
    start_task(live)
    begin, data = device.sealed(device.assignment())
    device.report(begin, chunks(data))
    with refused() as found:
        device.fetch(begin.sealed_digest)
    assert isinstance(found[0], errors.NotFound)


def test_one_device_has_only_so_many_streams(live: Live, device: LiveDevice) -> None:
    start_task(live)
    begin, data = device.sealed(device.assignment())
    hold = threading.Event()
    held = [device.stub.Report(_begin_and_wait(begin, hold)) for _ in range(STREAMS_PER_DEVICE)]
    assert [next(iter(call)).proceed.offset for call in held] == [0] * STREAMS_PER_DEVICE
    with refused() as found:
        device.report(begin, chunks(data))
    assert isinstance(found[0], errors.Unavailable)
    other = live.device()
    assert other.report(*_as_report(other))[-1].HasField("accepted")
    hold.set()
    for call in held:
        assert isinstance(call.exception(), grpc.RpcError)
    assert device.report(begin, chunks(data))[-1].HasField("accepted")


def _begin_and_wait(begin: ReportBegin, hold: threading.Event) -> Iterator[pb.ReportRequest]:
    yield pb.ReportRequest(begin=messages.report_begin_to_message(begin))
    hold.wait(20)


def _as_report(device: LiveDevice) -> tuple[ReportBegin, list[bytes]]:
    begin, data = device.sealed(device.assignment())
    return begin, chunks(data)


# Report.


def test_a_report_is_counted_and_a_repeated_one_is_accepted_but_not_counted_again(
    live: Live, device: LiveDevice
) -> None:
    start_task(live)
    begin, data = device.sealed(device.assignment())
    answers = device.report(begin, chunks(data))
    assert answers[0].proceed.offset == 0
    assert answers[-1].HasField("accepted")
    again = device.report(begin, [])
    assert again[0].proceed.offset == len(data)
    assert again[-1].HasField("accepted")
    assert live.do(live.parts.coordinator.operations.rounds)[0].reports == 1


def test_a_broken_upload_goes_on_where_it_was(live: Live, device: LiveDevice) -> None:
    start_task(live)
    begin, data = device.sealed(device.assignment())
    with refused() as found:
        device.report(begin, chunks(data)[:2])
    assert isinstance(found[0], errors.Interrupted)
    rest = device.stub.Report(
        iter(
            [
                pb.ReportRequest(begin=messages.report_begin_to_message(begin)),
                *(pb.ReportRequest(chunk=chunk) for chunk in chunks(data)[2:]),
            ]
        )
    )
    answers = list(rest)
    assert answers[0].proceed.offset == 20_000
    assert answers[-1].HasField("accepted")


def test_a_late_report_is_told_before_a_byte_is_sent(live: Live, device: LiveDevice) -> None:
    start_task(live, goal=1)
    late = live.device()
    begin, data = late.sealed(late.assignment())
    device.report(*_as_report(device))
    with refused() as found:
        late.report(begin, chunks(data))
    assert isinstance(found[0], errors.RoundClosed)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"upload_token": b"another"}, errors.NotAllowed),
        ({"session_id": "0" * 32}, errors.NotFound),
        ({"report_id": "short"}, errors.MalformedMessage),
        ({"sealed_digest": "0" * 64}, errors.DigestMismatch),
        ({"sealed_size": 10**9}, errors.OutOfBounds),
        ({"sealed_size": 0}, errors.OutOfBounds),
        ({"upload_token": b""}, errors.OutOfBounds),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value.code,
)
def test_a_report_that_lies_is_refused_and_counted_for_nothing(
    live: Live, device: LiveDevice, change: dict[str, object], error: type[errors.UmbelError]
) -> None:
    start_task(live)
    begin, data = device.sealed(device.assignment())
    before = live.facts()
    with refused() as found:
        device.report(dataclasses.replace(begin, **change), chunks(data))
    assert type(found[0]) is error
    assert live.facts() == before
    assert device.report(begin, chunks(data))[-1].HasField("accepted")


@pytest.mark.parametrize(
    "requests",
    [
        [],
        [pb.ReportRequest(chunk=b"x")],
        [pb.ReportRequest()],
        [pb.ReportRequest(begin=pb.ReportBegin())],
    ],
    ids=["nothing", "chunk first", "empty", "empty begin"],
)
def test_a_report_starts_with_begin(live: Live, device: LiveDevice, requests: list[pb.ReportRequest]) -> None:
    with refused() as found:
        list(device.stub.Report(iter(requests)))
    assert isinstance(found[0], errors.BadInput)


@pytest.mark.parametrize(
    ("bad", "words"),
    [(b"", "aren't empty"), (bytes(CHUNK_BYTES + 1), f"the limit is {CHUNK_BYTES}")],
    ids=["empty", "too large"],
)
def test_chunks_have_a_size(live: Live, device: LiveDevice, bad: bytes, words: str) -> None:
    start_task(live)
    begin, _ = device.sealed(device.assignment())
    with refused() as found:
        device.report(begin, [bad])
    assert isinstance(found[0], errors.BadInput)
    assert words in str(found[0])


def test_more_bytes_than_announced_are_refused_and_the_upload_can_go_on(live: Live, device: LiveDevice) -> None:
    start_task(live)
    begin, data = device.sealed(device.assignment())
    with refused() as found:
        device.report(begin, [*chunks(data)[:-1], chunks(data)[-1] + b"more"])
    assert isinstance(found[0], errors.OutOfBounds)
    whole = len(chunks(data)) - 1
    assert device.report(begin, chunks(data)[whole:])[-1].HasField("accepted")
