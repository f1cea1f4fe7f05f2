"""Unmodified Flower programs over a live coordinator: its rounds, its rules, its devices' own training."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

# First, because it loads flwr quietly.
from umbel_server.flower.grid import DeviceGrid

# isort: split
import flwr.serverapp.strategy as flower
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp

from tests.crossing import crossed
from tests.server.driving import BUNDLE, MODEL, OPERATOR, TASK, SimulatedDevice, World, inline, together
from tests.server.driving import task as own_task
from tests.server.fleets import accuracy, driven, fleet_of, while_they_visit
from umbel.errors import BadInput, Conflict, NotFound, OutOfBounds, RoundClosed, WeightsMismatch, WrongState
from umbel.identity import DeviceId
from umbel.plan import Kind, Plan
from umbel.visit import Assignment, Retry
from umbel.weights import Weights
from umbel_server.cohort import CohortOrder
from umbel_server.flower.port import CoordinatorPort
from umbel_server.flower.program import Program, load_app
from umbel_server.round import RoundState
from umbel_server.versions import TRAINING, VersionState

START = BUNDLE.shared_weights()
pytestmark = pytest.mark.usefixtures("quick_disk")


def arrays(weights: Weights = START, prefix: int = 0) -> ArrayRecord:
    """A model as a program holds it; without the bundle's prefixes, as torch names it."""
    return ArrayRecord({name[prefix:]: Array(np.array(array)) for name, array in weights.arrays.items()})


def learnt(result: flower.Result, prefix: str = "") -> Weights:
    return Weights({prefix + name: array.numpy() for name, array in result.arrays.items()})


def order(*devices: SimulatedDevice, weights: Weights = START, **plan: Any) -> CohortOrder:
    return CohortOrder(Plan(**plan), weights, tuple(device.id for device in devices), 1)


async def calling(*devices: SimulatedDevice) -> None:
    """Let the coordinator know of the devices."""
    for device in devices:
        assert isinstance((await device.check_in()).reply, Retry)


class Bench:
    """A grid over a driven task of a world."""

    def __init__(self, world: World) -> None:
        self.port = CoordinatorPort(world.coordinator, TASK, asyncio.get_running_loop())
        self.grid: DeviceGrid | None = None

    def start(self, strategy: Any, rounds: int, **chosen: Any) -> flower.Result:
        self.grid = DeviceGrid(self.port, self.port.plan)
        result: flower.Result = strategy.start(self.grid, arrays(), num_rounds=rounds, **chosen)
        return result


@pytest.fixture
def world(small_world: World) -> Iterator[World]:
    yield small_world


async def test_an_unmodified_server_app_trains_a_fleet_by_torchs_own_names(world: World) -> None:
    devices = fleet_of(world, 5)
    await world.begin(driven())
    await calling(*devices)
    app = ServerApp()
    results: list[flower.Result] = []

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = flower.FedAvg(min_available_nodes=5, weighted_by_key="num-examples")
        rounds = int(context.run_config["num-server-rounds"])
        results.append(strategy.start(grid, arrays(prefix=2), num_rounds=rounds))

    port = CoordinatorPort(world.coordinator, TASK, asyncio.get_running_loop())
    program = Program(app, TASK, {"num-server-rounds": 4})
    await while_they_visit(world, devices, lambda: program.run(port))
    assert accuracy(learnt(results[0], "p_"), devices) > accuracy(START, devices) + 0.2
    kinds = [plan.kind for plan in devices[0].plans]
    assert kinds == [Kind.TRAIN, Kind.EVALUATE] * 4
    assert {plan.batch_size for plan in devices[0].plans} == {32}


@pytest.mark.slow
async def test_krum_keeps_learning_where_devices_lie(world: World) -> None:
    devices = fleet_of(world, 5, liars=1)
    await world.begin(driven())
    await calling(*devices)
    bench = Bench(world)

    def run(strategy: Any) -> flower.Result:
        return bench.start(strategy, 3, train_config=ConfigRecord({"lr": 0.1}))

    krum = flower.Krum(num_malicious_nodes=1, min_available_nodes=5, fraction_evaluate=0.0)
    robust = await while_they_visit(world, devices, lambda: run(krum))
    mean = flower.FedAvg(min_available_nodes=5, fraction_evaluate=0.0)
    poisoned = await while_they_visit(world, devices, lambda: run(mean))
    assert accuracy(learnt(robust), devices[:-1]) > accuracy(learnt(poisoned), devices[:-1]) + 0.1
    assert devices[0].plans[0].hyperparameters["lr"] == 0.1


