"""`umbel tasks drift` as people and cron type it, on a coordinator that has rounds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.server.drifting import AGE, metrics, write_rounds
from tests.server.driving import TASK, task
from tests.server.live import Live, serving
from tests.server.test_cli import Result, Umbel, done
from tests.server.test_cli import live as live
from tests.server.test_cli import run as run
from tests.server.test_cli import umbel as umbel
from tests.server.test_metrics import scrape, written
from umbel_server import task_records
from umbel_server.task_records import TaskRecord

YOUNG, OLD = (0.4, 0.3, 0.2, 0.1), (0.1, 0.2, 0.3, 0.4)


def grow_older(live: Live) -> None:
    """Write a task whose devices are older in its last five rounds of twenty."""
    live.add_model()
    measured = [metrics(OLD if number >= 15 else YOUNG, seed=number) for number in range(20)]

    def write() -> None:
        with live.parts.store.transaction() as connection:
            task_records.insert(connection, TaskRecord(task(), 0.0))
        write_rounds(live.parts.store, live.parts.coordinator.registry, measured, TASK)

    live.do(write)


@pytest.fixture
def drift(umbel: Umbel, live: Live) -> Umbel:
    """`umbel tasks drift` of such a task."""
    grow_older(live)
    return lambda *words: umbel("tasks", "drift", TASK, *words)


def test_drift_is_exit_code_one_with_a_line_for_whoever_reads_crons_mail(drift: Umbel, umbel: Umbel) -> None:
    found = drift("--json")
    assert (found.code, found.err) == (1, "umbel: drift of age\n")
    assert {it["what"]: it["verdict"] for it in found.json["findings"]} == {
        "age": "drift",
        "loss per example": "steady",
        "right answers": "steady",
    }
    assert found.json["reference"] == list(range(1, 11)) and found.json["findings"][0]["edges"] == list(AGE.edges)
    told = drift()
    assert (told.code, told.err) == (1, found.err)
    assert "rounds 16-20 (5) against rounds 1-10 (10)" in told.out
    for words in ("up to 10", "10 to 20", "above 30", "████████████████████████ 4"):
        assert words in told.out
    # A list of metrics is for people to read one by one: no bins there, and all of them for programs.
    shown = done(umbel("rounds", "show", TASK, "20")).out
    assert "age[" not in shown and "examples=400" in shown
    assert "age[3]" in done(umbel("rounds", "show", TASK, "20", "--json")).json["metrics"]


def test_windows_that_show_no_drift_or_are_too_small_are_exit_code_nought(drift: Umbel) -> None:
    assert done(drift("--reference", "16-19", "--recent", "1", "--below", "0.4", "--json")).json["problem"] == ""
    few = done(drift("--recent", "12"))
    assert "can't tell: 20 rounds have left sums that can be compared, and 22 are needed" in few.out
    assert "can't tell" in done(drift("--recent", "2")).out


def test_windows_that_make_no_sense_are_told_in_words(drift: Umbel) -> None:
    for words, code in (
        ("--reference ten", 2),
        ("--reference 1-", 2),
        ("--recent -1", 2),
        ("--below 0", 2),
        ("--reference 10-1", 1),
        ("--recent 201", 1),
    ):
        told: Result = drift(*words.split())
        assert (told.code, told.out) == (code, ""), words
        assert told.err, words


def test_windows_of_the_settings_are_those_of_verbs_and_of_prometheus(run: Umbel, tmp_path: Path) -> None:
    chosen = {"drift_reference_rounds": 12, "drift_recent_rounds": 6, "metrics_port": 0}
    with serving(tmp_path / "state", **chosen) as live:
        grow_older(live)
        told = run("tasks", "drift", TASK, "--state", str(tmp_path / "state"), "--json").json
        assert (told["reference"], told["recent"]) == (list(range(1, 13)), list(range(15, 21)))
        found = scrape(live)[written("umbel_drift_p_value", task=TASK, what="age")]
        assert found == told["findings"][0]["p_value"]
