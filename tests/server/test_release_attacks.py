"""Attacks on what devices believe to be released: each row of the list, by its name (TUF 1.0; Uptane)."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import DownloadLengthMismatchError
from tuf.api.metadata import Metadata, MetaFile, TargetFile

from tests.server.release_world import MODEL, NOW, ROLE, World, listed, with_evil
from umbel.clock import DAY
from umbel.digests import digest_of
from umbel.errors import (
    Expired,
    MalformedMessage,
    NotAuthentic,
    NotFound,
    OutOfBounds,
    RollbackRefused,
    SignatureInvalid,
    Unreachable,
)
from umbel.listing import facts_of, target_path
from umbel_client.listing import Listing
from umbel_client.tuf_files import FilesAtHand
from umbel_server.drafts import sign_draft
from umbel_server.repository import role_of


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    made.release(listed(1), listed(2))
    return made


async def test_an_honest_release_is_found_with_its_facts(world: World) -> None:
    device = world.device()
    assert await device.find(world.fetch, NOW, MODEL, 2) == listed(2)
    with pytest.raises(NotFound, match="isn't listed"):
        await device.find(world.fetch, NOW, MODEL, 9)


async def test_a_check_without_news_fetches_less_than_a_kilobyte(world: World) -> None:
    device, fetched = world.device(), list[int]()

    async def counting(name: str, limit: int) -> bytes:
        data = await world.fetch(name, limit)
        fetched.append(len(data))
        return data

    await device.refresh(counting, NOW)
    fetched.clear()
    await device.refresh(counting, NOW + 60)
    assert sum(fetched) < 1_000


async def test_rollback_by_an_old_timestamp_is_refused(world: World) -> None:
    old, device = world.snapshot_of_now(), world.device()
    world.release(listed(3))
    await device.refresh(world.fetch, NOW)
    world.lies = {"timestamp.json": old["timestamp.json"]}
    with pytest.raises(RollbackRefused):
        await device.refresh(world.fetch, NOW)


async def test_mix_and_match_of_a_new_timestamp_with_an_old_snapshot_is_refused(world: World) -> None:
    old_name, _ = world.current("snapshot")
    old, device = world.snapshot_of_now(), world.device()
    await device.refresh(world.fetch, NOW)
    world.release(listed(3))
    new_name, _ = world.current("snapshot")
    world.lies = {new_name: old[old_name]}
    with pytest.raises(RollbackRefused):
        await device.refresh(world.fetch, NOW)


async def test_mix_and_match_of_a_new_snapshot_with_old_releases_is_refused(world: World) -> None:
    old_name, _ = world.current(ROLE)
    old, device = world.snapshot_of_now(), world.device()
    await device.find(world.fetch, NOW, MODEL, 2)
    world.release(listed(3))
    new_name, _ = world.current(ROLE)
    world.lies = {new_name: old[old_name]}
    with pytest.raises(RollbackRefused):
        await device.find(world.fetch, NOW, MODEL, 3)


async def test_a_frozen_mirror_is_noticed_when_the_timestamp_runs_out(world: World) -> None:
    device = world.device()
    await device.refresh(world.fetch, NOW)
    await device.refresh(world.fetch, NOW + 0.9 * DAY)
    with pytest.raises(Expired):
        await device.refresh(world.fetch, NOW + 1.1 * DAY)


async def test_a_clock_set_back_does_not_prolong_a_freeze(world: World) -> None:
    device, frozen = world.device(), world.snapshot_of_now()
    later = NOW + 3 * DAY
    world.repository.keep_fresh(later)
    await device.refresh(world.fetch, later)
    assert device.time_floor == later
    world.lies = frozen | {"timestamp.json": world.repository.file("timestamp.json")}
    await device.refresh(world.fetch, NOW - 400 * DAY)
    fresh = Listing(world.folder / "device-1", world.repository.first_root)
    world.lies = {"timestamp.json": _expired_after(world, later)}
    with pytest.raises(Expired):
        await fresh.refresh(world.fetch, NOW - 400 * DAY)


@pytest.mark.parametrize("days", [3, 800])
async def test_a_coordinator_that_has_set_its_clock_right_is_followed_again(world: World, days: int) -> None:
    """Whoever plays its metadata of before back, isn't."""
    device, ahead = world.device(), NOW + days * DAY
    world.repository.keep_fresh(ahead)
    with suppress(Expired):  # the root, by that time
        await device.refresh(world.fetch, NOW)
    assert device.time_floor == ahead
    before = world.snapshot_of_now()
    world.repository.keep_fresh(NOW + 60)
    world.release(listed(3))
    assert (await device.find(world.fetch, NOW + 60, MODEL, 3)).number == 3
    assert device.time_floor < ahead
    world.lies = before
    with pytest.raises(RollbackRefused):
        await device.refresh(world.fetch, NOW + 90)