async def test_fedavg_over_the_grid_gives_what_the_coordinators_own_round_gives(world: World) -> None:
    devices = world.enrol("a", "b", "c")
    await world.begin(driven(goal=3, rounds=1))
    await calling(*devices)
    bench, strategy = Bench(world), flower.FedAvg(min_available_nodes=3, fraction_evaluate=0.0)
    result = await while_they_visit(world, devices, lambda: bench.start(strategy, 1))
    world.coordinator.operations.stop_task(TASK, OPERATOR)
    deltas = [device.drawn(TASK, 1).delta for device in devices]
    mean = (deltas[0] + deltas[1] + deltas[2]).scaled(1 / 3)
    for name, array in (START + mean).arrays.items():
        np.testing.assert_allclose(learnt(result)[name], array, atol=1e-6)


async def test_single_updates_reach_the_program_and_nothing_becomes_a_version(world: World) -> None:
    devices = world.enrol("a", "b", "c")
    await world.begin(driven())
    running = asyncio.create_task(world.coordinator.run_cohort(TASK, order(*devices, weights=START.scaled(0.5))))
    await asyncio.sleep(0)
    assert await together(*devices) == [True, True, True]
    await world.coordinator.tick()
    answers = dict(await running)
    assert set(answers) == {device.id for device in devices}
    for device in devices:
        assert answers[device.id].delta == device.drawn(TASK, 1).delta
    operations = world.coordinator.operations
    assert operations.round(TASK, 1).state is RoundState.COMPLETED
    assert operations.round(TASK, 1).version is None
    handed_out, first = operations.versions(MODEL)
    assert (handed_out.state, first.state) == (VersionState.CANDIDATE, VersionState.ACCEPTED)
    assert {release.channel for release in operations.releases(MODEL) if release.version == first.number} == {TRAINING}
    assert world.weights() == START
    with pytest.raises(WrongState):
        operations.publish(MODEL, handed_out.number, "stable", OPERATOR)
    assert list(world.blobs.spool.iterdir()) == []


async def test_the_same_weights_are_handed_out_as_one_version(world: World) -> None:
    devices = world.enrol("a", "b")
    await world.begin(driven(goal=2))
    for weights, kind in ((START, "train"), (START.scaled(2.0), "evaluate"), (START.scaled(2.0), "train")):
        asked = order(*devices, weights=weights, kind=Kind(kind))
        running = asyncio.create_task(world.coordinator.run_cohort(TASK, asked))
        await asyncio.sleep(0)
        await together(*devices)
        await world.coordinator.tick()
        assert len(await running) == 2
    assert [version.number for version in world.coordinator.operations.versions(MODEL)] == [2, 1]


async def test_only_the_devices_that_were_asked_take_part(world: World) -> None:
    asked, other = world.enrol("a", "b")
    await world.begin(driven(minimum=1))
    running = asyncio.create_task(world.coordinator.run_cohort(TASK, order(asked)))
    await asyncio.sleep(0)
    assert isinstance((await other.check_in()).reply, Retry)
    assert await asked.visit()
    await world.coordinator.tick()
    assert [device for device, _ in await running] == [asked.id]


async def test_goal_minimum_and_deadline_hold_as_ever(world: World) -> None:
    devices = world.enrol("a", "b", "c")
    await world.begin(driven(goal=2, minimum=2, over_selection=1.5))
    running = asyncio.create_task(world.coordinator.run_cohort(TASK, order(*devices)))
    await asyncio.sleep(0)
    late = devices[2].report(await devices[2].assignment())
    await together(*devices[:2])
    with pytest.raises(RoundClosed):
        await devices[2].send(late)
    await world.coordinator.tick()
    assert len(await running) == 2
    too_few = asyncio.create_task(world.coordinator.run_cohort(TASK, order(*devices), 50.0))
    await asyncio.sleep(0)
    assert await devices[0].visit()
    world.clock.instant += 51
    await world.coordinator.tick()
    assert await too_few == []
    assert world.coordinator.operations.round(TASK, 2).state is RoundState.ABANDONED


