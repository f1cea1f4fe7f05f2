"""The coordinator's promises to devices and operators, on both databases."""

from __future__ import annotations

import asyncio
import math
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest

from tests.server.driving import BUNDLE, MODEL, OPERATOR, POPULATION, TASK, World, offer, task, together
from umbel.bundle import Bundle
from umbel.digests import digest_of
from umbel.errors import AlreadyExists, BadInput, Conflict, NotAllowed, NotFound, OutOfBounds, RoundClosed, WrongState
from umbel.plan import Kind, Plan
from umbel.release import STABLE
from umbel.update import Aggregate
from umbel.visit import Outcome, ReleaseOutcome, Retry, SessionRecord
from umbel_models.zoo import bundle_path
from umbel_server import fleet
from umbel_server.beat import Beat
from umbel_server.flower.spec import StrategySpec
from umbel_server.round import UPLOAD_GRACE_SECONDS, RoundState, SessionState
from umbel_server.selection import SHORTEST_SECONDS
from umbel_server.task import Task, TaskState
from umbel_server.validation import ValidationPolicy

MEASURE = Task("measure", POPULATION, MODEL, plan=Plan(kind=Kind.EVALUATE), goal=2, updates_private=False)


async def test_a_task_runs_its_rounds_and_releases_each_version(world: World) -> None:
    devices = world.enrol("a", "b", "c")
    await world.begin(task(rounds=3))
    for _ in range(3):
        # One after the other: the third finds that enough have reported.
        for device in devices:
            await device.visit()
        await world.coordinator.tick()
    operations = world.coordinator.operations
    assert operations.task(TASK).task.state is TaskState.DONE
    rounds = operations.rounds(TASK)
    assert [(one.key.number, one.state, one.version) for one in rounds] == [
        (number, RoundState.COMPLETED, number + 1) for number in (3, 2, 1)
    ]
    assert {(one.reports, one.assigned, one.accuracy) for one in rounds} == {(2, 2, 0.6)}
    assert all(one.bytes_up > 8 * sum(array.size for array in world.weights().arrays.values()) for one in rounds)
    newest = (await devices[0].check_in(offers_work=False)).newest
    assert newest == operations.releases(MODEL)[0].signed
    assert operations.releases(MODEL)[0].channel == STABLE
    assert operations.verify_audit() > 0
    assert list(world.blobs.spool.iterdir()) == []


async def test_rounds_and_releases_are_listed_newest_first_though_a_clock_was_a_year_ahead(world: World) -> None:
    devices = world.enrol("a", "b", "c")
    right = world.clock.now()
    await world.begin(task(rounds=3))
    for now in (right + 365 * 86_400.0, right + 10.0, right + 20.0):
        for device in devices:
            await device.visit()
        world.clock.instant = now
        await world.coordinator.tick()
    operations = world.coordinator.operations
    assert [one.key.number for one in operations.rounds()] == [3, 2, 1]
    numbers = [release.number for release in operations.releases("")]
    assert numbers == sorted(numbers, reverse=True)
    assert [release.number for release in operations.status().newest_releases] == numbers[:1]


async def test_the_new_version_is_its_parent_plus_the_weighted_mean(world: World) -> None:
    devices = world.enrol("a", "b")
    await world.begin(task(rounds=1))
    assignments = [await device.assignment() for device in devices]
    expected = Aggregate.zero(BUNDLE.manifest.shared_shapes)
    for device, assignment in zip(devices, assignments, strict=True):
        expected.accumulate(device.update(assignment))
        await device.send(device.report(assignment))
    await world.coordinator.tick()
    wanted = (BUNDLE.shared_weights() + expected.mean()).to_vector()
    np.testing.assert_allclose(world.weights().to_vector(), wanted, rtol=0, atol=1e-6)


async def test_reports_that_come_at_the_same_time_all_count(world: World) -> None:
    world.offload = asyncio.to_thread
    world.restart()
    devices = world.enrol(*(f"device-{number}" for number in range(8)))
    await world.begin(task(goal=8, minimum=8, rounds=1))
    assert await together(*devices) == [True] * 8
    await world.coordinator.tick()
    assert world.coordinator.operations.version(MODEL, 2).lineage.cohort == 8


