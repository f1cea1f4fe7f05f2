"""Devices that really train, next to a coordinator in the same process, and Flower programs that use them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tests.server.driving import BUNDLE, MODEL, POPULATION, RUNTIME, TASK, SimulatedDevice, World
from umbel.bundle import Bundle
from umbel.plan import Plan
from umbel.update import Update
from umbel.visit import Assignment
from umbel.weights import Weights
from umbel_client.examples import Examples, Split
from umbel_client.trainer import Job, run
from umbel_server.task import Task
from umbel_simulations.smartwatch import Wearer, Windows, load_wearers

T = TypeVar("T")


@dataclass
class TrainingDevice(SimulatedDevice):
    """Runs its assignment's plan, from its assignment's base, on one wearer's windows."""

    wearer: Wearer = field(kw_only=True)
    plans: list[Plan] = field(default_factory=list)

    def update(self, assignment: Assignment) -> Update:
        self.plans.append(assignment.plan)
        bundle: Bundle = self.world.coordinator.registry.bundle(self.world.base_of(assignment))
        job = Job(assignment.plan, assignment.task, assignment.round, self.name)
        split = Split(_examples(self.wearer.training), _examples(self.wearer.held_back))
        return run(job, bundle, split, RUNTIME, self.world.clock)


class LyingDevice(TrainingDevice):
    """Reports the opposite of what it has learnt, ten times over."""

    def update(self, assignment: Assignment) -> Update:
        honest = super().update(assignment)
        return Update(honest.delta.scaled(-10.0), honest.weight, honest.metrics)


def fleet_of(world: World, count: int, liars: int = 0) -> list[TrainingDevice]:
    """Enrolled devices of the first wearers; the last of them lie."""
    wearers = load_wearers()[:count]
    world.enrol(*(wearer.name for wearer in wearers))
    kinds = [TrainingDevice] * (count - liars) + [LyingDevice] * liars
    return [kind(world, wearer.name, POPULATION, wearer=wearer) for kind, wearer in zip(kinds, wearers, strict=True)]


def driven(**changes: Any) -> Task:
    """A task for a program."""
    plan = Plan(epochs=1, batch_size=32, hyperparameters={"lr": 0.05})
    values: dict[str, Any] = {"plan": plan, "goal": 8, "minimum": 2, "deadline_seconds": 100.0, "seed": 7} | changes
    return Task(TASK, POPULATION, MODEL, updates_private=False, driven=True, **values)


async def while_they_visit(world: World, devices: Sequence[SimulatedDevice], program: Callable[[], T]) -> T:
    """Run a program in a thread of its own, while devices come and go."""
    running = asyncio.create_task(asyncio.to_thread(program))
    while not running.done():
        for device in devices:
            await device.visit()
        await world.coordinator.tick()
        await asyncio.sleep(0.002)
    return running.result()


def accuracy(weights: Weights, devices: Sequence[TrainingDevice]) -> float:
    """On all devices' held-back windows."""
    judge = RUNTIME.evaluate(BUNDLE, weights)
    sums = [judge({"x": one.wearer.held_back.x}, {"y": one.wearer.held_back.y}) for one in devices]
    return sum(one["correct"] for one in sums) / sum(one["examples"] for one in sums)


def _examples(windows: Windows) -> Examples:
    return Examples({"x": windows.x}, {"y": windows.y}, len(windows))
