"""Who the devices are and when they are free: pure, drawn once, the same for the same seed."""

from __future__ import annotations

import json
import os
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.simulations import fleets
from umbel.errors import MalformedMessage, NotFound, OutOfBounds
from umbel_client.examples import NONE, Examples
from umbel_simulations.data import ClientData, Federation
from umbel_simulations.fleet.adversaries import flipped, who_lies
from umbel_simulations.fleet.availability import NEVER, Diurnal, Traced
from umbel_simulations.fleet.engine import ends_of
from umbel_simulations.fleet.population import People
from umbel_simulations.fleet.traces import Trace, read_traces
from umbel_simulations.world import Adversary

HOUR = 3600.0
TRACE = {"duration": 100.0, "finish_time": 90.0, "active": [10.0, 50.0], "inactive": [30.0, 80.0]}
DIURNAL = {"availability": "diurnal", "mean_availability": 0.25, "day_night_swing": 4.0}
EMPTY: dict[str, list[float]] = {"active": [], "inactive": []}


def test_four_times_as_many_devices_are_free_at_the_best_hour_as_at_the_worst(tmp_path: Path) -> None:
    devices = 20_000
    model = Diurnal(devices, np.zeros(devices, np.int32), 0.0, 0.25, 4.0, seed=1)
    counts = [model.count(hour * HOUR) for hour in range(24)]
    assert sum(counts) / 24 / devices == pytest.approx(0.25, rel=0.03)
    # Blocks of two hours smooth the curve a little.
    assert 3.2 < max(counts) / min(counts) < 4.4
    assert int(np.argmax(counts)) in (1, 2, 3)
    elsewhere = Diurnal(devices, np.full(devices, 8 * 60, np.int32), 0.0, 0.25, 4.0, seed=1)
    assert int(np.argmax([elsewhere.count(hour * HOUR) for hour in range(24)])) in (17, 18, 19)
    evening = fleets.scenario(tmp_path, start_hour=20.0, population=fleets.population(devices=5000, **DIURNAL))
    late = People(evening).availability
    assert int(np.argmax([late.count(hour * HOUR) for hour in range(24)])) in (5, 6, 7), "its first hour is eight"


def test_who_is_rarely_free_is_so_some_day() -> None:
    model = Diurnal(50, np.zeros(50, np.int32), 0.0, mean=0.02, swing=4.0, seed=1)
    begins = [model.next_free(device, 0.0) for device in range(50)]
    assert 10 * 24 * HOUR < max(begins) < NEVER
    assert all(model.free(device, begin) for device, begin in enumerate(begins))


def test_more_freedom_than_a_day_has_room_for_is_refused() -> None:
    """Else the share of a day that a scenario asks for would not be the one that its devices have."""
    assert fleets.population(availability="diurnal", mean_availability=0.625).mean_availability == 0.625
    assert fleets.population(availability="always", mean_availability=0.9).mean_availability == 0.9
    assert fleets.population(availability="diurnal", mean_availability=1.0, day_night_swing=1.0).day_night_swing == 1.0
    with pytest.raises(OutOfBounds, match=r"mean_availability is 0\.9, .* at most 0\.625 can be"):
        fleets.population(availability="diurnal", mean_availability=0.9)


def test_wrong_answers_are_answers_that_there_are() -> None:
    """The opposite ones: of classes, of yes and no as numbers, and of any other number."""
    targets = {
        "label": np.array([1, 2, 3]),
        "marked": np.array([-100, 0, 4]),
        "late": np.float32([0, 1, 1]),
        "hours": np.float32([2.0, 3.0, 6.0]),
    }
    ends = ends_of(Federation("all", (), Examples({}, targets, 3)))
    wrong = flipped(Examples({}, targets, 3), ends).targets
    assert wrong["label"].tolist() == [2, 1, 0]
    assert wrong["marked"].tolist() == [-100, 4, 0], "what marks that there is nothing to learn stays"
    assert wrong["late"].tolist() == [1.0, 0.0, 0.0]
    assert wrong["hours"].tolist() == [6.0, 5.0, 2.0]
    assert all(wrong[name].dtype == array.dtype for name, array in targets.items())


