"""Experiments, schedules, groups and hold-backs, with real devices: who gets what, when, and how it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.rollouts.fleet import AUTHOR, EAGER, MODEL, POPULATION, SECOND, Fleet, fleet_of
from umbel.errors import NotAllowed, WrongState
from umbel_server.experiments import judge_experiment
from umbel_server.gates import Arm, Decision, Exposure, GatePolicy, Look
from umbel_server.rollout import Stage
from umbel_server.rollout_spec import ExperimentArm, RolloutSpec, Wave
from umbel_server.waves import bucket, release_for

ALL = (Wave(100.0, soak_seconds=10.0, deadline_seconds=3600.0),)


def started(fleet: Fleet, spec: RolloutSpec) -> str:
    """Start a rollout that gives each arm of an experiment a device: its salt is the coordinator's, so try some."""
    for attempt in range(100):
        name = f"r{attempt}"
        found = fleet.verbs.create(name, spec, AUTHOR).rollout
        if len({release_for(found, device.id) for device in fleet.devices}) == max(1, len(spec.arms)):
            break
    fleet.verbs.submit(name, AUTHOR, 0)
    fleet.verbs.approve(name, SECOND, spec.subject, 1)
    if not spec.start_at:
        fleet.verbs.start(name, AUTHOR, 2)
    return name


def experiment(fleet: Fleet, first: int, second: int, **more: Any) -> RolloutSpec:
    """An experiment between two versions, half of the devices each."""
    one, two = (fleet.verbs.prepare(MODEL, version, "stable", AUTHOR) for version in (first, second))
    arms = (ExperimentArm(one.number, 1.0), ExperimentArm(two.number, 1.0))
    defaults = {"waves": ALL, "gate": EAGER, "arms": arms}
    return RolloutSpec(MODEL, "stable", POPULATION, two.number, two.head, two.revert, **(defaults | more))


async def until(fleet: Fleet, name: str, stage: Stage) -> Any:
    for _ in range(10):
        if fleet.verbs.get(name).rollout.stage is stage:
            break
        await fleet.visits()
    assert fleet.verbs.get(name).rollout.stage is stage
    return fleet.verbs.get(name)


async def test_an_experiment_splits_the_fleet_tells_both_arms_and_ends_when_a_second_person_promotes(
    tmp_path: Path,
) -> None:
    fleet = await fleet_of(tmp_path, 4)
    spec = experiment(fleet, fleet.good_version(), fleet.good_version())
    name = started(fleet, spec)
    found = await until(fleet, name, Stage.AWAITING_PROMOTION)
    assert fleet.releases() == [release_for(found.rollout, device.id) for device in fleet.devices]
    for arm in spec.arms:
        assert f"release {arm.release}, accuracy: " in found.judgement
    assert "sample ratio: " in found.judgement
    assert f"release {spec.arms[1].release} beside {spec.arms[0].release}: " in found.judgement
    with pytest.raises(NotAllowed):
        fleet.verbs.promote(name, AUTHOR, found.rollout.revision)
    fleet.verbs.promote(name, SECOND, found.rollout.revision)
    assert fleet.verbs.get(name).rollout.stage is Stage.SUCCEEDED
    await fleet.visits()
    assert set(fleet.releases()) == {spec.release}


async def test_a_broken_arm_takes_both_arms_back_to_what_devices_had(tmp_path: Path) -> None:
    fleet = await fleet_of(tmp_path, 4)
    before = set(fleet.releases())
    gate = replace(EAGER, most_kept_own_share=0.2, ceiling_devices=1)
    spec = experiment(fleet, fleet.good_version(), fleet.broken_version(), gate=gate)
    ended = await until(fleet, started(fleet, spec), Stage.ROLLED_BACK)
    assert ended.rollout.stopped_by_gate
    assert f"release {spec.release}, rejections: " in ended.rollout.reason
    assert set(fleet.releases()) <= before | {spec.revert_release}


async def test_the_way_back_of_an_experiment_leaves_no_device_a_choice(tmp_path: Path) -> None:
    """A device that finds either arm better than the old release goes back all the same."""
    fleet = Fleet(tmp_path, devices=4)
    # A first release that is worse than the arms, but the first: devices that have nothing take anything.
    fleet.verbs.publish(MODEL, fleet.broken_version(), "stable", AUTHOR)
    await fleet.visits()
    spec = experiment(fleet, fleet.good_version(), fleet.good_version())
    name = started(fleet, spec)
    await until(fleet, name, Stage.AWAITING_PROMOTION)
    assert set(fleet.releases()) == {arm.release for arm in spec.arms}
    fleet.verbs.stop(name, "abort", AUTHOR, "wrong labels")
    await until(fleet, name, Stage.ROLLED_BACK)
    assert set(fleet.releases()) == {spec.revert_release}


# The gate of an experiment, alone.


ARMS = (ExperimentArm(7, 1.0), ExperimentArm(8, 1.0))
SMALL = GatePolicy(least_answers=5, margin=0)


def good(count: int, change: float = 0.0) -> list[Exposure]:
    return [Exposure(Arm.CANARY, answered=True, accuracy_change=change) for _ in range(count)]


def judged(
    first: list[Exposure],
    second: list[Exposure],
    control: Sequence[Exposure] = (),
    *,
    soaked: bool = True,
    last: bool = False,
) -> Any:
    sizes = {7: len(first), 8: len(second)}
    look = lambda release: Look(soaked, last, sizes[release])  # noqa: E731
    return judge_experiment(ARMS, {7: first, 8: second}, control, SMALL, look)


def test_an_experiment_passes_when_both_arms_do() -> None:
    assert judged(good(40), good(44)).decision is Decision.PASS
    assert judged(good(40), good(44), soaked=False).decision is Decision.CONTINUE


