"""Go or no-go: every threshold is held against what was measured, and what wasn't measured doesn't pass."""

from dataclasses import fields, replace

import pytest

from umbel_simulations.judgement import is_go, judge
from umbel_simulations.outcome import (
    Alarm,
    Cost,
    DriftOutcome,
    Outcome,
    RolloutEvent,
    RolloutOutcome,
    RoundOutcome,
    Spread,
)
from umbel_simulations.report import page
from umbel_simulations.report.figures import NONE, check_rows, figures, measures, number
from umbel_simulations.scenario import Data, Scenario, Thresholds, to_tree
from umbel_simulations.world import Shift


def spread(*values: float) -> Spread:
    return Spread.of(values) or pytest.fail()


BROKEN = RolloutOutcome(
    3, "noisy", "rolled-back", 5.0, 8.0, 4, 0, cleared_hour=9.5, events=(RolloutEvent(8.0, "<bad>"),)
)
MEASURED = Outcome(
    scenario=to_tree(
        Scenario("all", "digits", Data("smartwatch"), shifts=(Shift(4.0),), thresholds=Thresholds(accuracy=0.8))
    ),
    engine="fleet",
    seed=0,
    hours=10.0,
    rounds=(
        RoundOutcome(1, "accepted", 0.0, 1.0, 13, 10, 0.8, epsilon=1.0),
        RoundOutcome(2, "refused", 1.0, 2.0, 9, 8),
    ),
    weights="ab",
    accuracy=0.85,
    loss=0.4,
    per_device={
        "accuracy": spread(0.5, 0.9),
        "bytes_up": spread(1e6),
        "bytes_down": spread(2e6),
        "seconds": spread(10.0, 20.0),
    },
    devices=40,
    sessions=100,
    trained=50,
    wasted=5,
    rollouts=(replace(BROKEN, content="trained", cleared_hour=None), BROKEN),
    drift=DriftOutcome(9, (Alarm("age", 15, 2.0, 0.0001), Alarm("<hour>", 16, 5.5, 0.0002))),
    epsilon=2.0,
    shapes={"-v[<script>": 1},
    invariants=("books balance",),
)
FOUND = {
    "accuracy": 0.85,
    "fairness_floor": 0.52,
    "loss": 0.4,
    "wasted_sessions": 0.1,
    "megabytes_per_device": 3.0,
    "seconds_per_device": 19.5,
    "epsilon": 2.0,
    "roll_back_hours": 4.5,
    "exposed_devices": 0.1,
    "shift_noticed_hours": 1.5,
    "false_alarms": 1.0,
    "accepted_rounds": 1.0,
}
AT_LEAST = {"accuracy", "fairness_floor", "accepted_rounds"}


def test_there_is_a_case_for_each_threshold() -> None:
    assert set(FOUND) == {field.name for field in fields(Thresholds)}


@pytest.mark.parametrize("name", sorted(FOUND))
def test_a_threshold_passes_up_to_its_limit_and_not_beyond(name: str) -> None:
    found = FOUND[name]
    beyond = found * (1.01 if name in AT_LEAST else 0.99)
    (at,) = judge(MEASURED, Thresholds(**{name: found}))
    assert at.found == pytest.approx(found)
    assert replace(at, wanted=float(at.found or 0)).passes
    (past,) = judge(MEASURED, Thresholds(**{name: beyond}))
    assert not past.passes


@pytest.mark.parametrize("name", sorted(set(FOUND) - {"accepted_rounds"}))
def test_what_was_not_measured_is_no_go(name: str) -> None:
    empty = Outcome(to_tree(Scenario("none", "digits", Data("smartwatch"))), "fleet", 0, 1.0, (), "", None)
    generous = Thresholds(**{name: 0.01 if name in AT_LEAST else 0.99})
    (check,) = judge(empty, generous)
    assert check.found is None and not check.passes


def test_an_engine_without_sessions_has_measured_no_wasted_ones() -> None:
    (check,) = judge(replace(MEASURED, engine="cohort"), Thresholds(wasted_sessions=0.99))
    assert check.found is None and not check.passes
    told = figures(replace(MEASURED, engine="cohort"))
    assert (told["wasted"], told["dropped"]) == (NONE, NONE)
    (half,) = judge(replace(MEASURED, per_device={"bytes_up": spread(1.0)}), Thresholds(megabytes_per_device=9.0))
    assert half.found is None, "what came down wasn't measured"
    (share,) = judge(replace(MEASURED, devices=0), Thresholds(exposed_devices=0.99))
    assert share.found is None, "a report that tells no devices tells no share of them"


def test_a_broken_release_that_never_began_is_no_go_and_is_told() -> None:
    never = RolloutOutcome(0, "slow", "not-begun", None, None, 0, 0)
    both = replace(MEASURED, rollouts=(BROKEN, never))
    checks = judge(both, Thresholds(roll_back_hours=99.0, exposed_devices=1.0))
    assert [check.found for check in checks] == [None, None]
    assert "not-begun" in page.render(both)


