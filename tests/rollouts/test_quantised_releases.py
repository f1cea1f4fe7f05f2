"""A quantised release is one content for everybody, small for those who have its base, and judged like any other."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from tests.client.recordings import recordings
from tests.rollouts.fleet import AUTHOR, MODEL, RUNTIME, Fleet, fleet_of
from umbel.bundle import Bundle
from umbel.delta import rebuild
from umbel.errors import MalformedMessage, NotFound, WrongState
from umbel.manifest import WEIGHTS_FILE
from umbel.self_check import verify_golden
from umbel_server import task_records
from umbel_server.releasing import Made
from umbel_server.requests import ANY, Call, revisions
from umbel_server.rollout_spec import Audience
from umbel_server.tables import TASKS
from umbel_server.validation import ValidationPolicy
from umbel_server.versions import VersionState, delta_of


@pytest.fixture
async def fleet(tmp_path: Path) -> Fleet:
    """Two devices with a release."""
    return await fleet_of(tmp_path, 2)


async def quantised(fleet: Fleet, version: int, call: Call = ANY) -> Made:
    return await fleet.coordinator.releasing.prepare(MODEL, version, "stable", "int8-delta", AUTHOR, call)


def bundle_of(fleet: Fleet, version: int) -> Bundle:
    return fleet.coordinator.operations.bundle(MODEL, version)


def open_to_all(fleet: Fleet, number: int) -> None:
    with fleet.coordinator.store.transaction() as connection:
        fleet.coordinator.rollouts.desk.open(connection, Audience(MODEL, "stable"), number)  # type: ignore[union-attr]
    fleet.steer()


async def test_a_quantised_version_is_near_what_it_was_made_from_and_passes_its_golden_examples(fleet: Fleet) -> None:
    wanted = fleet.good_version()
    made = await quantised(fleet, wanted)
    version = fleet.coordinator.operations.version(MODEL, made.version)
    assert (version.state, version.parent) == (VersionState.QUANTISED, wanted)
    assert f"quantised version {wanted}" in version.lineage.verdict
    bundle = bundle_of(fleet, made.version)
    bundle.verify()
    verify_golden(RUNTIME, bundle)
    off = (bundle.shared_weights() - bundle_of(fleet, wanted).shared_weights()).norm()
    moved = (bundle_of(fleet, wanted).shared_weights() - bundle_of(fleet, 2).shared_weights()).norm()
    assert 0 < off < moved / 50


async def test_devices_rebuild_exactly_what_is_listed(fleet: Fleet) -> None:
    made = await quantised(fleet, fleet.good_version())
    open_to_all(fleet, made.prepared.number)
    before = fleet.devices[0].kit.memory.state.fetched
    await fleet.visits()
    assert fleet.releases() == [made.prepared.number] * 2
    listed = fleet.coordinator.rollouts.desk.listed(MODEL)[made.prepared.number]  # type: ignore[union-attr]
    active = fleet.devices[0].kit.shelf.slots.active
    assert active is not None and active.bundle == listed.bundle
    after = fleet.devices[0].kit.memory.state.fetched
    assert after.deltas - before.deltas == 2
    weights = bundle_of(fleet, made.version).manifest.files[WEIGHTS_FILE]
    assert (
        fleet.devices[0].kit.shelf.path(weights.digest).read_bytes()
        == bundle_of(fleet, made.version).paths[WEIGHTS_FILE].read_bytes()
    )
    assert after.bytes - before.bytes < 0.45 * weights.size + 5_000


async def test_a_step_that_is_too_large_for_a_lossless_delta_still_has_a_small_defining_one(fleet: Fleet) -> None:
    wanted = fleet.add_version(lambda weights: _noisy(weights, 0.01))
    made = await quantised(fleet, wanted)
    exact = await fleet.coordinator.releasing.prepare(MODEL, wanted, "stable", "full", AUTHOR)
    size = bundle_of(fleet, wanted).manifest.files[WEIGHTS_FILE].size
    (small,) = fleet.coordinator.releasing.one(MODEL, made.prepared.number).deltas
    (large,) = fleet.coordinator.releasing.one(MODEL, exact.prepared.number).deltas
    assert small.size < 0.3 * size < small.stands_for
    assert large.stands_for < size, "only the golden examples have a delta"


def _noisy(weights: Any, scale: float) -> Any:
    chance = np.random.Generator(np.random.PCG64(5))
    arrays = {n: a + scale * chance.normal(0, 1, a.shape).astype("f4") for n, a in weights.arrays.items()}
    return type(weights)(arrays)


async def test_a_device_without_the_base_fetches_the_same_content_whole(fleet: Fleet) -> None:
    made = await quantised(fleet, fleet.good_version())
    open_to_all(fleet, made.prepared.number)
    fleet.devices.append(fleet.enrol(9))
    await fleet.visits()
    assert fleet.releases() == [made.prepared.number] * 3
    assert fleet.devices[2].kit.memory.state.fetched.deltas == 0
    bundles = {device.kit.shelf.slots.active.bundle for device in fleet.devices}  # type: ignore[union-attr]
    assert len(bundles) == 1


async def test_the_way_back_from_a_quantised_release_is_what_devices_had(fleet: Fleet) -> None:
    before = fleet.releases()[0]
    made = await quantised(fleet, fleet.good_version())
    listed = fleet.coordinator.rollouts.desk.listed(MODEL)  # type: ignore[union-attr]
    back = listed[made.prepared.revert]
    assert (back.content_of, back.bundle) == (before, listed[before].bundle)
    assert back.bundle != listed[made.prepared.number].bundle


async def test_no_round_starts_from_a_quantised_version(fleet: Fleet) -> None:
    wanted = fleet.good_version()
    made = await quantised(fleet, wanted)
    assert made.version > wanted
    with fleet.coordinator.store.reading() as connection:
        assert fleet.coordinator.registry.newest_accepted(connection, MODEL).number == wanted


async def test_asked_again_it_is_the_same_version_and_the_same_release(fleet: Fleet) -> None:
    wanted, once = fleet.good_version(), Call(request_id="once")
    first = await quantised(fleet, wanted, once)
    # Devices have something else meanwhile: the call was carried out all the same.
    fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    assert await quantised(fleet, wanted, once) == first


async def test_whoever_has_not_seen_the_newest_change_changes_nothing(fleet: Fleet) -> None:
    wanted = fleet.good_version()
    with fleet.coordinator.store.reading() as connection:
        seen = revisions(connection, "model", [MODEL])[MODEL]
    versions = len(fleet.coordinator.operations.versions(MODEL))
    with pytest.raises(WrongState, match="revision"):
        await quantised(fleet, wanted, Call(expected_revision=seen - 1))
    assert len(fleet.coordinator.operations.versions(MODEL)) == versions
    assert (await quantised(fleet, wanted, Call(expected_revision=seen))).version == versions + 1


async def test_its_delta_survives_a_start_and_is_a_file_of_its_version(fleet: Fleet) -> None:
    made = await quantised(fleet, fleet.good_version())
    fleet.restart()
    version = fleet.coordinator.operations.version(MODEL, made.version)
    delta = delta_of(version.lineage)
    assert delta is not None
    bundle = bundle_of(fleet, made.version)
    out, base = io.BytesIO(), fleet.coordinator.fetch(delta.base).read_bytes()
    data = fleet.coordinator.fetch(delta.digest).read_bytes()
    rebuild(io.BytesIO(data), io.BytesIO(base), out, delta.base, bundle.manifest.files[WEIGHTS_FILE])
    assert out.getvalue() == bundle.paths[WEIGHTS_FILE].read_bytes()


# Refusals: with nothing registered.


async def test_what_has_no_base_or_no_sense_is_refused(fleet: Fleet) -> None:
    wanted = fleet.good_version()
    versions = len(fleet.coordinator.operations.versions(MODEL))
    releasing = fleet.coordinator.releasing
    with pytest.raises(NotFound, match="nobody has a release"):
        await releasing.prepare(MODEL, wanted, "beta", "int8-delta", AUTHOR)
    with pytest.raises(MalformedMessage, match="int4"):
        await releasing.prepare(MODEL, wanted, "stable", "int4", AUTHOR)
    with pytest.raises(WrongState, match="already"):
        await quantised(fleet, 2)
    with pytest.raises(NotFound):
        await quantised(fleet, 99)
    assert len(fleet.coordinator.operations.versions(MODEL)) == versions


async def test_a_neighbour_that_answers_worse_on_held_out_data_is_refused(fleet: Fleet) -> None:
    wanted = fleet.good_version()
    manifest = bundle_of(fleet, wanted).manifest
    inputs, targets = recordings(70, "held out")
    data = safetensors.numpy.save({manifest.inputs[0].name: inputs, manifest.targets[0].name: targets})
    policy = ValidationPolicy(holdout=fleet.coordinator.operations.add_holdout(data, AUTHOR))
    with fleet.coordinator.store.transaction() as connection:
        (record,) = task_records.everything(connection)
        judged = replace(record.task, validation=policy)
        connection.execute(TASKS.update().values(task_json=judged.to_json()))
    made = await quantised(fleet, wanted)
    verdict = fleet.coordinator.operations.version(MODEL, made.version).lineage.verdict
    assert "on held-out data 100.00% of the answers are right" in verdict
    # From weights with one of each row far off, a row's 255 steps are too coarse for the others.
    fleet.verbs.publish(MODEL, fleet.add_version(_one_far_off), "stable", AUTHOR)
    versions = len(fleet.coordinator.operations.versions(MODEL))
    with pytest.raises(WrongState, match="not good enough: on held-out data"):
        await quantised(fleet, wanted)
    assert len(fleet.coordinator.operations.versions(MODEL)) == versions


def _one_far_off(weights: Any) -> Any:
    arrays = {name: array.copy() for name, array in weights.arrays.items()}
    for array in arrays.values():
        array *= -1.0
        array.reshape(len(array), -1)[:, 0] += 300.0
    return type(weights)(arrays)


# What operators see.


async def test_details_tell_encoding_sizes_deltas_and_standing(fleet: Fleet) -> None:
    head = fleet.releases()[0]
    made = await quantised(fleet, fleet.good_version())
    details = fleet.coordinator.releasing.one(MODEL, made.prepared.number)
    assert (details.encoding, details.standing) == ("int8-delta", "listed")
    assert details.size_by_runtime["onnx"] < details.size
    (delta,) = details.deltas
    assert delta.release == head and delta.size < 0.5 * delta.stands_for
    first = fleet.coordinator.releasing.one(MODEL, head)
    assert (first.encoding, first.standing, first.deltas) == ("full", "head", ())
    with pytest.raises(NotFound):
        fleet.coordinator.releasing.one(MODEL, 999)