async def test_a_device_that_is_not_enrolled_or_of_another_population_is_refused(world: World) -> None:
    (device,) = world.enrol("a")
    await world.begin(task())
    with pytest.raises(NotAllowed, match="enrol"):
        await world.coordinator.check_in(digest_of(b"stranger")[:32], offer())  # type: ignore[arg-type]
    with pytest.raises(NotAllowed, match="population"):
        await world.coordinator.check_in(device.id, offer("others"))


async def test_without_work_there_is_a_window_and_a_reason(world: World) -> None:
    (device,) = world.enrol("a")
    reply = (await device.check_in()).reply
    assert isinstance(reply, Retry)
    assert reply.reason == f"no round is open for population {POPULATION!r}", "a mistyped population is seen"
    await world.begin(task(goal=1))
    await device.visit()
    assert isinstance((await device.check_in()).reply, Retry)


async def test_checking_in_again_takes_the_old_sessions_place(world: World) -> None:
    device, other = world.enrol("a", "b")
    await world.begin(task(goal=1, over_selection=1.0))
    first, second = await device.assignment(), await device.assignment()
    with pytest.raises(RoundClosed, match="superseded"):
        await device.send(device.report(first))
    assert isinstance((await other.check_in()).reply, Retry)
    await device.send(device.report(second))
    assert world.coordinator.operations.round(TASK, 1).sessions == {
        SessionState.ABORTED: 1,
        SessionState.REPORTED: 1,
    }


async def test_too_late_is_said_before_a_byte_is_sent(world: World) -> None:
    devices = world.enrol("a", "b", "c")
    await world.begin(task())
    late = devices[2].report(await devices[2].assignment())
    await together(*devices[:2])
    for _ in range(2):
        with pytest.raises(RoundClosed):
            await world.coordinator.begin_report(late.begin)
        await world.coordinator.tick()


async def test_a_report_whose_round_closes_on_its_way_is_not_counted(world: World) -> None:
    devices = world.enrol("a", "b", "c")
    await world.begin(task())
    late = devices[2].report(await devices[2].assignment())
    await world.coordinator.begin_report(late.begin)
    await world.coordinator.append(late.begin.report_id, 0, late.sealed)
    await together(*devices[:2])
    with pytest.raises(RoundClosed):
        await world.coordinator.finish_report(late.begin.report_id)
    await world.coordinator.tick()
    assert list(world.blobs.spool.iterdir()) == []
    assert world.coordinator.operations.version(MODEL, 2).lineage.cohort == 2


async def test_between_a_rounds_deadline_and_its_end_a_device_is_told_to_come_back(small_world: World) -> None:
    (device,) = small_world.enrol("a")
    await small_world.begin(task(deadline_seconds=1000.0))
    small_world.clock.instant += 1000.0
    reply = (await device.check_in()).reply
    assert isinstance(reply, Retry) and "no open round" in reply.reason


async def test_at_the_deadline_the_minimum_counts_and_less_is_made_up_for(world: World) -> None:
    devices = world.enrol("a", "b", "c")
    await world.begin(task(goal=3, minimum=2, rounds=1))
    await devices[0].visit()
    world.clock.instant += 100
    await world.coordinator.tick()
    operations = world.coordinator.operations
    assert operations.round(TASK, 1).state is RoundState.ABANDONED
    assert operations.round(TASK, 2).state is RoundState.COLLECTING
    await together(*devices[:2])
    world.clock.instant += 100
    await world.coordinator.tick()
    assert operations.round(TASK, 2).state is RoundState.COMPLETED
    assert operations.task(TASK).task.state is TaskState.DONE


async def test_a_round_waits_for_stragglers_as_long_as_devices_were_measured_to_need(small_world: World) -> None:
    devices = small_world.enrol(*"abcdefgh")
    await small_world.begin(task(goal=8, minimum=4, rounds=3, deadline_seconds=1000.0))
    assignments = [await device.assignment() for device in devices]
    small_world.clock.instant += 20
    for device, assignment in zip(devices, assignments, strict=True):
        await device.send(device.report(assignment))
    await small_world.coordinator.tick()
    await together(*devices[:4])
    small_world.clock.instant += 39
    await small_world.coordinator.tick()
    assert small_world.coordinator.operations.round(TASK, 2).state is RoundState.COLLECTING
    small_world.clock.instant += 2
    await small_world.coordinator.tick()
    assert small_world.coordinator.operations.round(TASK, 2).state is RoundState.COMPLETED


