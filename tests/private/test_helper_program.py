"""The helper as its operator runs it: made, started, asked over TLS by a leader and a device, healthy, stopped."""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from prometheus_client.parser import text_string_to_metric_families

from tests.private.parties import NOW, POPULATION, Cohort, Party
from tests.server.processes import hearing_the_terminal, wait_until
from umbel.clock import SystemClock
from umbel.errors import (
    CertificateRefused,
    EnrolmentRefused,
    MalformedMessage,
    SetRefused,
    SignatureInvalid,
    Unavailable,
    Unreachable,
    WrongState,
)
from umbel.helper_card import HelperCard
from umbel.plan import Kind
from umbel.secure_sum import Participant
from umbel.v1 import secure_sum_pb2 as pb
from umbel.v1.secure_sum_pb2_grpc import HelperServiceStub
from umbel_client.participation import enrol_at_helper, renew_at_helper
from umbel_client.private import Pinned
from umbel_server.helper.folder import HelperFolder
from umbel_server.helper.port import LeaderSigner
from umbel_server.helper.program import _pages
from umbel_server.helper.records import Records
from umbel_server.helper.remote import RemoteHelper

UMBEL = [sys.executable, "-c", "from umbel_server.cli import main; main()"]


@dataclass
class Running:
    folder: Path
    leader: LeaderSigner
    card: HelperCard
    health: str
    process: subprocess.Popen[str]

    def tokens(self, count: int) -> list[str]:
        made = umbel("helper", "tokens", "--state", str(self.folder), "--population", POPULATION, "--count", str(count))
        return json.loads(made)["tokens"]


