"""Devices that don't have the release yet are what a gate compares with, by their own check-ins over the same time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.rollouts.fleet import AUTHOR, EAGER, MODEL, POPULATION, Fleet
from umbel.visit import CheckIn, Health, SessionRecord
from umbel_server import health
from umbel_server.exposures import canaries, control
from umbel_server.gates import Arm, Drift
from umbel_server.health import Told, is_trouble
from umbel_server.rollout import Stage
from umbel_server.rollout_spec import Wave

GATE = replace(EAGER, alpha=0.45, ceiling_devices=2, ceiling_share=0.2)
"""A dozen devices are few; what each says must weigh enough to decide."""
Told_ = Callable[[CheckIn], CheckIn]
Begun = Callable[[int], Awaitable[Fleet]]


BEGUN: dict[int, Fleet] = {}
"""Fleets whose rollout has begun, by their canaries; each test takes a copy of one."""


@pytest.fixture
def begun(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Begun:
    """A rollout whose first wave takes so many devices; as many others are its control."""

    async def a_copy(canaries: int) -> Fleet:
        if canaries not in BEGUN:
            BEGUN[canaries] = await fleet_with_canaries(tmp_path_factory.mktemp("begun"), canaries)
        fleet = BEGUN[canaries].copied(tmp_path / "copy")
        for index in range(len(fleet.devices)):
            fleet.reopen(index).kit.channel.say = well
        return fleet

    return a_copy


def well(check_in: CheckIn) -> CheckIn:
    return replace(check_in, health=Health(0.9, 0.01, 100.0))


async def fleet_with_canaries(folder: Path, canaries: int) -> Fleet:
    fleet = Fleet(folder, devices=2 * canaries)
    for device in fleet.devices:
        device.kit.channel.say = well
    fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    await fleet.visits()
    await fleet.visits()
    fleet.coordinator.fleet.flush(fleet.clock.now())
    lab = tuple(device.id for device in fleet.devices[:canaries])
    waves = (Wave(0.0, soak_seconds=40.0, deadline_seconds=3600.0, lab=True), Wave(100.0, 10.0, 3600.0))
    fleet.begin_rollout("r", fleet.good_version(), waves=waves, lab=lab, gate=GATE)
    return fleet


async def run(fleet: Fleet, says: dict[int, Told_]) -> Any:
    """Visits until the canaries' gate has decided, with what some devices tell besides."""
    for index, say in says.items():
        fleet.devices[index].kit.channel.say = say
    for _ in range(6):
        await fleet.visits()
        fleet.coordinator.fleet.flush(fleet.clock.now())
        if (found := fleet.verbs.get("r").rollout).wave != 0 or found.stage is not Stage.RUNNING:
            return fleet.verbs.get("r")
    return fleet.verbs.get("r")


def failing(check_in: CheckIn) -> CheckIn:
    record = SessionRecord("learn", 1, "-v[*", "runtime-failure: it doesn't run")
    return replace(check_in, sessions=(record,), health=Health(0.9, 0.01, 100.0))


def worse(check_in: CheckIn) -> CheckIn:
    return replace(check_in, health=Health(0.9, 0.01, 900.0))


TROUBLES = pytest.mark.parametrize(
    "say,canaries",
    [pytest.param(failing, 5, id="sessions fail"), pytest.param(worse, 8, id="memory grows", marks=pytest.mark.slow)],
)


@TROUBLES
async def test_trouble_that_comes_with_the_release_takes_it_back(begun: Begun, say: Told_, canaries: int) -> None:
    fleet = await begun(canaries)
    ended = await run(fleet, dict.fromkeys(range(canaries), say))
    assert ended.rollout.stage in (Stage.ROLLING_BACK, Stage.ROLLED_BACK), ended.judgement
    assert ended.rollout.wave == 0
    assert f"{canaries} control devices" in ended.judgement