def test_one_arm_that_fails_fails_the_experiment_and_is_named() -> None:
    failed = [Exposure(Arm.CANARY, answered=True, failed=True)] * 20
    judgement = judged(good(40), good(20) + failed)
    assert judgement.decision is Decision.FAIL
    assert "release 8, ceiling: 20 of 40 devices failed" in judgement.explain()


def test_what_fails_as_often_on_devices_without_either_arm_is_no_arms_fault() -> None:
    failed = [Exposure(Arm.CANARY, answered=True, failed=True)] * 15
    beside = [replace(it, arm=Arm.CONTROL) for it in good(135) + failed]
    assert judged(good(135) + failed, good(135) + failed).decision is Decision.FAIL
    assert judged(good(135) + failed, good(135) + failed, beside).decision is Decision.PASS


def test_all_arms_together_share_what_a_faultless_experiment_may_be_stopped_for() -> None:
    assert judged(good(40), good(44)).explain().count("(stops at 800)") == 8


def test_an_arm_that_cannot_tell_by_its_deadline_pauses_the_experiment() -> None:
    silent = [Exposure(Arm.CANARY)] * 40
    assert judged(good(40), silent).decision is Decision.CONTINUE
    assert judged(good(40), silent, last=True).decision is Decision.INCONCLUSIVE


def test_nothing_is_concluded_from_arms_of_the_wrong_sizes() -> None:
    judgement = judged(good(80), good(20))
    assert judgement.decision is Decision.INCONCLUSIVE
    assert "sample ratio: 80 devices got release 7, 20 devices got release 8" in judgement.explain()


def test_a_failure_counts_more_than_wrong_sizes() -> None:
    assert judged(good(80), [Exposure(Arm.CANARY, answered=True, failed=True)] * 20).decision is Decision.FAIL


def test_which_arm_serves_better_is_told_and_decides_nothing() -> None:
    judgement = judged(good(200), good(200, change=0.3))
    assert judgement.decision is Decision.PASS
    (told,) = [it for it in judgement.findings if it.guard == "release 8 beside 7"]
    assert "+30.0% more" in told.words and "over 200 pairs" in told.words


def test_looking_after_every_device_takes_a_fair_split_for_an_unfair_one_less_often_than_it_may() -> None:
    from umbel_server.evidence import ratio_evidence

    draw = np.random.Generator(np.random.PCG64(11))
    alarms = 0
    for _ in range(300):
        ones = np.cumsum(draw.random(200) < 0.5)
        alarms += any(ratio_evidence([int(n), i + 1 - int(n)], [1, 1]) >= 1_000 for i, n in enumerate(ones))
    assert alarms <= 2


# Schedules, groups, hold-backs.


async def test_a_scheduled_rollout_starts_by_itself_when_its_time_has_come_and_not_before(tmp_path: Path) -> None:
    fleet = await fleet_of(tmp_path, 2)
    before = fleet.releases()
    prepared = fleet.verbs.prepare(MODEL, fleet.good_version(), "stable", AUTHOR)
    start_at = fleet.clock.now() + 60.0
    spec = RolloutSpec(
        MODEL, "stable", POPULATION, prepared.number, prepared.head, prepared.revert, ALL, EAGER, start_at=start_at
    )
    name = started(fleet, spec)
    await fleet.visits(20.0)
    await fleet.visits(20.0)
    assert (fleet.verbs.get(name).rollout.stage, fleet.releases()) == (Stage.SCHEDULED, before)
    fleet.restart()
    await fleet.visits(20.0)
    assert fleet.verbs.get(name).rollout.stage is Stage.RUNNING
    await until(fleet, name, Stage.SUCCEEDED)
    assert set(fleet.releases()) == {prepared.number}


async def test_devices_outside_the_group_and_held_back_ones_keep_what_they_have(tmp_path: Path) -> None:
    fleet = await fleet_of(tmp_path, 4)
    before = fleet.releases()[0]
    *group, outside = [device.id for device in fleet.devices]
    salt = next(f"s{n}" for n in range(1000) if [bucket(f"s{n}", it) < 2_000 for it in group].count(True) == 1)
    held = next(device for device in group if bucket(salt, device) < 2_000)
    begun = fleet.begin_rollout(
        "r", fleet.good_version(), waves=ALL, only=tuple(group), hold_back_percent=20.0, hold_back_salt=salt
    )
    for _ in range(3):
        await fleet.visits()
        if fleet.verbs.get("r").rollout.stage is not Stage.RUNNING:
            break
        has = dict(zip([device.id for device in fleet.devices], fleet.releases(), strict=True))
        assert (has[outside], has[held]) == (before, before)
    assert fleet.verbs.counts(begun)[(begun.spec.release, "adopted")] == len(group) - 1


@pytest.mark.parametrize("action", ["pause", "abort"])
async def test_two_rollouts_never_move_the_same_devices(tmp_path: Path, action: str) -> None:
    fleet = await fleet_of(tmp_path, 2)
    fleet.begin_rollout("first", fleet.good_version())
    prepared = fleet.verbs.prepare(MODEL, fleet.good_version(), "stable", AUTHOR)
    spec = RolloutSpec(MODEL, "stable", POPULATION, prepared.number, prepared.head, prepared.revert, ALL)
    with pytest.raises(WrongState, match="moves these devices already"):
        started(fleet, spec)
    fleet.verbs.stop("first", action, AUTHOR, "a newer one is there")
    if action == "abort":
        fleet.steer()
    fleet.verbs.start("r0", AUTHOR, 2)
    ended = Stage.SUPERSEDED if action == "pause" else Stage.ROLLED_BACK
    assert fleet.verbs.get("first").rollout.stage is ended
