"""What every algorithm has in common: what it is given, and what one step of it gives back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

import numpy as np

from umbel.plan import Kind, Plan
from umbel.randomness import generator
from umbel.runtime.signature import resolve_hyperparameters
from umbel.weights import Weights
from umbel_server.task import Task
from umbel_simulations.cohort.clients import Backend, Vector
from umbel_simulations.cohort.pool import Pool
from umbel_simulations.cohort.rounds import Call, Report
from umbel_simulations.data import ClientData
from umbel_simulations.scenario import Scenario
from umbel_simulations.setting import Setting

_TAIL: Final = 1.96
"""Standard deviations between the median and the slowest 2.5 per cent."""


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """All that an algorithm is given: who trains what, by which means."""

    scenario: Scenario
    setting: Setting
    task: Task
    plan: Plan
    clients: tuple[ClientData, ...]
    """Those with as many examples as the plan asks for."""
    backend: Backend
    pool: Pool
    durations: dict[str, float] = field(default_factory=dict)
    """Virtual seconds of training by client, as far as they were asked for."""

    @classmethod
    def of(cls, scenario: Scenario, setting: Setting, backend: Backend, pool: Pool) -> Stage:
        """The stage of a scenario; raises `BadInput` for a strategy or a setting that the product refuses."""
        task = scenario.server_task()
        plan = task.plan_for(Kind.TRAIN)
        least = max(1, plan.min_examples)
        clients = tuple(client for client in setting.federation.clients if client.training.count >= least)
        return cls(scenario, setting, task, plan, clients, backend, pool)

    @property
    def hyperparameters(self) -> dict[str, float]:
        """What clients train with, all of it; raises `OutOfBounds` for what the model doesn't have."""
        return resolve_hyperparameters(self.setting.bundle.manifest, self.plan.hyperparameters)

    def call(self, number: int) -> Call:
        """What clients are asked in one round."""
        return Call(self.plan, self.task.name, number)

    def steps(self, client: ClientData) -> int:
        """How many steps a client takes in a round."""
        count = self.call(0).examples(client).count
        steps = math.ceil(count / self.plan.batch_size) * self.plan.epochs
        return min(steps, self.plan.max_steps or steps)

    def seconds(self, client: ClientData) -> float:
        """How long a client trains for a round, in virtual seconds: speeds are log-normal, as in a fleet."""
        found = self.durations.get(client.name)
        if found is None:
            found = self.durations[client.name] = self._seconds(client)
        return found

    def _seconds(self, client: ClientData) -> float:
        population = self.scenario.population
        decades = population.speed_decades / (2 * _TAIL) * generator(self.task.seed, "speed", client.name).normal()
        count, plan = self.call(0).examples(client).count, self.plan
        of_all = self.steps(client) / max(1, math.ceil(count / plan.batch_size) * plan.epochs)
        seen = of_all * count * plan.epochs
        return seen / (population.examples_per_second * float(10.0**decades))


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One step of an algorithm."""

    weights: Weights
    """The new model, or the old one if nothing came of it."""
    cohort: Sequence[ClientData]
    """Who was asked; one that was asked twice stands here twice."""
    reported: int
    silent: int = 0
    """Clients whose training went to NaN or infinity."""
    train_loss: float | None = None
    seconds: float = 0.0
    """Virtual seconds that it took."""
    verdict: str = "accepted"
    reason: str = ""


def stepped(
    stage: Stage, weights: Weights, cohort: Sequence[ClientData], found: Sequence[Report], total: Vector, seconds: float
) -> Step:
    """What some reports come to, where the server steps by their mean: nothing if they are too few or overflow.

    Args:
        stage: whose task and `server_lr` it is.
        weights: where the step begins.
        cohort: who was asked.
        found: who reported.
        total: what these moved, added up as the algorithm does.
        seconds: virtual seconds that it took.
    """
    nothing = Step(weights, cohort, len(found), len(cohort) - len(found), seconds=seconds)
    if len(found) < stage.task.minimum:
        reason = f"{len(found)} reports, the task asks for {stage.task.minimum}"
        return replace(nothing, verdict="abandoned", reason=reason)
    with np.errstate(over="ignore", invalid="ignore"):
        new = weights.to_vector() + np.float32(stage.scenario.algorithm.server_lr / len(found)) * total
    if not np.isfinite(new).all():
        return replace(nothing, verdict="refused", reason="the step leads to NaN or infinity")
    loss = sum(report.count.loss for report in found) / sum(report.count.examples for report in found)
    return replace(nothing, weights=Weights.from_vector(new, weights.shapes), train_loss=loss)


class Algorithm(Protocol):
    """What a server does with what its clients report."""

    def step(self, number: int, weights: Weights) -> Step:
        """Take one step from `weights`; `number` counts from 1."""

    def memory(self) -> bytes:
        """What it remembers from step to step."""

    def restore(self, memory: bytes) -> None:
        """Go on from what `memory` gave; raises `MalformedMessage` for anything else."""
