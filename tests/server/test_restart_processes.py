"""Real processes, killed with SIGKILL at random moments: the run goes on to its end, and the books balance."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa

from tests.server.processes import MODEL, POPULATION, TASK, Federation, RealDevice, names_in, wait_until
from umbel.plan import Plan
from umbel.randomness import generator
from umbel_server import round_records
from umbel_server.app import Parts
from umbel_server.flower.spec import StrategySpec
from umbel_server.tables import ROUNDS, SESSIONS
from umbel_server.task import Task
from umbel_server.validation import ValidationPolicy
from umbel_server.versions import VersionState

LONGEST_WAIT = 1.0
"""For a file to appear, before the killer loses patience."""


def task(devices: int, *, evaluates: bool = False) -> Task:
    """Rounds without end; all devices but one make one, and whatever they made is accepted."""
    return Task(
        TASK,
        POPULATION,
        MODEL,
        plan=Plan(epochs=2, batch_size=16, hyperparameters={"lr": 0.05}),
        goal=devices - 1,
        minimum=2,
        over_selection=1.5,
        deadline_seconds=90.0,
        rounds=1_000_000,
        strategy=StrategySpec("FedAdam", {"eta": 0.01}),
        validation=ValidationPolicy(max_accuracy_drop=1.0, max_step_ratio=0.0, max_report_ratio=1e6),
        evaluate_candidates=evaluates,
        updates_private=False,
    )


def wait_for_a_moment(chance: np.random.Generator, root: Path, *areas: str) -> None:
    """Until some time has passed, or something has just changed in one of these folders."""
    area = str(chance.choice(["", *areas]))
    seconds, shortly = chance.uniform(0, LONGEST_WAIT), chance.uniform(0, 0.03)
    if not area:
        time.sleep(seconds)
        return
    before, deadline = names_in(root / area), time.monotonic() + LONGEST_WAIT
    while names_in(root / area) == before and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(shortly)


class Killer:
    """Draws whom to kill, and when: after a while, or as soon as something changes on the victim's disk."""

    def __init__(self, federation: Federation, seed: int) -> None:
        self.federation = federation
        self.chance = generator("killer", seed)

    def strike(self) -> None:
        """Kill one process and start it again."""
        devices = self.federation.devices
        victim = int(self.chance.integers(0, 2 * len(devices)))
        if victim < len(devices):
            self.strike_device(devices[victim])
        else:
            self.strike_coordinator()

    def strike_device(self, device: RealDevice) -> None:
        wait_for_a_moment(self.chance, device.home, "session", "shelf/blobs", "shelf/personal")
        device.agent.kill()
        device.require_good_slot()
        device.agent.start()

    def strike_coordinator(self) -> None:
        wait_for_a_moment(self.chance, self.federation.state / "blobs", "spool", "bundles", "state")
        self.federation.coordinator.kill()
        self.federation.coordinator.start()


def run_through(federation: Federation, planned: Task, kills: int, seed: int) -> None:
    """Run a task and kill on the way; then let it go on for two rounds, stop everything, and look at what is left."""
    federation.begin(planned)
    killer = Killer(federation, seed)
    for _ in range(kills):
        killer.strike()
    let_it_end(federation)
    with federation.parts() as parts:
        require_an_unbroken_line(parts)
        require_each_report_counts_once(federation, parts)
        require_that_devices_say_the_same(federation, parts)
        require_that_nothing_is_left_over(federation, parts)


def let_it_end(federation: Federation) -> None:
    """Two more rounds without a kill; then everybody comes to rest and is stopped."""
    federation.wake_all()
    enough = federation.versions() + 2
    wait_until(lambda: federation.versions() >= enough, "rounds go on after the last kill")
    federation.stop_task()
    newest = federation.newest_release()
    wait_until(lambda: all(device.is_at_rest(newest) for device in federation.devices), "every device is at rest")
    for device in federation.devices:
        assert device.agent.stop() == 0
        device.require_good_slot()
        assert device.adopted
    assert federation.coordinator.stop() == 0


