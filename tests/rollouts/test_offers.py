"""Who is offered what: only what is listed, newer, not held, not answered before, and only whom a rollout takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import sqlalchemy as sa

from tests.rollouts.fleet import AUTHOR, MODEL, POPULATION, DirectChannel, Fleet, fleet_of
from umbel.errors import AlreadyExists, NotFound, WrongState
from umbel_server.repository import role_of
from umbel_server.rollout import Stage
from umbel_server.rollout_spec import Audience, RolloutSpec, Wave
from umbel_server.tables import DEVICES, VERSIONS

EVERYBODY = (Wave(100.0, soak_seconds=10.0, deadline_seconds=3600.0),)
HALF = (Wave(50.0, soak_seconds=10.0, deadline_seconds=3600.0), *EVERYBODY)


@pytest.fixture
async def fleet(tmp_path: Path) -> Fleet:
    return await fleet_of(tmp_path, 2)


def is_offered(fleet: Fleet, index: int = 0) -> bool:
    """Whether the last answer to a device's check-in held an offer."""
    return cast("DirectChannel", fleet.devices[index].kit.channel).last.HasField("offer")


async def test_who_has_the_newest_is_offered_nothing(fleet: Fleet) -> None:
    await fleet.visits()
    assert not is_offered(fleet)


async def test_a_release_that_nobody_has_signed_yet_is_not_offered(fleet: Fleet) -> None:
    for signer in fleet.keys.signers(role_of(MODEL)):
        fleet.keys.forget(signer.public_key.keyid)
    before = fleet.releases()
    fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    await fleet.visits()
    assert not is_offered(fleet) and fleet.releases() == before


async def test_who_turned_a_release_down_is_not_asked_again(fleet: Fleet) -> None:
    fleet.verbs.publish(MODEL, fleet.broken_version(), "stable", AUTHOR)
    await fleet.visits()
    assert is_offered(fleet)
    await fleet.visits()
    assert not is_offered(fleet)


async def test_a_hold_stops_what_is_new(fleet: Fleet) -> None:
    before = fleet.releases()
    fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    fleet.verbs.hold(MODEL, AUTHOR, "wrong labels")
    await fleet.visits()
    assert not is_offered(fleet) and fleet.releases() == before


async def test_a_hold_that_is_none_can_not_be_lifted(fleet: Fleet) -> None:
    with pytest.raises(NotFound, match="held"):
        fleet.verbs.lift(MODEL, AUTHOR)


async def test_a_paused_rollout_offers_nothing(fleet: Fleet) -> None:
    before = fleet.releases()
    fleet.begin_rollout("r", fleet.good_version(), waves=EVERYBODY)
    fleet.verbs.stop("r", "pause", AUTHOR, "watching support")
    await fleet.visits()
    assert not is_offered(fleet) and fleet.releases() == before


async def test_a_wave_is_offered_to_whom_it_takes_and_going_back_to_whom_it_took(fleet: Fleet) -> None:
    before = fleet.releases()
    begun = fleet.begin_rollout("r", fleet.good_version(), waves=HALF, only=(fleet.id_of(0),))
    await fleet.visits(seconds=1.0)
    assert is_offered(fleet, 0), "the first wave of a small group takes somebody"
    assert not is_offered(fleet, 1), "it is not of the group"
    assert fleet.releases() == [begun.spec.release, before[1]]
    fleet.verbs.stop("r", "roll-back" if fleet.verbs.get("r").rollout.stage is Stage.SUCCEEDED else "abort", AUTHOR, "")
    await fleet.visits()
    assert fleet.releases() == [begun.spec.revert_release, before[1]]
    assert fleet.verbs.get("r").rollout.stage is Stage.ROLLING_BACK, "the device has yet to say so"
    await fleet.visits()
    assert fleet.verbs.get("r").rollout.stage is Stage.ROLLED_BACK


async def test_what_is_taken_back_is_not_the_channels_head_any_more(fleet: Fleet) -> None:
    begun = fleet.begin_rollout("r", fleet.good_version(), waves=EVERYBODY)
    for _ in range(4):
        await fleet.visits()
    assert fleet.verbs.get("r").rollout.stage is Stage.SUCCEEDED
    newcomer = fleet.enrol(7)
    await newcomer.wake()
    active = newcomer.kit.shelf.slots.active
    assert active is not None and active.number == begun.spec.release, "the whole channel has it"
    fleet.verbs.stop("r", "roll-back", AUTHOR, "a user called")
    late = fleet.enrol(8)
    await late.wake()
    assert late.kit.shelf.slots.active is not None
    assert late.kit.shelf.slots.active.number == begun.spec.revert_release


async def test_a_rollout_is_for_its_own_population_alone(fleet: Fleet) -> None:
    before = fleet.releases()
    fleet.begin_rollout("r", fleet.good_version(), waves=EVERYBODY, population="ankles")
    await fleet.visits()
    assert not is_offered(fleet) and fleet.releases() == before


