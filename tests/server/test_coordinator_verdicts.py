"""What becomes of candidates: who measures them, who judges them, and what is written down."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import safetensors.numpy

from tests.server.driving import BUNDLE, MODEL, OPERATOR, TASK, World, task, together
from umbel.plan import Kind, Plan
from umbel.randomness import generator
from umbel.runtime.onnx import OnnxRuntime
from umbel_server.flower.spec import StrategySpec
from umbel_server.round import RoundState
from umbel_server.task import TaskState
from umbel_server.validation import ValidationPolicy
from umbel_server.versions import VersionState


async def test_devices_measure_a_candidate_before_its_verdict(world: World) -> None:
    devices = world.enrol("a", "b")
    await world.begin(task(rounds=2, evaluate_candidates=True))
    operations = world.coordinator.operations
    await together(*devices)
    await world.coordinator.tick()
    assert operations.round(TASK, 1).state is RoundState.VALIDATING
    assert operations.version(MODEL, 2).state is VersionState.CANDIDATE
    assignment = await devices[0].assignment()
    assert (assignment.plan.kind, assignment.round) == (Kind.EVALUATE, 1)
    assert world.base_of(assignment) == operations.version(MODEL, 2).bundle
    world.restart()
    await together(*devices)
    await world.coordinator.tick()
    operations = world.coordinator.operations
    accepted = operations.version(MODEL, 2)
    assert (accepted.state, accepted.lineage.verdict, accepted.accuracy) == (VersionState.ACCEPTED, "accepted", 0.6)
    judged = operations.round(TASK, 1)
    assert (judged.state, judged.version, judged.candidate_accuracy) == (RoundState.COMPLETED, 2, 0.6)
    assert operations.round(TASK, 2).base_version == 2


async def test_a_candidate_that_serves_devices_worse_is_refused_and_the_parent_stands(world: World) -> None:
    devices = world.enrol("a", "b")
    await world.begin(task(rounds=2, evaluate_candidates=True))
    await together(*devices)
    await world.coordinator.tick()
    for device in devices:
        assignment = await device.assignment()
        worse = device.update(assignment)
        worse = type(worse)(worse.delta, worse.weight, {"loss": 40.0, "correct": 2.0, "examples": 20.0})
        await device.send(device.report(assignment, worse))
    await world.coordinator.tick()
    operations = world.coordinator.operations
    assert operations.version(MODEL, 2).state is VersionState.REFUSED
    assert operations.round(TASK, 1).state is RoundState.FAILED
    assert "right" in operations.round(TASK, 1).reason
    assert operations.round(TASK, 2).base_version == 1
    assert operations.task(TASK).steps == 0


async def test_a_candidate_that_too_few_devices_measure_is_refused(world: World) -> None:
    devices = world.enrol("a", "b")
    await world.begin(task(rounds=1, minimum=2, evaluate_candidates=True))
    await together(*devices)
    await world.coordinator.tick()
    world.clock.instant += 100
    await world.coordinator.tick()
    operations = world.coordinator.operations
    assert operations.version(MODEL, 2).state is VersionState.REFUSED
    assert "abandoned" in operations.round(TASK, 1).reason


async def test_the_servers_own_examples_refuse_a_candidate_that_forgot(world: World) -> None:
    # Held-out examples on which the parent is always right: their targets are its own answers.
    x = generator("held-out").normal(size=(200, 6, 100)).astype(np.float32)
    (scores,) = OnnxRuntime().infer(BUNDLE, BUNDLE.weights())({"x": x}).values()
    operations = world.coordinator.operations
    digest = operations.add_holdout(safetensors.numpy.save({"x": x, "y": scores.argmax(1)}), OPERATOR)
    devices = world.enrol("a", "b")
    await world.begin(task(rounds=1, validation=ValidationPolicy(holdout=digest)))
    for device in devices:
        assignment = await device.assignment()
        update = device.update(assignment)
        await device.send(device.report(assignment, replace(update, delta=update.delta.scaled(20.0))))
    await world.coordinator.tick()
    assert operations.round(TASK, 1).state is RoundState.FAILED
    assert "held-out data" in operations.round(TASK, 1).reason
    assert len(operations.versions(MODEL)) == 1


async def test_each_change_leaves_its_row_in_the_audit(world: World) -> None:
    devices = world.enrol("a", "b")
    await world.begin(task(rounds=1, evaluate_candidates=True))
    for _ in range(2):
        await together(*devices)
        await world.coordinator.tick()
    rows = reversed(world.coordinator.operations.audit_rows())
    train, evaluate = f"{TASK}/1/train", f"{TASK}/1/evaluate"
    assert [(row.action, row.object) for row in rows] == [
        ("model.add", MODEL),
        ("task.create", TASK),
        ("round.open", train),
        ("round.aggregating", train),
        ("round.validating", train),
        ("round.open", evaluate),
        ("round.aggregating", evaluate),
        ("version.accepted", f"{MODEL}/2"),
        ("round.completed", evaluate),
        ("round.completed", train),
        ("task.done", TASK),
    ]


async def test_an_evaluation_task_measures_the_newest_version_and_makes_none(world: World) -> None:
    devices = world.enrol("a", "b")
    await world.begin(task(rounds=1, plan=Plan(kind=Kind.EVALUATE)))
    await together(*devices)
    await world.coordinator.tick()
    operations = world.coordinator.operations
    assert operations.version(MODEL, 1).accuracy == 0.6
    assert operations.round(TASK, 1).version == 1
    assert len(operations.versions(MODEL)) == 1
    assert operations.task(TASK).task.state is TaskState.DONE


async def test_a_robust_strategy_runs_where_updates_are_public(small_world: World) -> None:
    devices = small_world.enrol("a", "b", "c")
    await small_world.begin(
        task(strategy=StrategySpec("FedMedian"), updates_private=False, goal=3, minimum=3, rounds=1)
    )
    assignments = [await device.assignment() for device in devices]
    updates = [device.update(assignment) for device, assignment in zip(devices, assignments, strict=True)]
    for device, assignment in zip(devices, assignments, strict=True):
        await device.send(device.report(assignment))
    await small_world.coordinator.tick()
    median = np.median([update.delta.to_vector() for update in updates], axis=0)
    wanted = BUNDLE.shared_weights().to_vector() + median
    np.testing.assert_allclose(small_world.weights().to_vector(), wanted, rtol=0, atol=1e-6)