def test_an_opposite_answer_to_what_only_one_user_has_is_an_answer_too() -> None:
    """Else a liar with the last class, which nobody held back, would lie by a class below 0, and not at all."""
    rare = Examples({}, {"label": np.array([4, 0])}, 2)
    ends = ends_of(Federation("all", (ClientData("one", rare, NONE),), Examples({}, {"label": np.array([1, 2])}, 2)))
    assert flipped(rare, ends).targets["label"].tolist() == [0, 4]


def test_each_adversary_has_its_share_and_nobody_is_two_of_them() -> None:
    liars = who_lies((Adversary("lazy", 0.25), Adversary("nan", 0.5)), 20, seed=1)
    assert Counter(one.kind for one in liars.values()) == {"lazy": 5, "nan": 10}
    assert liars != who_lies((Adversary("lazy", 0.25), Adversary("nan", 0.5)), 20, seed=2)


def test_the_next_free_moment_is_free_and_lasts_until_it_ends() -> None:
    """Also a hair before it, where the loop may ring."""
    hair, start = 1e-6, 5 * HOUR
    model = Diurnal(50, np.zeros(50, np.int32), 0.0, 0.25, 4.0, seed=1)
    for device in range(50):
        begin = model.next_free(device, start)
        end = model.free_until(device, begin)
        assert model.free(device, begin)
        assert model.free(device, begin - hair)
        assert model.free(device, (begin + end) / 2)
        assert not model.free(device, end)
        assert begin == start or not model.free(device, begin - 1.0)
        assert model.count(begin - hair) == sum(model.free(one, begin - hair) for one in range(50))


def test_a_fleet_that_is_always_free_is_free_until_never() -> None:
    """As a scenario may ask for: a mean of 1 without a swing has no block that isn't free."""
    model = Diurnal(3, np.zeros(3, np.int32), 0.0, mean=1.0, swing=1.0, seed=1)
    assert [model.free_until(device, 0.0) for device in range(3)] == [NEVER] * 3


def test_speeds_spread_over_two_decades_and_some_clocks_are_wrong(tmp_path: Path) -> None:
    told = fleets.scenario(
        tmp_path, population=fleets.population(devices=4000, wrong_clocks=0.1, time_zones=(0.0, -8.0, 5.75))
    )
    people = People(told)
    profiles = [people.profile(device) for device in range(people.count)]
    low, high = np.quantile([profile.speed for profile in profiles], [0.025, 0.975])
    assert np.log10(high / low) == pytest.approx(2.0, abs=0.15)
    medians = np.median([(one.speed, one.down, one.up, one.latency) for one in profiles], axis=0)
    assert medians == pytest.approx([20.0, 20e6 / 8, 5e6 / 8, 0.05], rel=0.1)
    slowest, usual = np.quantile([profile.latency for profile in profiles], [0.975, 0.5])
    assert np.log10(slowest / usual) == pytest.approx(0.5, abs=0.05), "half of the network's one decade"
    drawn = np.log10([(one.speed, one.down, one.up, one.latency) for one in profiles]).T
    assert np.abs(np.corrcoef(drawn) - np.eye(4)).max() < 0.1, "none of these tells of another"
    wrong = [profile for profile in profiles if profile.clock_error]
    assert len(wrong) / len(profiles) == pytest.approx(0.1, abs=0.02)
    errors = [profile.clock_error / HOUR for profile in wrong]
    assert -24.0 <= min(errors) < -20.0 < 20.0 < max(errors) <= 24.0
    assert {profile.utc_offset_minutes for profile in profiles} == {0, -480, 345}, "as in UTC-8"


def test_traces_are_read_as_json_and_as_the_pickle_that_fedscale_hands_out(tmp_path: Path) -> None:
    (tmp_path / "traces.json").write_text("\ufeff\n" + json.dumps({"7": TRACE}))
    (tmp_path / "traces.pkl").write_bytes(pickle.dumps({7: TRACE}))
    wanted = (Trace(90.0, ((10.0, 30.0), (50.0, 80.0))),)
    assert read_traces(tmp_path / "traces.json") == read_traces(tmp_path / "traces.pkl") == wanted
    model = Traced(2, wanted)
    assert model.next_free(0, 31.0) == 50.0
    assert model.next_free(1, 85.0) == 100.0
    assert model.free_until(0, 90.0 + 55.0) == 90.0 + 80.0
    assert Traced(1, (Trace(90.0, ()),)).next_free(0, 0.0) == NEVER


