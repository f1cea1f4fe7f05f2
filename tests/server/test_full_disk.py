"""A coordinator or a helper with a full disk: it says so and goes on; nobody loses what they had, nothing is left."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import suppress
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.databases import new_postgresql
from tests.power_cut import no_room
from tests.private.parties import TASK as PRIVATE_TASK
from tests.private.parties import Party
from tests.server.driving import World, task
from tests.server.live import MODEL, POPULATION, TASK, Live, refused, serving
from tests.server.test_deltas import add, first, joined
from umbel.errors import Unavailable
from umbel.plan import Kind
from umbel.visit import SessionRecord
from umbel_server.blobs import AREAS
from umbel_server.helper import program
from umbel_server.helper.records import Records
from umbel_server.passing import may_pass
from umbel_server.tables import DEVICES, SHAPES
from umbel_server.task import Task


def counted(live: Live) -> int:
    """Reports of the open round."""
    (found,) = live.do(live.parts.coordinator.operations.rounds)
    return found.reports


def test_a_report_that_finds_no_room_is_kept_by_its_device_and_counts_once_there_is_some(tmp_path: Path) -> None:
    with serving(tmp_path / "state") as live:
        live.add_model()
        device = live.device()
        planned = Task(TASK, POPULATION, MODEL, goal=2, over_selection=3.0, updates_private=False)
        live.do(lambda: live.parts.coordinator.operations.create_task(planned, "operator:test"))
        live.run(live.parts.coordinator.tick())
        with refused() as found, no_room():
            device.check_in()
        assert type(found[0]) is Unavailable, "a device gives its session up for any other error"
        begin, sealed = device.sealed(device.assignment())
        chunks = [sealed[start : start + 10_000] for start in range(0, len(sealed), 10_000)]
        with refused() as found, no_room():
            device.report(begin, chunks)
        assert type(found[0]) is Unavailable and counted(live) == 0
        assert device.report(begin, chunks)[-1].HasField("accepted")
        assert counted(live) == 1


async def test_what_devices_told_outlives_a_database_that_takes_no_writes(tmp_path: Path, postgresql: str) -> None:
    """As after a failover, on the server that isn't the first one yet."""
    world = World(new_postgresql(postgresql), tmp_path / "blobs")
    (device,) = world.enrol("a")
    await device.check_in()

    def refuse_writes(connection: sa.Connection) -> None:
        connection.exec_driver_sql("SET TRANSACTION READ ONLY")

    sa.event.listen(world.store.engine, "begin", refuse_writes)
    with pytest.raises(sa.exc.DBAPIError) as found:
        world.coordinator.fleet.flush(world.clock.now())
    assert may_pass(found.value)
    sa.event.remove(world.store.engine, "begin", refuse_writes)
    world.coordinator.fleet.flush(world.clock.now())
    assert world.coordinator.operations.status().devices_seen_lately == 1
    world.store.close()


async def test_tries_without_room_leave_no_files_that_take_what_room_there_is(small_world: World) -> None:
    blobs = small_world.blobs
    for _ in range(3):
        with no_room(), pytest.raises(OSError, match="too large"):
            blobs.put_bundle_file(b"graph")
    left = [path.name for area in AREAS for path in (small_world.blobs_path / area).glob("aside-*")]
    assert left == []
    blobs.put_bundle_file(b"graph")


async def test_what_devices_told_while_there_was_no_room_is_written_once_there_is_some(small_world: World) -> None:
    await small_world.begin(task())
    (device,) = small_world.enrol("teller")
    await device.check_in(sessions=(SessionRecord("learn", 1, "-v[]+^"),))
    fleet = small_world.coordinator.fleet
    with no_room(), pytest.raises(sa.exc.OperationalError):
        fleet.flush(small_world.clock.now())
    fleet.flush(small_world.clock.now())
    with small_world.store.reading() as connection:
        assert connection.scalar(sa.select(DEVICES.c.visits).where(DEVICES.c.id == device.id)) == 1
        assert connection.execute(sa.select(SHAPES.c.shape, SHAPES.c.count)).all() == [("-v[]+^", 1)]


async def test_a_delta_that_finds_no_room_costs_no_device_its_session(small_world: World) -> None:
    before, _ = first(small_world), add(small_world, 1e-4)
    await small_world.begin(task())
    made = small_world.coordinator.deltas._make
    small_world.coordinator.deltas._make = lambda pair: _without_room(made, pair)  # type: ignore[method-assign]
    _, found = await joined(small_world, before.bundle)
    assert found == ()
    assert not list((small_world.blobs_path / "deltas").iterdir())
    small_world.coordinator.deltas._make = made  # type: ignore[method-assign]
    assert (await small_world.enrol("next")[0].check_in(held_bundles=(before.bundle,))).deltas


async def _without_room(make, pair):  # type: ignore[no-untyped-def]
    with no_room():
        return await make(pair)


def test_a_helper_that_had_no_room_for_one_change_takes_the_next(tmp_path: Path) -> None:
    records = Records(tmp_path / "helper.db")
    with no_room(), pytest.raises(sqlite3.OperationalError):
        records.offer("learn", (1, 0), Kind.TRAIN, b"k" * 32, 10.0)
    assert records.round("learn", 1, Kind.TRAIN) is None and records.latest("learn") is None
    records.offer("learn", (1, 0), Kind.TRAIN, b"k" * 32, 10.0)
    assert records.round("learn", 1, Kind.TRAIN) is not None


def test_a_helper_whose_change_a_full_disk_undid_tells_of_the_disk(tmp_path: Path) -> None:
    records = Records(tmp_path / "helper.db")
    pages = records._row("PRAGMA page_count")[0]
    records._connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(sqlite3.OperationalError, match="full"):
        records.offer("learn", (1, 0), Kind.TRAIN, b"k" * 50_000, 10.0)
    records._connection.execute(f"PRAGMA max_page_count = {pages + 100}")
    records.offer("learn", (1, 0), Kind.TRAIN, b"k" * 50_000, 10.0)


async def test_keys_that_expired_while_a_helper_had_no_room_go_once_there_is_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    party = Party(records=Records(tmp_path / "helper.db"))
    party.open()
    party.clock.instant += 7200.0
    monkeypatch.setattr(program, "SWEEP_SECONDS", 0.01)
    with no_room():
        sweeping = asyncio.create_task(program._sweep(party.helper))
        await asyncio.sleep(0.1)
    try:
        async with asyncio.timeout(20):
            while party.records.round(PRIVATE_TASK, 1, Kind.TRAIN) is not None:
                assert not sweeping.done(), "nobody sweeps any more"
                await asyncio.sleep(0.01)
    finally:
        sweeping.cancel()
        with suppress(asyncio.CancelledError, sqlite3.Error):
            await sweeping
