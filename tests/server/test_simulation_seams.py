"""What a simulation may put around a coordinator, and that it changes nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.databases import new_sqlite
from tests.server.driving import POPULATION, ManualClock, World, offer
from umbel.digests import digest_of
from umbel.errors import CertificateRefused, NotAllowed
from umbel.identity import DeviceId
from umbel_server.app import build
from umbel_server.beat import Beat
from umbel_server.folder import Folder
from umbel_server.selection import Pace, window
from umbel_server.settings import Settings
from umbel_server.store import HASTY, Store
from umbel_server.surroundings import Surroundings


def names(count: int) -> list[DeviceId]:
    return [DeviceId(digest_of(str(number).encode())[:32]) for number in range(count)]


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(1_790_000_000.0)


@pytest.fixture
def settings(tmp_path: Path, clock: ManualClock) -> Settings:
    Folder.create(tmp_path / "state", (), clock.now())
    return Settings(state=tmp_path / "state", durable=False, pace_steering=False, pace_idle_seconds=900.0)


def test_devices_that_are_admitted_in_bulk_may_call_until_they_are_revoked(
    settings: Settings, clock: ManualClock
) -> None:
    parts = build(settings, clock)
    devices = names(50)
    parts.access.admit("simulation", POPULATION, devices)
    parts.access.admit("simulation", POPULATION, devices)
    peer = parts.access.known(devices[7], POPULATION)
    assert (peer.id, peer.realm) == (devices[7], POPULATION)
    parts.access.revoke("operator:ada", devices[7], "lost")
    with pytest.raises(CertificateRefused):
        parts.access.known(devices[7], POPULATION)
    parts.store.close()


def test_a_fleet_that_has_learned_its_devices_asks_the_store_for_none(
    settings: Settings, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = build(settings, clock)
    fleet, devices = parts.coordinator.fleet, names(4)
    parts.access.admit("simulation", POPULATION, devices[:3])
    fleet.visit(devices[0], offer(), clock.now())
    fleet.learn()
    assert set(fleet.members(POPULATION, clock.now())) == {devices[0]}, "known is not the same as having called"

    def asked(_: Store) -> None:
        raise AssertionError("the store was asked")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "reading", asked)
        fleet.visit(devices[1], offer(), clock.now())
        with pytest.raises(AssertionError, match="asked"):
            fleet.visit(devices[3], offer(), clock.now())
    with pytest.raises(NotAllowed):
        fleet.visit(devices[3], offer(), clock.now())
    parts.store.close()


def test_a_hasty_store_is_only_hasty(settings: Settings, clock: ManualClock) -> None:
    told: list[str] = []
    parts = build(settings, clock, Surroundings(on_step=told.append, chance=bytes, beat=Beat(tick=30.0)))
    with parts.store.reading() as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 0
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
    parts.access.admit("simulation", POPULATION, names(1))
    assert told[-2:] == ["commit", "committed"]
    assert len(HASTY) == 4
    parts.store.close()


def test_production_refuses_to_be_hasty(settings: Settings, clock: ManualClock) -> None:
    with pytest.raises(NotAllowed, match="power cut"):
        build(settings.model_copy(update={"profile": "production"}), clock)
    assert any("power cut" in warning for warning in settings.warnings)


def test_without_steering_everybody_comes_back_at_the_same_pace() -> None:
    off = Pace(idle=900.0, steers=False)
    assert {window(off, devices, 10, 60.0) for devices in (10, 100_000)} == {window(off, 0, 0, 0.0)}
    assert window(Pace(idle=900.0), 100_000, 10, 60.0) != window(Pace(idle=900.0), 10, 10, 60.0)


async def test_a_device_that_stays_away_for_a_day_counts_no_more(tmp_path: Path) -> None:
    world = World(new_sqlite(tmp_path / "umbel.db"), tmp_path / "blobs")
    fleet = world.coordinator.fleet
    early, late = world.enrol("early", "late")
    fleet.visit(early.id, offer(), world.clock.now())
    fleet.visit(early.id, offer(), world.clock.now())
    world.clock.instant += 80_000.0
    fleet.visit(late.id, offer(), world.clock.now())
    assert fleet.active(POPULATION) == 2
    world.clock.instant += 10_000.0
    fleet.flush(world.clock.now())
    assert fleet.active(POPULATION) == 1
    world.restart()
    world.coordinator.fleet.flush(world.clock.now())
    assert world.coordinator.fleet.active(POPULATION) == 1
