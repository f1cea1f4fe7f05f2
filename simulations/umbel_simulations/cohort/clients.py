"""Who trains in a cohort, and what each has trained: the values that engines and back ends exchange."""

from __future__ import annotations

import math
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

Orders = Sequence[NDArray[np.intp]]
"""The order of a client's examples in each epoch."""


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
        vector, shapes = self.weights.to_vector(), self.weights.shapes
        object.__setattr__(self, "vector", vector)
        # Views of the same memory: what a run reads and what deltas are taken from is in the cache once, not twice.
        object.__setattr__(self, "weights", Weights.from_vector(vector, shapes))


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

    def delta(self, start: Start, plan: Plan, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """New minus old, clipped as the plan says, in an array of its own: `out`, if it is given.

        Raises:
            NotFinite: it holds NaN or infinity; the client reports nothing.
        """
        delta = np.subtract(self.vector, start.vector, out=out)
        if not np.isfinite(delta).all():
            raise NotFinite("training ended at weights that are NaN or infinite; lower the learning rate")
        if plan.clip_norm:
            delta[:] = Weights({"delta": delta}).clipped(plan.clip_norm)["delta"]
        return delta


class Worker(Protocol):
    """Trains one client after the other, in one thread."""

    def train(self, job: Job, start: Start, examples: Examples, orders: Orders = ()) -> Trained:
        """Run a job's plan from `start`.

        Args:
            job: what to do.
            start: where to start.
            examples: what to train with.
            orders: `orders_of` this job, if it was worked out already.

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


def orders_of(job: Job, count: int) -> Orders:
    """The order of `count` examples in each epoch of a job, as a device draws it."""
    return [job.order(epoch, count) for epoch in range(job.plan.epochs)]


def runs(job: Job, count: int, most: int, orders: Orders = ()) -> Iterator[tuple[NDArray[np.intp], int]]:
    """The rows of a job's batches, as a device takes them, neighbours of one size together; and the size of a batch.

    Args:
        job: what to do.
        count: how many examples there are.
        most: how many rows may be taken together, if more than one batch.
        orders: `orders_of` this job, if it was worked out already.
    """
    size = job.plan.batch_size
    together = max(1, most // size) * size
    left = job.plan.max_steps * size or math.inf
    for epoch in range(job.plan.epochs):
        order = orders[epoch] if orders else job.order(epoch, count)
        if count > left:
            order = order[: int(left)]
        whole = len(order) - len(order) % size
        for at in range(0, whole, together):
            yield order[at : min(at + together, whole)], size
        if whole < len(order):
            yield order[whole:], len(order) - whole
        left -= math.ceil(len(order) / size) * size
        if left <= 0:
            return