async def test_one_bad_report_is_left_out(world: World) -> None:
    devices = world.enrol("a", "b", "c")
    await world.begin(driven(goal=3))
    running = asyncio.create_task(world.coordinator.run_cohort(TASK, order(*devices)))
    await asyncio.sleep(0)
    assignment = await devices[0].assignment()
    with pytest.raises(BadInput):
        await devices[0].send(devices[0].report(assignment, b"\x0a\x04" + bytes(4)))
    await together(*devices[1:])
    world.clock.instant += 101
    await world.coordinator.tick()
    assert {device for device, _ in await running} == {device.id for device in devices[1:]}


@pytest.mark.parametrize("reported", [1, 2])
async def test_after_a_restart_an_order_is_ended_and_never_becomes_a_version(world: World, reported: int) -> None:
    devices = world.enrol("a", "b")
    await world.begin(driven(goal=2))
    lost = asyncio.create_task(world.coordinator.run_cohort(TASK, order(*devices, weights=START.scaled(0.5))))
    await asyncio.sleep(0)
    await together(*devices[:reported])
    world.restart()
    assert isinstance((await devices[1].check_in()).reply, Retry)
    await world.coordinator.tick()
    found = world.coordinator.operations.round(TASK, 1)
    assert found.state is (RoundState.ABANDONED if reported == 1 else RoundState.FAILED)
    assert "gone" in found.reason
    assert world.weights() == START
    assert len(world.coordinator.operations.rounds()) == 1
    lost.cancel()
    running = asyncio.create_task(world.coordinator.run_cohort(TASK, order(*devices)))
    await asyncio.sleep(0)
    assert await together(*devices) == [True, True]
    await world.coordinator.tick()
    assert len(await running) == 2


async def test_a_program_that_gives_up_frees_the_devices_for_the_next(world: World) -> None:
    devices = world.enrol("a", "b")
    await world.begin(driven(goal=2))
    first = asyncio.create_task(world.coordinator.run_cohort(TASK, order(*devices)))
    await asyncio.sleep(0)
    assert isinstance((await devices[0].check_in()).reply, Assignment)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    second = asyncio.create_task(world.coordinator.run_cohort(TASK, order(*devices)))
    await asyncio.sleep(0)
    assert world.coordinator.operations.round(TASK, 1).state is RoundState.ABANDONED
    assert await together(*devices) == [True, True]
    await world.coordinator.tick()
    assert len(await second) == 2


async def test_a_report_that_is_added_up_as_its_rounds_time_ends_reaches_the_program(world: World) -> None:
    ending = world.pass_time_while_adding(101.0)
    devices = world.enrol("a", "b", "c")
    await world.begin(driven(goal=3))
    running = asyncio.create_task(world.coordinator.run_cohort(TASK, order(*devices), 100.0))
    await asyncio.sleep(0)
    for device, assigned in [(device, await device.assignment()) for device in devices[:2]]:
        await device.send(device.report(assigned))
    await ending[0]
    assert len(await running) == 2


async def test_a_program_that_begins_while_the_one_before_is_handed_its_round_waits_for_that(world: World) -> None:
    hold, held = asyncio.Event(), asyncio.Event()

    async def slowly(function: Callable[..., Any], *arguments: Any) -> Any:
        if function.__name__ == "collect" and not held.is_set():
            held.set()
            await hold.wait()
        return await inline(function, *arguments)

    world.offload = slowly
    world.restart()
    devices = world.enrol("a", "b")
    await world.begin(driven(goal=2))
    first = asyncio.create_task(world.coordinator.run_cohort(TASK, order(*devices)))
    await asyncio.sleep(0)
    await together(*devices)
    ending = asyncio.create_task(world.coordinator.tick())
    await held.wait()
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    second = asyncio.create_task(world.coordinator.run_cohort(TASK, order(*devices)))
    await asyncio.sleep(0)
    hold.set()
    await ending
    assert await together(*devices) == [True, True]
    await world.coordinator.tick()
    assert len(await second) == 2


