"""A gate may be asked after every answer; it must neither be fooled by looking often nor miss what is broken."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbel.errors import OutOfBounds
from umbel_server.evidence import mean_evidence, ratio_evidence
from umbel_server.gates import (
    Arm,
    Decision,
    Drift,
    Exposure,
    GatePolicy,
    Judgement,
    Look,
    failure_evidence,
    judge,
)

SMALL = GatePolicy(least_answers=5, margin=0)


def _canaries(good: int, failed: int = 0, kept: int = 0, silent: int = 0, **measured: float) -> list[Exposure]:
    return (
        [Exposure(Arm.CANARY, answered=True, **measured) for _ in range(good)]
        + [Exposure(Arm.CANARY, answered=True, failed=True) for _ in range(failed)]
        + [Exposure(Arm.CANARY, answered=True, kept_own=True, **measured) for _ in range(kept)]
        + [Exposure(Arm.CANARY) for _ in range(silent)]
    )


def _control(good: int, failed: int = 0) -> list[Exposure]:
    return [Exposure(Arm.CONTROL, answered=True) for _ in range(good)] + [
        Exposure(Arm.CONTROL, answered=True, failed=True) for _ in range(failed)
    ]


def _judge(
    exposures: list[Exposure], policy: GatePolicy = SMALL, *, soaked: bool = True, last: bool = False
) -> Judgement:
    members = sum(exposure.arm is Arm.CANARY for exposure in exposures)
    return judge(exposures, policy, Look(soaked, last, members))


def _of(judgement: Judgement, guard: str) -> Decision:
    return next(finding.decision for finding in judgement.findings if finding.guard == guard)


def test_a_healthy_wave_passes_only_after_its_soak_time() -> None:
    wave = _canaries(10)
    assert _judge(wave, soaked=False).decision is Decision.CONTINUE
    assert _judge(wave).decision is Decision.PASS


def test_a_control_that_calls_before_the_first_canary_says_nothing() -> None:
    assert failure_evidence(_control(5, failed=5), 0.05) == 1.0
    assert judge(_control(5), SMALL, Look(True, False, 4)).decision is Decision.CONTINUE


def test_too_few_answers_go_on_until_the_deadline_and_are_then_inconclusive() -> None:
    wave = _canaries(4, silent=6)
    assert _judge(wave).decision is Decision.CONTINUE
    assert _judge(wave, last=True).decision is Decision.INCONCLUSIVE


def test_a_wave_that_takes_nobody_passes() -> None:
    assert judge([], GatePolicy(), Look(soaked=True, last=False, members=0)).decision is Decision.PASS


def test_a_wave_whose_devices_have_not_come_yet_does_not_pass() -> None:
    assert judge([], SMALL, Look(soaked=True, last=False, members=7)).decision is Decision.CONTINUE


def test_a_control_that_is_there_before_any_canary_says_nothing() -> None:
    control = _control(12, failed=2)
    assert judge(control, SMALL, Look(soaked=True, last=False, members=7)).decision is Decision.CONTINUE
    assert failure_evidence(control, 0.01) == 1.0


def test_failures_exactly_at_the_ceiling_do_not_fire_and_one_more_does() -> None:
    policy = GatePolicy(least_answers=5, margin=0, ceiling_share=0.2, expected_failure_share=0.2)
    assert _of(_judge(_canaries(16, failed=4), policy), "ceiling") is Decision.PASS
    assert _of(_judge(_canaries(15, failed=5), policy), "ceiling") is Decision.FAIL


def test_two_lying_devices_cannot_stop_a_rollout_by_the_ceiling() -> None:
    assert _of(_judge(_canaries(2, failed=2)), "ceiling") is Decision.PASS
    assert _of(_judge(_canaries(2, failed=3)), "ceiling") is Decision.FAIL


def test_one_failing_device_never_stops_a_rollout_alone() -> None:
    assert _judge(_canaries(0, failed=1) + _control(1000)).decision is not Decision.FAIL


def test_a_broken_canary_fails_before_its_soak_time_is_over() -> None:
    assert _judge(_canaries(1, failed=4, silent=5), soaked=False).decision is Decision.FAIL


def test_keeping_ones_own_model_is_not_a_failure() -> None:
    judgement = _judge(_canaries(10, kept=10))
    assert judgement.decision is Decision.PASS
    assert "10 of 20 devices kept their own" in judgement.explain()


def test_most_of_those_who_were_asked_must_have_answered() -> None:
    assert _judge(_canaries(20, silent=80)).decision is Decision.CONTINUE
    assert _judge(_canaries(20, silent=80), last=True).decision is Decision.INCONCLUSIVE
    assert _judge(_canaries(60, silent=40)).decision is Decision.PASS


def test_four_tests_share_what_a_faultless_release_may_be_stopped_for() -> None:
    assert _judge(_canaries(10)).explain().count("(stops at 400)") == 4


def test_a_device_that_failed_has_not_turned_the_release_down() -> None:
    """Nine of the ten that could choose kept their own; five that failed make that no smaller a share."""
    assert _of(_judge(_canaries(1, failed=5, kept=9)), "rejections") is Decision.FAIL


def test_a_release_that_nearly_nobody_wants_fails() -> None:
    assert _judge(_canaries(1, kept=19)).decision is Decision.FAIL


def test_a_fall_in_accuracy_fails_and_noise_does_not() -> None:
    noise = [Exposure(Arm.CANARY, answered=True, accuracy_change=c) for c in np.linspace(-0.1, 0.1, 40)]
    assert _judge(noise).decision is Decision.PASS
    assert _of(_judge(_canaries(20, accuracy_change=-0.5)), "accuracy") is Decision.FAIL


def test_slow_answers_and_large_memory_fail() -> None:
    assert _of(_judge(_canaries(20, latency_ratio=5.0)), "latency") is Decision.FAIL
    assert _of(_judge(_in_use(20, Drift(memory_ratio=7.0))), "memory") is Decision.FAIL
    assert _judge(_in_use(20, Drift(memory_ratio=1.0))).decision is Decision.PASS
    assert _judge(_canaries(20, latency_ratio=1.1)).decision is Decision.PASS


def _in_use(count: int, drift: Drift, arm: Arm = Arm.CANARY, **seen: bool) -> list[Exposure]:
    return [Exposure(arm, answered=True, drift=drift, **seen) for _ in range(count)]


BOUNDS = [
    ("accuracy", Drift(accuracy=-0.3)),
    ("latency", Drift(latency_ratio=4.0)),
    ("memory", Drift(memory_ratio=6.0)),
]


@pytest.mark.parametrize("guard,drift", BOUNDS, ids=[guard for guard, _ in BOUNDS])
def test_what_gets_worse_in_use_on_canaries_alone_fails(guard: str, drift: Drift) -> None:
    steady = Drift(0.0, 1.0, 1.0)
    judgement = _judge(_in_use(60, drift) + _in_use(60, steady, Arm.CONTROL))
    assert _of(judgement, guard) is Decision.FAIL
    assert "beside 60 control devices" in judgement.explain()


@pytest.mark.parametrize("guard,drift", BOUNDS, ids=[guard for guard, _ in BOUNDS])
def test_what_gets_worse_everywhere_at_the_same_time_is_not_the_releases_fault(guard: str, drift: Drift) -> None:
    """A heat wave, an update of the app, a holiday: control devices see it too."""
    assert _judge(_in_use(60, drift) + _in_use(60, drift, Arm.CONTROL)).decision is Decision.PASS


def test_drift_in_use_says_nothing_before_the_soak_time_is_over_or_beside_too_few() -> None:
    worse, steady = Drift(accuracy=-0.5), Drift(accuracy=0.0)
    wave = _in_use(60, worse) + _in_use(60, steady, Arm.CONTROL)
    assert _judge(wave, soaked=False).decision is Decision.CONTINUE
    assert _judge(_in_use(60, worse) + _in_use(19, steady, Arm.CONTROL)).decision is Decision.PASS
    assert _judge(_in_use(60, worse) + _in_use(20, steady, Arm.CONTROL)).decision is Decision.FAIL
    silent = _in_use(20, Drift(), Arm.CONTROL)
    assert _judge(_in_use(60, worse) + _in_use(19, steady, Arm.CONTROL) + silent).decision is Decision.PASS


def test_trouble_on_canaries_alone_fails_and_trouble_everywhere_does_not() -> None:
    quiet = _control(100)
    troubled = _in_use(20, Drift(), troubled=True)
    assert _of(_judge(troubled + _canaries(20) + quiet), "failures") is Decision.FAIL
    everywhere = _in_use(50, Drift(), Arm.CONTROL, troubled=True)
    assert _of(_judge(troubled + _canaries(20) + everywhere + _control(50)), "failures") is Decision.PASS


def test_trouble_without_a_control_says_nothing() -> None:
    assert _judge(_in_use(20, Drift(), troubled=True)).decision is Decision.PASS


def test_canaries_may_fail_at_taking_a_release_over_as_often_as_is_expected_whatever_the_control_does() -> None:
    """Control devices take nothing over, so they can't fail at it: that alone is no evidence."""
    assert _judge(_canaries(990, failed=10) + _control(10_000)).decision is Decision.PASS
    assert _of(_judge(_canaries(900, failed=100) + _control(10_000)), "failures") is Decision.FAIL


