"""Records of questions: by day, for so long, and never in an answer's way."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from umbel.clock import DAY
from umbel_server.serving import log as log_module
from umbel_server.serving.inference import Inferred
from umbel_server.serving.log import InferenceLog

NOON = 1_700_049_600.0
"""2023-11-15, 12:00 UTC."""


def record(at: float = NOON, **changed: object) -> Inferred:
    told = {"caller": "operator:shop", "id": "1", "model": "m", "asked": "", "version": 1, "examples": 2}
    return Inferred(at, **(told | {"waited": 0.1, "ran": 0.2, "outcome": "answered"} | changed))  # type: ignore[arg-type]


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_records_lie_in_the_file_of_their_day_for_their_owner_only(tmp_path: Path) -> None:
    for at in (NOON, NOON + 1, NOON + DAY):
        log = InferenceLog(tmp_path / "inferences", 14)
        log.put(record(at, id="a\n{"))
        log.close()
    first, second = sorted((tmp_path / "inferences").iterdir())
    assert (first.name, second.name) == ("2023-11-15.jsonl", "2023-11-16.jsonl")
    assert [line["at"] for line in lines(first)] == [NOON, NOON + 1]
    assert lines(second)[0]["id"] == "a\n{"
    assert stat.S_IMODE(first.stat().st_mode) == 0o600
    assert stat.S_IMODE(first.parent.stat().st_mode) == 0o700


def test_files_that_are_too_old_go_and_no_others(tmp_path: Path) -> None:
    for name in ("2023-10-31.jsonl", "2023-11-01.jsonl", "2023-11-14.jsonl", "notes.txt"):
        (tmp_path / name).write_text("")
    log = InferenceLog(tmp_path, 14)
    log.put(record())
    log.close()
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == ["2023-11-01.jsonl", "2023-11-14.jsonl", "2023-11-15.jsonl", "notes.txt"]


def test_what_there_is_no_room_for_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "BACKLOG", 3)
    monkeypatch.setattr(log_module, "WRITE_SECONDS", 60.0)
    log = InferenceLog(tmp_path, 14)
    for number in range(10):
        log.put(record(id=str(number)))
    log.close()
    (file,) = tmp_path.iterdir()
    assert [line.get("id") for line in lines(file)] == ["0", "1", "2", None]
    assert lines(file)[-1] == {"at": NOON, "dropped": 7}


def test_on_a_full_disk_records_are_dropped_and_counted_and_nobody_waits(tmp_path: Path) -> None:
    folder = tmp_path / "inferences"
    log = InferenceLog(folder, 14)
    blocked = folder / "2023-11-15.jsonl"
    blocked.mkdir()
    log._waiting.append(record())
    log._write_waiting()
    blocked.rmdir()
    blocked.write_text('{"at":17')  # as far as the disk had room
    log.put(record(id="later"))
    log.close()
    half, later, dropped = blocked.read_text().splitlines()
    assert half == '{"at":17'
    assert json.loads(later)["id"] == "later"
    assert json.loads(dropped)["dropped"] == log.dropped == 1
