"""In a storm the books balance; and where a bug is planted in the round logic, the storm finds it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.simulations import fleets, tiny
from umbel.bundle import Bundle
from umbel.clock import SystemClock
from umbel.errors import InvariantBroken
from umbel.plan import Kind, Plan
from umbel.runtime.onnx import OnnxRuntime
from umbel.visit import ReportBegin
from umbel_client import trainer
from umbel_client.examples import Split
from umbel_client.trainer import Job
from umbel_server import privacy_ledger
from umbel_server.aggregation import PlainSum
from umbel_server.round import Round, Session, SessionState
from umbel_server.runner import TaskRunner
from umbel_simulations.data import ClientData
from umbel_simulations.fleet.channel import CALL_SECONDS
from umbel_simulations.fleet.engine import Run
from umbel_simulations.fleet.faults import Fate, crash_times
from umbel_simulations.fleet.invariants import Audit
from umbel_simulations.fleet.member import Awake, expected_seconds
from umbel_simulations.fleet.rollouts import Played
from umbel_simulations.fleet.time_of_device import DeviceTime, PacedRuntime, SharedSessions
from umbel_simulations.outcome import RolloutEvent
from umbel_simulations.scenario import PrivacyPart
from umbel_simulations.world import Crash, Faults, Outage, Process, RolloutPlan, WaveStep

CHECK, COUNT = TaskRunner._check, TaskRunner.count
LATE_SECONDS = 30.0
"""A calm fleet's sessions take a few seconds; a message that is lost costs thirty."""


def test_in_a_storm_every_report_that_counts_counts_once(tiny_bundle: Bundle, tmp_path: Path) -> None:
    told = fleets.scenario(fleets.home_of(tiny_bundle), faults=fleets.STORM)
    for private in (False, True):
        task = replace(told.task, privacy=PrivacyPart(on=private))
        found = fleets.played(replace(told, task=task), tmp_path)
        assert [one.verdict for one in found.rounds].count("accepted") == 4
        assert {"coordinator killed", "device killed", "coordinator cut off"} <= set(found.faults)
        assert ("helper killed" in found.faults) is private
        assert len(found.invariants) == 8


@pytest.mark.slow
def test_a_coordinator_that_dies_as_a_rollout_begins_comes_back_and_goes_on(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    crashes = (Crash("coordinator", from_hour=0.3999, until_hour=0.3999),)
    rollout = RolloutPlan(0.4, content="unloadable", waves=fleets.WAVES, gate=fleets.GATE)
    next_one = replace(rollout, at_hour=0.5, on_failure="pause")
    told = fleets.scenario(fleets.home_of(tiny_bundle), faults=Faults(crashes=crashes), rollouts=(rollout, next_one))
    found = fleets.played(told, tmp_path)
    assert found.faults["coordinator killed"] == 1
    first, second = found.rollouts
    assert (first.ending, second.ending) == ("rolled-back", "paused")
    assert 0.5 < (first.ended_hour or 0.0) <= (second.started_hour or 0.0), "one waits for the other"
    assert len(first.events) == len({event.what.partition(":")[0] for event in first.events}), "each stage is told once"


@pytest.mark.slow
def test_who_has_a_release_has_reached_it_though_nobody_could_be_told(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """The fleet is cut off right after it was offered the release: the books know less than the devices."""
    rollout = RolloutPlan(0.3, waves=(WaveStep(100.0, soak_hours=5.0),), gate=fleets.GATE)
    cut = Faults(outages=(Outage("coordinator", 0.45, 6.0),))
    told = fleets.scenario(fleets.home_of(tiny_bundle), faults=cut, rollouts=(rollout,), hours=2.0)
    (one,) = fleets.played(told, tmp_path).rollouts
    assert one.devices_left >= 1
    assert one.devices_reached >= one.devices_left


def test_a_crash_that_finds_a_visit_over_comes_to_the_next_one(tiny_bundle: Bundle, tmp_path: Path) -> None:
    crash = Crash("device", 8, until_hour=0.02, down_seconds=60.0)
    told = fleets.scenario(fleets.home_of(tiny_bundle), faults=Faults(crashes=(crash,)))
    found = fleets.played(told, tmp_path)
    assert found.faults == {"device killed": 8}
    assert [one.verdict for one in found.rounds] == ["accepted"] * 4


@pytest.mark.parametrize(
    ("process", "counted"),
    [("helper", "helper killed"), pytest.param("leader", "coordinator killed", marks=pytest.mark.slow)],
)
def test_crashes_that_fall_due_together_all_come_and_each_is_counted_once(
    tiny_bundle: Bundle, tmp_path: Path, process: Process, counted: str
) -> None:
    """All of these fall due before the first sum is asked for."""
    told = fleets.scenario(fleets.home_of(tiny_bundle), faults=Faults(crashes=(Crash(process, 3, until_hour=1e-4),)))
    found = fleets.played(replace(told, task=replace(told.task, privacy=PrivacyPart(on=True))), tmp_path)
    assert found.faults == {counted: 3}
    assert [one.verdict for one in found.rounds].count("accepted") == 4


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param(Faults(crashes=(Crash("helper", until_hour=1e-4, down_seconds=1800.0),)), id="killed"),
        pytest.param(Faults(outages=(Outage("helper", 0.0, 0.5),)), id="cut off", marks=pytest.mark.slow),
    ],
)
def test_a_helper_stays_away_as_long_as_the_scenario_says(tiny_bundle: Bundle, tmp_path: Path, faults: Faults) -> None:
    """Without that, four rounds take seven minutes."""
    told = fleets.scenario(fleets.home_of(tiny_bundle), faults=faults)
    found = fleets.played(replace(told, task=replace(told.task, privacy=PrivacyPart(on=True))), tmp_path)
    assert 0.5 < found.hours < 1.2
    assert [one.verdict for one in found.rounds].count("accepted") == 4


