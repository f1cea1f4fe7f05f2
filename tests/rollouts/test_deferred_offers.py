"""Offers are deferred while a device isn't idle: put off, never failed, and taken up where they were left."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from tests.client.recordings import recordings
from tests.rollouts.fleet import AUTHOR, MODEL, QUICK, DirectChannel, Fleet, at_once
from umbel.errors import Unreachable
from umbel_client import Device, HostStatus, IdlePolicy
from umbel_client.slots import TRIES
from umbel_client.visits import Ending
from umbel_server import executions
from umbel_server.rollout import Stage
from umbel_server.rollout_spec import Wave

EVERYBODY = (Wave(100.0, soak_seconds=10.0, deadline_seconds=3600.0),)
WHEN_IDLE = IdlePolicy(require_power=False, require_unmetered=False, max_temperature=None, min_free_bytes=0)


class Life:
    """One device with a first release, its owner's hands, and a rollout that is about to reach it."""

    def __init__(self, folder: Path) -> None:
        self.fleet, self.hands = Fleet(folder), HostStatus()
        self.device = self.fleet.enrol(0, policy=WHEN_IDLE, status=self.hands)
        self.fleet.devices = [self.device]

    async def begin(self) -> None:
        self.hands.tell(idle=True)
        self.fleet.verbs.publish(MODEL, self.fleet.good_version(), "stable", AUTHOR)
        await self.fleet.visits()
        await self.fleet.visits(40.0)
        self.before = self.fleet.releases()[0]
        self.offered = self.fleet.begin_rollout("r", self.fleet.good_version(), waves=EVERYBODY).spec.release
        self.fleet.steer()

    @property
    def channel(self) -> DirectChannel:
        return cast("DirectChannel", self.device.kit.channel)

    def outcome(self) -> str | None:
        """As the coordinator's table has it; None before any offer."""
        with self.fleet.coordinator.store.reading() as connection:
            found = executions.find(connection, MODEL, self.offered, self.device.id)
        return found.outcome if found else None

    def unmoved(self, device: Device) -> bool:
        """The current slot serves, nothing else is on trial or told, and the gate counts nobody."""
        device.predict(recordings(1)[0])
        slots = device.kit.shelf.slots
        with self.fleet.coordinator.store.reading() as connection:
            seen = [move.exposure() for move in executions.of_rollout(connection, "r", [self.offered])]
        return (
            self.fleet.releases() == [self.before]
            and slots.trial is None
            and not device.kit.memory.state.outcomes
            and not any(exposure.answered or exposure.failed or exposure.kept_own for exposure in seen)
            and self.fleet.verbs.get("r").rollout.stage is Stage.RUNNING
        )


@pytest.fixture
async def life(tmp_path: Path) -> Life:
    made = Life(tmp_path)
    await made.begin()
    return made


async def test_offers_are_deferred_while_not_idle(life: Life) -> None:
    life.hands.tell(idle=False)
    traffic = life.channel.traffic.down
    for _ in range(TRIES + 2):
        assert (await life.device.wake()).ending is Ending.WAITED
        life.fleet.steer()
    assert life.outcome() is None and life.channel.traffic.down == traffic
    assert life.unmoved(life.device)
    life.hands.tell(idle=True)
    await life.fleet.visits()
    assert life.fleet.releases() == [life.offered]


async def test_an_offer_is_deferred_by_whoever_takes_the_device_up_during_the_check_in(life: Life) -> None:
    def taken_up(told: Any) -> Any:
        life.hands.tell(idle=False)
        return told

    life.channel.say = taken_up
    traffic = life.channel.traffic.down
    for _ in range(TRIES + 2):
        life.hands.tell(idle=True)
        visit = await life.device.wake()
        assert visit.ending is Ending.INTERRUPTED and "the device is in use" in str(visit.error)
        life.fleet.steer()
        assert life.outcome() == executions.WAITING, "offered, and no answer"
    assert life.channel.traffic.down == traffic, "not even the listing was read"
    assert life.unmoved(life.device)
    await goes_on(life)


async def test_fetching_stops_between_two_files_and_goes_on_there(life: Life) -> None:
    def taken_up(data: bytes) -> bytes:
        life.hands.tell(idle=False)
        return data

    life.channel.spoil = taken_up
    visit = await life.device.wake()
    assert visit.ending is Ending.INTERRUPTED and life.unmoved(life.device)
    came = life.device.kit.memory.state.fetched.bytes
    await goes_on(life)
    assert life.device.kit.memory.state.fetched.bytes > came


async def test_an_accept_test_that_is_interrupted_any_number_of_times_is_no_failure(life: Life) -> None:
    def taken_up(work: Any, *arguments: Any) -> Any:
        life.hands.tell(idle=False)
        return at_once(work, *arguments)

    longer = replace(QUICK, epochs=1)
    device = life.fleet.reopen(0, policy=WHEN_IDLE, status=life.hands, offload=taken_up, personal=longer)
    for _ in range(2 * TRIES):
        life.hands.tell(idle=True)
        assert (await device.wake()).ending is Ending.INTERRUPTED
        assert life.unmoved(device) and life.outcome() == executions.WAITING
    life.device = life.fleet.reopen(0, policy=WHEN_IDLE, status=life.hands)
    await goes_on(life)


async def test_neither_a_broken_way_nor_a_cancelled_visit_is_a_try(life: Life) -> None:
    ends = itertools.cycle([asyncio.CancelledError(), Unreachable("the cable is out")])

    def broken(work: Any, *arguments: Any) -> Any:
        raise next(ends)

    for _ in range(2 * TRIES):
        life.device = life.fleet.reopen(0, policy=WHEN_IDLE, status=life.hands, offload=broken)
        with contextlib.suppress(asyncio.CancelledError):
            await life.device.wake()
        assert life.unmoved(life.device) and life.outcome() == executions.WAITING
    life.device = life.fleet.reopen(0, policy=WHEN_IDLE, status=life.hands)
    await goes_on(life)


async def goes_on(life: Life) -> None:
    """Idle later, the device takes the offer up and answers it under the same execution."""
    life.channel.say, life.channel.spoil = (lambda told: told), (lambda data: data)
    life.hands.tell(idle=True)
    await life.fleet.visits(1.0)
    assert life.fleet.releases() == [life.offered]
    await life.fleet.visits(1.0)
    assert life.outcome() == "adopted"
