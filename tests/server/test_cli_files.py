"""`umbel` where files and folders don't do: nothing is lost, and the message is one line that says which."""

from __future__ import annotations

import sqlite3
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
import structlog

from tests.server.live import Live
from tests.server.test_cli import Umbel, done
from tests.server.test_cli import live as live
from tests.server.test_cli import run as run
from tests.server.test_cli import umbel as umbel
from umbel_server import passing
from umbel_server.authority import PeerKind
from umbel_server.cli.serving import log_to_stderr
from umbel_server.folder import Folder
from umbel_server.store import Store


@pytest.fixture
def logging() -> Iterator[None]:
    before = structlog.get_config()
    yield
    structlog.configure(**before)


def test_the_log_tells_what_failed_and_not_the_values_of_variables(
    logging: None, capsys: pytest.CaptureFixture[str]
) -> None:
    log_to_stderr("info")

    def enrol(token: str) -> None:
        raise ValueError(f"a token of {len(token)} letters")

    try:
        enrol("hush" * 3)
    except ValueError as error:
        structlog.get_logger().error("unexpected error", exc_info=error)
    told = capsys.readouterr().err
    assert "Traceback" in told and "a token of 12 letters" in told
    assert "hush" * 3 not in told and "locals" not in told


def test_a_database_that_is_away_takes_a_line_of_the_log_and_a_mistake_takes_more(
    logging: None, capsys: pytest.CaptureFixture[str]
) -> None:
    log_to_stderr("info")
    full = OSError(28, "No space left on device")
    gone = sa.exc.OperationalError("UPDATE", {}, sqlite3.OperationalError("server closed\n\tthe connection"))
    passing.tell(structlog.get_logger(), "tick failed", ExceptionGroup("some", [full, gone]), failures=1)
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "No space left on device; server closed the connection" in told
    passing.tell(structlog.get_logger(), "tick failed", ExceptionGroup("some", [full, ValueError("odd")]))
    assert "| ValueError: odd\n" in capsys.readouterr().err


def test_a_log_on_a_full_disk_stops_nothing(logging: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, text: str) -> None:
            raise OSError(28, "No space left on device")

        flush = isatty = lambda self: False

    monkeypatch.setattr(sys, "stderr", Full())
    log_to_stderr("info")
    structlog.get_logger().error("tick failed")


def test_a_damaged_key_and_a_database_from_the_future_are_named(run: Umbel, tmp_path: Path) -> None:
    done(run("init", str(tmp_path / "state")))
    ports = [f"--{port}-port=0" for port in ("device", "enrol", "admin")]
    for name in ("release.key", "leader.key", "audit.key"):
        path = tmp_path / "state" / "keys" / name
        whole = path.read_bytes()
        path.write_bytes(b"x")
        result = run("serve", "--state", str(tmp_path / "state"), *ports)
        assert (result.code, f"{path} is damaged" in result.err) == (1, True), result.err
        path.write_bytes(whole)
    store = Store.open(f"sqlite:///{tmp_path}/state/umbel.db")
    with store.transaction() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    store.close()
    result = run("serve", "--state", str(tmp_path / "state"), *ports)
    assert (result.code, "a newer version of Umbel" in result.err) == (1, True), result.err


