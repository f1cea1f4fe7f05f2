"""What weeks bring: hundreds of releases, a coordinator set up from a backup, months without one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import cast

import pytest
from tuf.api.metadata import Targets

from tests.rollouts.fleet import AUTHOR, MODEL, DirectChannel, Fleet
from umbel_server import renewal
from umbel_server.keyring import new_key, public_key
from umbel_server.metadata_files import KEPT_FILES
from umbel_server.releases import KEPT_LISTED
from umbel_server.repository import Repository, role_of
from umbel_server.rollout_spec import Wave

DAY = 86_400.0


def go_back_to(fleet: Fleet, backup: Path) -> None:
    """Put a copy in the place of the coordinator's folder, and start it."""
    fleet.coordinator.store.close()
    for name in ("listing", "blobs"):
        shutil.rmtree(fleet.folder / name)
        shutil.copytree(backup / name, fleet.folder / name)
    for path in fleet.folder.glob("umbel.db*"):
        path.unlink()
    shutil.copy(backup / "umbel.db", fleet.folder)
    fleet.repository = Repository(fleet.folder / "listing", fleet.keys)
    fleet.restart()


async def a_day_goes_by(fleet: Fleet) -> None:
    """The coordinator keeps its metadata fresh, and devices visit."""
    fleet.clock.instant += DAY
    fleet.steer()
    await fleet.visits()


async def test_devices_follow_a_restored_coordinator_as_soon_as_its_numbers_are_above_theirs(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path / "fleet", devices=1)
    fleet.verbs.publish(MODEL, 1, "stable", AUTHOR)
    await a_day_goes_by(fleet)
    fleet.coordinator.store.close()
    shutil.copytree(fleet.folder, tmp_path / "backup")
    fleet.restart()
    for _ in range(2):
        fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
        # Metadata are signed twice a day, whether anything is released or not.
        for _ in range(3):
            await a_day_goes_by(fleet)
    (ahead,) = fleet.releases()
    go_back_to(fleet, tmp_path / "backup")
    number = 0
    while number <= ahead:
        await a_day_goes_by(fleet)
        assert fleet.releases() == [ahead] and not fleet.devices[0].kit.memory.state.last_error
        number = fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    await fleet.visits()
    assert fleet.releases() == [number] and number == ahead + 1


async def test_a_listing_that_is_behind_is_no_releases_fault(tmp_path: Path) -> None:
    """What a mirror, or a restored folder, holds back says nothing about the release: it stays on offer."""
    fleet = Fleet(tmp_path, devices=1)
    fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    old = {path.name: path.read_bytes() for path in (fleet.folder / "listing").glob("*.json")}
    await fleet.visits()
    fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    await fleet.visits()
    number = fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    device = fleet.devices[0]
    channel, before = cast("DirectChannel", device.kit.channel), fleet.releases()
    channel.lies = {"timestamp.json": old["timestamp.json"]}
    await fleet.visits()
    assert "older release metadata" in device.kit.memory.state.last_error
    channel.lies = {"timestamp.json": (device.kit.home / "listing" / "timestamp.json").read_bytes()}
    await fleet.visits()
    assert "isn't listed" in device.kit.memory.state.last_error
    assert fleet.releases() == before
    channel.lies = {}
    await fleet.visits()
    assert fleet.releases() == [number]


async def test_hundreds_of_releases_leave_a_listing_that_devices_still_take(tmp_path: Path) -> None:
    """Each accepted round makes a release; a device reads the whole list for each, and refuses one above 2 MB."""
    fleet = Fleet(tmp_path, devices=2)
    beta = fleet.verbs.publish(MODEL, 1, "beta", AUTHOR)
    fleet.verbs.publish(MODEL, 1, "stable", AUTHOR)
    await fleet.visits()
    asleep = fleet.devices.pop()
    for _ in range(KEPT_LISTED + KEPT_FILES):
        number = fleet.verbs.publish(MODEL, 1, "stable", AUTHOR)
    desk = fleet.coordinator.rollouts.desk  # type: ignore[union-attr]
    assert len(desk.listed(MODEL)) == KEPT_LISTED + 2, "the head, some behind it, and the other channel's"
    assert beta in desk.listed(MODEL), "another channel's head"
    with fleet.coordinator.store.reading() as connection:
        assert desk.waiting(connection) == [], "what was dropped doesn't wait for signatures"
    files = [path.name for path in (fleet.folder / "listing").iterdir()]
    assert len(files) < 4 * KEPT_FILES and "1.root.json" in files
    fleet.devices.append(asleep)
    await fleet.visits()
    assert fleet.releases() == [number, number]


