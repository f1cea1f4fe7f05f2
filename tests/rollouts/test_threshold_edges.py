"""The edges of thresholds, as hawkBit's own tests try them: exactly at, one beside, none, gone, late, again.

Cases after RolloutManagementTest, RolloutGroup and Threshold condition tests of Eclipse hawkBit.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.rollouts.fleet import AUTHOR, EAGER, MODEL, SECOND, Fleet, fleet_of
from umbel.errors import WrongState
from umbel.visit import Outcome
from umbel_server.gates import Arm, Decision, Exposure, GatePolicy, Look, judge
from umbel_server.rollout import Stage
from umbel_server.rollout_spec import Promotion, Wave

ALL = (Wave(100.0, soak_seconds=10.0, deadline_seconds=3600.0),)


def decided(answered: int, offered: int, members: int, *, kept: int = 0, failed: int = 0, **policy: float) -> Decision:
    quiet = {"margin": 0.0, "expected_failure_share": 0.4}
    good = answered - kept - failed
    exposures = (
        [Exposure(Arm.CANARY, answered=True)] * good
        + [Exposure(Arm.CANARY, answered=True, kept_own=True)] * kept
        + [Exposure(Arm.CANARY, answered=True, failed=True)] * failed
        + [Exposure(Arm.CANARY)] * (offered - answered)
    )
    return judge(exposures, GatePolicy(**(quiet | policy)), Look(True, False, members)).decision  # type: ignore[arg-type]


def test_answers_exactly_at_the_threshold_open_the_next_wave_and_one_less_does_not() -> None:
    assert decided(20, 30, 30) is Decision.PASS
    assert decided(19, 30, 30) is Decision.CONTINUE


def test_the_share_of_answers_exactly_at_the_threshold_is_enough() -> None:
    assert decided(60, 100, 100) is Decision.PASS
    assert decided(59, 100, 100) is Decision.CONTINUE
    assert decided(3, 5, 3, least_answers=1) is Decision.PASS
    assert decided(2, 5, 3, least_answers=1) is Decision.CONTINUE


def test_failures_exactly_at_the_threshold_are_no_error_and_one_more_is() -> None:
    assert decided(100, 100, 100, failed=20) is Decision.PASS
    assert decided(100, 100, 100, failed=21) is Decision.FAIL


def test_rejections_exactly_at_the_threshold_are_no_error_and_one_more_is() -> None:
    assert decided(100, 100, 100, kept=80) is Decision.PASS
    assert decided(100, 100, 100, kept=81) is Decision.FAIL


@pytest.mark.parametrize("failed", [0, 1, 2])
def test_a_count_below_the_least_is_no_error_whatever_its_share(failed: int) -> None:
    assert decided(failed, failed, failed, failed=failed, least_answers=1) is not Decision.FAIL


def test_a_wave_of_nobody_succeeds_and_never_fails() -> None:
    assert decided(0, 0, 0) is Decision.PASS


def revoke(fleet: Fleet, index: int) -> None:
    from umbel_server.tables import DEVICES

    with fleet.coordinator.store.transaction() as connection:
        this = DEVICES.update().where(DEVICES.c.id == fleet.id_of(index))
        connection.execute(this.values(revoked_at=fleet.clock.now()))


async def test_devices_that_are_revoked_leave_the_count_so_that_the_others_answers_are_enough(tmp_path: Path) -> None:
    fleet = await fleet_of(tmp_path, 3)
    fleet.begin_rollout("r", fleet.good_version(), waves=ALL)
    fleet.clock.instant += 1.0
    silent = fleet.devices[1:]
    for device in silent:  # offered it, and never heard of again
        device.kit.channel.read_listing = None  # type: ignore[method-assign,assignment]
        with pytest.raises(TypeError):
            await device.wake()
    fleet.devices = fleet.devices[:1]
    for _ in range(3):
        await fleet.visits()
    assert fleet.verbs.get("r").rollout.stage is Stage.RUNNING, "one of three is below six tenths"
    fleet.devices += silent
    for index in (1, 2):
        revoke(fleet, index)
    fleet.steer()
    assert fleet.verbs.get("r").rollout.stage is Stage.SUCCEEDED


async def test_a_liar_that_is_revoked_has_no_vote_and_a_way_back_does_not_wait_for_the_revoked(tmp_path: Path) -> None:
    fleet = await fleet_of(tmp_path, 3)
    begun = fleet.begin_rollout("r", fleet.good_version(), waves=ALL)
    await fleet.visits()
    from umbel_server import executions
    from umbel_server.tables import EXECUTIONS

    with fleet.coordinator.store.transaction() as connection:
        liar = executions.find(connection, MODEL, begun.spec.release, fleet.id_of(2))
        assert liar is not None
        told = EXECUTIONS.update().where(EXECUTIONS.c.id == liar.id)
        connection.execute(told.values(outcome=Outcome.FAILED.value))
    revoke(fleet, 2)
    gone = fleet.devices.pop()
    await fleet.visits()
    assert fleet.verbs.get("r").rollout.stage is Stage.SUCCEEDED, "its failure would have stopped the rollout"
    fleet.devices.append(gone)
    revoke(fleet, 1)
    fleet.devices = fleet.devices[:1]
    fleet.verbs.stop("r", "roll-back", AUTHOR, "after all")
    for _ in range(3):
        await fleet.visits()
    assert fleet.verbs.get("r").rollout.stage is Stage.ROLLED_BACK


async def test_a_device_that_enrols_while_a_rollout_runs_joins_its_wave(tmp_path: Path) -> None:
    fleet = await fleet_of(tmp_path, 1)
    begun = fleet.begin_rollout("r", fleet.good_version(), waves=(Wave(100.0, 60.0, 3600.0),))
    await fleet.visits()
    fleet.devices.append(fleet.enrol(9))
    await fleet.visits()
    assert fleet.releases() == [begun.spec.release] * 2


async def test_a_second_rollout_succeeds_after_the_first_ended_with_errors(tmp_path: Path) -> None:
    fleet = await fleet_of(tmp_path, 2)
    fleet.begin_rollout("first", fleet.broken_version(), waves=ALL)
    for _ in range(4):
        await fleet.visits()
    assert fleet.verbs.get("first").rollout.stage is Stage.ROLLED_BACK
    begun = fleet.begin_rollout("second", fleet.good_version(), waves=ALL)
    for _ in range(3):
        await fleet.visits()
    assert fleet.verbs.get("second").rollout.stage is Stage.SUCCEEDED
    assert fleet.releases() == [begun.spec.release] * 2


async def test_the_next_wave_waits_for_its_person_and_refuses_in_every_other_stage(tmp_path: Path) -> None:
    fleet = await fleet_of(tmp_path, 2)
    manual = Wave(50.0, 10.0, 3600.0, promotion=Promotion.MANUAL)
    fleet.begin_rollout("r", fleet.good_version(), waves=(manual, *ALL), gate=EAGER)

    def promote() -> None:
        fleet.verbs.promote("r", SECOND, fleet.verbs.get("r").rollout.revision)

    with pytest.raises(WrongState, match="has to be awaiting-promotion; what can be done now: pause, abort"):
        promote()
    for _ in range(3):
        await fleet.visits()
    assert fleet.verbs.get("r").rollout.stage is Stage.AWAITING_PROMOTION
    assert fleet.verbs.get("r").rollout.wave == 0, "however long nobody says anything"
    promote()
    for _ in range(3):
        await fleet.visits()
    assert fleet.verbs.get("r").rollout.stage is Stage.SUCCEEDED
    with pytest.raises(WrongState):
        promote()
