"""Attacks on what devices believe to be released: each row of the list, by its name (TUF 1.0; Uptane)."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile, TargetFile

from umbel.digests import digest_of
from umbel.errors import (
    AlreadyExists,
    Expired,
    MalformedMessage,
    NotAuthentic,
    NotFound,
    OutOfBounds,
    RollbackRefused,
    SignatureInvalid,
    Unreachable,
    WrongState,
)
from umbel.listing import ListedRelease
from umbel_client.listing import Listing
from umbel_server.keyring import DAY, Keyring
from umbel_server.repository import Repository, role_of, sign_draft

NOW = 1_790_000_000.0
MODEL = "shoulder"
ROLE = role_of(MODEL)


def listed(number: int, version: int | None = None, **facts: Any) -> ListedRelease:
    version = version or number
    return ListedRelease(MODEL, number, version, "stable", digest_of(f"manifest {version}".encode()), 900, **facts)


@dataclass
class World:
    """A repository with its keys, and devices that read it through a mirror that may lie."""

    folder: Path
    keys: Keyring = field(init=False)
    repository: Repository = field(init=False)
    lies: dict[str, bytes] = field(default_factory=dict)
    devices: int = 0

    def __post_init__(self) -> None:
        self.keys = Keyring.create(self.folder / "keys")
        self.repository = Repository.create(self.metadata, self.keys, NOW)
        self.name_signers(MODEL)

    @property
    def metadata(self) -> Path:
        return self.folder / "metadata"

    def name_signers(self, model: str) -> None:
        signers = [signer.public_key for signer in self.keys.add(role_of(model))]
        self.publish("targets", self.repository.draft_signers(model, signers, NOW))
        self.publish(role_of(model), self.repository.draft_empty(model, NOW))

    def publish(self, role: str, draft: bytes, now: float = NOW) -> None:
        self.repository.publish(role, self.repository.sign(draft, role), now)

    def release(self, *releases: ListedRelease, now: float = NOW) -> None:
        self.publish(ROLE, self.repository.draft_releases(releases, now), now)

    def device(self) -> Listing:
        self.devices += 1
        return Listing(self.folder / f"device-{self.devices}", self.repository.first_root, seconds=5.0)

    async def fetch(self, name: str, limit: int) -> bytes:
        data = self.lies.get(name) or self.repository.file(name)
        if len(data) > limit:
            raise OutOfBounds(f"{name} is longer than {limit}")
        return data

    def snapshot_of_now(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.metadata.glob("*.json")}

    def current(self, role: str) -> tuple[str, Metadata[Any]]:
        newest = max(self.metadata.glob(f"*.{role}.json"), key=lambda path: int(path.name.split(".")[0]))
        return newest.name, Metadata.from_bytes(newest.read_bytes())

    def forge(self, role: str, metadata: Metadata[Any], signers: list[CryptoSigner]) -> None:
        """Publish by force, as somebody would who owns the folder, the online keys, and `signers`."""
        metadata.signatures.clear()
        metadata.signed.version += 1
        name = f"{metadata.signed.version}.{role}.json"
        (self.metadata / name).write_bytes(sign_draft(metadata.to_bytes(), signers))
        if role == "snapshot":
            self.repository._stamp(metadata.signed.version, NOW, "")
        elif role != "root":
            self.repository._follow({role: metadata.signed.version}, NOW)


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


def _with_evil(world: World) -> Metadata[Any]:
    _, metadata = world.current(ROLE)
    path = f"models/{MODEL}/66.json"
    metadata.signed.targets[path] = TargetFile(6, {"sha256": digest_of(b"evil")}, path)
    return metadata


async def test_stolen_online_keys_cannot_release_anything(world: World) -> None:
    stolen = world.keys.signers("snapshot") + world.keys.signers("timestamp")
    world.forge(ROLE, _with_evil(world), stolen)
    with pytest.raises(SignatureInvalid):
        await world.device().find(world.fetch, NOW, MODEL, 66)


async def test_one_of_three_stolen_release_keys_is_not_enough(world: World) -> None:
    world.forge(ROLE, _with_evil(world), world.keys.signers(ROLE)[:1])
    with pytest.raises(SignatureInvalid):
        await world.device().find(world.fetch, NOW, MODEL, 66)


async def test_one_key_that_signs_twice_counts_once(world: World) -> None:
    world.forge(ROLE, _with_evil(world), world.keys.signers(ROLE)[:1] * 2)
    with pytest.raises(SignatureInvalid):
        await world.device().find(world.fetch, NOW, MODEL, 66)


async def test_unknown_keys_count_for_nothing(world: World) -> None:
    world.forge(ROLE, _with_evil(world), [CryptoSigner.generate_ed25519() for _ in range(3)])
    with pytest.raises(SignatureInvalid):
        await world.device().find(world.fetch, NOW, MODEL, 66)


async def test_the_signers_of_one_model_cannot_release_another(world: World) -> None:
    world.name_signers("other")
    _, metadata = world.current(role_of("other"))
    path = f"models/{MODEL}/66.json"
    metadata.signed.targets[path] = TargetFile(6, {"sha256": digest_of(b"evil")}, path)
    world.forge(role_of("other"), metadata, world.keys.signers(role_of("other"))[:2])
    with pytest.raises(NotFound):
        await world.device().find(world.fetch, NOW, MODEL, 66)


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
    world.forge(ROLE, _with_evil(world), [stolen, good])
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
    stolen = world.keys.signers("timestamp")
    metadata = Metadata.from_bytes(world.repository.file("timestamp.json"))
    metadata.signed.version = 2**31
    metadata.signed.unrecognized_fields["x-umbel-issued-at"] = int(NOW + 900 * DAY)
    metadata.signed.expires = metadata.signed.expires.replace(year=2100)
    metadata.signatures.clear()
    world.lies = {"timestamp.json": sign_draft(metadata.to_bytes(), stolen)}
    with pytest.raises(Expired):
        await device.refresh(world.fetch, NOW)
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


def test_offline_signatures_may_come_one_after_the_other_from_two_machines(world: World) -> None:
    draft = world.repository.draft_releases([listed(3)], NOW)
    first, second = world.keys.signers(ROLE)[:2]
    world.repository.publish(ROLE, sign_draft(sign_draft(draft, [first]), [second]), NOW)
    assert world.repository.release(MODEL, 3) == listed(3)


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

        def write(name: str, data: bytes, real: Any = Repository._write) -> None:
            nonlocal written
            if written == survives:  # noqa: B023
                raise OSError("power cut")
            written += 1
            real(world.repository, name, data)

        with monkeypatch.context() as patch:
            patch.setattr(world.repository, "_write", write)
            with pytest.raises(OSError, match="power cut"):
                world.release(listed(before[-1] + 1))
        again = Repository(world.metadata, world.keys)
        assert [release.number for release in again.releases(MODEL)] == before
        world.release(listed(before[-1] + 1))
        assert world.repository.releases(MODEL)[-1].number == before[-1] + 1
