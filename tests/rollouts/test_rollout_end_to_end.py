"""Releases reach devices signed and in waves, are tested there, and can always go back."""

from __future__ import annotations

from pathlib import Path

from tests.rollouts.fleet import AUTHOR, MODEL, Fleet
from umbel_server.rollout import Stage
from umbel_server.rollout_spec import Wave
from umbel_server.serving.service import catalogue

DEVICES = 12
"""`make demo` does the same with twenty."""


def answers_callers(fleet: Fleet) -> int:
    """The version that a program gets which asks the coordinator's model over the network."""
    assert fleet.coordinator.rollouts is not None
    return catalogue(fleet.coordinator.store, fleet.coordinator.rollouts.desk).find(MODEL, "").version


async def test_a_good_version_reaches_everybody_wave_by_wave_and_a_broken_one_is_stopped_in_its_canary(
    tmp_path: Path,
) -> None:
    fleet = Fleet(tmp_path, devices=DEVICES)
    fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    await fleet.visits()
    first = set(fleet.releases())
    assert len(first) == 1 and 0 not in first
    before = answers_callers(fleet)

    good = fleet.begin_rollout("good", fleet.good_version())
    reached = []
    for _ in range(12):
        assert answers_callers(fleet) == before, "no program meets a release before the whole population has it"
        await fleet.visits()
        reached.append(sum(number == good.spec.release for number in fleet.releases()))
        if fleet.verbs.get("good").rollout.stage is Stage.SUCCEEDED:
            break
    assert fleet.verbs.get("good").rollout.stage is Stage.SUCCEEDED
    assert 0 < reached[0] < reached[-1] == DEVICES
    after = answers_callers(fleet)
    assert after == before + 1

    broken = fleet.begin_rollout("broken", fleet.broken_version())
    touched = set()
    for _ in range(6):
        await fleet.visits()
        touched |= {index for index, number in enumerate(fleet.releases()) if number == broken.spec.release}
        if fleet.verbs.get("broken").rollout.stage is Stage.ROLLED_BACK:
            break
    ended = fleet.verbs.get("broken")
    assert ended.rollout.stage is Stage.ROLLED_BACK, ended
    assert ended.rollout.wave == 0
    assert broken.spec.release not in fleet.releases()
    assert len(touched) <= 3
    assert answers_callers(fleet) == after


async def test_a_release_reaches_devices_as_a_delta_from_the_one_before(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, devices=2)
    fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    await fleet.visits()
    before = fleet.devices[0].kit.memory.state.fetched
    number = fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    await fleet.visits()
    assert fleet.releases() == [number, number]
    after = fleet.devices[0].kit.memory.state.fetched
    assert after.deltas - before.deltas == 2, "the weights and the golden examples"
    assert after.files - before.files == 1, "the manifest"
    assert after.bytes - before.bytes < after.spared_by_deltas


async def test_a_release_that_no_device_has_tried_does_not_end_well(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    fleet.begin_rollout("r", fleet.good_version(), waves=(Wave(5.0, soak_seconds=10.0), Wave(100.0, soak_seconds=10.0)))
    for _ in range(5):
        await fleet.visits()
    rollout = fleet.verbs.get("r").rollout
    assert (rollout.stage, rollout.wave) == (Stage.RUNNING, 1)
    fleet.devices.append(fleet.enrol(0))
    for _ in range(4):
        await fleet.visits()
    assert fleet.verbs.get("r").rollout.stage is Stage.SUCCEEDED


async def test_a_way_back_is_taken_by_devices_that_the_release_served_better(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, devices=1)
    fleet.verbs.publish(MODEL, fleet.broken_version(), "stable", AUTHOR)
    await fleet.visits()
    everybody = (Wave(100.0, soak_seconds=10.0),)
    begun = fleet.begin_rollout("r", fleet.good_version(), waves=everybody)
    for _ in range(4):
        await fleet.visits()
    assert fleet.releases() == [begun.spec.release]
    assert answers_callers(fleet) == 3
    fleet.verbs.stop("r", "roll-back", AUTHOR, "it says what it must not")
    for _ in range(3):
        await fleet.visits()
    assert fleet.releases() == [begun.spec.revert_release]
    assert answers_callers(fleet) == 2, "programs go back with the devices"