def test_the_trace_that_the_page_shows_is_read(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/reference/scenarios.md").read_text("utf-8")
    (tmp_path / "traces").write_text(page.split("```json\n")[1].split("```")[0])
    assert read_traces(tmp_path / "traces") == (Trace(172800.0, ((3600.0, 28800.0), (90000.0, 118800.0))),)


class Attack:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("owned",)


def test_traces_are_followed_in_turn_in_the_order_of_their_names(tmp_path: Path) -> None:
    """Each from the instant at which an interval begins, in whatever order these stand, until before it ends."""
    late = {"duration": 90.0, "active": [70.0, 40.0], "inactive": [60.0]}
    (tmp_path / "traces").write_text(json.dumps({"2": late, "10": TRACE}))
    model = Traced(3, read_traces(tmp_path / "traces"))
    assert [[model.free(device, at) for at in (10.0, 30.0, 45.0, 69.0, 89.0)] for device in range(3)] == [
        [True, False, False, True, False],
        [False, False, True, False, True],
        [True, False, False, True, False],
    ]
    assert [model.next_free(1, at) for at in (0.0, 40.0, 60.0, 90.0)] == [40.0, 40.0, 70.0, 130.0]


def test_a_trace_may_be_free_from_its_first_moment_to_its_last(tmp_path: Path) -> None:
    (tmp_path / "traces").write_text(json.dumps({"1": {"duration": 90.0, "active": [0.0], "inactive": [90.0]}}))
    assert read_traces(tmp_path / "traces") == (Trace(90.0, ((0.0, 90.0),)),)


def test_a_trace_file_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "traces").write_bytes(pickle.dumps({1: Attack()}))
    with pytest.raises(MalformedMessage, match="plain"):
        read_traces(tmp_path / "traces")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"1": {}},
        {"1": {**TRACE, "finish_time": -1}},
        {"1": {"finish_time": 1e-9, "active": [0.0], "inactive": [1e-10]}},
        [TRACE],
        *({"1": {**EMPTY, "duration": length}} for length in (-1.0, 0.0, True, 10**400)),
        *({"1": {**TRACE, "active": [begin]}} for begin in (95.0, 90.0)),
        {"1": {**TRACE, "active": [-0.5]}},
        {"1": {**TRACE, "inactive": [90.5]}},
        {"1": {**TRACE, "active": ["10"]}},
        {"1": {**TRACE, "inactive": [30.0, float("nan")]}},
        {"1": {**TRACE, "active": "12"}},
        {"1": {**TRACE, "active": {"10": 1}}},
        {"1": {**TRACE, "finish_time": True}},
    ],
)
def test_traces_that_make_no_sense_are_refused(tmp_path: Path, wrong: object) -> None:
    (tmp_path / "traces").write_text(json.dumps(wrong))
    with pytest.raises(MalformedMessage):
        read_traces(tmp_path / "traces")
    for nothing in (tmp_path / "missing", tmp_path):
        with pytest.raises(NotFound):
            read_traces(nothing)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60))
def test_a_damaged_trace_file_is_refused_whatever_it_holds(
    tmp_path_factory: pytest.TempPathFactory, damage: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged-trace"
    path.write_bytes(pickle.PROTO + b"\x04" + damage)
    with pytest.raises(MalformedMessage):
        read_traces(path)


def test_a_fleet_follows_its_trace(tmp_path: Path) -> None:
    path = tmp_path / "traces.json"
    path.write_text(json.dumps({"1": TRACE}))
    part = replace(fleets.population(), availability="trace", trace=str(path))
    people = People(fleets.scenario(tmp_path, population=part))
    assert [people.availability.count(at) for at in (0.0, 20.0, 40.0, 60.0)] == [0, fleets.USERS, 0, fleets.USERS]
