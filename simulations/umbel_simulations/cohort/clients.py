"""Who trains in a cohort, and what each has trained: the values that engines and back ends exchange."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from umbel.errors import NotFinite
from umbel.plan import Plan
from umbel.update import Metrics
from umbel.weights import Weights
from umbel_client.examples import Examples
from umbel_client.trainer import TRAIN_EXAMPLES, TRAIN_LOSS, Job


@dataclass(frozen=True, slots=True, eq=False)
class Start:
    """What clients of a round start from; workers bind it once for all of them."""

    weights: Weights
    """The shared weights."""
    drift: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    """What is taken off some weights after each step; see `over_steps`."""
    vector: NDArray[np.float32] = field(init=False)
    """The weights in one array, as `Weights.to_vector` orders them."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "vector", self.weights.to_vector())


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """Where a client's training ended."""

    vector: NDArray[np.float32]
    """All shared weights in one array; overwritten when the same worker trains its next client."""
    steps: int
    loss: float
    """Sum over the examples seen."""
    examples: int

    def metrics(self) -> Metrics:
        """What a report adds to the metrics of its base."""
        return {TRAIN_LOSS: self.loss, TRAIN_EXAMPLES: float(self.examples)}

    def weight(self, plan: Plan, count: int) -> float:
        """With how much weight a client with `count` examples counts, as a device reckons it."""
        return min(float(min(self.steps * plan.batch_size, count)), plan.max_weight)

    def delta(self, start: Start, plan: Plan) -> NDArray[np.float32]:
        """New minus old, clipped as the plan says, in an array of its own.

        Raises:
            NotFinite: it holds NaN or infinity; the client reports nothing.
        """
        delta = self.vector - start.vector
        if not np.isfinite(delta).all():
            raise NotFinite("training ended at weights that are NaN or infinite; lower the learning rate")
        if not plan.clip_norm:
            return delta
        return Weights({"delta": delta}).clipped(plan.clip_norm)["delta"].copy()


class Worker(Protocol):
    """Trains one client after the other, in one thread."""

    def train(self, job: Job, start: Start, examples: Examples) -> Trained:
        """Run a job's plan from `start`.

        Raises:
            NotFinite: a loss was NaN or infinite; the client reports nothing.
            InputMismatch: the examples are not what the model takes.
            RuntimeFailure: the runtime gave up.
        """


class Backend(Protocol):
    """Whatever can train and judge a model on many clients at a time."""

    def worker(self) -> Worker:
        """A worker for one thread."""

    def evaluate(self, weights: Weights, examples: Examples) -> Metrics:
        """Metric sums over examples; nothing over none. May be called from any thread."""


def runs(batches: Iterator[NDArray[np.intp]], most: int) -> Iterator[tuple[NDArray[np.intp], int]]:
    """Neighbouring batches of one size together: their rows in one array, and the size of a batch.

    Args:
        batches: the rows of each batch, as `umbel_client.trainer.batches` yields them.
        most: how many rows may be taken together, if more than one batch.
    """
    held: list[NDArray[np.intp]] = []
    for batch in batches:
        if held and (len(batch) != len(held[0]) or (len(held) + 1) * len(batch) > most):
            yield _joined(held)
            held = []
        held.append(batch)
    if held:
        yield _joined(held)


def _joined(batches: Sequence[NDArray[np.intp]]) -> tuple[NDArray[np.intp], int]:
    return (np.concatenate(batches) if len(batches) > 1 else batches[0]), len(batches[0])
