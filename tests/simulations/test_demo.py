"""The demo's own words; that it runs is seen by `.ci/run`."""

from __future__ import annotations

import io
import signal
import sys
from pathlib import Path

import pytest
from rich.console import Console

from umbel.holding import held
from umbel_simulations.demo.__main__ import main
from umbel_simulations.demo.board import rollout_table
from umbel_simulations.demo.results import Results, RolloutResult


@pytest.mark.parametrize(("folder", "told"), [("dem[b]o", "another demo runs in"), ("file/inside", "Not a directory")])
def test_a_folder_that_does_not_do_is_told_in_words(
    folder: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["demo", "--folder", folder])
    Path("file").touch()
    Path("dem[b]o").mkdir()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        with held(Path("dem[b]o"), "nobody"):
            assert main() == 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("the demo failed: ") and told in said and folder in said
    assert not list(Path("dem[b]o").iterdir())


def test_a_terminal_of_the_usual_width_shows_how_each_rollout_ended() -> None:
    ended = RolloutResult("broken", 10, "rolled-back", 1, 20, 0, "", 6.5)
    written = io.StringIO()
    Console(file=written, width=80).print(rollout_table(Results((), (), 12.0, "", (ended,))))
    assert written.getvalue().splitlines()[-1].split() == ["broken", "10", "rolled-back", "1", "20", "0", "6.5"]