def test_a_control_that_fails_as_often_clears_a_release() -> None:
    wave = _canaries(190, failed=10)
    assert _of(_judge(wave + _control(10)), "failures") is Decision.FAIL, "too few to compare with"
    assert _of(_judge(wave + _control(190, failed=10)), "failures") is Decision.PASS


def test_one_absurd_measurement_speaks_for_one_device_only() -> None:
    wave = [*_canaries(19, latency_ratio=1.0), Exposure(Arm.CANARY, answered=True, latency_ratio=1e300)]
    judgement = _judge(wave)
    assert judgement.decision is Decision.PASS
    assert "latency: 1.11 times the old one over 20 devices" in judgement.explain(), "as if eight times as slow"


def test_a_control_that_tells_absurdly_small_numbers_makes_no_release_look_large() -> None:
    """Every control device lies; beside half of what there was, which counts most, these canaries are within bounds."""
    lying = _in_use(60, Drift(memory_ratio=1e-300), Arm.CONTROL)
    assert _of(_judge(_in_use(60, Drift(memory_ratio=1.0)) + lying), "memory") is Decision.PASS


def test_a_margin_asks_for_evidence_that_only_many_devices_give() -> None:
    policy = GatePolicy(least_answers=5, margin=0.05)
    assert _judge(_canaries(20), policy).decision is Decision.CONTINUE
    assert _judge(_canaries(100), policy).decision is Decision.PASS


