"""Drift is told from sums of rounds: as seldom by mistake as was asked for, and where it is, it is found."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from umbel.histograms import Histogram
from umbel.update import Metrics
from umbel_server.drift import ACCURACY, LOSS, Finding, Splits, Verdict, findings

AGE = Histogram("age", (-1.5, -0.5, 0.5, 1.5))
BELOW = 0.05

Numbers = NDArray[np.float64]


def fleets(count: int, rounds: int, shifted: int = 0, share: float = 0.0, seed: int = 0, devices: int = 20) -> Numbers:
    """Bins of fleets' rounds: devices whose means differ more than one device's ten examples do. [fleets, rounds, bins]

    In the last `shifted` rounds a share of the devices has values half a standard deviation larger.
    """
    chance = np.random.default_rng(seed)
    means = chance.normal(0.0, 1.5, (count, rounds, devices))
    moved = chance.random(means.shape) < share
    moved[:, : rounds - shifted] = False
    means += moved * 0.5 * math.hypot(1.0, 1.5)
    values = chance.normal(means[..., None], 1.0, (*means.shape, 10)).reshape(count, rounds, -1)
    places = np.searchsorted(np.array(AGE.edges) * math.hypot(1.0, 1.5), values)
    return np.stack([(places == place).sum(axis=2) for place in range(len(AGE.bins))], axis=2).astype(float)


def told(bins: Numbers, **more: float) -> list[Metrics]:
    """What rounds with these bins have in their metrics."""
    return [dict(zip(AGE.bins, row, strict=True)) | more for row in bins.tolist()]


def compared(bins: Numbers, recent: int, below: float = BELOW) -> Finding:
    return findings(Splits.of(len(bins) - recent, recent), told(bins), [AGE], below)[0]


def test_fleets_that_stay_as_they_are_alarm_as_seldom_as_was_asked_for() -> None:
    alarms = sum(compared(bins, recent=4).verdict is Verdict.DRIFT for bins in fleets(500, rounds=10))
    assert 12 <= alarms <= 40  # 25 of 500 are asked for; of a thousand honest seeds, two would be beyond


def test_counting_examples_would_call_every_fleet_another() -> None:
    """The attack on the test itself: a chi-square over examples takes one device's examples for many devices'."""
    bins = fleets(100, rounds=10)
    recent, before = bins[:, 6:].sum(axis=1), bins[:, :6].sum(axis=1)
    expected = (recent + before) * recent.sum(axis=1, keepdims=True) / bins.sum(axis=(1, 2))[:, None]
    rest = (recent + before) - expected
    square = ((recent - expected) ** 2 / expected + (recent - expected) ** 2 / rest).sum(axis=1)
    assert (square > 9.49).mean() > 0.3  # the limit for 4 degrees of freedom at 0.05


def test_half_a_fleet_that_moves_by_half_a_sigma_is_found_though_the_psi_is_small() -> None:
    found = [
        compared(bins, 5, below=0.001) for bins in fleets(10, rounds=15, shifted=5, share=0.5, seed=1, devices=200)
    ]
    assert sum(one.verdict is Verdict.DRIFT for one in found) >= 9
    assert all(one.psi is not None and one.psi < 0.1 for one in found)  # below which "nothing has changed", by custom


@pytest.mark.parametrize("shift", [0, 5])
def test_noise_that_makes_counts_negative_neither_alarms_nor_hides(shift: int) -> None:
    bins = fleets(30, rounds=15, shifted=shift, share=1.0, seed=2, devices=60)
    bins = np.concatenate([bins, np.zeros((*bins.shape[:2], 5))], axis=2)  # and bins that nobody's values lie in
    wide = Histogram("wide", tuple(range(bins.shape[2] - 1)))
    bins += np.random.default_rng(3).normal(0.0, 12.0, bins.shape)
    assert (bins < 0).any()
    alarms = 0
    for fleet in bins.tolist():
        rounds = [dict(zip(wide.bins, row, strict=True)) for row in fleet]
        found = findings(Splits.of(10, 5), rounds, [wide], BELOW)[0]
        assert found.psi is not None and math.isfinite(found.psi)
        alarms += found.verdict is Verdict.DRIFT
    assert alarms >= 27 if shift else alarms <= 5


def test_where_noise_leaves_nothing_nothing_is_claimed() -> None:
    bins = np.full((15, len(AGE.bins)), -3.0)
    found = compared(bins, recent=5, below=0.001)
    assert (found.verdict, found.p_value) == (Verdict.UNKNOWN, 1.0)


@pytest.mark.parametrize("place", [0, -1])
def test_a_device_with_a_million_examples_decides_one_round_and_no_more(place: int) -> None:
    """Its weight is bounded, its counts are by a million only: the round that it is in is one round for all that."""
    for shift, verdict in ((0, Verdict.STEADY), (10, Verdict.DRIFT)):
        for bins in fleets(2, rounds=30, shifted=shift, share=1.0, seed=4, devices=60):
            bins[place, -1] += 1e6
            assert compared(bins, recent=10, below=0.001).verdict is verdict


def test_a_window_of_the_very_same_rounds_has_not_moved() -> None:
    bins = np.tile([3.0, 14.0, 15.0, 92.0, 6.0], (15, 1)) * np.arange(1, 16)[:, None] / 7  # in cohorts of other sizes
    found = compared(bins, recent=5)
    assert found.p_value == 1.0 and abs(found.psi or 0.0) < 1e-9
    bins[10:] = [4.0, 13.0, 15.0, 92.0, 6.0]
    assert compared(bins, recent=5).p_value == pytest.approx(1 / 3003)


def test_ways_that_are_alike_but_for_rounding_count_alike() -> None:
    """A reproduction: rounds of three kinds, in cohorts of other sizes, of which 21 ways came out a little nearer."""
    kinds = np.array([[2.0, 21, 13, 19, 8], [4, 18, 4, 4, 19], [20, 25, 13, 6, 6]])
    bins = kinds[[0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 1, 1, 2, 2, 2]] * np.arange(1, 16)[:, None]
    assert compared(bins, recent=5).p_value == pytest.approx(453 / 3003)


def test_too_few_rounds_for_so_small_a_p_value_say_so_instead_of_all_is_well() -> None:
    bins = fleets(1, rounds=12, shifted=2, share=1.0)[0]
    found = compared(bins, recent=2, below=0.001)
    assert found.verdict is Verdict.UNKNOWN
    assert found.p_value >= 1 / 66


def answered(loss: list[float], correct: list[float], recent: int = 5) -> dict[str, Finding]:
    rounds = [
        {"loss": per * count, "correct": right * count, "examples": count}
        for per, right, count in zip(loss, correct, np.random.default_rng(0).integers(300, 600, len(loss)), strict=True)
    ]
    return {it.what: it for it in findings(Splits.of(len(rounds) - recent, recent), rounds, [], 0.001)}


def test_a_model_that_gets_worse_is_told_and_one_that_gets_better_is_left_alone() -> None:
    chance = np.random.default_rng(5)
    about = chance.normal(0.0, 0.02, 15)
    worse = np.repeat([0.0, 0.2], [10, 5])
    found = answered(list(0.5 + about + worse), list(0.8 + about - worse))
    assert {one.verdict for one in found.values()} == {Verdict.DRIFT}
    assert found[LOSS].after - found[LOSS].before == pytest.approx(0.2, abs=0.03)
    assert found[ACCURACY].after - found[ACCURACY].before == pytest.approx(-0.2, abs=0.03)
    found = answered(list(0.5 + about - worse), list(0.8 + about + worse))
    assert {one.verdict for one in found.values()} == {Verdict.STEADY}
    assert min(one.p_value for one in found.values()) > 0.9


@pytest.mark.parametrize("place", [0, -1])
def test_a_device_that_tells_of_a_boundless_loss_decides_one_round_and_no_more(place: int) -> None:
    about = np.random.default_rng(6).normal(0.5, 0.02, 30)
    for worse, verdict in ((0.0, Verdict.STEADY), (0.2, Verdict.DRIFT)):
        loss = about + np.repeat([0.0, worse], [20, 10])
        loss[place] = 1e15
        assert answered(list(loss), [0.5] * 30, recent=10)[LOSS].verdict is verdict


def test_a_model_without_right_answers_is_judged_by_its_loss() -> None:
    rounds = [{"loss": 3.0, "examples": 10.0}] * 15
    assert [(it.what, it.p_value) for it in findings(Splits.of(10, 5), rounds, [], 0.001)] == [(LOSS, 1.0)]


def test_all_ways_are_gone_through_once_while_they_are_few_and_drawn_alike_each_time_where_they_are_many() -> None:
    few = Splits.of(10, 5).taken
    assert len(np.unique(few, axis=0)) == len(few) == math.comb(15, 5)
    assert set(few.sum(axis=1)) == {5.0}
    many = Splits.of(40, 20).taken
    assert (many == Splits.of(40, 20).taken).all() and len(many) == 10_001
    assert set(many.sum(axis=1)) == {20.0} and many[1:].mean(axis=0).min() > 0.3
    for one in (few, many):
        assert (one[0] == np.sort(one[0])).all()  # the first is how the rounds lie


def test_how_a_histogram_was_and_is_stands_beside_the_verdict() -> None:
    bins = np.repeat([[10.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 5.0, 5.0, 0.0]], [10, 5], axis=0)
    found = compared(bins, recent=5)
    assert (found.before, found.after) == (0.0, 2.5)
    assert (found.reference, found.recent) == ((1, 0, 0, 0, 0), (0, 0, 0.5, 0.5, 0))
    assert found.edges == AGE.edges
    assert found.psi is not None and found.psi > 1