@pytest.mark.parametrize("turn", [1, -1])
def test_of_several_broken_releases_the_worst_is_judged(turn: int) -> None:
    worse = replace(BROKEN, release=4, devices_reached=8, cleared_hour=15.0)
    both = replace(MEASURED, rollouts=(BROKEN, worse)[::turn])
    checks = judge(both, Thresholds(roll_back_hours=9.0, exposed_devices=0.1))
    assert [(check.found, check.passes) for check in checks] == [(10.0, False), (0.2, False)]


def test_a_run_without_thresholds_has_no_verdict_and_is_no_go() -> None:
    unjudged = replace(MEASURED, scenario=to_tree(Scenario("none", "digits", Data("smartwatch"))))
    assert not is_go(judge(unjudged))
    assert (measures(unjudged)["verdict"], figures(unjudged)["verdict"]) == (None, NONE)
    assert "nothing to judge" in page.render(unjudged)


def test_figures_in_words_are_the_measures_and_measures_are_numbers() -> None:
    cost = Cost(1.26, 0.5, 2, 100.4)
    words, numbers = figures(MEASURED, cost), measures(MEASURED, cost)
    assert list(words) == [label for label in numbers if label != "rounds"]
    assert (words["accuracy"], numbers["accuracy"]) == ("85.0%", 0.85)
    assert (words["accepted rounds"], numbers["accepted rounds"], numbers["rounds"]) == ("1 of 2", 1, 2)
    assert (words["real seconds"], words["peak memory"]) == ("1.3", "100 MB")
    assert {label for label, value in numbers.items() if isinstance(value, str)} == {"verdict"}
    assert measures(replace(MEASURED, epsilon=0.0))["epsilon"] is None
    assert [number(value) for value in (None, 0.0, 3.0, 0.12345, 12.345, 1234.56)] == [
        NONE, "0", "3", "0.123", "12.35", "1,235",
    ]  # fmt: skip
    checks = judge(MEASURED, Thresholds(accuracy=0.9, epsilon=3.0))
    assert check_rows(checks) == [("accuracy", "≥ 0.9", "0.85", "fails"), ("epsilon", "≤ 3", "2", "holds")]


def test_a_broken_release_that_somebody_still_has_is_no_go() -> None:
    stuck = replace(MEASURED, rollouts=(replace(BROKEN, cleared_hour=None, devices_left=1),))
    (check,) = judge(stuck, Thresholds(roll_back_hours=1000))
    assert not check.passes


def test_no_thresholds_are_no_go() -> None:
    assert judge(MEASURED, Thresholds()) == () and not is_go(())
    assert is_go(judge(MEASURED))


def test_a_page_that_shows_a_part_of_what_there_was_says_so() -> None:
    many = tuple(RoundOutcome(number, "accepted", 0.0, 1.0, 1, 1) for number in range(1, 1235))
    text = page.render(replace(MEASURED, rounds=many, shapes={f"-{place}": place for place in range(30)}))
    assert "The first 200 of 1,234 rounds" in text
    assert "Session shapes: the 20 commonest of 30" in text
    assert "<td>-29</td>" in text and "<td>-9</td>" not in text
    assert "<summary>Rounds<" in page.render(MEASURED)


def test_a_gates_reasons_are_shown_once_though_they_stand_in_each_later_event() -> None:
    events = tuple(RolloutEvent(hour, f"{what}\n  margin: worse") for hour, what in ((8.0, "stops"), (9.0, "is back")))
    text = page.render(replace(MEASURED, rollouts=(replace(BROKEN, events=events),)))
    assert text.count("margin: worse") == 1
    assert "stops" in text and "is back" in text


def test_a_comparison_names_its_runs_or_how_many_there_are() -> None:
    titles = {count: page.render_comparison({f"r{place}": MEASURED for place in range(count)}) for count in (3, 4)}
    assert "<title>r0 and r1 and r2" in titles[3]
    assert "<title>4 runs" in titles[4]


def test_a_page_shows_all_that_a_run_was_and_nothing_of_it_is_taken_for_html() -> None:
    text = page.render(MEASURED)
    for told in (
        "Go</h2>",
        "Rollouts",
        "&lt;bad&gt;",
        "&lt;script&gt;",
        "books balance",
        "Told as drift",
        "&lt;hour&gt;",
        "Privacy spent",
        MEASURED.digest(),
    ):
        assert told in text
    assert "<script" not in text and "<bad>" not in text
    assert "No-go" in page.render(replace(MEASURED, accuracy=0.1))
    in_the_open = page.render(replace(MEASURED, epsilon=0.0))
    assert "Privacy spent" not in in_the_open
    nothing_right = replace(MEASURED, rounds=(*MEASURED.rounds, RoundOutcome(3, "accepted", 2.0, 3.0, 9, 8, 0.0)))
    assert "<title>all: 3, 0<" in page.render(nothing_right)
