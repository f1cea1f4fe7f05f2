"""Which rounds are held against which, as the store has them, and what an operator is told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.server.drifting import AGE, counting, metrics, write_rounds
from tests.server.driving import TASK, World, task
from umbel.bundle import Bundle
from umbel.errors import NotFound, OutOfBounds
from umbel.histograms import Histogram
from umbel.plan import Kind, Plan
from umbel.update import Update
from umbel.visit import Assignment
from umbel_server import task_records
from umbel_server.drift import Finding, Verdict
from umbel_server.drift_report import DriftReport
from umbel_server.drift_windows import Windows
from umbel_server.round import RoundState
from umbel_server.task_records import TaskRecord

YOUNG, OLD = (0.4, 0.3, 0.2, 0.1), (0.1, 0.2, 0.3, 0.4)


@pytest.fixture
def begun(small_world: World) -> World:
    """A task whose rounds a test writes itself."""
    with small_world.store.transaction() as connection:
        task_records.insert(connection, TaskRecord(task(), 0.0))
    return small_world


def wrote(world: World, *rounds: tuple[float, ...], first: int = 1, **how: Any) -> None:
    measured = [metrics(ages, seed=number) for number, ages in enumerate(rounds)]
    write_rounds(world.store, world.coordinator.registry, measured, TASK, first, **how)


def told(world: World, **chosen: Any) -> DriftReport:
    return world.coordinator.operations.drift(TASK, Windows(**chosen))


def of_age(report: DriftReport) -> Finding:
    return report.findings[0]


def numbers(report: DriftReport) -> tuple[list[int], list[int]]:
    return [it.number for it in report.rounds.reference], [it.number for it in report.rounds.recent]


def test_ages_that_have_moved_are_told(begun: World) -> None:
    wrote(begun, *[YOUNG] * 20, *[OLD] * 5)
    found = told(begun)
    assert numbers(found) == (list(range(1, 11)), list(range(21, 26)))
    assert (of_age(found).what, of_age(found).verdict) == ("age", Verdict.DRIFT)
    assert of_age(found).after - of_age(found).before == pytest.approx(1.0, abs=0.1)
    assert [it.verdict for it in found.findings[1:]] == [Verdict.STEADY, Verdict.STEADY]
    assert of_age(told(begun, first=6, last=15, recent=5)).verdict is Verdict.DRIFT


def test_an_operator_chooses_which_rounds_are_compared(begun: World) -> None:
    wrote(begun, *[OLD] * 10, *[YOUNG] * 20)
    assert of_age(told(begun)).verdict is Verdict.DRIFT
    found = told(begun, first=11, last=20, recent=8)
    assert numbers(found) == (list(range(11, 21)), list(range(23, 31)))
    assert (of_age(found).verdict, found.below) == (Verdict.STEADY, 0.001)


def test_too_few_rounds_say_how_many_are_needed(begun: World) -> None:
    assert told(begun).problem.startswith("0 rounds have left sums that can be compared, and 15 are needed")
    wrote(begun, *[YOUNG] * 12)
    found = told(begun)
    assert found.problem.startswith("12 rounds have left sums") and not found.findings
    assert numbers(found) == (list(range(1, 11)), [11, 12])
    assert told(begun, first=40, last=50).problem == "no round from 40 to 50 has left a sum that can be compared"
    assert "13 are needed: 8 for the reference, and 5 after" in told(begun, first=1, last=8).problem
    assert "10 and 2 rounds give no p-value below 0.015" in told(begun, recent=2).problem
    assert of_age(told(begun, recent=2)).verdict is Verdict.UNKNOWN
    assert told(begun, recent=2, below=0.05).problem == ""


def test_a_round_counts_once_its_sum_is_known_whatever_became_of_its_candidate(begun: World) -> None:
    """Else data that have candidates refused would never be seen to change."""
    wrote(begun, *[YOUNG] * 10)
    write_rounds(begun.store, begun.coordinator.registry, [{}], TASK, 11, state=RoundState.ABANDONED)
    write_rounds(begun.store, begun.coordinator.registry, [{}], TASK, 12, state=RoundState.FAILED)
    wrote(begun, *[OLD] * 5, first=13, state=RoundState.FAILED)
    wrote(begun, YOUNG, first=18, state=RoundState.VALIDATING)
    found = told(begun)
    assert numbers(found) == (list(range(1, 11)), list(range(13, 18)))
    assert of_age(found).verdict is Verdict.DRIFT


def test_cohorts_that_measure_candidates_are_not_mixed_with_those_that_train(begun: World) -> None:
    wrote(begun, *[YOUNG] * 15)
    before = told(begun)
    wrote(begun, *[OLD] * 20, kind=Kind.EVALUATE)
    assert told(begun) == before
    assert of_age(before).verdict is Verdict.STEADY


def test_rounds_that_counted_between_other_edges_are_passed_over_and_that_is_said(begun: World) -> None:
    other = Histogram("age", (1.0, 2.0, 3.0))
    wrote(begun, *[YOUNG] * 20, bundle=counting(other))
    wrote(begun, *[OLD] * 15, first=21)
    found = told(begun)
    assert numbers(found) == (list(range(21, 31)), list(range(31, 36)))
    assert (found.rounds.passed_over, of_age(found).verdict, of_age(found).edges) == (20, Verdict.STEADY, AGE.edges)


def test_answers_are_compared_between_rounds_of_one_version_only(begun: World) -> None:
    """Training moves what a model says, and that is no drift of anything."""
    first = counting(replace(AGE, of_answers=True))
    second = Bundle(replace(first.manifest, description="trained"), first.paths)
    wrote(begun, *[YOUNG] * 10, bundle=first)
    wrote(begun, *[OLD] * 15, first=11, bundle=second)
    found = told(begun)
    assert [one.name for one in found.rounds.left_out] == ["age"]
    assert [one.what for one in found.findings] == ["loss per example", "right answers"]
    alike = told(begun, first=11, last=20)
    assert alike.rounds.left_out == () and of_age(alike).what == "age"


def test_a_model_that_counts_nothing_is_judged_by_its_answers(begun: World) -> None:
    sums = [metrics(YOUNG, worse=0.2 * (number >= 10), seed=number) for number in range(15)]
    plain = [{name: value for name, value in one.items() if "[" not in name} for one in sums]
    write_rounds(begun.store, begun.coordinator.registry, plain, TASK, bundle=counting())
    assert [(it.what, it.verdict) for it in told(begun).findings] == [
        ("loss per example", Verdict.DRIFT),
        ("right answers", Verdict.DRIFT),
    ]


async def test_what_devices_report_is_what_is_compared(world: World) -> None:
    """End to end: a model that counts, devices that report, a coordinator that sums, and drift."""
    counts = counting(AGE)
    world.coordinator.registry.add_model("counting", counts, "operator:test", 0.0)
    devices = world.enrol("a", "b")
    measure = replace(task(plan=Plan(kind=Kind.EVALUATE), rounds=15), model="counting")
    await world.begin(measure)
    for number in range(15):
        ages = OLD if number >= 10 else YOUNG
        for place, device in enumerate(devices):
            reply = (await device.check_in()).reply
            assert isinstance(reply, Assignment)
            body = Update(device.update(reply).delta, 20.0, metrics(ages, seed=2 * number + place))
            await device.send(device.report(reply, body))
        await world.coordinator.tick()
        world.clock.instant += 10
    found = told(world)
    assert [it.number for it in found.rounds.recent] == [11, 12, 13, 14, 15]
    assert of_age(found).verdict is Verdict.DRIFT
    assert of_age(found).recent == pytest.approx(OLD, abs=0.05)


@pytest.mark.parametrize(
    "odd",
    [
        {"recent": 0},
        {"recent": 201},
        {"reference": 0},
        {"first": 3, "last": 2},
        {"first": 0, "last": 5},
        {"first": 5},
        {"first": 1, "last": 201},
        {"below": 0.0},
        {"below": 1.0},
        {"below": float("nan")},
    ],
)
def test_windows_that_make_no_sense_are_refused(odd: dict[str, Any]) -> None:
    with pytest.raises(OutOfBounds):
        Windows(**odd)


def test_a_task_that_is_not_there_is_not_found(small_world: World) -> None:
    with pytest.raises(NotFound):
        small_world.coordinator.operations.drift("nobody", Windows())
