"""One bad device never hurts a round: each attack gets its own error, and the result is that of the others alone."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.databases import new_sqlite
from tests.server.driving import BUNDLE, MODEL, SHAPES, TASK, Report, SimulatedDevice, World, task
from umbel.digests import digest_of
from umbel.errors import (
    AlreadyReported,
    BadInput,
    Conflict,
    DigestMismatch,
    Interrupted,
    MalformedMessage,
    NotAllowed,
    NotFinite,
    NotFound,
    OutOfBounds,
    RoundClosed,
    SealBroken,
    UmbelError,
    WeightsMismatch,
)
from umbel.sealing import OVERHEAD
from umbel.visit import Assignment
from umbel.weights import Weights
from umbel_server.aggregation import LeaderKey
from umbel_server.round import RoundState, SessionState
from umbel_server.tables import ROUNDS, SESSIONS

Spoil = Callable[[SimulatedDevice, Assignment], Report]


def with_update(**changes: Any) -> Spoil:
    """An honest seal round a dishonest update."""

    def spoil(device: SimulatedDevice, assignment: Assignment) -> Report:
        return device.report(assignment, replace(device.update(assignment), **changes))

    return spoil


def filled(value: float) -> Weights:
    return Weights({name: np.full(shape, value, np.float32) for name, shape in SHAPES.items()})


def cut(device: SimulatedDevice, assignment: Assignment) -> Report:
    return device.report(assignment, b"\x0a\x04" + bytes(4))


def to_another_key(device: SimulatedDevice, assignment: Assignment) -> Report:
    return device.report(replace(assignment, sealing=LeaderKey.generate().sealing))


def flipped(device: SimulatedDevice, assignment: Assignment) -> Report:
    honest = device.report(assignment)
    sealed = bytearray(honest.sealed)
    sealed[len(sealed) // 2] ^= 1
    return Report(replace(honest.begin, sealed_digest=digest_of(bytes(sealed))), bytes(sealed))


def bound_to(**changes: Any) -> Spoil:
    return lambda device, assignment: device.report(assignment, binding=changes)


AFTER_OPENING = [
    ("NaN", with_update(delta=filled(float("nan"))), NotFinite),
    ("infinity", with_update(delta=filled(float("inf"))), NotFinite),
    ("huge", with_update(delta=filled(1e30)), OutOfBounds),
    ("negative weight", with_update(weight=-600.0), OutOfBounds),
    ("no weight", with_update(weight=0.0), OutOfBounds),
    ("largest weight", with_update(weight=1.7e308), OutOfBounds),
    ("huge weight", with_update(weight=1e12), OutOfBounds),
    ("foreign metric", with_update(metrics={"accuracy": 1.0}), BadInput),
    ("huge metric", with_update(metrics={"loss": 1.5e308}), OutOfBounds),
    ("huge metric below zero", with_update(metrics={"loss": -1.5e308}), OutOfBounds),
    ("metric NaN", with_update(metrics={"loss": float("nan")}), NotFinite),
    ("empty delta", with_update(delta=Weights({})), WeightsMismatch),
    ("one number", with_update(delta=Weights({"p": np.zeros(1, np.float32)})), WeightsMismatch),
    ("not an update", lambda device, assignment: device.report(assignment, b"\xff" * 100), MalformedMessage),
    ("short delta", cut, WeightsMismatch),
    ("another key", to_another_key, SealBroken),
    ("bits flipped", flipped, SealBroken),
    ("another round", bound_to(round=2), SealBroken),
    ("another task", bound_to(task="other"), SealBroken),
    ("another session", bound_to(session_id="0" * 32), SealBroken),
    ("another base", bound_to(base=digest_of(b"other")), SealBroken),
]


async def clean_result(world: World) -> bytes:
    await world.coordinator.tick()
    return world.weights().to_bytes()


@pytest.fixture
async def expected(tmp_path: Path) -> bytes:
    """What the honest devices alone make."""
    world = World(new_sqlite(tmp_path / "clean.db"), tmp_path / "clean")
    await world.begin(task(rounds=1))
    for device in world.enrol("a", "b"):
        assert await device.visit()
    result = await clean_result(world)
    world.store.close()
    return result


@pytest.mark.parametrize(
    ("spoil", "error"), [case[1:] for case in AFTER_OPENING], ids=[case[0] for case in AFTER_OPENING]
)
@pytest.mark.usefixtures("quick_disk")
async def test_a_bad_report_is_named_and_leaves_the_sum_as_it_was(
    spoil: Spoil, error: type[UmbelError], small_world: World, expected: bytes
) -> None:
    world = small_world
    await world.begin(task(rounds=1))
    first, second, bad = world.enrol("a", "b", "mallory")
    await first.visit()
    with pytest.raises(error):
        await bad.send(spoil(bad, await bad.assignment()))
    summary = world.coordinator.operations.round(TASK, 1)
    assert summary.sessions == {SessionState.REPORTED: 1, SessionState.FAILED: 1}
    assert await bad.visit() is False, "one chance a round"
    assert len(list(world.blobs.spool.iterdir())) == 1
    await second.visit()
    assert await clean_result(world) == expected


Act = Callable[[SimulatedDevice, Report], Awaitable[object]]


def ask(**changes: Any) -> Act:
    return lambda device, report: device.world.coordinator.begin_report(replace(report.begin, **changes))


async def truncated(device: SimulatedDevice, report: Report) -> None:
    await device.world.coordinator.begin_report(report.begin)
    await device.world.coordinator.append(report.begin.report_id, 0, report.sealed[:-1])
    await device.world.coordinator.finish_report(report.begin.report_id)


async def too_long(device: SimulatedDevice, report: Report) -> None:
    await device.world.coordinator.begin_report(report.begin)
    await device.world.coordinator.append(report.begin.report_id, 0, report.sealed + b"x")


async def with_a_gap(device: SimulatedDevice, report: Report) -> None:
    await device.world.coordinator.begin_report(report.begin)
    await device.world.coordinator.append(report.begin.report_id, 5, report.sealed[5:])


async def other_bytes(device: SimulatedDevice, report: Report) -> None:
    await device.world.coordinator.begin_report(report.begin)
    await device.world.coordinator.append(report.begin.report_id, 0, bytes(len(report.sealed)))
    await device.world.coordinator.finish_report(report.begin.report_id)


async def out_of_the_blue(device: SimulatedDevice, report: Report) -> None:
    await device.world.coordinator.append("f" * 32, 0, b"x")


async def finished_out_of_the_blue(device: SimulatedDevice, report: Report) -> None:
    await device.world.coordinator.finish_report("f" * 32)


NUMBERS = sum(array.size for array in BUNDLE.shared_weights().arrays.values())
BEFORE_OPENING = [
    ("wrong token", ask(upload_token=b"guess"), NotAllowed),
    ("empty token", ask(upload_token=b""), NotAllowed),
    ("unknown session", ask(session_id="0" * 32), NotFound),
    ("oversized", ask(sealed_size=4 * NUMBERS + 200_000), OutOfBounds),
    ("absurd size", ask(sealed_size=2**62), OutOfBounds),
    ("no size", ask(sealed_size=0), OutOfBounds),
    ("only a seal", ask(sealed_size=OVERHEAD), OutOfBounds),
    ("truncated", truncated, Interrupted),
    ("too long", too_long, OutOfBounds),
    ("a gap", with_a_gap, OutOfBounds),
    ("wrong digest", other_bytes, DigestMismatch),
    ("unknown upload", out_of_the_blue, NotFound),
    ("unknown end", finished_out_of_the_blue, NotFound),
]


@pytest.mark.parametrize(
    ("act", "error"), [case[1:] for case in BEFORE_OPENING], ids=[case[0] for case in BEFORE_OPENING]
)
@pytest.mark.usefixtures("quick_disk")
async def test_a_bad_upload_is_refused_and_the_right_one_still_counts(
    act: Act, error: type[UmbelError], small_world: World, expected: bytes
) -> None:
    world = small_world
    await world.begin(task(rounds=1))
    first, second = world.enrol("a", "b")
    report = first.report(await first.assignment())
    before = world.dump(SESSIONS), world.dump(ROUNDS)
    with pytest.raises(error):
        await act(first, report)
    assert (world.dump(SESSIONS), world.dump(ROUNDS)) == before
    await first.send(report)
    await second.visit()
    assert await clean_result(world) == expected


async def test_a_replay_counts_once_and_a_second_report_not_at_all(world: World) -> None:
    first, second = world.enrol("a", "b")
    await world.begin(task())
    assignment = await first.assignment()
    report = first.report(assignment)
    await first.send(report)
    await first.send(report)
    with pytest.raises(AlreadyReported):
        await first.send(first.report(assignment, report_id="e" * 32))
    await second.visit()
    await world.coordinator.tick()
    assert world.coordinator.operations.version(MODEL, 2).lineage.cohort == 2
    await first.send(report)
    with pytest.raises(AlreadyReported):
        await first.send(first.report(assignment, report_id="e" * 32))
    with pytest.raises(NotAllowed):
        await world.coordinator.begin_report(replace(report.begin, upload_token=b"guess"))


async def test_another_devices_report_cannot_be_handed_in_as_ones_own(world: World) -> None:
    first, thief = world.enrol("a", "thief")
    await world.begin(task())
    report = first.report(await first.assignment())
    own = await thief.assignment()
    stolen = replace(report.begin, session_id=own.session_id, upload_token=own.upload_token, report_id="e" * 32)
    with pytest.raises(SealBroken):
        await thief.send(Report(stolen, report.sealed))
    await first.send(report)


async def test_a_report_id_in_use_is_refused_to_another_session(small_world: World) -> None:
    first, thief = small_world.enrol("a", "thief")
    await small_world.begin(task())
    report = first.report(await first.assignment())
    await small_world.coordinator.begin_report(report.begin)
    own = await thief.assignment()
    with pytest.raises(Conflict):
        await small_world.coordinator.begin_report(
            replace(report.begin, session_id=own.session_id, upload_token=own.upload_token)
        )
    await first.send(report)


async def test_a_report_id_that_counted_once_is_refused_for_ever(world: World) -> None:
    first, thief = world.enrol("a", "thief")
    await world.begin(task(goal=1, rounds=2))
    report = first.report(await first.assignment())
    await first.send(report)
    await world.coordinator.tick()
    assignment = await thief.assignment()
    with pytest.raises(Conflict):
        await thief.send(thief.report(assignment, report_id=report.begin.report_id))
    assert await first.visit()


async def test_a_session_that_seals_anew_gives_up_what_it_had_sent(small_world: World) -> None:
    (device,) = small_world.enrol("a")
    await small_world.begin(task(goal=1))
    assignment = await device.assignment()
    old, new = device.report(assignment), device.report(assignment)
    await small_world.coordinator.begin_report(old.begin)
    await small_world.coordinator.append(old.begin.report_id, 0, old.sealed[:500])
    assert await small_world.coordinator.begin_report(new.begin) == 0
    assert list(small_world.blobs.spool.iterdir()) == []
    await device.send(new)


async def test_uploads_that_nobody_finishes_are_swept_with_their_session(small_world: World) -> None:
    (device,) = small_world.enrol("a")
    await small_world.begin(task())
    report = device.report(await device.assignment())
    await small_world.coordinator.begin_report(report.begin)
    await small_world.coordinator.append(report.begin.report_id, 0, report.sealed[:500])
    await device.assignment()
    await small_world.coordinator.tick()
    assert list(small_world.blobs.spool.iterdir()) == []
    with pytest.raises(RoundClosed):
        await small_world.coordinator.begin_report(report.begin)


async def test_all_reports_bad_only_costs_the_round(small_world: World) -> None:
    devices = small_world.enrol("a", "b")
    await small_world.begin(task())
    for device in devices:
        with pytest.raises(NotFinite):
            await device.send(with_update(delta=filled(float("nan")))(device, await device.assignment()))
    small_world.clock.instant += 100
    await small_world.coordinator.tick()
    assert [device.name for device in devices if await device.visit()] == ["a", "b"]


@pytest.mark.usefixtures("quick_disk")
async def test_devices_whose_metrics_add_up_to_infinity_do_not_stop_a_task(small_world: World) -> None:
    """Each is a number; their sum couldn't be written down, and the round would never end."""
    world = small_world
    await world.begin(task(rounds=1))
    *liars, first, second = world.enrol("m", "n", "a", "b")
    for device in liars:
        assignment = await device.assignment()
        update = device.update(assignment)
        with pytest.raises(OutOfBounds):
            await device.send(device.report(assignment, replace(update, metrics={**update.metrics, "loss": 1.5e308})))
    assert await first.visit() and await second.visit()
    await world.coordinator.tick()
    assert world.coordinator.operations.round(TASK, 1).state is RoundState.COMPLETED