async def test_orders_stand_in_line(world: World) -> None:
    devices = world.enrol("a", "b")
    await world.begin(driven(goal=2))
    asked = [asyncio.create_task(world.coordinator.run_cohort(TASK, order(*devices))) for _ in range(2)]
    for _ in asked:
        await asyncio.sleep(0)
        assert len([one for one in world.coordinator.operations.rounds() if one.ended_at is None]) == 1
        await together(*devices)
        await world.coordinator.tick()
        await asyncio.sleep(0)
    assert [len(await one) for one in asked] == [2, 2]


async def test_stopping_the_task_tells_the_program(world: World) -> None:
    devices = world.enrol("a", "b")
    await world.begin(driven())
    running = asyncio.create_task(world.coordinator.run_cohort(TASK, order(*devices)))
    await asyncio.sleep(0)
    world.coordinator.operations.stop_task(TASK, OPERATOR)
    await world.coordinator.tick()
    with pytest.raises(WrongState, match="stopped"):
        await running
    with pytest.raises(WrongState, match="done"):
        await world.coordinator.run_cohort(TASK, order(*devices))


async def test_what_cannot_be_asked_is_refused_and_opens_no_round(world: World) -> None:
    devices = world.enrol("a", "b")
    await world.begin(driven())
    small = Weights({"p_head.bias": np.zeros(7, np.float32)})
    nobody = CohortOrder(Plan(), START, (DeviceId("0" * 32),), 1)
    for asked, error in (
        (order(*devices, weights=small), WeightsMismatch),
        (order(*devices, hyperparameters={"momentum": 0.9}), BadInput),
        (nobody, OutOfBounds),
    ):
        with pytest.raises(error):
            await world.coordinator.run_cohort(TASK, asked)
    with pytest.raises(OutOfBounds):
        await world.coordinator.run_cohort(TASK, order(*devices), 0.0)
    with pytest.raises(NotFound):
        await world.coordinator.run_cohort("other", order(*devices))
    assert world.coordinator.operations.rounds() == []
    assert len(world.coordinator.operations.versions(MODEL)) == 1


async def test_a_task_of_private_updates_gives_none_to_a_program(world: World) -> None:
    devices = world.enrol("a", "b")
    await world.begin(own_task())
    with pytest.raises(WrongState, match="driven"):
        await world.coordinator.run_cohort(TASK, order(*devices))
    with pytest.raises(BadInput, match="not private"):
        own_task(driven=True, updates_private=True)
    with pytest.raises(Conflict):
        world.coordinator.operations.create_task(driven(), OPERATOR)


async def test_a_program_whose_coordinator_stops_is_let_go(world: World) -> None:
    devices = world.enrol("a", "b")
    await world.begin(driven())
    await calling(*devices)
    port = CoordinatorPort(world.coordinator, TASK, asyncio.get_running_loop())
    opened = asyncio.ensure_future(anext(world.coordinator.subscribe()))
    await asyncio.sleep(0)
    running = asyncio.create_task(asyncio.to_thread(port.run, order(*devices), None))
    assert (await opened).kind == "round.open"
    port.close()
    with pytest.raises(WrongState, match="run it again"):
        await running
    with pytest.raises(WrongState):
        port.device_ids()


async def test_a_program_that_asks_while_its_coordinator_stops_is_let_go_too(world: World) -> None:
    await world.begin(driven())
    busy = asyncio.new_event_loop()  # and answers nobody any more
    port = CoordinatorPort(world.coordinator, TASK, busy)
    told = queue.SimpleQueue[object]()

    def ask() -> None:
        try:
            crossed(port, asyncio, "run_coroutine_threadsafe", port.device_ids, port.close)
        except WrongState as error:
            told.put(error)

    threading.Thread(target=ask, daemon=True).start()
    assert "run it again" in str(await asyncio.to_thread(told.get, timeout=20))
    await asyncio.to_thread(busy.run_until_complete, asyncio.sleep(0))
    busy.close()


@pytest.mark.parametrize(
    ("name", "error"),
    [("no-colon", BadInput), ("json:loads", BadInput), ("json:nothing", NotFound), ("nowhere_at_all:app", NotFound)],
)
def test_what_is_no_server_app_is_refused(name: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        load_app(name)


async def test_a_denied_device_and_one_that_never_called_are_not_offered(world: World) -> None:
    called, silent = world.enrol("a", "b")
    await world.begin(driven(minimum=1))
    await calling(called)
    assert world.coordinator.devices_of(TASK) == [called.id]
    assert silent.id not in world.coordinator.devices_of(TASK)