async def test_a_coordinator_that_was_down_for_a_year_goes_on_releasing(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, devices=1)
    fleet.verbs.publish(MODEL, 1, "stable", AUTHOR)
    await fleet.visits()
    for days in (30.0, 100.0, 400.0):
        fleet.clock.instant += days * DAY
        fleet.restart()
        fleet.steer()
        number = fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
        await fleet.visits()
        assert fleet.releases() == [number]


@pytest.mark.parametrize("role", ["targets", role_of(MODEL)])
async def test_a_signers_key_that_is_replaced_during_a_rollout_stops_no_device(
    tmp_path: Path, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = Fleet(tmp_path, devices=2)
    publish = fleet.repository.publish

    def then_look(changed: str, signed: bytes, now: float) -> None:
        publish(changed, signed, now)
        fleet.repository._verify(role, fleet.repository._load(role, Targets))

    monkeypatch.setattr(fleet.repository, "publish", then_look)
    fleet.verbs.publish(MODEL, 1, "stable", AUTHOR)
    await fleet.visits()
    begun = fleet.begin_rollout("r", fleet.good_version(), waves=(Wave(100.0, soak_seconds=10.0),))
    for _ in range(3):
        old = next(it.key_id for it in fleet.repository.key_status() if it.role == role)
        renewal.rotate(fleet.repository, fleet.keys, role, old, fleet.clock.now())
        assert old not in {signer.public_key.keyid for signer in fleet.keys.signers(role)}, "it doesn't lie about"
    await fleet.visits()
    assert fleet.releases() == [begun.spec.release] * 2
    assert not any(device.kit.memory.state.last_error for device in fleet.devices)


def test_two_lost_keys_of_three_are_replaced_one_by_one(tmp_path: Path) -> None:
    """Too few stay to sign anew beforehand; the first new one does with them, right after it took its place."""
    fleet = Fleet(tmp_path)
    fleet.verbs.publish(MODEL, 1, "stable", AUTHOR)
    role = role_of(MODEL)
    first, second, _ = (it.key_id for it in fleet.repository.key_status() if it.role == role)
    for lost in (first, second):
        fleet.keys.forget(lost)
    for lost in (first, second):
        renewal.rotate(fleet.repository, fleet.keys, role, lost, fleet.clock.now())
        fleet.repository._verify(role, fleet.repository._load(role, Targets))


async def test_a_listing_with_too_few_signatures_is_no_releases_fault(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, devices=1)
    number = fleet.verbs.publish(MODEL, 1, "stable", AUTHOR)
    role = role_of(MODEL)
    old = next(it.key_id for it in fleet.repository.key_status() if it.role == role)
    draft = fleet.repository.draft_rotation(role, old, fleet.keys.add(role, 1)[0].public_key, fleet.clock.now())
    fleet.repository.publish("targets", fleet.repository.sign(draft, "targets"), fleet.clock.now())
    await fleet.visits()
    assert "signed by 1/2 keys" in fleet.devices[0].kit.memory.state.last_error
    again = fleet.repository.draft_renewal(role, fleet.clock.now())
    fleet.repository.publish(role, fleet.repository.sign(again, role), fleet.clock.now())
    await fleet.visits()
    assert fleet.releases() == [number]


def test_metadata_stay_fresh_while_a_new_models_signers_have_listed_nothing(tmp_path: Path) -> None:
    """The empty listing of a model whose keys lie elsewhere travels too; that may take days."""
    fleet = Fleet(tmp_path)
    signers = [public_key(new_key(tmp_path / f"{number}.key")) for number in range(3)]
    draft = fleet.repository.draft_signers("other", signers, fleet.clock.now())
    fleet.repository.publish("targets", fleet.repository.sign(draft, "targets"), fleet.clock.now())
    fleet.clock.instant += 3 * DAY
    fleet.steer()
    expires = {it.role: it.expires_at for it in fleet.repository.freshness()}
    assert expires["timestamp"] > fleet.clock.now()