@TROUBLES
async def test_trouble_that_comes_to_everybody_at_once_does_not(begun: Begun, say: Told_, canaries: int) -> None:
    fleet = await begun(canaries)
    ended = await run(fleet, dict.fromkeys(range(2 * canaries), say))
    assert ended.rollout.stage in (Stage.RUNNING, Stage.SUCCEEDED), ended.judgement
    assert ended.rollout.wave == 1


async def test_the_control_is_who_could_have_been_offered_it_and_was_not(tmp_path: Path) -> None:
    taken, everybody = 3, 6
    fleet = await fleet_with_canaries(tmp_path, taken)
    await fleet.visits()
    fleet.devices[everybody - 1].kit.channel.say = lambda check_in: replace(check_in, release=9_999)
    fleet.clock.instant += 5.0
    for device in fleet.devices[: everybody - 1]:
        await device.wake()
    coordinator = fleet.coordinator
    coordinator.fleet.flush(fleet.clock.now())
    found = fleet.verbs.get("r").rollout
    from umbel_server import executions

    with coordinator.store.reading() as connection:
        moves = executions.of_rollout(connection, "r", found.releases)
        seen = health.seen_since(connection, POPULATION, found.started_at)
    assert [it.arm for it in canaries(moves, seen)] == [Arm.CANARY] * taken
    assert [it.arm for it in control(found, moves, seen)] == [Arm.CONTROL] * (everybody - taken)
    alone = replace(found, spec=replace(found.spec, only=tuple(device.id for device in fleet.devices[:5])))
    assert len(control(alone, moves, seen)) == 2, "devices outside the group could never have been offered it"
    late = {device: told for device, told in seen.items() if device != fleet.id_of(everybody - 1)}
    assert len(control(found, moves, late)) == everybody - taken - 1


# What is kept.


def check_in(health: Health, release: int, *errors: str) -> CheckIn:
    sessions = tuple(SessionRecord("t", 1, "-v[*", error) for error in errors)
    return CheckIn(POPULATION, (), (), sessions=sessions, health=health, release=release)


@pytest.mark.parametrize(
    "shape,error,counts",
    [
        ("-v[*", "runtime-failure: no", True),
        ("-v[*", "golden-mismatch", True),
        ("-v[*", "not-finite", True),
        ("-v[*", "internal", True),
        ("-v[*", "something-from-a-newer-device", True),
        ("-*", "unreachable", False),
        ("-v[]+*", "digest-mismatch", False),
        ("-*", "not-allowed", False),
        ("-v[]+#", "round-closed", False),
        ("-v[!", "", False),
        ("-v[]+^", "", False),
    ],
)
def test_a_session_counts_as_trouble_if_the_model_or_the_device_failed(shape: str, error: str, counts: bool) -> None:
    assert is_trouble(SessionRecord("t", 1, shape, error)) is counts


def test_a_window_keeps_what_was_told_before_it_and_counts_troubles_anew(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    store = fleet.coordinator.store

    def tell(at: float, *what: CheckIn) -> None:
        told = None
        for one in what:
            told = Told.of(one, at, told)
        assert told is not None
        with store.transaction() as connection:
            health.write(connection, {"d": told})

    tell(1.0, check_in(Health(0.8, 0.1, 100.0), 1, "runtime-failure", "unreachable"))
    with store.transaction() as connection:
        assert health.seen_since(connection, POPULATION, 0.0)["d"].troubles == 1
        health.begin_window(connection, POPULATION)
        assert health.seen_since(connection, POPULATION, 0.0)["d"].drift == Drift(0.0, 1.0, 1.0)
        assert health.seen_since(connection, POPULATION, 2.0) == {}
    tell(3.0, check_in(Health(None, 0.3, None), 2), check_in(Health(0.9, None, None), 2, "not-finite"))
    with store.transaction() as connection:
        seen = health.seen_since(connection, POPULATION, 2.0)["d"]
    assert (seen.release, seen.troubles) == (2, 1)
    assert seen.drift == Drift(pytest.approx(0.1), pytest.approx(3.0), None), "memory of the old release says nothing"
