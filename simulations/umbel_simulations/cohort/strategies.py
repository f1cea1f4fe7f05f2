"""Rounds under any of Flower's strategies: FedAvg, FedProx, FedAdam, FedYogi, the robust ones."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Final, Protocol

from umbel.errors import UmbelError
from umbel.weights import Weights
from umbel_server import flower
from umbel_server.flower.spec import needs_singles
from umbel_simulations.cohort.algorithm import Stage, Step
from umbel_simulations.cohort.clients import Start
from umbel_simulations.cohort.rounds import Call, Cohort, chosen, train
from umbel_simulations.data import ClientData

_COUNT_BYTES: Final = 8


class Trains(Protocol):
    """How a cohort gets trained: here, by a pool of threads, or elsewhere."""

    def __call__(self, cohort: Sequence[ClientData], call: Call, start: Start, *, wants_singles: bool) -> Cohort:
        """Train a cohort; the same sum whoever does it."""


class StrategyRounds:
    """Draw a cohort, train it, hand its sum (or its single updates) to the strategy.

    Args:
        stage: who there is.
        trains: how cohorts get trained; by the stage's pool unless given.
    """

    def __init__(self, stage: Stage, trains: Trains | None = None) -> None:
        self._stage = stage
        self._state = b""
        self._steps = 0
        self._trains = trains or partial(train, stage.pool)

    def step(self, number: int, weights: Weights) -> Step:
        """One round; see `Algorithm`."""
        stage, task = self._stage, self._stage.task
        cohort = chosen(stage.clients, task.goal, task.seed, task.name, number)
        wants_singles = needs_singles(task.strategy)
        found = self._trains(cohort, stage.call(number), Start(weights), wants_singles=wants_singles)
        # A round lasts as long as its slowest client.
        seconds = max(map(stage.seconds, cohort), default=0.0)
        verdict, reason = "accepted", ""
        if found.count < task.minimum:
            verdict, reason = "abandoned", f"{found.count} reports, the task asks for {task.minimum}"
        else:
            try:
                # As in the product, the strategy counts its steps: a round that came to nothing is none.
                collected, step = found.collected(), self._steps + 1
                weights, self._state = flower.apply(task.strategy, self._state, weights, collected, step)
                self._steps = step
            except UmbelError as error:
                verdict, reason = "refused", f"{error.code}: {error}"
        return Step(
            weights, cohort, found.count, found.silent, found.train_loss, seconds, verdict=verdict, reason=reason
        )

    def memory(self) -> bytes:
        """How many steps there were, and the strategy's state."""
        return self._steps.to_bytes(_COUNT_BYTES) + self._state

    def restore(self, memory: bytes) -> None:
        """Go on with a strategy's state."""
        self._steps, self._state = int.from_bytes(memory[:_COUNT_BYTES]), memory[_COUNT_BYTES:]
