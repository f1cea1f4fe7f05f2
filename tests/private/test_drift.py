"""Drift of a fleet of which only noisy sums are known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.databases import new_sqlite
from tests.private.test_coordinator import PRIVATE, PrivateWorld
from tests.server.drifting import AGE, counting, metrics
from tests.server.driving import OPERATOR, TASK, task
from umbel.plan import Kind, Plan
from umbel.update import Update
from umbel_server.drift import Verdict
from umbel_server.drift_windows import Windows
from umbel_server.privacy_settings import PrivacySettings

YOUNG, OLD = (0.7, 0.2, 0.1, 0.0), (0.2, 0.3, 0.5, 0.0)


async def test_drift_is_told_from_noisy_sums_that_no_device_can_be_told_from(tmp_path: Path) -> None:
    world = PrivateWorld(new_sqlite(tmp_path / "umbel.db"), tmp_path / "blobs")
    world.coordinator.registry.add_model("counting", counting(AGE), OPERATOR, 0.0)
    devices = world.enrol_private("a", "b", "c", "d")
    noisy = PrivacySettings(noise_multiplier=0.02, metric_bound=400.0)
    chosen = PRIVATE | {
        "plan": Plan(kind=Kind.EVALUATE, max_weight=64.0),
        "rounds": 12,
        "privacy": noisy,
    }
    await world.begin(replace(task(**chosen), model="counting"))
    for number in range(12):
        for place, device in enumerate(devices):
            ages = OLD if number >= 8 else YOUNG
            assignment = await device.assignment()
            body = Update(device.update(assignment).delta, 20.0, metrics(ages, seed=4 * number + place))
            await device.send(device.report(assignment, body))
        await world.coordinator.tick()
        world.clock.instant += 10
    counted = [row.metrics["age[3]"] for row in world.coordinator.operations.rounds(TASK) if row.ended_at]
    assert len(counted) == 12 and min(counted) < 0, "noise: nobody is of that age"
    found = world.coordinator.operations.drift(TASK, Windows(reference=8, recent=4, below=0.01))
    world.store.close()
    assert found.findings[0].verdict is Verdict.DRIFT
    assert found.findings[0].recent == pytest.approx(OLD, abs=0.1)
