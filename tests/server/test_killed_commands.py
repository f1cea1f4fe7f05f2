"""An operator's commands, killed anywhere or short of room: what was there still is, and the same words again do it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.power_cut import PowerCut, dies_at, fills_up_at
from tests.server.live import MODEL, Live
from tests.server.test_cli import Umbel, done
from tests.server.test_cli import live as live
from tests.server.test_cli import run as run
from tests.server.test_cli import umbel as umbel
from umbel.bundle import Bundle
from umbel.holding import held
from umbel_server.cli.listing import sign

Words = Callable[[Path], tuple[str, ...]]


def cut_anywhere(umbel: Umbel, monkeypatch: pytest.MonkeyPatch, folder: Path, words: Words) -> int:
    """Type a command that is cut off at one step after another, and then again; how many steps there were."""
    for last in itertools.count():
        place = folder / str(last)
        place.mkdir()
        with monkeypatch.context() as patch:
            taken = dies_at(patch, last)
            try:
                done(umbel(*words(place)))
                return len(taken)
            except PowerCut:
                pass
        done(umbel(*words(place)))
    raise AssertionError


def test_an_operator_is_added_once_wherever_the_command_was_cut_off(
    umbel: Umbel, live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def add(place: Path) -> tuple[str, ...]:
        return ("operators", "add", f"ada-{place.name}", "--role", "viewer", "--out", str(place / "ada"))

    steps = cut_anywhere(umbel, monkeypatch, tmp_path, add)
    assert steps >= 8, "the key, the answer's certificate and authority"
    for place in tmp_path.glob("[0-9]*"):
        done(umbel("status", "--identity", str(place / "ada"), "--server", live.addresses.admin))
    added = live.do(lambda: [row.action for row in live.parts.coordinator.operations.audit_rows(1_000)])
    assert added.count("operator.add") == 1 + len(list(tmp_path.glob("[0-9]*"))), "the first admin, and each of them"


def test_an_operator_whose_answer_was_lost_keeps_the_key_that_may_be_known_by_now(
    umbel: Umbel, live: Live, tmp_path: Path
) -> None:
    add = ("operators", "add", "ada", "--role", "viewer", "--out", str(tmp_path / "ada"))
    unheard = umbel(*add, "--server", "127.0.0.1:1")
    assert (unheard.code, "no answer" in unheard.err) == (1, True), unheard.err
    key = (tmp_path / "ada" / "key.pem").read_bytes()
    done(umbel(*add))
    assert (tmp_path / "ada" / "key.pem").read_bytes() == key


def test_a_version_is_exported_whole_wherever_the_command_was_cut_off(
    umbel: Umbel, live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live.add_model()
    steps = cut_anywhere(
        umbel, monkeypatch, tmp_path, lambda place: ("versions", "export", MODEL, "1", str(place / "bundle"))
    )
    assert steps > 3
    for place in tmp_path.glob("[0-9]*"):
        Bundle.open(place / "bundle")


def test_an_export_without_room_leaves_nothing(
    umbel: Umbel, live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live.add_model()
    with monkeypatch.context() as patch:
        fills_up_at(patch, 2)
        assert umbel("versions", "export", MODEL, "1", str(tmp_path / "bundle")).code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_signatures_that_others_gave_outlive_one_that_finds_no_room(
    run: Umbel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, draft = tmp_path / "state", tmp_path / "draft.json"
    done(run("init", str(state)))
    done(run("keys", "renew", "targets", "--draft", str(draft), "--state", str(state)))
    first, second = (str(state / "keys" / "releases" / f"targets-{number}.key") for number in (1, 2))
    done(run("keys", "sign", str(draft), "--key", first))
    signed = draft.read_bytes()
    for cut, ending in ((fills_up_at, None), (dies_at, PowerCut)):
        with monkeypatch.context() as patch:
            cut(patch, 0)
            if ending is None:
                assert "No space left" in run("keys", "sign", str(draft), "--key", second).err
            else:
                with pytest.raises(ending):
                    run("keys", "sign", str(draft), "--key", second)
        assert draft.read_bytes() == signed
    done(run("keys", "sign", str(draft), "--key", second))
    done(run("keys", "publish", "targets", str(draft), "--state", str(state)))


def test_signatures_that_are_given_at_the_same_moment_all_count(run: Umbel, tmp_path: Path) -> None:
    state, draft = tmp_path / "state", tmp_path / "draft.json"
    done(run("init", str(state)))
    for _ in range(5):
        done(run("keys", "renew", "targets", "--draft", str(draft), "--state", str(state)))
        with ThreadPoolExecutor(3) as signers:
            keys = [state / "keys" / "releases" / f"targets-{number}.key" for number in (1, 2, 3)]
            for given in [signers.submit(sign, draft, key) for key in keys]:
                given.result()
        assert all(one["sig"] for one in json.loads(draft.read_bytes())["signatures"])
        assert len(json.loads(draft.read_bytes())["signatures"]) == 3


@pytest.mark.parametrize("words", [("init",), ("helper", "init", "--leader", "00" * 32)])
def test_one_folder_is_made_by_one_command_at_a_time(run: Umbel, tmp_path: Path, words: tuple[str, ...]) -> None:
    state = tmp_path / "state"
    state.mkdir()
    with held(state, "held by a test"):
        assert "is at work in" in run(*words, str(state)).err
        assert list(state.iterdir()) == []
    done(run(*words, str(state)))
    again = run(*words, str(state))
    assert (again.code, "already; choose another folder" in again.err) == (1, True)


def test_what_is_written_to_a_device_is_not_replaced(run: Umbel, tmp_path: Path) -> None:
    done(run("init", str(tmp_path / "state")))
    done(run("keys", "renew", "targets", "--draft", "/dev/null", "--state", str(tmp_path / "state")))
    assert Path("/dev/null").is_char_device()