def test_failures_count_against_all_offers_because_they_are_told_sooner() -> None:
    answered_only = failure_evidence(_canaries(0, failed=3) + _control(20), 0.01)
    with_offers = failure_evidence(_canaries(0, failed=3, silent=200) + _control(20), 0.01)
    assert with_offers < answered_only


def test_every_word_of_an_explanation_names_its_guard() -> None:
    judgement = _judge(_canaries(3, failed=9))
    assert judgement.explain().startswith("fail:")
    for guard in ("ceiling", "rejections", "failures", "accuracy", "latency", "memory", "enough data", "margin"):
        assert f"  {guard}: " in judgement.explain()


@pytest.mark.parametrize(
    "wrong",
    [
        '{"alpha": 0}',
        '{"alpha": 0.5}',
        '{"expected_failure_share": 0.5}',
        '{"ceiling_share": 1.5}',
        '{"margin": -0.1}',
        '{"least_answers": 0}',
        '{"ceiling_devices": 0}',
        '{"most_latency_ratio": 9}',
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(wrong: str) -> None:
    with pytest.raises(OutOfBounds):
        GatePolicy(**json.loads(wrong))


@given(st.lists(st.floats(-1, 1), max_size=60), st.floats(-0.9, 0.9))
def test_evidence_about_a_mean_does_not_depend_on_the_order(values: list[float], limit: float) -> None:
    wealth = mean_evidence(values, limit, -1, 1)
    assert wealth >= 0
    assert mean_evidence(values[::-1], limit, -1, 1) == pytest.approx(wealth)


@pytest.mark.parametrize("value,counts_as", [(1e9, 1.0), (-1e9, -1.0), (float("-inf"), -1.0)])
def test_a_value_beyond_its_bounds_is_bet_on_as_if_it_lay_on_them(value: float, counts_as: float) -> None:
    """A bet on more than that could lose more than there is: wealth below nothing is no evidence."""
    assert mean_evidence([0.1, value, 0.2], 0.0, -1, 1) == mean_evidence([0.1, counts_as, 0.2], 0.0, -1, 1)


def test_an_experiment_whose_arms_got_the_wrong_shares_is_noticed() -> None:
    assert ratio_evidence([0, 0], [1, 1]) == pytest.approx(1.0)
    assert ratio_evidence([500, 520], [1, 1]) < 1
    assert ratio_evidence([760, 240], [3, 1]) < 1
    assert ratio_evidence([400, 620], [1, 1]) > 1_000
    assert ratio_evidence([30, 0], [1, 1]) > 1_000


def test_looking_after_every_answer_stops_a_faultless_release_less_often_than_alpha() -> None:
    """Ville's inequality on the code itself: 400 faultless canaries, 2 % fail on both sides, a look at each failure."""
    draw = np.random.Generator(np.random.PCG64(7))
    stopped = 0
    for _ in range(400):
        canary, control = draw.random(400) < 0.02, draw.random(400) < 0.02
        order = np.sort(np.concatenate([np.flatnonzero(canary) * 2, np.flatnonzero(control) * 2 + 1]))
        a = b = 0
        for event in order:
            a, b = a + (event % 2 == 0), b + (event % 2 == 1)
            exposed = _canaries(0, failed=a) + _control(0, failed=b)
            stopped_now = failure_evidence(exposed + _PAD[: 2 * 400 - a - b], 0.01) >= 100
            if stopped_now:
                stopped += 1
                break
    assert stopped <= 8


_PAD = [exposure for _ in range(400) for exposure in (Exposure(Arm.CANARY), Exposure(Arm.CONTROL))]
