"""Coordinator and helper die at any durable step of either, and start again: the task ends to the bit as it would have.

The steps are those of the leader's database and blobs, and the moments before and after each change of the helper's
records; a crash after a change is also an answer that never arrives.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.databases import new_sqlite
from tests.private.test_coordinator import PRIVATE, PrivateWorld
from tests.server.driving import TASK, Plug, task
from tests.server.test_restart import created
from umbel_server.aggregation import LeaderKey
from umbel_server.helper.records import Records
from umbel_server.signing import ReleaseSigner
from umbel_server.tables import AUDIT, RELEASES, TASKS, VERSIONS
from umbel_server.task import Task, TaskState

SIGNER, LEADER = ReleaseSigner.generate(), LeaderKey.generate()
DEVICES = 3
LONGEST = 40
"""Laps of all devices until a task should long be done."""
Places = Iterator[tuple[str, Path]]


class Plugged(Records):
    """The helper's records, with a plug to pull before and after each change of a round."""

    def __init__(self, world: PrivateWorld) -> None:
        super().__init__()
        self._world = world

    def offer(self, *arguments: Any) -> None:
        self._around("offer", super().offer, *arguments)

    def countersign(self, *arguments: Any) -> None:
        self._around("countersign", super().countersign, *arguments)

    def commit(self, *arguments: Any) -> None:
        self._around("commit", super().commit, *arguments)

    def _around(self, name: str, change: Any, *arguments: Any) -> None:
        self._world.plug(f"before the helper's {name}")
        change(*arguments)
        self._world.plug(f"after the helper's {name}")


class BothDie(PrivateWorld):
    """One plug for leader and helper; `restart` starts both again, each from its own disk."""

    def __init__(self, url: str, blobs: Path) -> None:
        super().__init__(url, blobs, SIGNER, LEADER, Plugged(self))


async def run(place: tuple[str, Path], planned: Task, crashes: set[int]) -> tuple[BothDie, list[str]]:
    """Run a whole private task, dying at the steps numbered in `crashes`."""
    world = BothDie(*place)
    devices = world.enrol_private(*(f"device-{index}" for index in range(DEVICES)))
    world.plug = Plug(crashes)
    world.restart()
    await world.surely(lambda: created(world, planned))
    for _ in range(LONGEST):
        if world.coordinator.operations.task(TASK).task.state is TaskState.DONE:
            return world, world.plug.steps
        for device in devices:
            await world.surely(device.visit)
        await world.surely(lambda: world.coordinator.tick())
    raise AssertionError(f"not done after {LONGEST} laps")


def ending(world: BothDie) -> dict[str, Any]:
    """All that a run leaves behind, to the bit."""
    assert world.coordinator.operations.verify_audit() > 0
    spool = [path for path in world.blobs.spool.rglob("*") if path.is_file()]
    keys = world.records._row("SELECT count(*) FROM rounds WHERE private_key IS NOT NULL")
    tables = {table.name: world.dump(table) for table in (AUDIT, RELEASES, TASKS, VERSIONS)}
    left = {"spool": spool, "keys of summed rounds": keys, "weights": world.weights().to_bytes()}
    world.store.close()
    world.records.close()
    return tables | left


@pytest.fixture
def places(tmp_path: Path) -> Places:
    """Fresh disks, one after another."""
    return ((new_sqlite(tmp_path / f"{number}.db"), tmp_path / f"blobs-{number}") for number in itertools.count())


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody cuts the power here: nothing need be synced."""
    monkeypatch.setattr("umbel_server.blobs.flush", lambda path: None)
    monkeypatch.setattr("umbel_server.store.PRAGMAS", ("journal_mode=WAL", "synchronous=OFF", "foreign_keys=ON"))


async def require_equal_endings(places: Places, planned: Task, stride: int) -> None:
    world, steps = await run(next(places), planned, set())
    unbroken = ending(world)
    assert steps.count("after the helper's commit") == planned.rounds
    always = [number for number, step in enumerate(steps, 1) if "helper" in step]
    for number in sorted({*always, *range(1, len(steps) + 1, stride)}):
        world, _ = await run(next(places), planned, {number})
        assert ending(world) == unbroken, f"killed at step {number}, {steps[number - 1]}"


async def test_killed_at_steps_of_either_party_a_round_ends_bit_equal(places: Places) -> None:
    await require_equal_endings(places, task(**(PRIVATE | {"goal": 3, "rounds": 1})), stride=5)


@pytest.mark.slow
async def test_killed_at_any_step_of_either_party_two_rounds_end_bit_equal(places: Places) -> None:
    await require_equal_endings(places, task(**(PRIVATE | {"goal": 3, "rounds": 2})), stride=1)
