"""A report that comes too late is told so, whenever in its upload the round was left; never that nobody knows it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.server.driving import BUNDLE, MODEL, TASK, SimulatedDevice, World, inline, task, together
from umbel.errors import RoundClosed
from umbel.update import Aggregate
from umbel_server import uploads
from umbel_server.closing import advance


async def begun(world: World, **changes: Any) -> tuple[list[SimulatedDevice], Any]:
    """Two devices that may report, and a third whose upload has begun."""
    devices = world.enrol("a", "b", "c")
    await world.begin(task(**changes))
    late = devices[2].report(await devices[2].assignment())
    await world.coordinator.begin_report(late.begin)
    return devices[:2], late


async def test_chunks_after_the_end_of_the_round_are_too_late(small_world: World) -> None:
    others, late = await begun(small_world)
    await small_world.coordinator.append(late.begin.report_id, 0, late.sealed[:500])
    await together(*others)
    await small_world.coordinator.tick()
    with pytest.raises(RoundClosed):
        await small_world.coordinator.append(late.begin.report_id, 500, late.sealed[500:])
    with pytest.raises(RoundClosed):
        await small_world.coordinator.finish_report(late.begin.report_id)


async def test_a_whole_report_after_the_end_of_the_round_is_too_late(small_world: World) -> None:
    others, late = await begun(small_world)
    await small_world.coordinator.append(late.begin.report_id, 0, late.sealed)
    await together(*others)
    await small_world.coordinator.tick()
    with pytest.raises(RoundClosed):
        await small_world.coordinator.finish_report(late.begin.report_id)
    with pytest.raises(RoundClosed):
        await small_world.coordinator.begin_report(late.begin)


async def test_a_whole_report_that_comes_while_other_tasks_are_still_looked_after_is_too_late(
    small_world: World,
) -> None:
    others, late = await begun(small_world, rounds=1)
    await small_world.coordinator.append(late.begin.report_id, 0, late.sealed)
    await together(*others)
    while await advance(small_world.coordinator.runner(TASK)):
        pass
    with pytest.raises(RoundClosed):
        await small_world.coordinator.finish_report(late.begin.report_id)


async def test_a_report_that_waits_while_its_round_is_closed_is_too_late(small_world: World) -> None:
    """It has all its bytes and stands in line behind the closing of its own round."""
    hold, held = asyncio.Event(), asyncio.Event()

    async def slowly(function: Callable[..., Any], *arguments: Any) -> Any:
        if function.__name__ == "_make":
            held.set()
            await hold.wait()
        return await inline(function, *arguments)

    small_world.offload = slowly
    small_world.restart()
    others, late = await begun(small_world)
    await small_world.coordinator.append(late.begin.report_id, 0, late.sealed)
    await together(*others)
    closing = asyncio.create_task(small_world.coordinator.tick())
    await held.wait()
    waiting = asyncio.create_task(small_world.coordinator.finish_report(late.begin.report_id))
    await asyncio.sleep(0)
    hold.set()
    await closing
    with pytest.raises(RoundClosed):
        await waiting


async def test_a_round_whose_last_moment_comes_while_a_report_is_added_up_is_closed_with_it(small_world: World) -> None:
    closing = small_world.pass_time_while_adding(101.0)
    await small_world.begin(task(goal=3, rounds=1))
    expected = Aggregate.zero(BUNDLE.manifest.shared_shapes)
    devices = small_world.enrol("a", "b")
    for device, assigned in [(device, await device.assignment()) for device in devices]:
        expected.accumulate(device.update(assigned))
        await device.send(device.report(assigned))
    await closing[0]
    assert small_world.coordinator.operations.version(MODEL, 2).lineage.cohort == 2
    wanted = (BUNDLE.shared_weights() + expected.mean()).to_vector()
    np.testing.assert_allclose(small_world.weights().to_vector(), wanted, rtol=0, atol=1e-6)


async def test_what_is_remembered_of_late_uploads_is_bounded(
    small_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "OVER_KEPT", 2)
    devices = small_world.enrol(*"abcd")
    await small_world.begin(task(goal=4))
    for device in devices:
        report = device.report(await device.assignment())
        await small_world.coordinator.begin_report(report.begin)
    small_world.clock.instant += 200
    await small_world.coordinator.tick()
    assert len(small_world.coordinator.uploads._over) == 2


async def test_what_is_remembered_of_devices_that_ask_again_and_hang_up_is_bounded(
    small_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "OVER_KEPT", 2)
    devices = small_world.enrol(*"abc")
    await small_world.begin(task(goal=3))
    reports = [device.report(await device.assignment()) for device in devices]
    for device, report in zip(devices, reports, strict=True):
        await device.send(report)
    for report in reports:
        assert await small_world.coordinator.begin_report(report.begin) == report.begin.sealed_size
    held = small_world.coordinator.uploads
    assert (len(held._over), len(held._begun), len(held._by_session)) == (2, 0, 0)


async def test_a_report_whose_session_is_superseded_while_it_is_opened_leaves_nothing_behind(
    small_world: World,
) -> None:
    device, _ = small_world.enrol("a", "b")

    async def meanwhile(function: Callable[..., Any], *arguments: Any) -> Any:
        found = await inline(function, *arguments)
        if function.__name__ == "add":
            await device.check_in()
        return found

    small_world.offload = meanwhile
    small_world.restart()
    await small_world.begin(task())
    with pytest.raises(RoundClosed, match="superseded"):
        await device.send(device.report(await device.assignment()))
    assert list(small_world.blobs.spool.iterdir()) == []
