"""An operator's terminal is shown words of devices and makers of models, and nothing that would move its cursor."""

from __future__ import annotations

import pytest

from umbel_server.cli import output

HOSTILE = "broken\x1b[2J\x1b]0;title\x07\r\x9b1Aall is well"


def test_a_table_shows_words_and_obeys_none(capsys: pytest.CaptureFixture[str]) -> None:
    output.console().print(output.table("", [("device", str), ("reason", lambda row: HOSTILE)], ["7f"]))
    output.console().print(f"held: {HOSTILE}\nsecond line")
    told = capsys.readouterr().out
    assert all(letter.isprintable() or letter == "\n" for letter in told)
    assert told.count("all is well") == 2 and "second line" in told
