"""Keys are replaced, offline signatures travel as files, and the repository refuses what doesn't fit."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, Root

from tests.server.release_world import MODEL, NOW, ROLE, World, listed, with_evil
from umbel.clock import DAY
from umbel.errors import (
    AlreadyExists,
    Expired,
    MalformedMessage,
    NotFound,
    OutOfBounds,
    RollbackRefused,
    SignatureInvalid,
    WrongState,
)
from umbel_client.listing import Listing
from umbel_server.drafts import sign_draft
from umbel_server.keyring import Keyring
from umbel_server.metadata_files import MetadataFiles
from umbel_server.repository import Repository


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    made.release(listed(1), listed(2))
    return made


# Keys.


def _rotate(world: World, role: str, old: str) -> None:
    new = world.keys.add(role, 1)[0].public_key
    holder = "root" if role in ("root", "targets", "snapshot", "timestamp") else "targets"
    world.publish(holder, world.repository.draft_rotation(role, old, new, NOW))
    world.keys.forget(old)


async def test_a_replaced_release_key_signs_no_more(world: World) -> None:
    device = world.device()
    await device.refresh(world.fetch, NOW)
    stolen, good = world.keys.signers(ROLE)[:2]
    _rotate(world, ROLE, stolen.public_key.keyid)
    world.release(listed(3))
    assert (await device.find(world.fetch, NOW, MODEL, 3)).number == 3
    world.forge(ROLE, with_evil(world), [stolen, good])
    with pytest.raises(SignatureInvalid):
        await device.find(world.fetch, NOW, MODEL, 66)


async def test_root_keys_are_replaced_one_by_one_until_none_of_the_first_is_left(world: World) -> None:
    device = world.device()
    for key in world.keys.signers("root"):
        _rotate(world, "root", key.public_key.keyid)
    assert (await device.find(world.fetch, NOW, MODEL, 2)).number == 2


async def test_a_hostile_root_signed_by_new_keys_alone_is_refused(world: World) -> None:
    device = world.device()
    _, root = world.current("root")
    mine = [CryptoSigner.generate_ed25519() for _ in range(5)]
    root.signed.roles["root"].keyids = []
    for key in mine:
        root.signed.add_key(key.public_key, "root")
    world.forge("root", root, mine)
    with pytest.raises(SignatureInvalid):
        await device.refresh(world.fetch, NOW)


async def test_fast_forward_is_recovered_from_by_replacing_the_online_keys(world: World) -> None:
    device = world.device()
    world.lies = {"timestamp.json": _fast_forward(world, int(NOW + 900 * DAY))}
    with pytest.raises(Expired):
        await device.refresh(world.fetch, NOW)
    await _recover(world, device)


@pytest.mark.parametrize("instant", [10**15, -(10**15), 10**400, "never", [], None])
async def test_a_date_that_is_none_is_recovered_from_too(world: World, instant: Any) -> None:
    """Whoever holds the timestamp's key may write anything there: it must not end a device's updates for good."""
    device = world.device()
    world.lies = {"timestamp.json": _fast_forward(world, instant)}
    await device.refresh(world.fetch, NOW)
    assert device.time_floor == 0.0
    await _recover(world, device)


def _fast_forward(world: World, instant: Any) -> bytes:
    """A timestamp from far ahead, by the real key."""
    metadata = Metadata.from_bytes(world.repository.file("timestamp.json"))
    metadata.signed.version = 2**31
    metadata.signed.unrecognized_fields["x-umbel-issued-at"] = instant
    metadata.signed.expires = metadata.signed.expires.replace(year=2100)
    metadata.signatures.clear()
    return sign_draft(metadata.to_bytes(), world.keys.signers("timestamp"))


async def _recover(world: World, device: Listing) -> None:
    world.lies = {}
    with pytest.raises((RollbackRefused, Expired)):
        await device.refresh(world.fetch, NOW)
    for role in ("snapshot", "timestamp"):
        _rotate(world, role, world.keys.signers(role)[0].public_key.keyid)
    assert (await device.find(world.fetch, NOW, MODEL, 2)).number == 2
    assert device.time_floor < NOW + DAY, "a stolen key must not leave a far future behind"


# The repository's own refusals.


def test_too_few_signatures_are_not_published(world: World) -> None:
    draft = world.repository.draft_releases([listed(3)], NOW)
    with pytest.raises(SignatureInvalid):
        world.repository.publish(ROLE, sign_draft(draft, world.keys.signers(ROLE)[:1]), NOW)
    assert [release.number for release in world.repository.releases(MODEL)] == [1, 2]


def test_a_new_root_needs_the_signers_of_the_one_before_and_its_own(world: World) -> None:
    old = next(key.key_id for key in world.repository.key_status() if key.role == "root")
    draft = world.repository.draft_rotation("root", old, world.keys.add("root", 1)[0].public_key, NOW)
    both, strangers = world.keys.signers("root"), Keyring.create(world.folder / "strangers").signers("root")
    for signers in ((), both[:2], strangers[:3]):
        with pytest.raises(SignatureInvalid):
            world.repository.publish("root", sign_draft(draft, signers), NOW)
    hostile = Keyring.create(world.folder / "hostile")
    with pytest.raises(SignatureInvalid):
        world.repository.publish("root", _root_of(hostile, draft), NOW)
    assert world.repository.first_root


def test_a_root_whose_own_signers_have_not_signed_it_is_not_published(world: World) -> None:
    """All of the old signers, and none of those whom it names: after it, nobody could sign another one."""
    old = next(key.key_id for key in world.repository.key_status() if key.role == "root")
    draft = world.repository.draft_rotation("root", old, world.keys.add("root", 1)[0].public_key, NOW)
    successors = Keyring.create(world.folder / "successors")
    handed_on = _root_of(successors, draft, by=world.keys)
    with pytest.raises(SignatureInvalid):
        world.repository.publish("root", handed_on, NOW)
    world.repository.publish("root", sign_draft(handed_on, successors.signers("root")), NOW)


def _root_of(keys: Keyring, draft: bytes, by: Keyring | None = None) -> bytes:
    """The same root, but naming these keys alone; signed by them, or by others."""
    metadata = Metadata[Root].from_bytes(draft)
    for key_id in tuple(metadata.signed.roles["root"].keyids):
        metadata.signed.revoke_key(key_id, "root")
    for key in keys.public_keys("root"):
        metadata.signed.add_key(key, "root")
    return sign_draft(metadata.to_bytes(), (by or keys).signers("root"))


def test_a_model_gets_its_signers_once(world: World) -> None:
    with pytest.raises(AlreadyExists, match="has signers already"):
        world.repository.draft_signers(MODEL, world.keys.public_keys(ROLE), NOW)


def test_signers_too_few_to_sign_together_are_refused(world: World) -> None:
    """One key under two names is one: the model could never be released, nor get other signers."""
    (key,) = (signer.public_key for signer in world.keys.add("targets", 1))
    with pytest.raises(OutOfBounds, match="2 signers have to sign together"):
        world.repository.draft_signers("another", [key, key, key], NOW)
    assert "another" not in world.repository.models()


def test_offline_signatures_may_come_one_after_the_other_from_two_machines(world: World) -> None:
    draft = world.repository.draft_releases([listed(3)], NOW)
    first, second = world.keys.signers(ROLE)[:2]
    world.repository.publish(ROLE, sign_draft(sign_draft(draft, [first]), [second]), NOW)
    assert listed(3) in world.repository.releases(MODEL)


def test_two_drafts_of_the_same_version_cannot_both_be_published(world: World) -> None:
    one, other = (world.repository.draft_releases([listed(number)], NOW) for number in (3, 4))
    world.publish(ROLE, one)
    with pytest.raises(WrongState, match="draft it again"):
        world.publish(ROLE, other)


def test_a_number_is_used_once_and_numbers_rise(world: World) -> None:
    world.release(listed(5))
    with pytest.raises(AlreadyExists):
        world.repository.draft_releases([listed(5)], NOW)
    with pytest.raises(WrongState):
        world.repository.draft_releases([listed(4)], NOW)


def test_key_status_names_every_key_and_which_should_not_lie_here(world: World) -> None:
    status = world.repository.key_status()
    assert [sum(key.role == role for key in status) for role in ("root", "targets", "snapshot", "timestamp", ROLE)] == [
        5,
        3,
        1,
        1,
        3,
    ]
    assert all(key.held_here for key in status)
    assert {key.role for key in status if not key.offline} == {"snapshot", "timestamp"}


def test_keys_are_secret_files_and_do_not_print(world: World) -> None:
    for path in (world.folder / "keys").iterdir():
        assert path.stat().st_mode & 0o077 == 0
    assert "keys)" in repr(world.keys)
    with pytest.raises(AlreadyExists):
        Keyring.create(world.folder / "keys")


@pytest.mark.parametrize("name", ["../keys/root-1.key", "root-1.key", ".hidden.json", "nothing.json", "a/b.json"])
def test_only_metadata_are_handed_out(world: World, name: str) -> None:
    with pytest.raises((NotFound, MalformedMessage)):
        world.repository.file(name)


def test_a_crash_before_the_timestamp_leaves_what_was_published_before(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pull the plug before each file that a publication writes: readers see all or nothing, and a second try works."""
    for survives in range(3):
        before = [release.number for release in world.repository.releases(MODEL)]
        written = 0

        def write(name: str, data: bytes, real: Any = MetadataFiles.write) -> None:
            nonlocal written
            if written == survives:  # noqa: B023
                raise OSError("power cut")
            written += 1
            real(world.repository._files, name, data)

        with monkeypatch.context() as patch:
            patch.setattr(world.repository._files, "write", write)
            with pytest.raises(OSError, match="power cut"):
                world.release(listed(before[-1] + 1))
        again = Repository(world.metadata, world.keys)
        assert [release.number for release in again.releases(MODEL)] == before
        world.release(listed(before[-1] + 1))
        assert world.repository.releases(MODEL)[-1].number == before[-1] + 1


def test_a_coordinator_that_stamps_at_this_moment_undoes_no_rotation_of_another_process(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`umbel keys rotate` beside `umbel serve`: the old key's private half is gone once its place was taken."""
    coordinator, command = Repository(world.repository._files.folder, world.keys), world.repository
    new = [signer.public_key for signer in world.keys.add("targets", 2)]
    draft = command.sign(command.draft_signers("another", new, NOW), "targets")
    rotating = threading.Thread(target=lambda: command.publish("targets", draft, NOW))
    write = MetadataFiles.write

    def slowly(files: MetadataFiles, name: str, data: bytes) -> None:
        if files is coordinator._files and not rotating.ident:
            rotating.start()
            rotating.join(0.3)
        write(files, name, data)

    monkeypatch.setattr(MetadataFiles, "write", slowly)
    assert coordinator.keep_fresh(NOW + 6 * DAY)
    rotating.join()
    assert "another" in command.models()
    assert "another" in coordinator.models()
