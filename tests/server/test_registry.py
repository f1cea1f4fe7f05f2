"""Versions never change, releases only rise, and nothing unpublished can be fetched."""

from __future__ import annotations

import pytest

from tests.server.driving import BUNDLE, MODEL, OPERATOR, POPULATION, World, task, together
from umbel.bundle import Bundle
from umbel.digests import digest_of
from umbel.errors import (
    AlreadyExists,
    MalformedMessage,
    NotAllowed,
    NotFound,
    OutOfBounds,
    SignatureInvalid,
    WrongState,
)
from umbel.manifest import MAX_MANIFEST_BYTES
from umbel.messages import release_from_bytes
from umbel.release import STABLE, verify_statement
from umbel.runtime.onnx import OnnxRuntime
from umbel.self_check import verify_golden
from umbel_models.zoo import bundle_path
from umbel_server.signing import ReleaseSigner
from umbel_server.versions import CANDIDATE, TRAINING, VersionState


def test_a_registered_model_is_version_1_and_its_files_can_be_fetched(world: World) -> None:
    version = world.coordinator.operations.version(MODEL, 1)
    assert (version.parent, version.state, version.lineage.registered_by) == (None, VersionState.ACCEPTED, OPERATOR)
    assert version.bundle == BUNDLE.manifest.digest
    for digest in (version.bundle, *(ref.digest for ref in BUNDLE.manifest.files.values())):
        assert digest_of(world.coordinator.fetch(digest).read_bytes()) == digest


def test_a_version_is_handed_out_under_its_own_release(small_world: World) -> None:
    registry, operations = small_world.coordinator.registry, small_world.coordinator.operations
    operations.add_version(MODEL, 1, bundle_path("smartwatch"), OPERATOR)
    operations.publish(MODEL, 1, STABLE, OPERATOR)
    with small_world.store.reading() as connection:
        for number in (1, 2):
            version = registry.version(connection, MODEL, number)
            found = registry.base_release(connection, version)
            assert (found.version, found.channel) == (number, TRAINING)


def test_a_name_is_given_once_and_must_be_one(world: World) -> None:
    with pytest.raises(AlreadyExists):
        world.coordinator.operations.add_model(MODEL, bundle_path("smartwatch"), OPERATOR)
    with pytest.raises(MalformedMessage):
        world.coordinator.operations.add_model("../up", bundle_path("smartwatch"), OPERATOR)
    assert [model.name for model in world.coordinator.operations.models()] == [MODEL]


def test_what_no_version_lists_is_not_found(small_world: World) -> None:
    stray = small_world.blobs.put_bundle_file(b"a candidate whose round was never committed")
    state = small_world.blobs.put_state("learn", b"moments")
    assert state is not None
    for digest in (stray, state, digest_of(b"nothing")):
        with pytest.raises(NotFound):
            small_world.coordinator.fetch(digest)


def test_a_file_too_large_for_a_manifest_is_not_read_as_one(small_world: World) -> None:
    """A device may name any file as a bundle that it holds."""
    weights = small_world.blobs.put_bundle_file(bytes(MAX_MANIFEST_BYTES + 1))
    with pytest.raises(OutOfBounds, match="larger than a manifest"):
        small_world.coordinator.registry.manifest(weights)


def test_numbers_rise_over_all_channels_and_going_back_is_a_new_release(world: World) -> None:
    operations = world.coordinator.operations
    numbers = [operations.publish(MODEL, 1, channel, OPERATOR).number for channel in (STABLE, "beta", STABLE)]
    assert numbers == [2, 3, 4]
    newest = world.coordinator.registry.newest_release(MODEL, STABLE)
    assert newest is not None
    assert newest.number == 4
    assert [release.number for release in operations.releases(MODEL)] == [4, 3, 2, 1]
    statement = verify_statement(newest.signed, world.signer.public_key)
    release = release_from_bytes(statement)
    assert (release.number, release.version, release.bundle) == (4, 1, BUNDLE.manifest.digest)
    with pytest.raises(SignatureInvalid):
        verify_statement(newest.signed, ReleaseSigner.generate().public_key)


@pytest.mark.parametrize("channel", [TRAINING, CANDIDATE])
def test_the_rounds_channels_are_not_for_operators(small_world: World, channel: str) -> None:
    with pytest.raises(NotAllowed):
        small_world.coordinator.operations.publish(MODEL, 1, channel, OPERATOR)


def test_an_unknown_version_is_not_published(small_world: World) -> None:
    with pytest.raises(NotFound):
        small_world.coordinator.operations.publish(MODEL, 2, STABLE, OPERATOR)
    with pytest.raises(NotFound):
        small_world.coordinator.operations.publish("nothing", 1, STABLE, OPERATOR)


async def test_a_candidate_is_not_published(small_world: World) -> None:
    devices = small_world.enrol("a", "b")
    await small_world.begin(task(evaluate_candidates=True))
    await together(*devices)
    await small_world.coordinator.tick()
    assert small_world.coordinator.operations.version(MODEL, 2).state is VersionState.CANDIDATE
    with pytest.raises(WrongState):
        small_world.coordinator.operations.publish(MODEL, 2, STABLE, OPERATOR)


async def test_lineage_tells_where_each_version_came_from(world: World) -> None:
    devices = world.enrol("a", "b")
    await world.begin(task(rounds=2))
    for _ in range(2):
        await together(*devices)
        await world.coordinator.tick()
    chain = [step.version for step in world.coordinator.operations.trace(MODEL, 3)]
    assert [version.number for version in chain] == [3, 2, 1]
    newest = chain[0].lineage
    assert (newest.task, newest.round, newest.cohort, newest.weight) == ("learn", 2, 2, 100.0)
    assert (newest.strategy, newest.verdict, newest.plan["seed"]) == ("FedAvg", "accepted", 7)
    assert newest.step_norm > 0
    assert [version.accuracy for version in chain] == [None, 0.6, 0.6]
    assert world.coordinator.operations.task("learn").task.population == POPULATION


async def test_a_new_version_is_a_whole_bundle_whose_golden_examples_hold(small_world: World) -> None:
    devices = small_world.enrol("a", "b")
    await small_world.begin(task(rounds=1))
    await together(*devices)
    await small_world.coordinator.tick()
    bundle = small_world.coordinator.operations.bundle(MODEL, 2)
    bundle.verify()
    verify_golden(OnnxRuntime(), bundle)
    assert isinstance(bundle, Bundle)
    assert bundle.shared_weights() != BUNDLE.shared_weights()


def test_the_signers_key_survives_its_bytes_and_does_not_print(small_world: World) -> None:
    signer = small_world.signer
    assert ReleaseSigner.from_bytes(signer.to_bytes()).public_key == signer.public_key
    assert signer.to_bytes().hex() not in repr(signer)
    with pytest.raises(MalformedMessage):
        ReleaseSigner.from_bytes(b"short")