def umbel(*arguments: str) -> str:
    done = subprocess.run([*UMBEL, *arguments, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("helper") / "state"
    leader = LeaderSigner(Ed25519PrivateKey.generate())
    address = ("--address", "127.0.0.1:0", "--minimum-cohort", "2", "--operator", "ACME IT")
    umbel("helper", "init", str(folder), "--leader", leader.public.hex(), *address)
    command = [*UMBEL, "helper", "run", "--state", str(folder), "--health-port", str(free_port()), "--json"]
    with hearing_the_terminal():
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    ready = json.loads(process.stdout.readline())
    card = HelperCard.from_text((folder / "card.json").read_bytes())
    assert card.address == ready["address"] and card.operator == "ACME IT"
    yield Running(folder, leader, card, ready["health"], process)
    process.send_signal(signal.SIGHUP)  # its terminal goes; the other signals go the same way
    assert process.wait(10) == 0
    process.stdout.close()


def free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture
def party(running: Running) -> Iterator[Party]:
    """The usual parties, but their helper is the running program."""
    party = Party()
    party.sign = running.leader
    remote = RemoteHelper(running.card, running.leader)
    party.port = remote  # type: ignore[assignment]
    party.clock.instant = SystemClock().now()
    yield party
    remote.close()


async def member(running: Running, token: str) -> tuple[Pinned, Participant]:
    pinned = await enrol_at_helper(running.card, token, POPULATION, SystemClock().now())
    return pinned, Participant(Ed25519PrivateKey.from_private_bytes(pinned.key), pinned.certificate)


def agree(party: Party, running: Running, **changes: object) -> Cohort:
    from umbel.descriptor import SignedDescriptor, sign_as_leader
    from umbel_server.secure_aggregation import PrivateRound

    statement = party.describe(**changes).to_bytes()
    signature = sign_as_leader(statement, party.sign.key)
    signed = SignedDescriptor(statement, signature, party.port.countersign(statement, signature))
    return Cohort(party, PrivateRound.verified(signed, party.sign.public, running.card.identity))


async def test_a_round_goes_through_over_the_network(party: Party, running: Running) -> None:
    devices = [(await member(running, token))[1] for token in running.tokens(5)]
    cohort = agree(party, running, number=1, size=200_000)
    expected = cohort.fill(devices)
    found = cohort.sum.close()
    assert found.count == 5 and abs(found.aggregate.total - expected).max() < 1e-3
    ids = sorted(cohort.spool)
    with pytest.raises(SetRefused):
        party.port.commit(cohort.agreed.rd, ids[1:])


async def test_refusals_come_back_as_what_they_are(party: Party, running: Running) -> None:
    cohort = agree(party, running, number=3)
    with pytest.raises(WrongState):
        party.port.commit(cohort.agreed.rd, [bytes(16)])
    stranger = RemoteHelper(running.card, LeaderSigner(Ed25519PrivateKey.generate()))
    with pytest.raises(SignatureInvalid):
        stranger.prepare(cohort.agreed.rd, [])
    stranger.close()


@pytest.mark.parametrize("knows_the_round", [False, True])
def test_a_stranger_who_never_stops_sending_is_not_listened_to(
    knows_the_round: bool, party: Party, running: Running
) -> None:
    rd = agree(party, running, number=5 + knows_the_round).agreed.rd if knows_the_round else bytes(32)
    code = grpc.StatusCode.INVALID_ARGUMENT if knows_the_round else grpc.StatusCode.NOT_FOUND
    item = pb.HelperItem(report_id=bytes(16), capsule=bytes(4096), commitment=bytes(32))
    credentials = grpc.ssl_channel_credentials(running.card.certificate)
    with grpc.secure_channel(running.card.address, credentials) as channel:
        stub = HelperServiceStub(channel)
        for ask in (
            lambda: stub.Prepare((pb.PrepareRequest(rd=rd, items=[item] * 9) for _ in itertools.count()), timeout=30),
            lambda: list(
                stub.Commit((pb.CommitRequest(rd=rd, report_ids=bytes(160)) for _ in itertools.count()), timeout=30)
            ),
        ):
            with pytest.raises(grpc.RpcError) as refused:
                ask()
            assert refused.value.code() is code  # type: ignore[attr-defined]


async def test_a_device_enrols_renews_and_is_revoked(running: Running) -> None:
    (token,) = running.tokens(1)
    pinned, _ = await member(running, token)
    renewed = await renew_at_helper(pinned, POPULATION, SystemClock().now())
    assert renewed.certificate.not_after_ms >= pinned.certificate.not_after_ms
    with pytest.raises(EnrolmentRefused):
        await member(running, token)
    (running.folder / "lost").write_text(token + "\n")
    umbel("helper", "revoke", "--state", str(running.folder), f"@{running.folder / 'lost'}")
    with pytest.raises(CertificateRefused):
        await renew_at_helper(pinned, POPULATION, SystemClock().now())


async def test_another_helpers_certificate_is_not_talked_to(running: Running, tmp_path: Path) -> None:
    umbel("helper", "init", str(tmp_path / "other"), "--leader", running.leader.public.hex())
    other = HelperCard.from_text((tmp_path / "other" / "card.json").read_bytes())
    impostor = replace(running.card, certificate=other.certificate)
    with pytest.raises(CertificateRefused):
        await enrol_at_helper(impostor, "token", POPULATION, NOW)
    remote = RemoteHelper(impostor, running.leader)
    with pytest.raises(Unreachable):
        remote.commit(bytes(32), [])
    remote.close()


@pytest.mark.slow
async def test_a_helper_that_hangs_is_given_up_long_before_a_sum_might_be_late(party: Party, running: Running) -> None:
    """Connected and silent: it is asked whether it is there, and a call that may take ten minutes ends."""
    party.port.offer_key("hung", 1, Kind.TRAIN)
    running.process.send_signal(signal.SIGSTOP)
    try:
        asked = asyncio.to_thread(party.port.commit, bytes(32), [])
        with pytest.raises(Unreachable):
            await asyncio.wait_for(asked, 120)
    finally:
        running.process.send_signal(signal.SIGCONT)


def test_it_tells_its_health_and_counts(running: Running) -> None:
    with urllib.request.urlopen(f"http://{running.health}/healthz") as answer:
        told = json.loads(answer.read())
    assert told["status"] == "ok"
    assert json.loads(umbel("helper", "status", "--state", str(running.folder))).keys() < told.keys()
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"http://{running.health}/other")
    refused.value.close()


def test_it_tells_prometheus_how_its_calls_ended_and_of_whom_nothing(running: Running) -> None:
    before = scrape(running)
    stranger = RemoteHelper(running.card, LeaderSigner(Ed25519PrivateKey.generate()))
    with pytest.raises(SignatureInvalid):
        stranger.offer_key("secret-task", 1, Kind.TRAIN)
    stranger.close()
    labels = {
        "service": "HelperService",
        "method": "OfferKey",
        "status": "UNAUTHENTICATED",
        "error": "signature-invalid",
    }
    refused = ("umbel_rpc_calls_total", frozenset(labels.items()))
    # A call is counted once its caller has been told.
    wait_until(lambda: scrape(running).get(refused, 0) == before.get(refused, 0) + 1, "the refused call is counted")
    after = scrape(running)
    with urllib.request.urlopen(f"http://{running.health}/healthz") as answer:
        counts = json.loads(answer.read())
    for state in ("open", "summed"):
        assert after["umbel_helper_rounds", frozenset({("state", state)})] == counts[f"rounds_{state}"]
    assert after["umbel_database_up", frozenset()] == 1
    assert not [name for name in after if "secret-task" in str(name)]


def scrape(running: Running) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    with urllib.request.urlopen(f"http://{running.health}/metrics") as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return {(it.name, frozenset(it.labels.items())): it.value for family in families for it in family.samples}


async def test_health_fails_where_the_records_cannot_be_read(tmp_path: Path) -> None:
    records = Records(tmp_path / "helper.db")
    pages, _ = _pages(records, ())
    address = await pages.open("127.0.0.1", 0)
    records.close()
    told = []
    for path in (b"/healthz", b"/metrics"):
        reader, writer = await asyncio.open_connection(*address.split(":"))
        writer.write(b"GET " + path + b" HTTP/1.1\r\n\r\n")
        told.append((await reader.read()).decode())
        writer.close()
    await pages.close()
    assert told[0].startswith("HTTP/1.1 503 ") and '"status": "failing"' in told[0]
    assert told[1].startswith("HTTP/1.1 200 ") and "\numbel_database_up 0.0\n" in told[1]


async def test_a_health_port_that_is_taken_is_named(tmp_path: Path) -> None:
    records = Records(tmp_path / "helper.db")
    pages, _ = _pages(records, ())
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(Unavailable, match=f"can't listen at 127.0.0.1:{port}"):
            await pages.open("127.0.0.1", port)
    records.close()


def test_a_card_outlasts_the_devices_that_pin_it(running: Running) -> None:
    """Nothing can renew what all of them have pinned."""
    end = x509.load_pem_x509_certificate(running.card.certificate).not_valid_after_utc.timestamp()
    assert end > SystemClock().now() + 15 * 365 * 86_400


def test_a_second_one_in_its_folder_is_refused(running: Running) -> None:
    command = [*UMBEL, "helper", "run", "--state", str(running.folder), "--port", "0"]
    second = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (second.returncode, "another helper runs" in second.stderr) == (1, True)
    assert HelperCard.from_text((running.folder / "card.json").read_bytes()) == running.card


@pytest.mark.parametrize(
    "verb",
    [("run",), *(pytest.param(v, marks=pytest.mark.slow) for v in (("status",), ("tokens", "--population", "wrists")))],
)
def test_a_store_that_cannot_be_used_is_told_in_a_line(verb: tuple[str, ...], running: Running, tmp_path: Path) -> None:
    folder = shutil.copytree(running.folder, tmp_path / "copy")
    (folder / "helper.db").write_bytes(b"no database" * 100)
    done = subprocess.run(
        [*UMBEL, "helper", *verb, "--state", str(folder)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.count("\n"), f"the store in {folder}" in done.stderr) == (1, 1, True)


def test_its_secrets_are_private_files_and_its_folder_is_made_once(running: Running) -> None:
    for name in ("identity.key", "authority.key", "tls.key"):
        assert (running.folder / "keys" / name).stat().st_mode & 0o077 == 0
    again = subprocess.run(
        [*UMBEL, "helper", "init", str(running.folder), "--leader", "00" * 32], capture_output=True, text=True
    )
    assert again.returncode == 1 and "holds a helper already" in again.stderr


@pytest.mark.parametrize(
    "line", ["minimum_cohort = true", "minimum_cohort = 2.5", "populations = [1]", "populations = 'wrists'"]
)
def test_a_helpers_rule_of_another_kind_is_refused(line: str, tmp_path: Path) -> None:
    """`true` would count as a cohort of one, and a name alone as populations of one letter each."""
    (tmp_path / "helper.toml").write_text(f"leader = '{'ab' * 32}'\n{line}")
    with pytest.raises(MalformedMessage):
        HelperFolder(tmp_path).settings()


@pytest.mark.parametrize(
    "line",
    ["leader = 5", "[", *(pytest.param(other, marks=pytest.mark.slow) for other in ("unknown = 1", "leader = 'abc'"))],
)
def test_a_broken_config_file_is_refused(line: str, running: Running, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in running.folder.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "helper.toml").write_text(line)
    done = subprocess.run([*UMBEL, "helper", "run", "--state", str(folder)], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("umbel: ")
