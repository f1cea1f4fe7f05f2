"""The coordinator offers the shorter way where it is shorter, and keeps what it made."""

from __future__ import annotations

import asyncio
import io
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.server.driving import MODEL, OPERATOR, RUNTIME, SimulatedDevice, World, inline, task
from umbel.delta import is_worth_it, rebuild
from umbel.digests import Digest, digest_of
from umbel.errors import NotFound
from umbel.file_delta import FileDelta
from umbel.manifest import WEIGHTS_FILE, FileRef
from umbel.randomness import generator
from umbel.successor import successor
from umbel.weights import Weights
from umbel_server import deltas
from umbel_server.blobs import Blobs
from umbel_server.deltas import Deltas
from umbel_server.versions import TRAINING, Lineage, Version, VersionState


def add(world: World, step: float, seed: str = "step") -> Version:
    """An accepted version, `step` away from the one before."""
    registry, parent = world.coordinator.registry, world.coordinator.operations.versions(MODEL, 1)[0]
    bundle = registry.bundle(parent.bundle)
    chance = generator(seed)
    moved = {
        n: a + (step * chance.normal(0, 1, a.shape)).astype("f4") for n, a in bundle.shared_weights().arrays.items()
    }
    manifest, files = successor(bundle, Weights(moved), RUNTIME)
    registry.keep_successor(manifest, files)
    with world.store.transaction() as connection:
        version = registry.add_version(
            connection, MODEL, parent.number, manifest, Lineage(registered_by=OPERATOR), 0.0, VersionState.ACCEPTED
        )
        registry.release(connection, version, TRAINING, 0.0)
    return version


def weights(world: World, version: Version) -> tuple[Path, FileRef]:
    bundle = world.coordinator.registry.bundle(version.bundle)
    return bundle.paths[WEIGHTS_FILE], bundle.manifest.files[WEIGHTS_FILE]


def first(world: World) -> Version:
    return world.coordinator.operations.version(MODEL, 1)


def fresh(world: World) -> Deltas:
    """As after a start of the process."""
    return Deltas(world.coordinator.registry, Blobs(world.blobs_path), inline)


async def joined(world: World, *held: Digest) -> tuple[SimulatedDevice, tuple[FileDelta, ...]]:
    """A device that holds bundles, and the deltas that its check-in brought."""
    (device,) = world.enrol("holder")
    return device, (await device.check_in(held_bundles=held)).deltas


async def test_a_device_is_offered_a_delta_from_what_it_holds_to_the_base_of_its_round(small_world: World) -> None:
    before, after = first(small_world), add(small_world, 1e-4)
    await small_world.begin(task())
    _, found = await joined(small_world, before.bundle)
    (old, base), (new, target) = weights(small_world, before), weights(small_world, after)
    (delta,) = [delta for delta in found if delta.target == target.digest]
    assert delta.base == base.digest and is_worth_it(delta.size, target.size)
    data, out = small_world.coordinator.fetch(delta.digest).read_bytes(), io.BytesIO()
    assert (len(data), digest_of(data)) == (delta.size, delta.digest)
    rebuild(io.BytesIO(data), io.BytesIO(old.read_bytes()), out, base.digest, target)
    assert out.getvalue() == new.read_bytes()


async def test_a_delta_that_many_ask_for_at_once_is_made_once(small_world: World) -> None:
    made: list[Any] = []

    async def slowly(function: Callable[..., Any], *arguments: Any) -> Any:
        if function.__name__ == "_write":
            made.append(arguments[-1])
            await asyncio.sleep(0)
        return await inline(function, *arguments)

    small_world.offload = slowly
    small_world.restart()
    before, _ = first(small_world), add(small_world, 1e-4)
    await small_world.begin(task(goal=3))
    devices = small_world.enrol("a", "b", "c")
    replies = await asyncio.gather(*(device.check_in(held_bundles=(before.bundle,)) for device in devices))
    assert replies[0].deltas and len({reply.deltas for reply in replies}) == 1
    assert len(made) == len(set(made))


async def test_nothing_is_offered_to_whom_it_cannot_help(small_world: World) -> None:
    before, after = first(small_world), add(small_world, 1e-4)
    await small_world.begin(task())
    device, found = await joined(small_world)
    assert found == ()
    strange = [digest_of(b"never heard of"), weights(small_world, before)[1].digest]
    for held in ((after.bundle,), (before.bundle, after.bundle), tuple(strange)):
        assert (await device.check_in(held_bundles=held)).deltas == ()


async def test_a_delta_of_seventy_per_cent_or_more_is_not_offered_and_not_tried_again(small_world: World) -> None:
    before, after = first(small_world), add(small_world, 3.0)
    made: list[object] = []

    async def counting(*work: object) -> object:
        made.append(work)
        return await inline(*work)  # type: ignore[arg-type]

    found = Deltas(small_world.coordinator.registry, small_world.blobs, counting)
    for _ in range(3):
        offered = await found.to(after.bundle, (before.bundle,))
        assert weights(small_world, after)[1].digest not in {delta.target for delta in offered}
    assert len(made) == 2, "the weights once, the golden examples once"
    assert len(small_world.blobs.deltas()) == 1