def _expired_after(world: World, later: float) -> bytes:
    """A timestamp that the real key signed, but that ran out before `later`."""
    _, metadata = "", Metadata.from_bytes(world.repository.file("timestamp.json"))
    metadata.signed.version += 1
    metadata.signed.expires = metadata.signed.expires.replace(year=metadata.signed.expires.year - 1)
    metadata.signatures.clear()
    return sign_draft(metadata.to_bytes(), world.keys.signers("timestamp"))


@pytest.mark.parametrize("role,days", [("snapshot", 8), ("targets", 91), ("root", 366)])
async def test_metadata_past_its_date_is_refused_role_by_role(world: World, role: str, days: int) -> None:
    """Whatever else is fresh: each role's own date counts."""
    then = NOW + days * DAY
    for name, keep in (("timestamp", True), ("snapshot", role != "snapshot")):
        if keep:
            metadata = Metadata.from_bytes(
                world.repository.file("timestamp.json")
                if name == "timestamp"
                else world.current("snapshot")[1].to_bytes()
            )
            metadata.signed.expires = metadata.signed.expires.replace(year=metadata.signed.expires.year + 3)
            metadata.signatures.clear()
            signed = sign_draft(metadata.to_bytes(), world.keys.signers(name))
            world.lies["timestamp.json" if name == "timestamp" else world.current("snapshot")[0]] = signed
    with pytest.raises(Expired, match=role):
        await world.device().refresh(world.fetch, then)


async def test_stolen_online_keys_cannot_lower_a_version(world: World) -> None:
    device = world.device()
    await device.find(world.fetch, NOW, MODEL, 2)
    _, snapshot = world.current("snapshot")
    snapshot.signed.meta[f"{ROLE}.json"] = MetaFile(1)
    world.forge("snapshot", snapshot, world.keys.signers("snapshot"))
    with pytest.raises(RollbackRefused):
        await device.find(world.fetch, NOW, MODEL, 2)


async def test_stolen_online_keys_cannot_release_anything(world: World) -> None:
    stolen = world.keys.signers("snapshot") + world.keys.signers("timestamp")
    world.forge(ROLE, with_evil(world), stolen)
    with pytest.raises(SignatureInvalid):
        await world.device().find(world.fetch, NOW, MODEL, 66)


async def test_one_of_three_stolen_release_keys_is_not_enough(world: World) -> None:
    world.forge(ROLE, with_evil(world), world.keys.signers(ROLE)[:1])
    with pytest.raises(SignatureInvalid):
        await world.device().find(world.fetch, NOW, MODEL, 66)


async def test_one_key_that_signs_twice_counts_once(world: World) -> None:
    world.forge(ROLE, with_evil(world), world.keys.signers(ROLE)[:1] * 2)
    with pytest.raises(SignatureInvalid):
        await world.device().find(world.fetch, NOW, MODEL, 66)


async def test_unknown_keys_count_for_nothing(world: World) -> None:
    world.forge(ROLE, with_evil(world), [CryptoSigner.generate_ed25519() for _ in range(3)])
    with pytest.raises(SignatureInvalid):
        await world.device().find(world.fetch, NOW, MODEL, 66)


