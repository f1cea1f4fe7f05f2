"""Enrolment at coordinator and helper, cut off anywhere: the same words again finish it, with the same two tokens."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from tests.power_cut import PowerCut, dies_at, fills_up_at
from tests.server.live import POPULATION, Live, serving
from umbel.clock import SystemClock
from umbel.enrolment_code import EnrolmentCode
from umbel_client.cli import main
from umbel_client.enrolment import load_identity
from umbel_client.private import load_pinned
from umbel_server.helper import program
from umbel_server.helper.folder import HelperFolder, HelperSettings
from umbel_server.helper.service import HelperGateway


@dataclass
class Both:
    """A coordinator and a helper that listen, and what they hand out."""

    live: Live
    helper: program.HelperParts
    card: Path
    token: str = ""

    def words(self, home: Path) -> list[str]:
        """For a new device; again after a cut."""
        pinned = self.live.parts.authorities.server.certificate_pem
        code = EnrolmentCode(self.live.addresses.enrol, self.live.token(), pinned).to_text()
        token = self.live.do(lambda: self.helper.people.new_token(POPULATION))
        return ["--home", str(home), "enrol", "--code", code, "--helper", str(self.card), "--helper-token", token]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    place = tmp_path_factory.mktemp("both")
    with serving(place / "state") as live:
        settings = HelperSettings("ab" * 32, port=0)
        folder = HelperFolder.create(place / "helper", settings, "127.0.0.1:1", "ACME IT", SystemClock().now())
        parts = program.build(folder, settings, SystemClock())

        async def start() -> grpc.aio.Server:
            server = grpc.aio.server()
            for service in HelperGateway(parts.helper, parts.people).services():
                service.add_to(server)
            folder.write_address(f"127.0.0.1:{program._listen(server, folder, settings)}")
            await server.start()
            return server

        server = live.run(start())
        yield Both(live, parts, place / "helper" / "card.json")
        live.run(server.stop(0))
        parts.records.close()


def test_enrolment_that_was_cut_off_anywhere_goes_on_with_the_same_tokens(
    both: Both, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for last in itertools.count():
        home = tmp_path / f"cut-{last}"
        words = both.words(home)
        with monkeypatch.context() as patch:
            taken = dies_at(patch, last)
            try:
                assert main(words) == 0
                break
            except PowerCut:
                pass
        enrolled = (home / "identity.json").exists()
        assert enrolled or main(words) == 0, f"cut at step {last}: {taken}"
        assert load_identity(home).population == POPULATION and load_pinned(home) is not None
    assert taken.count("replace") == 4, "two keys, the helper, the identity"


def test_enrolment_on_a_full_disk_goes_on_once_there_is_room(
    both: Both, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for last in (0, 2, 4, 6):
        home = tmp_path / f"full-{last}"
        words = both.words(home)
        with monkeypatch.context() as patch:
            fills_up_at(patch, last)
            assert main(words) == 1
        assert "No space left" in capsys.readouterr().err
        assert main(words) == 0, "the tokens were spent on nothing"
        assert sorted(path.name for path in home.iterdir()) == ["helper.json", "identity.json"]


def test_a_helper_that_is_away_costs_no_token(both: Both, tmp_path: Path) -> None:
    words = both.words(tmp_path / "home")
    away = tmp_path / "away.json"
    away.write_text(json.dumps(json.loads(both.card.read_text()) | {"address": "127.0.0.1:1"}))
    there = words.index(str(both.card))
    assert main([*words[:there], str(away), *words[there + 1 :]]) == 1
    assert not (tmp_path / "home" / "identity.json").exists()
    assert main(words) == 0


def test_another_token_gets_another_key(both: Both, tmp_path: Path) -> None:
    """A key that one population knows must not keep its device from another."""
    home = tmp_path / "home"
    first, second = both.words(home), both.words(home)
    assert main(first[:-4]) == 0
    before = load_identity(home).device_id
    assert main([*second[:3], "--again", *second[3:]]) == 0
    assert load_identity(home).device_id != before