async def test_a_session_that_ran_out_of_time_makes_room_for_another(small_world: World) -> None:
    devices = small_world.enrol(*"abcdefgh", "eager")
    planned = task(goal=8, minimum=8, rounds=3, over_selection=1.0, deadline_seconds=1000.0)
    await small_world.begin(planned)
    await together(*devices[:8])
    await small_world.coordinator.tick()
    slow = devices[7].report(await devices[7].assignment())
    await together(*devices[:7])
    assert isinstance((await devices[8].check_in()).reply, Retry)
    small_world.clock.instant += SHORTEST_SECONDS + UPLOAD_GRACE_SECONDS + 1
    await small_world.coordinator.tick()
    with pytest.raises(RoundClosed):
        await small_world.coordinator.begin_report(slow.begin)
    assert await devices[8].visit()
    sessions = small_world.coordinator.operations.round(TASK, 2).sessions
    assert sessions == {SessionState.EXPIRED: 1, SessionState.REPORTED: 8}


async def test_devices_that_are_often_too_slow_are_given_longer(small_world: World) -> None:
    quick, slow = small_world.enrol(*"abcdefgh"), small_world.enrol("sloth", "snail")
    await small_world.begin(task(goal=8, minimum=6, rounds=3, over_selection=1.0, deadline_seconds=1000.0))
    reports = [device.report(await device.assignment()) for device in quick]
    small_world.clock.instant += 2
    for device, report in zip(quick, reports, strict=True):
        await device.send(report)
    await small_world.coordinator.tick()
    for _ in range(2):
        await together(*quick[:6])
        late = [device.report(await device.assignment()) for device in slow]
        small_world.clock.instant += 20
        for device, report in zip(slow, late, strict=True):
            with suppress(RoundClosed):
                await device.send(report)
        small_world.clock.instant += UPLOAD_GRACE_SECONDS
        await small_world.coordinator.tick()
    second, third = (small_world.coordinator.operations.round(TASK, number).sessions for number in (2, 3))
    assert second == {SessionState.REPORTED: 6, SessionState.EXPIRED: 2}, "8 seconds, by those that were heard"
    assert third == {SessionState.REPORTED: 8}, "32, by those that ran out of time too"


async def test_an_operator_pauses_resumes_and_stops(world: World) -> None:
    devices = world.enrol("a", "b")
    await world.begin(task(rounds=5))
    operations = world.coordinator.operations
    operations.pause_task(TASK, OPERATOR)
    await together(*devices)
    await world.coordinator.tick()
    assert operations.round(TASK, 1).state is RoundState.COMPLETED
    with pytest.raises(NotFound):
        operations.round(TASK, 2)
    assert isinstance((await devices[0].check_in()).reply, Retry)
    with pytest.raises(WrongState):
        operations.pause_task(TASK, OPERATOR)
    operations.resume_task(TASK, OPERATOR)
    await world.coordinator.tick()
    assert operations.round(TASK, 2).state is RoundState.COLLECTING
    operations.stop_task(TASK, OPERATOR)
    await world.coordinator.tick()
    assert operations.round(TASK, 2).state is RoundState.ABANDONED
    with pytest.raises(WrongState):
        operations.resume_task(TASK, OPERATOR)
    asked = [row.action for row in operations.audit_rows() if row.actor == OPERATOR]
    assert asked == ["task.stop", "task.resume", "task.pause", "task.create", "model.add"]


