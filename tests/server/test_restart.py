"""A coordinator that is killed at any durable step and started again ends where an unbroken one would have."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.databases import new_sqlite
from tests.server.driving import BUNDLE, SHAPES, TASK, Plug, SimulatedDevice, World, task
from umbel.errors import WrongState
from umbel.randomness import generator
from umbel.update import Aggregate
from umbel_server import flower
from umbel_server.aggregation import LeaderKey, Presummed
from umbel_server.flower.spec import StrategySpec
from umbel_server.signing import ReleaseSigner
from umbel_server.tables import AUDIT, RELEASES, TASKS, VERSIONS
from umbel_server.task import Task, TaskState

SIGNER, LEADER = ReleaseSigner.generate(), LeaderKey.generate()
STRATEGIES = [
    StrategySpec("FedAvg"),
    StrategySpec("FedAvgM", {"server_momentum": 0.9}),
    StrategySpec("FedAdam", {"eta": 0.01}),
    StrategySpec("FedYogi", {"eta": 0.01}),
]


async def run(url: str, folder: Path, planned: Task, crashes: set[int], crowd: int = 2) -> tuple[World, list[str]]:
    """Run a whole task, dying at the durable steps numbered in `crashes`."""
    world = World(url, folder, SIGNER, LEADER)
    devices = world.enrol(*(f"device-{index}" for index in range(crowd)))
    world.plug = Plug(crashes)
    world.restart()
    await world.surely(lambda: created(world, planned))
    while world.coordinator.operations.task(TASK).task.state is not TaskState.DONE:
        for device in devices:
            await world.surely(device.visit)
        await world.surely(lambda: world.coordinator.tick())
    return world, world.plug.steps


async def created(world: World, planned: Task) -> None:
    operations = world.coordinator.operations
    if not operations.tasks():
        operations.create_task(planned, "operator")
    await world.coordinator.tick()


def ending(world: World) -> dict[str, Any]:
    """All that a run leaves behind, to the bit."""
    assert world.coordinator.operations.verify_audit() > 0
    left = {path.name for area in ("spool", "state") for path in (world.blobs_path / area).iterdir()}
    tables = {table.name: world.dump(table) for table in (AUDIT, RELEASES, TASKS, VERSIONS)}
    weights = world.weights().to_bytes()
    world.store.close()
    return tables | {"weights": weights, "left": left}


@pytest.fixture
def places(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Fresh disks, one after another."""
    return ((new_sqlite(tmp_path / f"{number}.db"), tmp_path / f"blobs-{number}") for number in itertools.count())


Places = Iterator[tuple[str, Path]]


EIGHTHS = [
    pytest.param(strategy, 2 * at, 8, id=strategy.name, marks=[pytest.mark.slow] if at % 2 else [])
    for at, strategy in enumerate(STRATEGIES, 1)
]
"""Every eighth step, beginning elsewhere for each: together, every other step."""
EVERY = [pytest.param(STRATEGIES[2], 1, 1, id="FedAdam, every step", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("strategy", "first", "stride"), EIGHTHS + EVERY)
@pytest.mark.usefixtures("quick_disk")
async def test_killed_at_any_durable_step_it_ends_bit_equal(
    strategy: StrategySpec, first: int, stride: int, places: Places
) -> None:
    world, steps = await run(*next(places), task(strategy=strategy), set())
    unbroken = ending(world)
    assert steps.count("spool report") == 4
    assert ("put state" in steps) == (strategy.name != "FedAvg")
    for number in range(first, len(steps) + 1, stride):
        world, _ = await run(*next(places), task(strategy=strategy), {number})
        assert ending(world) == unbroken, f"killed at step {number}, {steps[number - 1]}"


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy.name)
@pytest.mark.usefixtures("quick_disk")
async def test_a_broken_run_makes_what_one_long_lived_strategy_makes(strategy: StrategySpec, places: Places) -> None:
    planned = task(strategy=strategy, goal=1, rounds=3)
    world, _ = await run(*next(places), planned, {4, 11, 20, 25, 30}, crowd=1)
    device = SimulatedDevice(world, "device-0", planned.population)
    weights, state = BUNDLE.shared_weights(), b""
    for number in (1, 2, 3):
        collected = Aggregate.zero(SHAPES)
        collected.accumulate(device.drawn(planned.name, number))
        weights, state = flower.apply(strategy, state, weights, Presummed(collected), number)
    assert world.weights() == weights
    assert world.blobs.state(TASK, world.coordinator.operations.task(TASK).strategy_state) == state
    world.store.close()


