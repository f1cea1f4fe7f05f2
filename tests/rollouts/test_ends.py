"""Whom a rollout reaches in the end, how going back ends, and what was prepared too long ago: on real devices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.rollouts.fleet import AUTHOR, EAGER, MODEL, POPULATION, SECOND, Fleet, fleet_of
from umbel.errors import WrongState
from umbel_client import Device
from umbel_server.releases import Prepared
from umbel_server.rollout import Stage
from umbel_server.rollout_spec import RolloutSpec, Wave
from umbel_server.tables import OPERATORS
from umbel_server.waves import BUCKETS, bucket, is_held_back, takes

DEADLINE = 3600.0
EVERYBODY = (Wave(100.0, soak_seconds=10.0, deadline_seconds=DEADLINE),)


@pytest.fixture
async def fleet(tmp_path: Path) -> Fleet:
    return await fleet_of(tmp_path, 4)


async def succeeded(fleet: Fleet, name: str, **spec: Any) -> Any:
    """A rollout of a good version that has succeeded, and two visits later."""
    fleet.begin_rollout(name, fleet.good_version(), **{"waves": EVERYBODY, **spec})
    for _ in range(4):
        await fleet.visits()
    found = fleet.verbs.get(name).rollout
    assert found.stage is Stage.SUCCEEDED
    return found


def salt_that_splits(*groups: list[Device]) -> str:
    """A salt by which a hold-back of half takes some of each group, and leaves some."""
    for number in range(10_000):
        if all(len({bucket(str(number), device.id) < BUCKETS // 2 for device in group}) == 2 for group in groups):
            return str(number)
    raise AssertionError("no salt splits these groups")


def spec_of(prepared: Prepared, **spec: Any) -> RolloutSpec:
    parts: dict[str, Any] = {"from_release": prepared.head, "revert_release": prepared.revert, "waves": EVERYBODY}
    return RolloutSpec(MODEL, "stable", POPULATION, prepared.number, gate=EAGER, **(parts | spec))


async def test_a_rollout_for_a_group_ends_with_the_group(fleet: Fleet) -> None:
    before = fleet.releases()
    found = await succeeded(fleet, "r", only=(fleet.id_of(0),))
    assert fleet.releases() == [found.spec.release, *before[1:]]
    newcomer = fleet.enrol(7)
    await newcomer.wake()
    assert newcomer.kit.shelf.slots.active.number == before[1], "it isn't of the group"  # type: ignore[union-attr]


async def test_what_a_group_has_tried_goes_to_everybody_once_prepared_again(fleet: Fleet) -> None:
    version = fleet.good_version()
    fleet.begin_rollout("group", version, waves=EVERYBODY, only=(fleet.id_of(0), fleet.id_of(1)))
    for _ in range(4):
        await fleet.visits()
    assert fleet.verbs.get("group").rollout.stage is Stage.SUCCEEDED
    found = fleet.begin_rollout("all", version, waves=EVERYBODY, gate=replace(EAGER, least_answers=20))
    for _ in range(4):
        await fleet.visits()
    assert fleet.verbs.get("all").rollout.stage is Stage.SUCCEEDED, "the group answers for the new number too"
    assert set(fleet.releases()) == {found.spec.release}


async def test_waves_that_end_below_everybody_end_there_and_still_take_their_share_of_newcomers(fleet: Fleet) -> None:
    before = fleet.releases()[0]
    half = (Wave(50.0, soak_seconds=10.0, deadline_seconds=DEADLINE),)
    found = await succeeded(fleet, "r", waves=half)
    newcomers = [fleet.enrol(10)]
    while len({takes(found, device.id) for device in newcomers}) < 2:
        newcomers.append(fleet.enrol(10 + len(newcomers)))
    fleet.devices += newcomers
    await fleet.visits()
    assert fleet.releases() == [found.spec.release if takes(found, it.id) else before for it in fleet.devices]


async def test_who_is_held_back_stays_so_after_success_and_until_something_newer_is_for_everybody(
    fleet: Fleet,
) -> None:
    first, newcomers = fleet.releases(), [fleet.enrol(10), fleet.enrol(11)]
    held_back = {"hold_back_percent": 50.0, "hold_back_salt": salt_that_splits(fleet.devices, newcomers)}
    one = await succeeded(fleet, "one", **held_back)
    two = await succeeded(fleet, "two", **held_back)
    fleet.devices += newcomers
    await fleet.visits()
    assert fleet.releases() == [first[0] if is_held_back(two, it.id) else two.spec.release for it in fleet.devices]
    fleet.verbs.stop("two", "roll-back", AUTHOR, "a user called")
    await fleet.visits()
    back = two.spec.revert_release
    assert fleet.releases() == [first[0] if is_held_back(two, it.id) else back for it in fleet.devices]
    assert one.spec.release < back
    number = fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    await fleet.visits()
    assert set(fleet.releases()) == {number}


async def test_a_mended_release_need_not_wait_until_the_last_device_went_back(fleet: Fleet) -> None:
    await succeeded(fleet, "bad")
    fleet.verbs.stop("bad", "roll-back", AUTHOR, "a user called")
    mended = fleet.begin_rollout("mended", fleet.good_version(), waves=EVERYBODY)
    await fleet.visits()
    assert set(fleet.releases()) == {mended.spec.release}
    fleet.verbs.stop("mended", "abort", AUTHOR, "no better")
    number = fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    for _ in range(2):
        await fleet.visits()
    assert set(fleet.releases()) == {number}
    for name in ("bad", "mended"):
        found = fleet.verbs.get(name).rollout
        assert found.stage is Stage.ROLLED_BACK and "devices left on it: 0" in found.reason


async def test_going_back_waits_for_devices_however_long_ago_the_last_wave_opened(fleet: Fleet) -> None:
    await succeeded(fleet, "r")
    fleet.clock.instant += 14 * 86_400.0
    fleet.steer()
    fleet.verbs.stop("r", "roll-back", AUTHOR, "a user called")
    fleet.steer()
    assert fleet.verbs.get("r").rollout.stage is Stage.ROLLING_BACK, "nobody has been asked yet"
    await fleet.visits()
    await fleet.visits()
    found = fleet.verbs.get("r").rollout
    assert found.stage is Stage.ROLLED_BACK and "devices left on it: 0" in found.reason


async def test_going_back_ends_at_a_deadline_of_its_own_when_devices_stay_away(fleet: Fleet) -> None:
    await succeeded(fleet, "r")
    fleet.verbs.stop("r", "roll-back", AUTHOR, "a user called")
    fleet.clock.instant += DEADLINE - 10.0
    fleet.steer()
    assert fleet.verbs.get("r").rollout.stage is Stage.ROLLING_BACK
    fleet.clock.instant += 10.0
    fleet.steer()
    found = fleet.verbs.get("r").rollout
    assert found.stage is Stage.ROLLED_BACK and "devices left on it: 4" in found.reason


async def test_devices_of_a_rollout_without_a_way_back_follow_the_next_release(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, devices=2)
    found = await succeeded(fleet, "first")
    assert found.spec.revert_release == 0
    fleet.verbs.stop("first", "roll-back", AUTHOR, "a user called")
    fleet.steer()
    assert fleet.verbs.get("first").rollout.stage is Stage.ROLLED_BACK
    number = fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    await fleet.visits()
    assert fleet.releases() == [number, number]


async def test_who_slept_through_a_way_back_goes_straight_to_what_came_after_it(fleet: Fleet) -> None:
    awake, asleep = fleet.devices[:3], fleet.devices[3]
    taken = await succeeded(fleet, "r")
    fleet.verbs.stop("r", "roll-back", AUTHOR, "a user called")
    fleet.devices = awake
    await fleet.visits()
    fleet.clock.instant += DEADLINE
    fleet.steer()
    number = fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    fleet.devices = [asleep]
    assert fleet.releases() == [taken.spec.release]
    await fleet.visits()
    assert fleet.releases() == [number]


async def test_a_way_back_to_what_was_itself_taken_back_is_refused(fleet: Fleet) -> None:
    await succeeded(fleet, "bad")
    prepared = fleet.verbs.prepare(MODEL, fleet.good_version(), "stable", AUTHOR)
    spec = spec_of(prepared)
    fleet.verbs.create("next", spec, AUTHOR)
    fleet.verbs.submit("next", AUTHOR, 0)
    fleet.verbs.approve("next", SECOND, spec.subject, 1)
    fleet.verbs.stop("bad", "roll-back", AUTHOR, "a user called")
    await fleet.visits()
    await fleet.visits()
    with pytest.raises(WrongState, match="brings back something else"):
        fleet.verbs.start("next", AUTHOR, 2)
    with pytest.raises(WrongState, match="releases prepare smartwatch"):
        fleet.verbs.create("again", spec, AUTHOR)
    with pytest.raises(WrongState, match="brings back something else"):
        fleet.verbs.edit("next", spec_of(prepared, on_failure=spec.on_failure, start_at=5.0), AUTHOR, 2)
    anew = spec_of(fleet.verbs.prepare(MODEL, fleet.good_version(), "stable", AUTHOR))
    fleet.verbs.edit("next", anew, AUTHOR, 2)


async def test_a_release_that_its_channel_has_passed_is_not_rolled_out(fleet: Fleet) -> None:
    prepared = fleet.verbs.prepare(MODEL, fleet.good_version(), "stable", AUTHOR)
    spec = spec_of(prepared, start_at=fleet.clock.instant + 100.0)
    fleet.verbs.create("late", spec, AUTHOR)
    fleet.verbs.submit("late", AUTHOR, 0)
    fleet.verbs.approve("late", SECOND, spec.subject, 1)
    fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    await fleet.visits(seconds=200.0)
    record = fleet.verbs.get("late")
    assert record.rollout.stage is Stage.SCHEDULED
    assert "only move to higher ones" in record.judgement, "whoever asks `explain` reads why it waits"


async def test_a_release_that_was_taken_back_is_not_rolled_out_again_by_the_same_words(fleet: Fleet) -> None:
    """Devices that went back stand above it, and would never move there."""
    begun = fleet.begin_rollout("r", fleet.good_version(), waves=(Wave(50.0, 10.0, 3600.0), *EVERYBODY))
    await fleet.visits()
    fleet.verbs.stop("r", "abort", AUTHOR, "wrong labels")
    assert fleet.head() < begun.spec.release
    with pytest.raises(WrongState, match=rf"at release {begun.spec.revert_release} already.*`umbel releases prepare"):
        fleet.verbs.create("again", begun.spec, AUTHOR)


async def test_a_population_without_tasks_keeps_its_model_after_its_rollout(fleet: Fleet) -> None:
    found = await succeeded(fleet, "r")
    offers = fleet.coordinator.rollouts.offers  # type: ignore[union-attr]
    assert offers.model_of(POPULATION) == found.spec.model


async def test_the_word_of_somebody_who_was_revoked_since_starts_nothing(fleet: Fleet) -> None:
    """A second person's stolen identity is worth nothing once it is revoked, also where it was used before."""
    spec = spec_of(fleet.verbs.prepare(MODEL, fleet.good_version(), "stable", AUTHOR))
    fleet.verbs.create("r", spec, AUTHOR)
    fleet.verbs.submit("r", AUTHOR, 0)
    fleet.verbs.approve("r", SECOND, spec.subject, 1)
    row = {"id": "aa", "name": "grace", "role": "approver", "added_by": AUTHOR, "added_at": 1.0, "revoked_at": 2.0}
    with fleet.coordinator.store.transaction() as connection:
        connection.execute(OPERATORS.insert().values(row))
    with pytest.raises(WrongState, match="revoked since"):
        fleet.verbs.start("r", AUTHOR, 2)
    fleet.verbs.edit("r", spec, AUTHOR, 2)
    fleet.verbs.submit("r", AUTHOR, 3)
    fleet.verbs.approve("r", "operator:hopper", spec.subject, 4)
    assert fleet.verbs.start("r", AUTHOR, 5).rollout.stage is Stage.RUNNING