async def test_devices_that_make_up_what_they_hold_have_few_deltas_made(
    small_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deltas, "BASES", 2)
    versions = [first(small_world), *(add(small_world, 1e-4, f"step {number}") for number in range(4))]
    *before, after = [version.bundle for version in versions]
    made, (_, target) = fresh(small_world), weights(small_world, versions[-1])
    for held in before:
        await made.to(after, (held,))
    assert len([one for one in small_world.blobs.deltas() if one.target == target.digest]) == 2


async def test_what_came_to_nothing_is_not_remembered_for_ever(
    small_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coordinator that runs for months makes a version in each round."""
    monkeypatch.setattr(deltas, "_REMEMBERED", 2)
    made = fresh(small_world)
    versions = [first(small_world), *(add(small_world, 10.0, f"far {number}") for number in range(4))]
    for before, after in itertools.pairwise(versions):
        offered = await made.to(after.bundle, (before.bundle,))
        assert weights(small_world, after)[1].digest not in {delta.target for delta in offered}
    assert len(made._useless) == 2


async def test_what_was_made_is_kept_through_a_start_and_made_again_if_it_is_deleted(small_world: World) -> None:
    before, after = first(small_world), add(small_world, 1e-4)
    made = await small_world.coordinator.deltas.to(after.bundle, (before.bundle,))
    assert made and fresh(small_world).between(before.bundle, after.bundle) == made
    for path in (small_world.blobs_path / "deltas").iterdir():
        path.unlink()
    again = fresh(small_world)
    assert again.between(before.bundle, after.bundle) == []
    assert again.path(made[0].digest) is None
    assert await again.to(after.bundle, (before.bundle,)) == made


async def test_what_rotted_or_was_left_half_written_is_not_offered_after_a_start(small_world: World) -> None:
    before, after = first(small_world), add(small_world, 1e-4)
    await small_world.coordinator.deltas.to(after.bundle, (before.bundle,))
    folder = small_world.blobs_path / "deltas"
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    (folder / "aside-0123").write_bytes(b"half")
    (folder / "no.delta.name").write_bytes(b"")
    assert fresh(small_world).between(before.bundle, after.bundle) == []
    assert list(folder.iterdir()) == []


async def test_of_several_bundles_the_nearest_gives_the_delta(small_world: World) -> None:
    one, two = first(small_world), add(small_world, 1e-2, "far")
    three = add(small_world, 1e-5, "near")
    (delta,) = [
        delta
        for delta in await small_world.coordinator.deltas.to(three.bundle, (one.bundle, two.bundle))
        if delta.target == weights(small_world, three)[1].digest
    ]
    assert delta.base == weights(small_world, two)[1].digest


async def test_making_up_what_one_holds_does_not_keep_the_coordinator_busy(
    small_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deltas, "BASES", 2)
    monkeypatch.setattr(deltas, "KEPT", 3)
    versions = [first(small_world), *(add(small_world, 1e-4, f"step {number}") for number in range(5))]
    found = fresh(small_world)
    for version in versions[:-1]:
        await found.to(versions[-1].bundle, (version.bundle,))
    to_weights = weights(small_world, versions[-1])[1].digest
    assert sum(delta.target == to_weights for delta in small_world.blobs.deltas()) <= 2
    for before, after in itertools.pairwise(versions):
        await found.to(after.bundle, (before.bundle,))
    assert len(small_world.blobs.deltas()) <= 3
    held = tuple(version.bundle for version in versions[:-1])
    assert len(found._pairs(versions[-1].bundle, held)) <= 2 * deltas.BUNDLES


async def test_a_delta_that_was_let_go_is_not_found_and_the_whole_file_still_is(small_world: World) -> None:
    before, after = first(small_world), add(small_world, 1e-4)
    (delta, *_) = await small_world.coordinator.deltas.to(after.bundle, (before.bundle,))
    gone = replace(delta, digest=digest_of(b"let go"))
    with pytest.raises(NotFound):
        small_world.coordinator.fetch(gone.digest)
    assert small_world.coordinator.fetch(delta.target).is_file()


async def test_a_coordinator_that_dies_while_it_keeps_a_delta_starts_without_it(small_world: World) -> None:
    before, after = first(small_world), add(small_world, 1e-4)
    small_world.plug.at = {len(small_world.plug.steps) + 1}
    with pytest.raises(BaseException, match="put delta"):
        await small_world.coordinator.deltas.to(after.bundle, (before.bundle,))
    small_world.restart()
    assert small_world.blobs.deltas() == []
    assert await small_world.coordinator.deltas.to(after.bundle, (before.bundle,))


def test_models_of_other_shapes_have_no_delta_between_them(small_world: World) -> None:
    bundle = small_world.coordinator.registry.bundle(first(small_world).bundle)
    shorter = bundle.manifest.files | {WEIGHTS_FILE: FileRef(digest_of(b"other"), 8)}
    manifest = replace(bundle.manifest, files=shorter)
    found = fresh(small_world)
    found._manifests = {Digest("a"): bundle.manifest, Digest("b"): manifest}
    assert found._pairs(Digest("b"), (Digest("a"),)) == []
    assert np.isfinite(bundle.shared_weights().to_vector()).all()