@pytest.mark.parametrize("evaluates", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.usefixtures("quick_disk")
async def test_killed_again_and_again_it_ends_bit_equal(evaluates: bool, places: Places) -> None:
    planned = task(strategy=STRATEGIES[2], goal=3, rounds=3, evaluate_candidates=evaluates)
    world, steps = await run(*next(places), planned, set(), crowd=3)
    unbroken = ending(world)
    assert len(unbroken["versions"]) == 4
    for seed in range(3):
        chance = generator("crashes", seed)
        crashes = {int(number) for number in chance.integers(1, 2 * len(steps), size=len(steps) // 3)}
        world, _ = await run(*next(places), planned, crashes, crowd=3)
        assert ending(world) == unbroken, f"killed at steps {sorted(crashes)}"


async def test_on_each_database_it_ends_bit_equal(database_url: str, tmp_path: Path, places: Places) -> None:
    planned = task(strategy=STRATEGIES[2])
    unbroken = ending((await run(*next(places), planned, set()))[0])
    world, _ = await run(database_url, tmp_path / "blobs", planned, {3, 9, 13, 17, 21, 28})
    assert ending(world) == unbroken


@pytest.mark.usefixtures("quick_disk")
async def test_a_folder_older_than_its_database_is_told_as_that(places: Places) -> None:
    world = World(*next(places), SIGNER, LEADER)
    await created(world, task())
    for file in (world.blobs_path / "bundles").iterdir():
        file.unlink()
    with pytest.raises(WrongState, match="the folder lacks files"):
        world.restart()


@pytest.mark.usefixtures("quick_disk")
async def test_an_upload_that_was_cut_off_goes_on_where_it_was(places: Places) -> None:
    world = World(*next(places), SIGNER, LEADER)
    (device,) = world.enrol("device-0")
    await world.begin(task(goal=1))
    report = device.report(await device.assignment())
    assert await world.coordinator.begin_report(report.begin) == 0
    await world.coordinator.append(report.begin.report_id, 0, report.sealed[:1000])
    world.restart()
    assert await world.coordinator.begin_report(report.begin) == 1000
    await world.coordinator.append(report.begin.report_id, 1000, report.sealed[1000:])
    await world.coordinator.finish_report(report.begin.report_id)
    assert world.coordinator.operations.round(TASK, 1).reports == 1
    world.store.close()


@pytest.mark.usefixtures("quick_disk")
async def test_an_acknowledgement_that_got_lost_is_given_again_and_counts_once(places: Places) -> None:
    world = World(*next(places), SIGNER, LEADER)
    first, second = world.enrol("device-0", "device-1")
    await world.begin(task(goal=2, rounds=1))
    report = first.report(await first.assignment())
    await first.send(report)
    world.restart()
    await first.send(report)
    assert world.coordinator.operations.round(TASK, 1).reports == 1
    await second.visit()
    await world.coordinator.tick()
    await first.send(report)
    assert world.coordinator.operations.version("smartwatch", 2).lineage.cohort == 2
    world.store.close()


@pytest.mark.usefixtures("quick_disk")
async def test_a_report_whose_commit_fails_is_not_counted_by_a_process_that_lives_on(places: Places) -> None:
    worlds = [World(*next(places), SIGNER, LEADER) for _ in range(2)]
    for world, fails in zip(worlds, (True, False), strict=True):
        first, second = world.enrol("device-0", "device-1")
        await world.begin(task(rounds=1))
        report = first.report(await first.assignment())
        if fails:
            # "spool report", then the commit of its row: the disk is full.
            world.plug.at, world.plug.kind = {len(world.plug.steps) + 2}, OSError
            with pytest.raises(OSError, match="commit"):
                await first.send(report)
        await second.visit()
        await first.send(report)
        await world.coordinator.tick()
    failed, clean = (world.coordinator.operations.version("smartwatch", 2).lineage for world in worlds)
    assert (failed.cohort, failed.weight) == (clean.cohort, clean.weight) == (2, 100.0)
    assert worlds[0].weights().to_vector() == pytest.approx(worlds[1].weights().to_vector(), abs=1e-6)
    for world in worlds:
        world.store.close()
