"""Data that shift do so for those devices and from that moment on, and the sums over cohorts tell of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.server.drifting import AGE, metrics
from tests.simulations import fleets, tiny
from umbel.bundle import Bundle
from umbel.digests import digest_of
from umbel.errors import BadInput
from umbel.plan import Kind
from umbel.update import Metrics
from umbel_client.examples import Examples, Split
from umbel_models.compile import compile_model
from umbel_models.histograms import feature, label
from umbel_models.optimizers import SGD
from umbel_server.round import Base, Round, RoundKey, RoundState
from umbel_simulations.fleet.drift import drift_of
from umbel_simulations.fleet.shifts import Shifts
from umbel_simulations.outcome import DriftOutcome
from umbel_simulations.world import Shift

HOUR = 3600.0
SEEN = Examples({"x": np.float32([[0, 10], [2, 30]]), "token": np.array([[1], [5]])}, {"y": np.array([0, 2])}, 2)
ENDS = {"y": 2.0}
YOUNG, OLD = (0.4, 0.3, 0.2, 0.1), (0.1, 0.2, 0.3, 0.4)


def shifts(*several: Shift, central: Examples = SEEN) -> Shifts:
    return Shifts(several, 20, 1, central, ENDS)


def test_each_shift_comes_to_its_share_of_the_devices_from_its_hour_on_and_for_good() -> None:
    whose = shifts(Shift(2.0, share=0.5), Shift(5.0, share=0.5))
    counts = {hour: [len(whose.begun(device, hour * HOUR)) for device in range(20)] for hour in (1.999, 2.0, 5.0, 99.0)}
    assert sum(counts[1.999]) == 0
    assert sum(counts[2.0]) == 10
    assert sum(counts[5.0]) == 20 and counts[5.0] == counts[99.0]
    assert set(counts[5.0]) == {0, 1, 2}, "who, is drawn for each by itself"


def test_inputs_move_by_their_own_deviations_and_answers_turn_to_the_opposite() -> None:
    moved = shifts().shifted(Split(SEEN, SEEN), (Shift(0.0, by=2.0),))
    for examples in (moved.training, moved.held_back):
        np.testing.assert_array_equal(examples.inputs["x"], np.float32([[2, 30], [4, 50]]))
        assert examples.inputs["x"].dtype == np.float32
        assert examples.inputs["token"] is SEEN.inputs["token"] and examples.targets is SEEN.targets
    turned = shifts().shifted(Split(SEEN, SEEN), (Shift(0.0, kind="answers"),)).held_back
    np.testing.assert_array_equal(turned.targets["y"], [2, 0])
    np.testing.assert_array_equal(turned.inputs["x"], SEEN.inputs["x"])


def test_tokens_cannot_be_moved_but_may_get_other_answers() -> None:
    text = Examples({"token": SEEN.inputs["token"]}, SEEN.targets, 2)
    with pytest.raises(BadInput, match='kind = "answers"'):
        shifts(Shift(1.0), central=text)
    shifts(Shift(1.0, kind="answers"), central=text)


def test_inputs_that_move_are_told_as_drift_and_nothing_is_before(tmp_path: Path) -> None:
    """From end to end: graphs that count, real devices, a real coordinator, and sums that give it away."""
    counting = {"first": feature("x", 0, (-0.5, 0.5, 1.5)), "class": label("y", tiny.CLASSES)}
    compile_model(replace(tiny.spec(SGD(lr=0.1)), histograms=counting), tmp_path / "bundle")
    told = fleets.scenario(tmp_path / "bundle")
    told = replace(told, task=replace(told.task, rounds=22), shifts=(Shift(0.178, by=2.0),))
    found = fleets.played(told, tmp_path)
    assert found.rounds[13].closed_hour < 0.178 < found.rounds[16].closed_hour, "enough rounds on either side"
    assert found.drift.looks == 22 - 14
    assert {alarm.what for alarm in found.drift.alarms} == {"first"}, "answers are what they were"
    assert all(alarm.hour > 0.178 and alarm.p_value < 0.001 for alarm in found.drift.alarms)


def test_what_lasts_is_told_once_and_what_comes_again_is_told_again() -> None:
    ages = [OLD if number // 8 in (2, 4) else YOUNG for number in range(48)]
    rounds = [held(number, metrics(shares, seed=number)) for number, shares in enumerate(ages, 1)]
    found = drift_of(rounds, [AGE], epoch=0.0)
    assert found.looks == 48 - 14
    assert [(alarm.what, alarm.round) for alarm in found.alarms] == [("age", 21), ("age", 37)]
    assert found.alarms[0].hour == 21.0
    assert not drift_of(rounds, [replace(AGE, of_answers=True)], epoch=0.0).alarms, (
        "a model that learns says other things"
    )


def held(number: int, sums: Metrics) -> Round:
    base = Base(1, 1, digest_of(b"any"))
    opened = Round(RoundKey("watch", number, Kind.TRAIN), base, 2, 1, 3, 60.0, 0.0, 0.0, 0.0)
    return replace(opened, state=RoundState.COMPLETED, ended_at=number * HOUR, metrics=sums)


def test_a_run_of_few_rounds_has_looked_for_nothing(tiny_bundle: Bundle, tmp_path: Path) -> None:
    told = fleets.scenario(fleets.home_of(tiny_bundle), shifts=(Shift(0.1),))
    assert fleets.played(told, tmp_path).drift == DriftOutcome()