def require_an_unbroken_line(parts: Parts) -> None:
    operations = parts.coordinator.operations
    versions, record = operations.versions(MODEL, limit=10_000), operations.task(TASK)
    assert [version.number for version in versions] == list(range(len(versions), 0, -1))
    assert [version.parent for version in versions] == [*range(len(versions) - 1, 0, -1), None]
    # Stopping the task may have cut off the last candidate's evaluation; every other one was accepted.
    refused = [version for version in versions if version.state is not VersionState.ACCEPTED]
    assert [version for version in versions[:1] if "abandoned" in version.lineage.verdict] == refused
    assert record.judged_rounds == len(versions) - 1
    assert record.steps == record.judged_rounds - len(refused)
    for version in versions:
        assert np.isfinite(operations.bundle(MODEL, version.number).shared_weights().to_vector()).all()


def require_each_report_counts_once(federation: Federation, parts: Parts) -> None:
    examples = {device.id: device.examples for device in federation.devices}
    most = parts.coordinator.operations.task(TASK).task.plan.max_weight
    by_round = {version.lineage.round: version.lineage for version in parts.coordinator.operations.versions(MODEL)}
    with parts.store.reading() as connection:
        for row in connection.execute(sa.select(ROUNDS).where(ROUNDS.c.state == "completed")):
            held = round_records.load(connection, round_records._key(row))
            assert held is not None
            reporters = [session.device for session in held.reports]
            assert len(reporters) == len(set(reporters)), "a device counts twice"
            assert [session.sequence for session in held.reports] == list(range(len(reporters)))
            if row.kind == "train":
                lineage = by_round[row.number]
                assert lineage.cohort == len(reporters)
                assert lineage.weight == sum(min(examples[device], most) for device in reporters)


def require_that_devices_say_the_same(federation: Federation, parts: Parts) -> None:
    with parts.store.reading() as connection:
        query = sa.select(SESSIONS.c.device, SESSIONS.c.round, SESSIONS.c.kind).where(SESSIONS.c.sequence.is_not(None))
        counted = Counter((row.device, row.round) for row in connection.execute(query))
    for device in federation.devices:
        rows = sum(number for (owner, _), number in counted.items() if owner == device.id)
        told = Counter(
            (device.id, visit["session"]["round"]) for visit in device.visits() if visit["ending"] == "contributed"
        )
        assert not told - counted, "an acknowledged report is lost"
        # Killed between its note and the end of its session, a device notes the same report again.
        assert rows <= device.state()["contributions"] <= rows + device.agent.kills


def require_that_nothing_is_left_over(federation: Federation, parts: Parts) -> None:
    assert parts.coordinator.operations.verify_audit() > 0
    blobs = federation.state / "blobs"
    assert not names_in(blobs / "spool"), "sealed reports outlive their rounds"
    assert len(names_in(blobs / "state")) == 1, "a strategy remembers more than one state"
    assert not [name for area in blobs.iterdir() for name in names_in(area) if name.startswith("aside-")]


@pytest.mark.slow
def test_processes_that_are_killed_at_any_time_lose_no_report_and_count_none_twice(tmp_path: Path) -> None:
    with Federation(tmp_path, f"sqlite:///{tmp_path / 'umbel.db'}", device_count=4) as federation:
        run_through(federation, task(devices=4), kills=5, seed=1)


@pytest.mark.slow
def test_so_in_a_long_run_whose_devices_judge_candidates_on_each_database(database_url: str, tmp_path: Path) -> None:
    with Federation(tmp_path, database_url, device_count=5) as federation:
        # What is kept where, and when, hangs on the database in transactions alone; those are cut one by one elsewhere.
        run_through(federation, task(devices=5, evaluates=True), kills=25 if "sqlite" in database_url else 10, seed=3)
