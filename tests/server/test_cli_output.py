"""An operator's terminal is shown words of devices and makers of models, and nothing that would move its cursor."""

from __future__ import annotations

import pytest

from umbel.v1.admin_pb2 import GetTaskPrivacyResponse
from umbel.v1.device_pb2 import Plan
from umbel_server.cli import output

HOSTILE = "broken\x1b[2J\x1b]0;title\x07\r\x9b1Aall is well"


def test_a_table_shows_words_and_obeys_none(capsys: pytest.CaptureFixture[str]) -> None:
    output.console().print(output.table("", [("device", str), ("reason", lambda row: HOSTILE)], ["7f"]))
    output.console().print(f"held: {HOSTILE}\nsecond line")
    told = capsys.readouterr().out
    assert all(letter.isprintable() or letter == "\n" for letter in told)
    assert told.count("all is well") == 2 and "second line" in told


def test_json_has_words_for_what_json_lacks_and_for_what_a_newer_coordinator_says() -> None:
    told = output.to_tree(GetTaskPrivacyResponse(epsilon_spent=float("inf"), delta=0.5))
    assert (told["epsilon_spent"], told["delta"]) == ("Infinity", 0.5)
    assert output.to_tree(Plan(kind=Plan.KIND_EVALUATE))["kind"] == "evaluate"
    assert output.to_tree(Plan(kind=9))["kind"] == "9"  # type: ignore[arg-type]
