"""The conversation over real sockets: mutual TLS, typed errors, bounded and resumable transfers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.client.conftest import RUNTIME, Bench
from tests.client.grpc_peer import DeviceAuthority, Peer, serving
from umbel.clock import SystemClock
from umbel.digests import digest_of
from umbel.errors import (
    BadInput,
    CertificateRefused,
    Conflict,
    DigestMismatch,
    EnrolmentRefused,
    MalformedMessage,
    NotFound,
    RoundClosed,
    UmbelError,
    Unavailable,
    Unreachable,
)
from umbel.plan import Plan
from umbel_client import ALWAYS, Device, Ending, PersonalSettings
from umbel_client.enrolment import (
    EnrolmentCode,
    Identity,
    IdentityKeeper,
    certificate_request,
    identity_of,
    load_identity,
    new_key,
    request_enrolment,
    save_identity,
)
from umbel_client.fetching import fetch_blob
from umbel_client.files import Disk
from umbel_client.grpc_channel import GrpcChannel
from umbel_client.shelf import Shelf

PERSONAL = PersonalSettings(epochs=1)


@pytest.fixture
async def peer(bench: Bench) -> AsyncIterator[Peer]:
    async with serving(bench.coordinator) as peer:
        yield peer


async def enrolled(peer: Peer) -> Identity:
    key = new_key()
    return identity_of(await request_enrolment(peer.code(), key), key)


async def joined(peer: Peer, bench: Bench) -> Device:
    bench.clock.instant = SystemClock().now()
    save_identity(bench.home, await enrolled(peer))
    return bench.device_with_examples(identity=None, channel=None, personal=PERSONAL)


async def test_a_whole_visit_over_mutual_tls(peer: Peer, bench: Bench) -> None:
    bench.coordinator.publish()
    bench.coordinator.tasks = [Plan(epochs=1)]
    device = await joined(peer, bench)
    visit = await device.wake()
    assert visit.error is None
    assert visit.ending is Ending.CONTRIBUTED
    assert set(peer.callers) == {device.id}
    state = device.kit.memory.state
    assert 49_000 < state.bytes_up < 60_000
    # The graphs of both runtimes are fetched, once per architecture.
    assert 80_000 < state.bytes_down < 240_000


async def test_a_broken_upload_goes_on_over_the_wire(peer: Peer, bench: Bench) -> None:
    bench.coordinator.publish()
    bench.coordinator.tasks = [Plan(epochs=1)]
    bench.coordinator.break_upload_after = 0
    device = await joined(peer, bench)
    visit = await device.wake()
    assert isinstance(visit.error, Unreachable)
    assert (await device.wake()).ending is Ending.CONTRIBUTED
    assert len(bench.coordinator.updates) == 1


async def test_too_late_travels_as_round_closed(peer: Peer, bench: Bench) -> None:
    bench.coordinator.publish()
    bench.coordinator.tasks = [Plan(epochs=1)]
    bench.coordinator.closed = True
    visit = await (await joined(peer, bench)).wake()
    assert visit.session is not None and visit.session.error == "round-closed"


async def test_nobody_there_is_unreachable_and_backs_off(peer: Peer, bench: Bench) -> None:
    device = await joined(peer, bench)
    keeper = IdentityKeeper(bench.home, replace(device.kit.identity), Disk())
    lonely = Device.open(
        bench.home,
        channel=GrpcChannel("localhost:9", keeper),
        runtime=RUNTIME,
        clock=bench.clock,
        status=bench.status,
        policy=ALWAYS,
    )
    visit = await lonely.wake()
    assert isinstance(visit.error, Unreachable)
    assert visit.next_wake - bench.clock.now() <= 4.0


async def test_a_token_works_once(peer: Peer) -> None:
    await enrolled(peer)
    with pytest.raises(EnrolmentRefused, match="was used"):
        await enrolled(peer)


async def test_the_token_is_not_shown_to_a_foreign_coordinator(peer: Peer) -> None:
    foreign = EnrolmentCode(peer.enrol_address, "token-1", DeviceAuthority().certificate())
    with pytest.raises(CertificateRefused, match="pinned"):
        await request_enrolment(foreign, new_key())
    assert peer.tokens == {"token-1"}


async def test_a_certificate_for_another_key_is_not_kept(peer: Peer) -> None:
    peer.devices.issue = lambda request: DeviceAuthority().issue(  # type: ignore[method-assign]
        certificate_request(DeviceAuthority().key)
    )
    with pytest.raises(CertificateRefused, match="another key"):
        await enrolled(peer)


async def test_a_device_does_not_talk_to_a_foreign_coordinator(peer: Peer, bench: Bench) -> None:
    device = await joined(peer, bench)
    foreign = replace(device.kit.identity, server_authority=DeviceAuthority().certificate())
    channel = GrpcChannel(peer.device_address, IdentityKeeper(bench.home, foreign, Disk()))
    visit = await bench.open(identity=None, channel=channel).wake()
    assert isinstance(visit.error, CertificateRefused)
    assert peer.callers == []


async def test_a_certificate_is_renewed_at_two_thirds_of_its_life_and_used_at_once(peer: Peer, bench: Bench) -> None:
    peer.devices.born, peer.devices.life = 1000.0, 1400.0
    device = await joined(peer, bench)
    old = device.kit.identity.certificate_chain
    await device.wake()
    await device.wake()
    assert peer.renewals == 1
    kept = load_identity(bench.home)
    assert kept.certificate_chain != old
    assert kept.device_id == device.id


async def test_an_expired_certificate_asks_for_a_new_enrolment(peer: Peer, bench: Bench) -> None:
    device = await joined(peer, bench)
    bench.clock.instant += 7200
    visit = await device.wake()
    assert isinstance(visit.error, CertificateRefused)
    assert "enrol" in str(visit.error)


async def test_the_private_key_is_readable_by_its_user_only(peer: Peer, bench: Bench) -> None:
    await joined(peer, bench)
    assert (bench.home / "identity.json").stat().st_mode & 0o777 == 0o600


async def test_an_enrolment_code_survives_its_text_and_hides_its_token(peer: Peer) -> None:
    code = peer.code("a-secret-token")
    assert EnrolmentCode.from_text(code.to_text() + "\n") == code
    assert "a-secret-token" not in repr(code)
    for bad in ("", "umbel-enrol-1.", "umbel-enrol-1.AAAA", "other.e30="):
        with pytest.raises(MalformedMessage, match="enrolment code"):
            EnrolmentCode.from_text(bad)


# Fetching, from a far side that is broken or hostile.


class Download:
    """A shelf, and a channel to fetch one blob of 20,000 bytes through."""

    def __init__(self, peer: Peer, identity: Identity, folder: Path) -> None:
        self.data = bytes(range(250)) * 80
        self.digest = digest_of(self.data)
        peer.coordinator.blobs[self.digest] = self.data
        self.shelf = Shelf(folder)
        self.channel = GrpcChannel(peer.device_address, IdentityKeeper(folder, identity, Disk()))

    async def fetch(self) -> None:
        try:
            await fetch_blob(self.channel, self.shelf, self.digest, len(self.data))
        finally:
            await self.channel.close()


@pytest.fixture
async def download(peer: Peer, tmp_path: Path) -> Download:
    return Download(peer, await enrolled(peer), tmp_path / "shelf")


async def test_endless_data_is_cut_off_at_the_announced_size(peer: Peer, download: Download) -> None:
    peer.fetch_fault = "endless"
    with pytest.raises(DigestMismatch, match="sends more"):
        await download.fetch()
    assert not download.shelf.holds(download.digest)
    assert not download.shelf.part(download.digest).exists()
    assert download.channel.traffic.down < len(download.data) + 3 * (256 << 10)


async def test_a_flipped_bit_is_refused_and_nothing_of_it_stays(peer: Peer, download: Download) -> None:
    peer.fetch_fault = "flipped"
    with pytest.raises(DigestMismatch, match="fetch them again"):
        await download.fetch()
    peer.fetch_fault = ""
    await download.fetch()
    assert download.shelf.path(download.digest).read_bytes() == download.data


async def test_a_broken_stream_goes_on_where_it_stopped(peer: Peer, download: Download) -> None:
    peer.hang_up_after = 8192
    with pytest.raises(Unreachable):
        await download.fetch()
    assert download.shelf.part(download.digest).stat().st_size == 8192
    before = download.channel.traffic.down
    await download.fetch()
    assert download.shelf.path(download.digest).read_bytes() == download.data
    assert download.channel.traffic.down - before < len(download.data) - 8192 + 200


async def test_a_truncated_stream_is_not_taken_for_whole(peer: Peer, download: Download) -> None:
    whole = download.data
    peer.coordinator.blobs[download.digest] = whole[:5000]
    with pytest.raises(Unreachable, match="5000 of 20000"):
        await download.fetch()
    assert not download.shelf.holds(download.digest)
    peer.coordinator.blobs[download.digest] = whole
    await download.fetch()
    assert download.shelf.holds(download.digest)


async def test_a_part_longer_than_the_blob_starts_anew(download: Download) -> None:
    download.shelf.part(download.digest).write_bytes(bytes(30_000))
    await download.fetch()
    assert download.shelf.path(download.digest).read_bytes() == download.data


@pytest.mark.parametrize(
    ("status", "kind"),
    [("NOT_FOUND", NotFound), ("UNIMPLEMENTED", BadInput), ("UNAVAILABLE", Unreachable), ("INTERNAL", UmbelError)],
)
async def test_a_status_without_a_code_still_has_a_type(
    peer: Peer, download: Download, status: str, kind: type[UmbelError]
) -> None:
    peer.fetch_fault = status
    with pytest.raises(kind, match="as the test asked"):
        await download.fetch()


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        ("INVALID_ARGUMENT", BadInput),
        ("FAILED_PRECONDITION", Conflict),
        ("ABORTED", RoundClosed),
        ("UNAVAILABLE", Unavailable),
        ("INTERNAL", UmbelError),
    ],
)
async def test_a_code_of_a_newer_coordinator_goes_by_its_status(
    peer: Peer, download: Download, status: str, kind: type[UmbelError]
) -> None:
    peer.fetch_fault, peer.fetch_code = status, "invented-later"
    with pytest.raises(UmbelError, match="as the test asked") as caught:
        await download.fetch()
    assert type(caught.value) is kind