@pytest.mark.slow
def test_a_process_dies_once_whoever_of_it_notices(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """Its rounds notice, and each call that it was answering, some when the next process is up already."""
    crash = Crash("coordinator", 10, until_hour=0.1, down_seconds=1.0)
    people = fleets.population(devices=40, check_in_hours=0.02, latency_seconds=2.0)
    slow = Faults(crashes=(crash,), delay=0.3, delay_seconds=3.0)
    told = fleets.scenario(fleets.home_of(tiny_bundle), population=people, faults=slow)
    found = fleets.played(replace(told, task=replace(told.task, rounds=8, goal=12)), tmp_path)
    assert 5 <= found.faults["coordinator killed"] <= crash.times


def test_crashes_that_could_come_only_after_the_run_never_come() -> None:
    assert crash_times(Crash("device", 3, from_hour=30.0), 0, 24 * 3600.0, 1) == []
    for until in (5.0, 0.0):
        times = crash_times(Crash("device", 9, 1.0, until), 0, 7200.0, 1)
        assert len(times) == 9
        assert all(3600.0 <= at <= 7200.0 for at in times)


ALONE = ClientData("one", tiny.examples(7, 1), tiny.examples(4, 2))


@pytest.mark.parametrize(
    "plan",
    [
        Plan(batch_size=4, epochs=3),
        Plan(batch_size=4, epochs=3, max_steps=3),
        Plan(batch_size=64, epochs=9, max_steps=2),
        Plan(batch_size=2, max_examples=5, max_steps=90),
        Plan(Kind.EVALUATE, batch_size=4),
    ],
    ids=str,
)
def test_what_a_plan_is_expected_to_take_is_what_it_takes(tiny_bundle: Bundle, plan: Plan) -> None:
    """Else a device's time would stand still until the expected end, long after its work was done."""
    time = DeviceTime(SystemClock(), 0.0)
    time.begin()
    job = Job(plan, "task", 1, "device")
    trainer.run(job, tiny_bundle, Split(ALONE.training, ALONE.held_back), PacedRuntime(OnnxRuntime(), time, 10.0), time)
    assert time.spent == pytest.approx(expected_seconds(plan, ALONE, 10.0))


def test_a_message_that_is_later_than_anybody_waits_still_arrives() -> None:
    assert Fate(late=CALL_SECONDS - 1.0).behind(CALL_SECONDS) is None
    assert Fate(late=CALL_SECONDS + 1.0).behind(CALL_SECONDS) == CALL_SECONDS + 1.0
    assert Fate(late=CALL_SECONDS + 1.0, overtaken=5.0).behind(CALL_SECONDS) == 5.0
    assert Fate(lost=True, late=CALL_SECONDS + 1.0, overtaken=5.0).behind(CALL_SECONDS) is None


@pytest.mark.slow
def test_messages_take_their_time_and_nobody_waits_for_one_longer_than_half_a_minute(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    far = fleets.population(latency_seconds=8.0, network_decades=0.0)
    told = fleets.scenario(fleets.home_of(tiny_bundle), hours=0.5)
    found = fleets.played(replace(told, population=far), tmp_path)
    assert [one.verdict for one in found.rounds] == ["accepted"] * 4
    assert all(one.closed_hour - one.opened_hour > 60 / 3600 for one in found.rounds)
    late = fleets.played(replace(told, faults=Faults(delay=1.0, delay_seconds=60.0)), tmp_path)
    assert sum(one.reported for one in late.rounds) == 0 < late.sessions


def test_only_what_can_come_twice_is_told_to_have_come_twice(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """A whole call, or a report: no answer, and no part of a download."""
    told = fleets.scenario(fleets.home_of(tiny_bundle), faults=Faults(duplicate=1.0, delay_seconds=1.0))
    found = fleets.played(replace(told, task=replace(told.task, rounds=1)), tmp_path)
    visits, reports = sum(hour.check_ins for hour in found.hourly), sum(hour.reports for hour in found.hourly)
    assert visits + reports <= found.faults["duplicated"] <= 2 * visits


def test_devices_with_wrong_clocks_look_in_as_often_as_others(tiny_bundle: Bundle, tmp_path: Path) -> None:
    told = fleets.scenario(fleets.home_of(tiny_bundle))
    right, wrong = (
        fleets.played(replace(told, population=fleets.population(wrong_clocks=share)), tmp_path) for share in (0.0, 1.0)
    )
    assert [one.verdict for one in wrong.rounds] == ["accepted"] * 4
    assert sum(one.check_ins for one in wrong.hourly) == pytest.approx(
        sum(one.check_ins for one in right.hourly), rel=0.3
    )


def test_a_slow_release_takes_eight_times_as_long(tiny_bundle: Bundle) -> None:
    spent = []
    for slow in (frozenset(), {tiny_bundle.manifest.digest}):
        time = DeviceTime(SystemClock(), 0.0)
        paced = PacedRuntime(OnnxRuntime(), time, 10.0, slow)
        paced.infer(tiny_bundle, tiny_bundle.weights())(tiny_bundle.golden().inputs)
        paced.train(tiny_bundle, tiny_bundle.weights()).step(tiny.examples(6, 1).inputs, tiny.examples(6, 1).targets)
        spent.append(time.spent)
    assert spent == pytest.approx([(8 / 3 + 6) / 10, 8 * (8 / 3 + 6) / 10])


def test_devices_share_the_sessions_that_were_asked_for_last(tiny_bundle: Bundle) -> None:
    shared = SharedSessions(OnnxRuntime(), keep=2)
    one, two, three = (tiny_bundle.weights().scaled(factor) for factor in (1.0, 2.0, 3.0))
    first, second = shared.infer(tiny_bundle, one), shared.infer(tiny_bundle, two)
    assert shared.infer(tiny_bundle, one) is first
    shared.infer(tiny_bundle, three)
    assert shared.infer(tiny_bundle, one) is first
    assert shared.infer(tiny_bundle, two) is not second, "two are kept"


@pytest.mark.slow
def test_outages_that_overlap_last_until_the_last_one_ends(tiny_bundle: Bundle, tmp_path: Path) -> None:
    outages = (Outage("coordinator", 0.0, 0.5), Outage("coordinator", 0.1, 1.5))
    found = fleets.played(fleets.scenario(fleets.home_of(tiny_bundle), faults=Faults(outages=outages)), tmp_path)
    assert [hour.sessions > 0 for hour in found.hourly[:2]] == [False, True]
    assert next(one for one in found.rounds if one.reported).closed_hour > 1.5


REQUIRE = Audit.require


def _counted(audit: Audit) -> list[Session]:
    return [one for one in audit.rounds[0].sessions.values() if one.sequence is not None]


def _with_round(audit: Audit, **changes: Any) -> None:
    audit.rounds = (replace(audit.rounds[0], **changes), *audit.rounds[1:])


def _with_session(audit: Audit, **changes: Any) -> None:
    first = _counted(audit)[0]
    _with_round(audit, sessions={**audit.rounds[0].sessions, first.id: replace(first, **changes)})


def _with_release_taken_back(audit: Audit) -> None:
    event = RolloutEvent(1.0, "rolled-back: fail\ndevices left on it: 0")
    played = Played(RolloutPlan(1.0), "rollout-1", stage="rolled-back", events=[event], numbers=(0,))
    audit._played = (played,)


UNTRUE: dict[str, Callable[[Audit], object]] = {
    "counts a device twice": lambda audit: _with_session(audit, device=_counted(audit)[1].device),
    "numbers its reports wrongly": lambda audit: _with_session(audit, sequence=99),
    "counts a session that is expired": lambda audit: _with_session(audit, state=SessionState.EXPIRED),
    "counts a report that its device never sent": lambda audit: _with_session(audit, id="another"),
    "1 reports were acknowledged": lambda audit: audit._books.acknowledged("another"),
    "weighs 0, its 6 reports weigh": lambda audit: _with_round(audit, weight=0.0),
    "was completed with 6 of 7 reports": lambda audit: _with_round(audit, minimum=7),
    "12 devices still answer with release": _with_release_taken_back,
    "nothing failed inside the coordinator: it broke": lambda audit: audit._house.failures.append("it broke\n"),
}


def test_whatever_the_books_hold_that_did_not_happen_is_found(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_untrue_books(audit: Audit) -> tuple[str, ...]:
        for words, make_untrue in UNTRUE.items():
            kept, failures = dict(vars(audit)), list(audit._house.failures)
            told = set(audit._books.acknowledgements)
            make_untrue(audit)
            with pytest.raises(InvariantBroken, match=words):
                REQUIRE(audit)
            vars(audit).update(kept)
            audit._books.acknowledgements, audit._house.failures = told, failures
        return REQUIRE(audit)

    monkeypatch.setattr(Audit, "require", with_untrue_books)
    told = fleets.scenario(fleets.home_of(tiny_bundle))
    found = fleets.played(replace(told, task=replace(told.task, rounds=1, evaluate_candidates=True)), tmp_path)
    assert len(found.invariants) == 8
    assert [one.verdict for one in found.rounds] == ["accepted"], "one that only judges a candidate isn't told"


@pytest.mark.parametrize(("inside", "name"), [(Awake, "visit"), (Run, "_count_the_free")])
def test_what_fails_inside_a_device_or_the_engine_comes_out(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: type, name: str
) -> None:
    async def fails(self: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(inside, name, fails)
    with pytest.raises(InvariantBroken, match=r"(?s)failed inside .*planted"):
        fleets.played(fleets.scenario(fleets.home_of(tiny_bundle), hours=0.1), tmp_path)


async def _late_reports_count_twice(self: TaskRunner, held: Round, begin: ReportBegin) -> None:
    """What comes late, as it does when its first way was cut off, weighs twice in the sum."""
    aggregator = self.fold.up_to_date(self.asked, held)
    assert isinstance(aggregator, PlainSum)
    before = aggregator.close().weight
    await CHECK(self, held, begin)
    if _is_late(self, begin):
        aggregator.close().aggregate.weight += aggregator.close().weight - before


async def _late_reports_are_thanked_for_and_dropped(self: TaskRunner, begin: ReportBegin) -> None:
    """What comes late is acknowledged, and forgotten."""
    if not _is_late(self, begin):
        await COUNT(self, begin)


def _is_late(runner: TaskRunner, begin: ReportBegin) -> bool:
    session = runner.round_of(begin.session_id).session(begin.session_id)
    return runner.tools.clock.now() - session.assigned_at > LATE_SECONDS


PLANTED: dict[str, tuple[str, Callable[..., Any], str]] = {
    "late reports count twice": ("_check", _late_reports_count_twice, "its . reports weigh"),
    "late reports are dropped": ("count", _late_reports_are_thanked_for_and_dropped, "acknowledged and don't count"),
}


@pytest.mark.parametrize(
    "bug", ["late reports count twice", pytest.param("late reports are dropped", marks=pytest.mark.slow)]
)
def test_a_bug_planted_in_the_round_logic_is_found_by_the_storm_alone(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bug: str
) -> None:
    name, wrong, words = PLANTED[bug]
    monkeypatch.setattr(TaskRunner, name, wrong)
    told = fleets.scenario(fleets.home_of(tiny_bundle))
    fleets.played(told, tmp_path)
    with pytest.raises(InvariantBroken, match=words):
        fleets.played(replace(told, faults=fleets.STORM), tmp_path)


def test_a_coordinator_that_overspends_the_budget_is_found(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = fleets.scenario(fleets.home_of(tiny_bundle), hours=2.0)
    privacy = PrivacyPart(on=True, noise_multiplier=4.0, epsilon=1.8, metric_bound=10.0)
    told = replace(told, task=replace(told.task, rounds=3, privacy=privacy))
    kept = fleets.played(told, tmp_path)
    assert [one.verdict for one in kept.rounds] == ["accepted", "accepted", "abandoned"]
    assert kept.epsilon is not None and 1.6 < kept.epsilon <= 1.8
    monkeypatch.setattr(privacy_ledger, "require_budget", lambda past, opening, settings: None)
    with pytest.raises(InvariantBroken, match=r"epsilon 2\.0.* of 1\.8 is spent"):
        fleets.played(told, tmp_path)