def test_a_file_that_cannot_be_used_is_told_in_one_line(umbel: Umbel, live: Live, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    file = str(tmp_path / "file")
    for words in (
        ("init", file),
        ("init", f"{file}/inside"),
        ("tasks", "create", "--file", str(tmp_path)),
        ("operators", "add", "ada", "--role", "viewer", "--out", file),
    ):
        result = umbel(*words)
        assert (result.code, result.err.count("\n")) == (1, 1), result.err
        assert result.err.startswith("umbel: can't use "), result.err


def test_a_file_that_holds_no_text_or_is_not_there_is_told_in_one_line(run: Umbel, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"\xea\xff")
    for file, says in ((tmp_path / "file", "isn't text"), (tmp_path / "missing", "isn't there")):
        for words in (
            ("audit", "check", str(file)),
            ("helper", "init", str(tmp_path / "helper"), "--leader", f"@{file}"),
        ):
            result = run(*words)
            assert (result.code, result.err.count("\n")) == (1, 1), result.err
            assert f"{file} {says}" in result.err


def test_only_what_init_makes_is_said_to_come_from_it(run: Umbel, tmp_path: Path) -> None:
    nobodys = run("serve", "--state", str(tmp_path / "nowhere")).err
    assert "umbel init" in nobodys and "umbel init" in run("helper", "run", "--state", str(tmp_path / "nowhere")).err
    own = run("audit", "check", str(tmp_path / "missing.jsonl")).err
    assert "missing.jsonl isn't there" in own and "umbel init" not in own


def test_an_operator_whose_key_cannot_be_kept_is_not_added(umbel: Umbel, live: Live, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    theirs = tmp_path / "ada"
    add = ("operators", "add", "ada", "--role", "viewer", "--out")
    assert umbel(*add, str(tmp_path / "file")).code == 1
    refused = umbel("operators", "add", "ada", "--role", "king", "--out", str(theirs))
    assert refused.code == 1 and not theirs.exists()
    done(umbel(*add, str(theirs)))
    key = (theirs / "key.pem").read_bytes()
    taken = umbel("operators", "add", "ben", "--role", "viewer", "--out", str(theirs))
    assert (taken.code, "holds an identity already" in taken.err) == (1, True)
    assert (theirs / "key.pem").read_bytes() == key
    assert "ben" not in done(umbel("operators", "list")).out


def test_names_that_no_server_can_have_are_refused_before_anything_is_made(run: Umbel, tmp_path: Path) -> None:
    for name in ("", "two words", "bücher.example", "-a.example", "a..b", "a" * 64, "a." * 127 + "a"):
        result = run("init", str(tmp_path / "state"), "--name", name)
        assert (result.code, "no host name" in result.err) == (1, True), name
    assert not (tmp_path / "state").exists()
    leader = ("--leader", "ab" * 32)
    for address in ("helper.example", "helper.example:port", "two words:7446", "helper.example:70000"):
        result = run("helper", "init", str(tmp_path / "helper"), *leader, "--address", address)
        assert (result.code, repr(address.rpartition(":")[0])[1:-1] in result.err) == (1, True), result.err
    assert not (tmp_path / "helper").exists()
    done(run("init", str(tmp_path / "state"), "--name", "fleet-1.example.org", "--name", "2001:db8::7"))
    done(run("helper", "init", str(tmp_path / "helper"), *leader, "--address", "[2001:db8::7]:7446"))


def test_the_next_command_can_be_copied_whatever_the_folder_is_called(run: Umbel, tmp_path: Path) -> None:
    told = done(run("init", str(tmp_path / "my state"))).out
    assert f"umbel serve --state '{tmp_path}/my state'" in told


def test_a_certificate_that_has_ended_is_told_and_renewed_without_its_key(
    umbel: Umbel, live: Live, tmp_path: Path
) -> None:
    theirs, state = tmp_path / "ada", live.settings.state
    done(umbel("operators", "add", "ada", "--role", "viewer", "--out", str(theirs)))
    remote = ("--identity", str(theirs), "--server", live.addresses.admin)
    authority = Folder(state).authorities().operator
    whole = (theirs / "certificate.pem").read_bytes()
    ended = authority.renew(whole, PeerKind.OPERATOR, time.time() - 7200, 3600.0)
    (theirs / "certificate.pem").write_bytes(ended)
    refused = umbel("status", *remote)
    assert (refused.code, "umbel operators renew" in refused.err) == (1, True), refused.err
    (tmp_path / "sent.pem").write_bytes(ended)
    done(umbel("operators", "renew", str(tmp_path / "sent.pem")))
    (theirs / "certificate.pem").write_bytes((tmp_path / "sent.pem").read_bytes())
    done(umbel("status", *remote))
    done(umbel("operators", "revoke", "ada"))
    done(umbel("operators", "renew", str(theirs)))
    assert "revoked" in umbel("status", *remote).err
    first, another = (
        done(umbel("operators", "renew", "--json")).json,
        done(umbel("operators", "renew", str(theirs), "--json")).json,
    )
    days = [(told["until_ms"] / 1000 - time.time()) / 86_400 for told in (first, another)]
    assert [round(count) for count in days] == [366, 90], "the first admin's year is a year again"


def test_what_people_write_in_brackets_is_shown_as_it_is(umbel: Umbel, live: Live) -> None:
    device = live.device()
    reason = "lost [/] in [the] tram :warning: [link=x]"
    done(umbel("devices", "revoke", device.id, "--reason", reason))
    assert reason in done(umbel("audit", "list")).out


def test_a_foreign_certificate_is_not_renewed(run: Umbel, tmp_path: Path) -> None:
    for name in ("mine", "other"):
        done(run("init", str(tmp_path / name)))
    file = tmp_path / "other" / "admin" / "certificate.pem"
    before = file.read_bytes()
    result = run("operators", "renew", str(file), "--state", str(tmp_path / "mine"))
    assert (result.code, file.read_bytes()) == (1, before)
    assert "isn't from this coordinator's authority" in result.err
