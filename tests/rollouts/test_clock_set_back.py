"""A coordinator's clock that was ahead and is set right holds up no rollout, nor the way back from a bad release."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.rollouts.fleet import AUTHOR, MODEL, SECOND, Fleet, SetClock, fleet_of
from umbel_server.rollout import Stage
from umbel_server.rollout_spec import Wave

YEARS = 4 * 365 * 86_400.0


@pytest.fixture
async def fleet(tmp_path: Path) -> Fleet:
    return await fleet_of(tmp_path, 4)


def set_back(fleet: Fleet) -> None:
    fleet.clock.instant -= YEARS


@pytest.mark.parametrize("restarts", [pytest.param(False, marks=pytest.mark.slow), True])
async def test_a_rollout_whose_wave_opened_in_the_future_goes_on(fleet: Fleet, restarts: bool) -> None:
    fleet.clock.instant += YEARS
    release = fleet.begin_rollout("r", fleet.good_version()).spec.release
    await fleet.visits()
    set_back(fleet)
    if restarts:
        fleet.restart()  # another holder, for whom the lease lasts for years
    for _ in range(6):
        await fleet.visits()
    assert fleet.verbs.get("r").rollout.stage is Stage.SUCCEEDED
    assert set(fleet.releases()) == {release}


async def test_going_back_that_began_in_the_future_is_given_up_at_its_deadline(fleet: Fleet) -> None:
    fleet.clock.instant += YEARS
    everybody = (Wave(100.0, soak_seconds=100.0, deadline_seconds=3600.0),)
    fleet.begin_rollout("r", fleet.good_version(), waves=everybody)
    for _ in range(2):
        await fleet.visits()  # the second one tells of the move
    fleet.devices.pop()  # never comes back
    fleet.verbs.stop("r", "abort", SECOND, "seen to be bad")
    set_back(fleet)
    fleet.steer()
    assert fleet.verbs.get("r").rollout.stage is Stage.ROLLING_BACK
    fleet.clock.instant += everybody[0].deadline_seconds
    fleet.steer()
    assert fleet.verbs.get("r").rollout.stage is Stage.ROLLED_BACK


async def test_devices_follow_a_coordinator_that_has_set_its_clock_right(fleet: Fleet) -> None:
    """Their own clocks were right all the time; what they saw signed says otherwise."""
    own = SetClock(fleet.clock.instant)
    for index in range(len(fleet.devices)):
        fleet.reopen(index, clock=own)
    fleet.clock.instant += YEARS
    fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    await fleet.visits()
    set_back(fleet)
    fleet.steer()
    release = fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    await fleet.visits()
    assert set(fleet.releases()) == {release}


async def test_a_device_that_called_in_the_future_counts_no_longer_than_others(fleet: Fleet) -> None:
    fleet.clock.instant += YEARS
    await fleet.visits()
    set_back(fleet)
    for device in fleet.devices[:3]:
        await device.wake()
    fleet.steer()
    here = fleet.coordinator.fleet
    assert len(here.members("wrists", fleet.clock.now())) == here.active("wrists") == 3