async def test_what_cannot_be_run_is_refused_before_a_round_begins(world: World) -> None:
    operations = world.coordinator.operations
    with pytest.raises(NotFound):
        operations.create_task(task(validation=ValidationPolicy(holdout="0" * 64)), OPERATOR)
    with pytest.raises(BadInput, match="hyper-parameters"):
        operations.create_task(task(plan=Plan(hyperparameters={"nonsense": 1.0})), OPERATOR)
    graphs = {"litert": BUNDLE.manifest.graphs["litert"]}
    files = {name: ref for name, ref in BUNDLE.manifest.files.items() if not name.endswith(".onnx")}
    tiny = Bundle(replace(BUNDLE.manifest, graphs=graphs, files=files), {name: BUNDLE.paths[name] for name in files})
    world.coordinator.registry.add_model("tiny", tiny, OPERATOR, 0.0)
    with pytest.raises(BadInput, match="no graphs for 'onnx'"):
        operations.create_task(replace(task(), model="tiny"), OPERATOR)
    for changes in (
        {"over_selection": 0.9}, {"over_selection": 101.0}, {"rounds": 0}, {"rounds": 1_000_001},
        {"deadline_seconds": math.nan}, {"deadline_seconds": math.inf}, {"deadline_seconds": 0.5},
    ):  # fmt: skip
        with pytest.raises(OutOfBounds, match=next(iter(changes))):
            task(**changes)
    with pytest.raises(BadInput, match="private"):
        task(strategy="Krum", updates_private=True)
    with pytest.raises(OutOfBounds, match="minimum"):
        task(strategy=StrategySpec("Krum"), updates_private=False)
    operations.create_task(task(), OPERATOR)
    with pytest.raises(AlreadyExists):
        operations.create_task(task(), OPERATOR)
    with pytest.raises(Conflict, match="training"):
        operations.create_task(replace(task(), name="other"), OPERATOR)
    operations.add_model("second", bundle_path("smartwatch"), OPERATOR)
    with pytest.raises(Conflict, match="one of its own"):
        operations.create_task(replace(task(), name="other", model="second"), OPERATOR)


async def test_two_tasks_share_a_fleet_and_a_device_works_for_one_at_a_time(small_world: World) -> None:
    devices = small_world.enrol("a", "b")
    await small_world.begin(task(rounds=1))
    await small_world.begin(MEASURE)
    first = await devices[0].assignment()
    second = await devices[0].assignment()
    assert {first.task, second.task} == {TASK, "measure"}
    with pytest.raises(RoundClosed, match="superseded"):
        await small_world.coordinator.begin_report(devices[0].report(first).begin)
    await devices[0].send(devices[0].report(second))


async def test_what_devices_tell_is_counted_once_and_made_up_names_take_no_room(world: World) -> None:
    device, _ = world.enrol("a", "b")
    await world.begin(task())
    world.coordinator.operations.publish(MODEL, 1, STABLE, OPERATOR)
    told = {
        "sessions": (SessionRecord(TASK, 1, "-v[]+^"), SessionRecord("made-up", 1, "-"), SessionRecord(TASK, 1, "-v!")),
        "outcomes": (
            ReleaseOutcome(MODEL, 2, Outcome.KEPT_OWN, "mine is better"),
            ReleaseOutcome(MODEL, 99, Outcome.FAILED),
            ReleaseOutcome(MODEL, 2**63 - 1, Outcome.FAILED),
            ReleaseOutcome("made-up", 1, Outcome.ADOPTED),
        ),
        "sdk": "umbel/0.1",
    }
    await device.check_in(offers_work=False, **told)
    await device.check_in(offers_work=False, outcomes=(ReleaseOutcome(MODEL, 2, Outcome.ADOPTED),))
    operations = world.coordinator.operations
    assert operations.shapes(TASK) == {"-v[]+^": 1, "-v!": 1}
    assert operations.shapes("made-up") == {}
    assert operations.outcomes(MODEL, 2) == {"adopted": 1}
    assert operations.outcomes(MODEL, 99) == {}
    seen = operations.device(device.id)
    assert (seen.visits, seen.last_seen, seen.runtimes) == (2, world.clock.now(), ("onnx",))
    assert operations.status().devices_seen_lately == 1
    world.restart()
    assert world.coordinator.operations.device(device.id).visits == 2


async def test_each_device_has_one_vote_on_each_models_release(small_world: World) -> None:
    devices, operations = small_world.enrol("a", "b"), small_world.coordinator.operations
    operations.add_model("second", bundle_path("smartwatch"), OPERATOR)
    for model in (MODEL, "second"):
        operations.publish(model, 1, STABLE, OPERATOR)
    for device in devices:
        told = (ReleaseOutcome(MODEL, 2, Outcome.ADOPTED), ReleaseOutcome("second", 2, Outcome.FAILED))
        await device.check_in(offers_work=False, outcomes=told)
        operations.status()
    assert operations.outcomes(MODEL, 2) == {"adopted": 2}
    assert operations.outcomes("second", 2) == {"failed": 2}


