"""The coordinator as a process: its folder, its settings, its start and its end."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import ssl
import stat
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import grpc
import pytest
from cryptography import x509

from tests.databases import empty_database
from tests.server.live import MovedClock, serving
from tests.server.processes import hearing_the_terminal
from umbel.clock import SystemClock
from umbel.errors import (
    AlreadyExists,
    CertificateRefused,
    EnrolmentRefused,
    NotFound,
    OutOfBounds,
    Unavailable,
    WrongState,
)
from umbel.stopping import told_to_stop
from umbel.v1 import admin_pb2 as pb
from umbel.v1 import device_pb2
from umbel_server.addresses import from_here, host_and_port, joined, why_not
from umbel_server.app import Server, build
from umbel_server.authority import make_request
from umbel_server.folder import Folder
from umbel_server.identity import Addresses, Identity
from umbel_server.port_certificate import RENEW_AFTER
from umbel_server.settings import load_settings

NOW = 1_700_000_000.0


def test_secrets_are_for_their_owner_only(tmp_path: Path) -> None:
    Folder.create(tmp_path / "state", (), NOW)
    for path in (tmp_path / "state").rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path


def test_secrets_do_not_print(tmp_path: Path) -> None:
    folder = Folder.create(tmp_path / "state", (), NOW)
    shown = f"{folder.authorities()} {folder.signer()} {folder.leader_key()} {Identity.read(folder.first_admin)}"
    assert "PRIVATE" not in shown
    assert folder.signer().to_bytes().hex() not in shown


def test_a_folder_is_made_once(tmp_path: Path) -> None:
    Folder.create(tmp_path / "state", (), NOW)
    before = {path: path.read_bytes() for path in (tmp_path / "state").rglob("*") if path.is_file()}
    with pytest.raises(AlreadyExists, match="another folder"):
        Folder.create(tmp_path / "state", (), NOW)
    assert before == {path: path.read_bytes() for path in (tmp_path / "state").rglob("*") if path.is_file()}


def test_without_init_nothing_starts(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="umbel init"):
        build(load_settings(tmp_path), MovedClock())


def test_another_coordinators_certificate_for_an_authority_is_noticed(tmp_path: Path) -> None:
    one, other = (Folder.create(tmp_path / name, (), NOW) for name in ("one", "other"))
    (one.path / "authority" / "device.pem").write_bytes((other.path / "authority" / "device.pem").read_bytes())
    with pytest.raises(CertificateRefused, match="doesn't belong"):
        one.authorities()


# Settings.


def test_the_command_line_goes_before_the_environment_and_that_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.toml").write_text("device_port = 1\nenrol_port = 1\nadmin_port = 1\n")
    monkeypatch.setenv("UMBEL_ENROL_PORT", "2")
    monkeypatch.setenv("UMBEL_ADMIN_PORT", "2")
    settings = load_settings(tmp_path, admin_port=3, device_port=None)
    assert (settings.device_port, settings.enrol_port, settings.admin_port) == (1, 2, 3)


@pytest.mark.parametrize(
    "text",
    ["device_port = 70000", "surprise = 1", "profile = 'party'", "device_port = ", "device_certificate_days = 0"],
)
def test_a_setting_that_is_not_one_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(OutOfBounds, match=text.partition(" ")[0] if text[-2] != "=" else "TOML"):
        load_settings(tmp_path)


def test_production_refuses_devices_without_proof_unless_asked_by_name(tmp_path: Path) -> None:
    assert load_settings(tmp_path).accepts_unattested
    assert not load_settings(tmp_path, profile="production").accepts_unattested
    assert load_settings(tmp_path, profile="production", attestation="accept").accepts_unattested


def test_the_production_profile_enrols_nobody_without_a_verifier(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec

    with serving(tmp_path / "state", profile="production") as live:
        request = make_request(ec.generate_private_key(ec.SECP256R1()))
        with pytest.raises(EnrolmentRefused):
            live.do(
                lambda: live.parts.access.enrol(live.parts.access.create_tokens("x", "p", 1, 9.0)[0][0], request, b"")
            )


# Start and stop.


def test_a_port_that_is_taken_is_said(tmp_path: Path) -> None:
    with serving(tmp_path / "first") as live:
        taken = int(live.addresses.admin.rpartition(":")[2])
        Folder.create(tmp_path / "second", (), live.clock.now())
        settings = load_settings(tmp_path / "second", device_port=0, enrol_port=0, admin_port=taken)

        async def start() -> None:
            server = Server(settings, build(settings, live.clock), live.clock)
            try:
                await server.start()
            finally:
                await server.stop()

        with pytest.raises(Unavailable, match=str(taken)):
            asyncio.run(start())


def test_certificates_and_state_outlive_the_process(tmp_path: Path) -> None:
    with serving(tmp_path / "state") as live:
        live.add_model()
        device = live.device()
        revoked = live.device()
        live.do(lambda: live.parts.access.revoke("operator:test", revoked.id, ""))
    with serving(tmp_path / "state") as live:
        again = type(device)(live, device.key, device.certificate)
        again.check_in()
        devices = live.admin().ListDevices(pb.ListDevicesRequest()).devices
        assert {found.id: bool(found.revoked_at_ms) for found in devices} == {device.id: False, revoked.id: True}


def test_a_database_of_another_folder_is_refused_before_anything_is_written_to_it(tmp_path: Path) -> None:
    for name in ("first", "second"):
        Folder.create(tmp_path / name, (), time.time())
    first = load_settings(tmp_path / "first")
    for _ in range(2):  # an empty one is anybody's, and then its folder's
        parts = build(first, SystemClock())
        assert parts.coordinator.rollouts is not None
        parts.coordinator.rollouts.reconcile()
        parts.store.close()
    with pytest.raises(WrongState, match="another folder"):
        build(load_settings(tmp_path / "second", database_url=first.effective_database_url), SystemClock())


def test_a_coordinator_that_has_run_for_more_than_a_year_is_still_believed(tmp_path: Path) -> None:
    with serving(tmp_path / "state", ahead=-400 * 86_400.0) as live:
        with pytest.raises(grpc.RpcError, match=r"CERTIFICATE_VERIFY_FAILED|certificate has expired"):
            live.device()
        live.clock.ahead = 0.0
        live.device().check_in()


def test_ports_get_one_new_certificate_when_half_of_its_time_is_over_or_the_clock_was_ahead(tmp_path: Path) -> None:
    with serving(tmp_path / "state") as live:
        addresses = (live.addresses.device, live.addresses.enrol, live.addresses.admin)

        def shown() -> set[int]:
            found = (ssl.get_server_certificate(host_and_port(address), timeout=10) for address in addresses)
            return {x509.load_pem_x509_certificate(pem.encode()).serial_number for pem in found}

        seen = set[int]()
        for ahead in (0.0, RENEW_AFTER + 60.0, 0.0):
            live.clock.ahead = ahead
            newest = shown()
            assert len(newest) == 1 and shown() == newest
            assert not newest & seen
            seen |= newest


@pytest.mark.parametrize(
    ("host", "called"),
    [("::1", "[::1]:7443"), ("::", "127.0.0.1:7443"), ("0.0.0.0", "127.0.0.1:7443"), ("10.0.0.7", "10.0.0.7:7443")],
)
def test_programs_of_this_machine_are_told_an_address_that_can_be_called(host: str, called: str) -> None:
    assert from_here(host, 7443) == called
    assert host_and_port(joined(host, 7443)) == (host, 7443)


def test_a_host_that_is_not_here_is_told_as_that_and_not_as_taken() -> None:
    assert "another coordinator" not in why_not("nobody.invalid", 0, "coordinator")
    assert "assign" in why_not("192.0.2.1", 0, "coordinator"), "Cannot assign requested address"


def test_an_address_of_ipv6_may_stand_in_brackets(tmp_path: Path) -> None:
    assert load_settings(tmp_path, host="[::1]").host == "::1"


def test_devices_are_told_the_advertised_address(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec

    with serving(tmp_path / "state", advertise="fleet.example:443") as live:
        request = make_request(ec.generate_private_key(ec.SECP256R1()))
        answer = live.enrolment().Enrol(device_pb2.EnrolRequest(token=live.token(), certificate_request=request))
        assert answer.device_address == "fleet.example:443"


# The real process.


@contextmanager
def process(state: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    ports = [f"--{port}-port=0" for port in ("device", "enrol", "admin")]
    command = [sys.executable, "-m", "umbel_server.cli", "serve", "--state", str(state), "--json", *ports, *more]
    quiet, pipe = os.environ | {"GRPC_VERBOSITY": "NONE"}, subprocess.PIPE
    with hearing_the_terminal():
        started = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=quiet)
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGHUP])
def test_a_told_end_is_an_orderly_one(tmp_path: Path, number: signal.Signals) -> None:
    Folder.create(tmp_path / "state", (), time.time())
    with process(tmp_path / "state", "--metrics-port", "0") as started:
        assert started.stdout is not None
        ready = json.loads(started.stdout.readline())
        addresses = Addresses.read(tmp_path / "state")
        assert ready == {"ready": True, **asdict(addresses)}
        with urllib.request.urlopen(f"http://{addresses.metrics}/metrics") as answer:
            assert b"\numbel_database_up 1.0\n" in answer.read()
        assert 0 not in {int(address.rpartition(":")[2]) for address in (addresses.device, addresses.admin)}
        require_an_orderly_end(tmp_path / "state", started, number)


def require_an_orderly_end(state: Path, started: subprocess.Popen[str], number: signal.Signals) -> None:
    started.send_signal(number)
    _, words = started.communicate(timeout=30)
    assert started.returncode == 0, words
    assert "Traceback" not in words
    with pytest.raises(NotFound):
        Addresses.read(state)


def test_a_second_coordinator_in_a_folder_is_refused_and_the_first_is_found_until_its_end(tmp_path: Path) -> None:
    Folder.create(tmp_path / "state", (), time.time())
    with process(tmp_path / "state") as started:
        assert started.stdout is not None
        assert json.loads(started.stdout.readline())["ready"]
        addresses = Addresses.read(tmp_path / "state")
        with process(tmp_path / "state") as second:
            assert "another coordinator runs" in second.communicate(timeout=30)[1], "two would each count half"
            assert second.returncode == 1
        assert Addresses.read(tmp_path / "state") == addresses
        file = tmp_path / "state" / "addresses.json"
        file.write_text(json.dumps(json.loads(file.read_bytes()) | {"of_a_newer_version": ""}))
        assert Addresses.read(tmp_path / "state") == addresses, "an older `umbel` finds a newer coordinator"
        require_an_orderly_end(tmp_path / "state", started, signal.SIGTERM)


async def test_a_program_that_was_told_to_outlive_its_terminal_does() -> None:
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what nohup does
    try:
        told = asyncio.Event()
        with told_to_stop(told.set):
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait_for(told.wait(), 10)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, handler)


@pytest.mark.parametrize("since", [pytest.param("before", marks=pytest.mark.slow), "meanwhile"])
def test_a_folder_that_takes_no_files_any_more_keeps_no_coordinator_from_an_orderly_end(
    tmp_path: Path, since: str
) -> None:
    Folder.create(tmp_path / "state", (), time.time())
    addresses = tmp_path / "state" / "addresses.json"
    if since == "before":
        addresses.mkdir()
    with process(tmp_path / "state") as started:
        if since == "meanwhile":
            assert started.stdout is not None
            assert started.stderr is not None
            started.stdout.close()  # nobody reads where it listens: it serves all the same
            assert any("ready" in line for line in started.stderr)
            addresses.unlink()
            addresses.mkdir()
            started.send_signal(signal.SIGTERM)
        _, words = started.communicate(timeout=30)
    assert (started.returncode, "Traceback" in words) == (1 if since == "before" else 0, False), words
    assert ("can't use" in words) == (since == "before")


@pytest.mark.slow  # the second waits for five seconds
def test_two_folders_on_one_postgresql_are_one_too_many_until_the_first_is_killed(
    tmp_path: Path, postgresql: str
) -> None:
    database = ("--database-url", empty_database(postgresql))
    Folder.create(tmp_path / "first", (), time.time())
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    with process(tmp_path / "first", *database) as started:
        assert started.stdout is not None
        assert json.loads(started.stdout.readline())["device"]
        with process(tmp_path / "second", *database) as second:
            assert "another coordinator uses this database" in second.communicate(timeout=30)[1]
            assert second.returncode == 1
    with process(tmp_path / "second", *database) as second:
        assert second.stdout is not None
        assert json.loads(second.stdout.readline())["device"]
