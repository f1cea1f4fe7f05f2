"""`umbel` where files and folders don't do: nothing is lost, and the message is one line that says which."""

from __future__ import annotations

from pathlib import Path

from tests.server.live import Live
from tests.server.test_cli import Umbel, done
from tests.server.test_cli import live as live
from tests.server.test_cli import run as run
from tests.server.test_cli import umbel as umbel


def test_a_file_that_cannot_be_used_is_told_in_one_line(umbel: Umbel, live: Live, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    file = str(tmp_path / "file")
    for words in (
        ("init", file),
        ("init", f"{file}/inside"),
        ("tasks", "create", "--file", str(tmp_path)),
        ("operators", "add", "ada", "--role", "viewer", "--out", file),
        ("helper", "init", str(tmp_path / "helper"), "--leader", f"@{tmp_path}/missing"),
    ):
        result = umbel(*words)
        assert (result.code, result.err.count("\n")) == (1, 1), result.err
        assert result.err.startswith("umbel: can't use "), result.err


def test_an_operator_whose_key_cannot_be_kept_is_not_added(umbel: Umbel, live: Live, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    theirs = tmp_path / "ada"
    add = ("operators", "add", "ada", "--role", "viewer", "--out")
    assert umbel(*add, str(tmp_path / "file")).code == 1
    refused = umbel("operators", "add", "ada", "--role", "king", "--out", str(theirs))
    assert refused.code == 1 and not (theirs / "key.pem").exists()
    done(umbel(*add, str(theirs)))
    key = (theirs / "key.pem").read_bytes()
    taken = umbel("operators", "add", "ben", "--role", "viewer", "--out", str(theirs))
    assert (taken.code, "holds an identity already" in taken.err) == (1, True)
    assert (theirs / "key.pem").read_bytes() == key
    assert "ben" not in done(umbel("operators", "list")).out


def test_names_that_no_server_can_have_are_refused_before_anything_is_made(run: Umbel, tmp_path: Path) -> None:
    for name in ("", "two words", "bücher.example", "-a.example", "a..b", "a" * 64):
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