@pytest.mark.parametrize("theirs,ours", [("other", MODEL), (MODEL, "other")], ids=["named later", "named earlier"])
async def test_the_signers_of_one_model_cannot_release_another(world: World, theirs: str, ours: str) -> None:
    world.name_signers("other")
    _, metadata = world.current(role_of(theirs))
    evil = replace(listed(66), model=ours)
    path = target_path(ours, 66)
    metadata.signed.targets[path] = TargetFile(900, {"sha256": evil.bundle}, path, {"custom": facts_of(evil)})
    world.forge(role_of(theirs), metadata, world.keys.signers(role_of(theirs))[:2])
    with pytest.raises(NotFound):
        await world.device().find(world.fetch, NOW, ours, 66)


async def test_changed_facts_are_noticed(world: World) -> None:
    name, _ = world.current(ROLE)
    tree = json.loads(world.repository.file(name))
    tree["signed"]["targets"][f"models/{MODEL}/2.json"]["custom"]["version"] = 1
    world.lies = {name: json.dumps(tree).encode()}
    with pytest.raises(SignatureInvalid):
        await world.device().find(world.fetch, NOW, MODEL, 2)


async def test_a_release_that_stands_under_another_number_is_refused(world: World) -> None:
    """Two of three signers who were careless, or fooled: what they signed still has to name itself."""
    _, metadata = world.current(ROLE)
    path = f"models/{MODEL}/7.json"
    facts = metadata.signed.targets[f"models/{MODEL}/2.json"].custom
    metadata.signed.targets[path] = TargetFile(900, {"sha256": digest_of(b"x")}, path, {"custom": facts})
    world.forge(ROLE, metadata, world.keys.signers(ROLE)[:2])
    with pytest.raises(MalformedMessage):
        await world.device().find(world.fetch, NOW, MODEL, 7)


async def test_endless_data_is_cut_off(world: World) -> None:
    world.lies = {"timestamp.json": b" " * 20_000}
    with pytest.raises(OutOfBounds):
        await world.device().refresh(world.fetch, NOW)


def test_a_file_longer_than_what_was_asked_for_is_not_given_to_the_client() -> None:
    at_hand = FilesAtHand("https://listing/", {"timestamp.json": b" " * 11})
    assert len(at_hand.download_bytes("https://listing/timestamp.json", 11)) == 11
    with pytest.raises(DownloadLengthMismatchError):
        at_hand.download_bytes("https://listing/timestamp.json", 10)


async def test_endless_roots_are_cut_off(world: World) -> None:
    async def always(name: str, limit: int) -> bytes:
        return world.repository.first_root if name.endswith("root.json") else await world.fetch(name, limit)

    with pytest.raises(NotAuthentic):
        await world.device().refresh(always, NOW)


async def test_slow_retrieval_ends_at_one_deadline_for_everything(world: World) -> None:
    async def dripping(name: str, limit: int) -> bytes:
        await asyncio.sleep(0.05)
        return await world.fetch(name, limit)

    device = Listing(world.folder / "slow", world.repository.first_root, seconds=0.12)
    with pytest.raises(Unreachable):
        await device.refresh(dripping, NOW)


@pytest.mark.parametrize("garbage", [b"", b"{", b"[]", b'{"signed": 7}', b"\xff" * 40, b"[" * 15_000])
async def test_garbage_is_refused_and_what_was_known_stays(world: World, garbage: bytes) -> None:
    device = world.device()
    await device.refresh(world.fetch, NOW)

    async def broken(name: str, limit: int) -> bytes:
        return garbage if name == "timestamp.json" else await world.fetch(name, limit)

    with pytest.raises((NotAuthentic, MalformedMessage)):
        await device.refresh(broken, NOW)
    assert await device.find(world.fetch, NOW, MODEL, 2) == listed(2)


async def test_a_device_is_offline_for_a_while_and_then_reaches_the_newest(world: World) -> None:
    device = world.device()
    for number in range(3, 8):
        world.release(listed(number))
        world.repository.keep_fresh(NOW + number * DAY)
    later = NOW + 7.5 * DAY
    assert (await device.find(world.fetch, later, MODEL, 7)).number == 7


async def test_going_back_is_a_higher_release_with_old_content(world: World) -> None:
    world.release(listed(3), listed(4, version=2, content_of=2, from_number=3))
    found = await world.device().find(world.fetch, NOW, MODEL, 4)
    assert (found.bundle, found.content_of) == (listed(2).bundle, 2)