async def test_made_up_shapes_take_little_room_and_those_that_are_known_go_on_counting(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "MOST_SHAPES", 3)
    (device,) = world.enrol("a")
    await world.begin(task())
    honest = SessionRecord(TASK, 1, "-v[]+^")
    made_up = tuple(SessionRecord(TASK, 1, "-", f"error-{number}") for number in range(9))
    for sessions, counted in (((honest,), {"-v[]+^": 1}), ((honest, *made_up), {"-v[]+^": 2, "-": 2})):
        await device.check_in(offers_work=False, sessions=sessions)
        assert world.coordinator.operations.shapes(TASK) == counted


async def test_a_device_that_makes_up_its_release_costs_the_others_nothing(world: World) -> None:
    liar, other = world.enrol("a", "b")
    await world.begin(task())
    await liar.check_in(offers_work=False, release=2**63 - 1)
    await other.check_in(offers_work=False)
    world.clock.instant += Beat().flush
    await world.coordinator.tick()
    world.restart()
    assert [world.coordinator.operations.device(device.id).visits for device in (liar, other)] == [1, 1]


async def test_bytes_down_are_counted_for_the_round_that_hands_them_out(world: World) -> None:
    world.enrol("a")
    await world.begin(task())
    world.coordinator.count_fetched(1000, BUNDLE.manifest.digest)
    world.coordinator.count_fetched(200)
    world.clock.instant += Beat().flush
    await world.coordinator.tick()
    assert world.coordinator.operations.round(TASK, 1).bytes_down == 1200
    assert world.coordinator.operations.status().bytes_down == 1200


async def test_watchers_hear_what_was_committed(small_world: World) -> None:
    devices = small_world.enrol("a", "b")
    events = small_world.coordinator.subscribe()
    heard = []

    async def listen() -> None:
        async for event in events:
            heard.append((event.kind, event.subject))

    listening = asyncio.create_task(listen())
    await asyncio.sleep(0)
    await small_world.begin(task(rounds=1))
    await together(*devices)
    await small_world.coordinator.tick()
    await asyncio.sleep(0)
    listening.cancel()
    key = f"{TASK}/1/train"
    kinds = ["round.open", "report.accepted", "report.accepted", "round.aggregating", "round.completed"]
    assert heard == [(kind, key) for kind in kinds]


async def test_run_closes_rounds_by_itself_and_stops_when_told(small_world: World) -> None:
    devices = small_world.enrol("a", "b")
    events = small_world.coordinator.subscribe()
    first = asyncio.ensure_future(anext(events))
    await asyncio.sleep(0)
    running = asyncio.create_task(small_world.coordinator.run())
    small_world.coordinator.operations.create_task(task(rounds=1), OPERATOR)
    assert (await first).kind == "round.open"
    assert await together(*devices) == [True, True]
    kinds = ["report.accepted", "report.accepted", "round.aggregating", "round.completed"]
    assert [(await anext(events)).kind for _ in kinds] == kinds
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert small_world.coordinator.operations.device(devices[0].id).reports == 1


async def test_what_devices_told_is_written_when_it_stops(small_world: World) -> None:
    (device,) = small_world.enrol("a")
    running = asyncio.create_task(small_world.coordinator.run())
    await asyncio.sleep(0)
    await device.check_in(offers_work=False)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    small_world.restart()
    assert small_world.coordinator.operations.device(device.id).visits == 1


async def test_one_task_that_cannot_go_on_does_not_hold_up_the_others(small_world: World) -> None:
    devices = small_world.enrol("a", "b")
    await small_world.begin(task(strategy="FedAdam"))
    await together(*devices)
    await small_world.coordinator.tick()
    (moments,) = (small_world.blobs_path / "state").iterdir()
    kept = moments.rename(small_world.blobs_path / "moments")
    await small_world.begin(MEASURE)
    for _ in range(2):
        await together(*devices)
    with pytest.raises(ExceptionGroup) as raised:
        await small_world.coordinator.tick()
    assert raised.group_contains(NotFound, match="restore it")
    operations = small_world.coordinator.operations
    assert operations.task("measure").task.state is TaskState.DONE
    assert operations.round(TASK, 2).state is RoundState.AGGREGATING
    kept.rename(moments)
    await small_world.coordinator.tick()
    assert operations.round(TASK, 2).state is RoundState.COMPLETED
