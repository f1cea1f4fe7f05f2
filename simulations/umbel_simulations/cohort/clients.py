"""Who trains in a cohort, and what each has trained: the values that engines and back ends exchange."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from umbel.errors import NotFinite
from umbel.manifest import Manifest
from umbel.update import Metrics
from umbel.weights import Weights
from umbel_client.examples import Examples
from umbel_client.trainer import TRAIN_EXAMPLES, TRAIN_LOSS, Gathering, Job

Vector = NDArray[np.float32]
"""Shared weights, or what they moved, in one array as `Weights.to_vector` orders them."""


def clipped(delta: Vector, norm: float) -> Vector:
    """A delta no longer than this."""
    return Weights({"delta": delta}).clipped(norm)["delta"]


@dataclass(frozen=True, slots=True, eq=False)
class Start:
    """What clients of a round start from; workers bind it once for all of them."""

    weights: Weights
    """The shared weights."""
    drift: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    """What is taken off some weights after each step; see `over_steps`."""
    vector: Vector = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "vector", self.weights.to_vector())


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """One client's share of a round."""

    job: Job
    examples: Examples
    weight: float
    """With how much weight it counts."""
    rows: NDArray[np.intp]
    """The rows of all batches, one after the other."""
    begins: NDArray[np.int64]
    ends: NDArray[np.int64]
    """[steps, 1] Where in `rows` each batch begins and ends; the last one of an epoch may be smaller."""

    @classmethod
    def of(cls, job: Job, examples: Examples) -> Share:
        """What a device would make of this job, with one example or more: the same batches, the same weight."""
        plan, count = job.plan, examples.count
        begins, ends = _bounds(count, plan.batch_size, plan.epochs, plan.max_steps)
        last = int(ends[-1, 0])
        orders = [job.order(epoch, count) for epoch in range(math.ceil(last / count))]
        rows = orders[0] if len(orders) == 1 else np.concatenate(orders)
        weight = min(float(min(len(ends) * plan.batch_size, count)), plan.max_weight)
        return cls(job, examples, weight, rows[:last], begins, ends)

    def gathered(self, manifest: Manifest) -> NDArray[np.float32]:
        """[steps] Over how many batches each step gathers gradients: fewer where batches don't divide evenly."""
        gathering = Gathering(self.job, manifest, self.examples.count)
        return np.repeat(np.array([gathering.each, gathering.left], np.float32), [gathering.last, gathering.left])


@dataclass(frozen=True, slots=True)
class Count:
    """What one client's training came to beside its weights."""

    steps: int
    loss: float
    """Sum over the examples seen."""
    examples: int

    def metrics(self) -> Metrics:
        """What a report adds to the metrics of its base."""
        return {TRAIN_LOSS: self.loss, TRAIN_EXAMPLES: float(self.examples)}


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """What one client's training came to."""

    delta: Vector
    """New minus old."""
    count: Count


class Worker(Protocol):
    """Trains clients in one thread."""

    def train(self, shares: Sequence[Share], start: Start, *, weighed: bool = True) -> tuple[Vector, list[Count]]:
        """Train each of some clients from `start`, and add up how far they moved.

        Args:
            shares: who trains with what; at least one.
            start: where each of them starts.
            weighed: each times its weight.

        Returns:
            The sum of new minus old, in the order of `Weights.to_vector`, and what each client's training came to.

        Raises:
            NotFinite: a loss or the sum is NaN or infinite: at least one client has nothing to report.
            InputMismatch: the examples are not what the model takes.
            RuntimeFailure: the runtime gave up.
        """

    def train_each(self, shares: Sequence[Share], start: Start) -> Iterable[Trained | None]:
        """Train each of some clients from `start`; None for one whose training went to NaN or infinity.

        Raises:
            InputMismatch, RuntimeFailure: as `train`.
        """


def one_by_one(worker: Worker, shares: Sequence[Share], start: Start) -> Iterator[Trained | None]:
    """`train_each` of a worker that trains one client after the other."""
    for share in shares:
        try:
            delta, (count,) = worker.train([share], start, weighed=False)
        except NotFinite:
            yield None
        else:
            yield Trained(delta, count)


class Backend(Protocol):
    """Whatever can train and judge a model on many clients at a time."""

    together: int
    """How many clients a worker trains abreast, at most; 1 for one after the other."""

    def worker(self) -> Worker:
        """A worker for one thread."""

    def evaluate(self, weights: Weights, examples: Examples) -> Metrics:
        """Metric sums over examples; nothing over none. May be called from any thread."""


@lru_cache(maxsize=4096)
def _bounds(count: int, size: int, epochs: int, most: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Kept, as many clients have as many examples: what is bound already needn't be bound again."""
    within, before = np.arange(0, count, size), np.arange(epochs) * count
    begins = np.add.outer(before, within).reshape(-1, 1)
    ends = np.add.outer(before, np.minimum(within + size, count)).reshape(-1, 1)
    return begins[: most or None], ends[: most or None]
