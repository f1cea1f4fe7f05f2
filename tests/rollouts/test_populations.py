"""Populations that share a model and a channel: what was let go for one reaches no device of another."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.rollouts.fleet import AUTHOR, MODEL, POPULATION, Fleet
from umbel.errors import WrongState
from umbel.plan import Plan
from umbel_server import heads
from umbel_server.releases import KEPT_LISTED
from umbel_server.rollout import Stage
from umbel_server.rollout_spec import Audience, RolloutSpec, Wave
from umbel_server.task import Task

ANKLES, FIRST = "ankles", 2
AT_ONCE = (Wave(100.0, soak_seconds=10.0, deadline_seconds=3600.0),)


@pytest.fixture
async def fleet(tmp_path: Path) -> Fleet:
    """A device of each of two populations, at the same release of the same channel."""
    fleet = Fleet(tmp_path, devices=1)
    task = Task("others", ANKLES, MODEL, Plan(), goal=1, minimum=1, rounds=1, updates_private=False)
    fleet.coordinator.operations.create_task(task, AUTHOR)
    fleet.coordinator.operations.stop_task("others", AUTHOR)
    fleet.devices.append(fleet.enrol(1, ANKLES))
    fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    await fleet.visits()
    assert fleet.releases() == [FIRST, FIRST]
    return fleet


async def rolled_out(fleet: Fleet, name: str, population: str = POPULATION) -> RolloutSpec:
    """A rollout to all of one population that has succeeded."""
    fleet.begin_rollout(name, fleet.good_version(), waves=AT_ONCE, population=population)
    await fleet.visits()
    await fleet.visits()
    found = fleet.verbs.get(name).rollout
    assert found.stage is Stage.SUCCEEDED
    return found.spec


async def test_what_one_population_got_in_waves_no_other_gets_at_once(fleet: Fleet) -> None:
    spec = await rolled_out(fleet, "wrists-first")
    for _ in range(2):
        await fleet.visits()
    assert fleet.releases() == [spec.release, FIRST]
    fleet.devices += [fleet.enrol(2), fleet.enrol(3, ANKLES)]
    await fleet.visits()
    assert fleet.releases() == [spec.release, FIRST, spec.release, FIRST], "new devices get what their population has"


async def test_while_a_rollout_runs_a_new_device_of_another_population_gets_what_its_own_has(fleet: Fleet) -> None:
    running = fleet.begin_rollout("wrists-first", fleet.good_version(), waves=AT_ONCE)
    fleet.devices += [fleet.enrol(2), fleet.enrol(3, ANKLES)]
    await fleet.visits()
    assert fleet.releases() == [running.spec.release, FIRST, running.spec.release, FIRST]


async def test_what_is_published_reaches_every_population(fleet: Fleet) -> None:
    await rolled_out(fleet, "wrists-first")
    number = fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    await fleet.visits()
    assert fleet.releases() == [number, number]
    with fleet.coordinator.store.reading() as connection:
        assert heads.read(connection).numbers == {Audience(MODEL, "stable"): number}


async def test_status_tells_what_devices_get_and_not_what_is_only_prepared(fleet: Fleet) -> None:
    before = fleet.head()
    fleet.verbs.prepare(MODEL, fleet.good_version(), "stable", AUTHOR)
    assert [one.number for one in fleet.coordinator.operations.status().newest_releases] == [before]
    rolled = await rolled_out(fleet, "r")
    told = fleet.coordinator.operations.status().newest_releases
    assert [one.number for one in told] == [before, rolled.release], "one population moved, the other stays"


async def test_each_population_goes_back_to_what_it_had(fleet: Fleet) -> None:
    first = await rolled_out(fleet, "wrists-first")
    second = await rolled_out(fleet, "ankles-next", ANKLES)
    fleet.verbs.stop("ankles-next", "roll-back", AUTHOR, "bad labels")
    await fleet.visits()
    await fleet.visits()
    assert fleet.releases() == [first.release, second.revert_release]
    assert (fleet.head(), fleet.head(ANKLES)) == (first.release, second.revert_release)
    listed = fleet.coordinator.rollouts.desk.listed(MODEL)  # type: ignore[union-attr]
    assert listed[second.revert_release].content_of == FIRST, "not what only the other population got"


async def test_a_release_prepared_for_one_population_brings_nothing_back_to_another(fleet: Fleet) -> None:
    await rolled_out(fleet, "wrists-first")
    prepared = fleet.verbs.prepare(MODEL, fleet.good_version(), "stable", AUTHOR)
    spec = RolloutSpec(MODEL, "stable", ANKLES, prepared.number, revert_release=prepared.revert)
    with pytest.raises(WrongState, match=f"--population {ANKLES}` makes both anew"):
        fleet.verbs.create("ankles-next", spec, AUTHOR)


async def test_a_head_from_before_populations_had_their_own_goes_back_for_everybody(fleet: Fleet) -> None:
    """A rollout that an older coordinator ended had set the whole channel's."""
    spec = await rolled_out(fleet, "wrists-first")
    with fleet.coordinator.store.transaction() as connection:
        heads.move(connection, Audience(MODEL, "stable"), spec.release)
    fleet.steer()
    await fleet.visits()
    assert fleet.releases() == [spec.release, spec.release]
    fleet.verbs.stop("wrists-first", "roll-back", AUTHOR, "bad labels")
    await fleet.visits()
    assert fleet.releases() == [spec.revert_release, spec.revert_release]


async def test_a_population_far_behind_keeps_what_it_has_and_what_it_is_moving_to_listed(fleet: Fleet) -> None:
    slow = fleet.begin_rollout("ankles-slowly", 1, waves=AT_ONCE, population=ANKLES).spec
    await rolled_out(fleet, "wrists-first")
    everybody, wrists = (Audience(MODEL, "stable", population) for population in ("", POPULATION))
    desk, store = fleet.coordinator.rollouts.desk, fleet.coordinator.store  # type: ignore[union-attr]
    for _ in range(KEPT_LISTED):
        number = fleet.verbs.prepare(MODEL, 1, "stable", AUTHOR, population=POPULATION).number
        with store.transaction() as connection:
            desk.open(connection, wrists, number)
    fleet.verbs.prepare(MODEL, 1, "stable", AUTHOR)
    listed = set(desk.listed(MODEL))
    assert {fleet.head(""), fleet.head(ANKLES), slow.release, slow.revert_release} <= listed
    assert len(listed) <= KEPT_LISTED + 8, "the other population's own are passed on the way"
    with store.reading() as connection:
        assert desk.head(connection, everybody) == number, "of everybody: the newest"
