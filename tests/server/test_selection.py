"""Who joins, how long things may take, and when the others come back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.server.driving import BUNDLE, offer, task
from umbel.digests import digest_of
from umbel.identity import DeviceId
from umbel.plan import Kind, Plan
from umbel_server.round import Base, Round, RoundKey
from umbel_server.selection import (
    ENOUGH_MEASURED,
    SHORTEST_SECONDS,
    Pace,
    adapted,
    most_wanting,
    why_not,
    window,
)

DEVICE = DeviceId("d" * 32)
BASE = Base(1, 1, digest_of(b"bundle"))


def held(kind: Kind = Kind.TRAIN, slots: int = 3, number: int = 1) -> Round:
    return Round(RoundKey("learn", number, kind), BASE, slots, 1, slots, 50.0, 0.0, 100.0, 100.0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"protocol": 0}, "too old"),
        ({"suites": ("other/1",)}, "this task's reports go by umbel-sealed"),
        ({"suites": ()}, "this task's reports go by umbel-sealed"),
        ({"runtimes": ("coreml",)}, "the device on coreml"),
        ({"training_examples": 9}, "asks for 10"),
    ],
)
def test_a_device_that_does_not_fit_is_told_why(changes: dict[str, object], reason: str) -> None:
    planned = task(plan=Plan(min_examples=10))
    assert why_not(DEVICE, offer(), planned, held(), BUNDLE.manifest) == ""
    assert reason in why_not(DEVICE, offer(**changes), planned, held(), BUNDLE.manifest)


def test_an_evaluation_looks_at_held_back_examples() -> None:
    planned = task(plan=Plan(min_examples=10))
    evaluation = held(Kind.EVALUATE)
    assert why_not(DEVICE, offer(training_examples=0), planned, evaluation, BUNDLE.manifest) == ""
    assert "asks for 10" in why_not(DEVICE, offer(held_back_examples=9), planned, evaluation, BUNDLE.manifest)


def test_a_device_without_examples_never_joins() -> None:
    planned = task(plan=Plan(min_examples=0))
    assert why_not(DEVICE, offer(training_examples=0), planned, held(), BUNDLE.manifest)


def test_a_full_or_closing_round_takes_nobody() -> None:
    full = held(slots=1).assign("s", DeviceId("e" * 32), "t", 0.0)
    assert "enough devices" in why_not(DEVICE, offer(), task(), full, BUNDLE.manifest)
    closing = full.receive("s", "r", digest_of(b""), 1, 1.0)
    assert "being closed" in why_not(DEVICE, offer(), task(), closing, BUNDLE.manifest)


def test_the_emptiest_round_is_offered_first() -> None:
    half = held(slots=2, number=1).assign("s", DEVICE, "t", 0.0)
    assert most_wanting([half, held(number=2)])[0].key.number == 2


def test_limits_follow_measured_times_within_bounds() -> None:
    assert adapted(Pace(), [3.0] * (ENOUGH_MEASURED - 1), 2.0, 600.0) == 600.0
    assert adapted(Pace(), [10.0] * 19 + [500.0], 2.0, 600.0) == 20.0
    assert adapted(Pace(), [0.01] * 20, 2.0, 600.0) == SHORTEST_SECONDS
    assert adapted(Pace(), [900.0] * 20, 2.0, 600.0) == 600.0
    assert adapted(Pace(adapts=False), [10.0] * 20, 2.0, 600.0) == 600.0


def test_a_small_fleet_comes_back_soon_and_a_large_one_is_spread_out() -> None:
    pace = Pace()
    small, large = window(pace, 20, 26, 30.0), window(pace, 100_000, 26, 30.0)
    assert (small.earliest, small.latest) == (0.5, 1.5)
    # About as many call within one session's time as a round takes, times the surplus.
    arrivals = 30.0 * 100_000 / ((large.earliest + large.latest) / 2)
    assert arrivals == pytest.approx(max(26 * pace.surplus, 30.0 * 100_000 / pace.longest))
    assert window(pace, 1_000_000, 0, 30.0).latest == 1.5 * pace.idle


@given(st.integers(0, 10**9), st.integers(0, 10**6), st.floats(0, 1e6))
def test_a_window_is_always_a_sensible_one(devices: int, wanted: int, seconds: float) -> None:
    pace = Pace()
    found = window(pace, devices, wanted, seconds)
    assert 0 < found.earliest <= found.latest <= 1.5 * pace.longest