async def test_one_rollout_at_a_time_moves_a_channels_devices(fleet: Fleet) -> None:
    fleet.begin_rollout("r", fleet.good_version(), waves=EVERYBODY)
    with pytest.raises(WrongState, match="moves these devices already"):
        fleet.begin_rollout("s", fleet.good_version(), waves=EVERYBODY)
    with pytest.raises(WrongState, match="end it first"):
        fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)


async def test_a_start_that_is_refused_leaves_the_paused_rollout_before_it(fleet: Fleet) -> None:
    fleet.begin_rollout("paused", fleet.good_version(), waves=EVERYBODY)
    fleet.verbs.stop("paused", "pause", AUTHOR, "watching support")
    later = fleet.clock.now() + 1000.0
    with pytest.raises(WrongState, match="scheduled to start later"):
        fleet.begin_rollout("later", fleet.good_version(), waves=EVERYBODY, start_at=later)
    fleet.clock.instant = later
    with pytest.raises(WrongState, match="look again"):
        fleet.verbs.start("later", AUTHOR, 1)
    assert fleet.verbs.get("paused").rollout.stage is Stage.PAUSED
    fleet.verbs.start("later", AUTHOR, 2)
    assert fleet.verbs.get("paused").rollout.stage is Stage.SUPERSEDED


def test_a_rollouts_id_is_used_once(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    prepared = fleet.verbs.prepare(MODEL, fleet.good_version(), "stable", AUTHOR)
    spec = RolloutSpec(MODEL, "stable", POPULATION, prepared.number, waves=EVERYBODY)
    fleet.verbs.create("r", spec, AUTHOR)
    with pytest.raises(AlreadyExists, match="another id"):
        fleet.verbs.create("r", replace(spec, start_at=1.0), AUTHOR)
    with pytest.raises(NotFound, match="aren't listed"):
        fleet.verbs.edit("r", replace(spec, release=77), AUTHOR, 0)


def test_the_rounds_own_channels_take_no_release(tmp_path: Path) -> None:
    from umbel.errors import NotAllowed
    from umbel_server.versions import CANDIDATE, TRAINING

    fleet = Fleet(tmp_path)
    for channel in (CANDIDATE, TRAINING):
        with pytest.raises(NotAllowed, match="belongs to the rounds"):
            fleet.verbs.prepare(MODEL, 1, channel, AUTHOR)


def test_a_version_that_was_refused_is_not_released(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    version = fleet.good_version()
    with fleet.coordinator.store.transaction() as connection:
        this = (VERSIONS.c.model == MODEL) & (VERSIONS.c.number == version)
        connection.execute(VERSIONS.update().where(this).values(state="refused"))
    with pytest.raises(WrongState, match="only accepted ones go out"):
        fleet.verbs.prepare(MODEL, version, "stable", AUTHOR)


def test_a_release_of_another_channel_is_in_no_rollout(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    prepared = fleet.verbs.prepare(MODEL, 1, "beta", AUTHOR)
    with pytest.raises(WrongState, match="of channel 'beta', not of 'stable': `umbel releases prepare"):
        fleet.verbs.create("r", RolloutSpec(MODEL, "stable", POPULATION, prepared.number), AUTHOR)


def test_a_channels_head_never_falls(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    lower, higher = (fleet.verbs.prepare(MODEL, 1, "stable", AUTHOR).number for _ in range(2))
    desk = fleet.coordinator.rollouts.desk  # type: ignore[union-attr]
    with fleet.coordinator.store.transaction() as connection:
        desk.open(connection, Audience(MODEL, "stable"), higher)
        with pytest.raises(WrongState, match="numbers rise"):
            desk.open(connection, Audience(MODEL, "stable"), lower)
        assert desk.head(connection, Audience(MODEL, "stable")) == higher


async def test_another_populations_device_is_in_no_wave(fleet: Fleet) -> None:
    with fleet.coordinator.store.transaction() as connection:
        this = DEVICES.c.id == fleet.id_of(0)
        connection.execute(sa.update(DEVICES).where(this).values(population="ankles"))
    fleet.restart()
    now = fleet.clock.now()
    assert fleet.coordinator.fleet.members(POPULATION, now) == [fleet.id_of(1)]
    assert fleet.coordinator.fleet.members("ankles", now) == [fleet.id_of(0)]


async def test_a_revoked_device_is_in_no_wave(fleet: Fleet) -> None:
    members = fleet.coordinator.fleet.members(POPULATION, fleet.clock.now())
    assert members == sorted(device.id for device in fleet.devices)
    with fleet.coordinator.store.transaction() as connection:
        this = DEVICES.c.id == fleet.id_of(0)
        connection.execute(sa.update(DEVICES).where(this).values(revoked_at=fleet.clock.now()))
    assert fleet.coordinator.fleet.members(POPULATION, fleet.clock.now()) == [fleet.id_of(1)]
