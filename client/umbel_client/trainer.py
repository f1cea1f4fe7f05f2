"""Run a plan on this device's examples: base weights in, an update out. No network, no clock of its own.

The work is done in one thread, step by step; `go_on` is asked before each step, so that the machine is given back
within a step of a condition falling away. What was done by then can go on later in the same round: with its weights
and the optimiser's slots, a resumed run equals an unbroken one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from umbel.bundle import Bundle
from umbel.clock import Clock
from umbel.errors import Interrupted, NotFinite, OutOfBounds
from umbel.manifest import ACCUMULATE, Manifest
from umbel.plan import Kind, Plan
from umbel.randomness import generator, with_seed
from umbel.runtime import Runtime
from umbel.update import Metrics, Update, add_metrics
from umbel.weights import Weights, require_finite
from umbel_client.examples import Examples, Split

EVALUATE_BATCH: Final = 32
TRAIN_LOSS: Final = "train_loss"
TRAIN_EXAMPLES: Final = "train_examples"
"""The two sums over training examples that a TRAIN report adds to the metrics of its base."""

GoOn = Callable[[], tuple[str, ...]]
"""What stands against working right now, in words; nothing if nothing does."""


def always() -> tuple[str, ...]:
    """Nothing ever stands against working."""
    return ()


@dataclass(frozen=True, slots=True)
class Progress:
    """A training run that was stopped on the way: where it stands, and what it has summed up."""

    steps: int
    weights: Weights
    slots: Weights
    loss: float
    examples: int
    seconds: float


class Stopped(Interrupted):
    """Training stopped within a step because a condition fell away; `progress` is kept for later."""

    def __init__(self, reasons: tuple[str, ...], progress: Progress) -> None:
        super().__init__("training stopped: " + "; ".join(reasons))
        self.progress = progress


@dataclass(frozen=True, slots=True)
class Job:
    """One device's share of one round."""

    plan: Plan
    task: str
    round: int
    device: str

    def order(self, epoch: int, count: int) -> NDArray[np.intp]:
        """The order of the examples in one epoch: drawn anew for each, and the same whenever asked."""
        return generator(self.plan.seed, self.task, self.round, self.device, epoch).permutation(count)

    def hyperparameters(self, manifest: Manifest) -> dict[str, float]:
        """What the training graph is given: the plan's values, and this job's seed where the model has dropout."""
        plan = self.plan
        return with_seed(manifest, plan.hyperparameters, plan.seed, self.task, self.round, self.device)


def run(
    job: Job,
    bundle: Bundle,
    split: Split,
    runtime: Runtime,
    clock: Clock,
    go_on: GoOn = always,
    progress: Progress | None = None,
) -> Update:
    """Judge the base on held-back examples and, for a TRAIN plan, train it.

    Args:
        job: what to do.
        bundle: the base: where to start.
        split: this device's examples.
        runtime: runs the bundle's graphs.
        clock: tells when the plan's time is over.
        go_on: asked before each step.
        progress: where an earlier try stopped.

    Raises:
        OutOfBounds: fewer examples than the plan asks for, or hyper-parameters that the model doesn't have.
        Stopped: a condition fell away.
        NotFinite: the loss, the delta or a metric is NaN or infinite; nothing may be sent.
        RuntimeFailure: the runtime gave up.
    """
    base = bundle.shared_weights()
    metrics = evaluate(bundle, base, split.held_back, runtime)
    if job.plan.kind is Kind.EVALUATE:
        _require_enough(split.held_back.count, job.plan)
        return _checked(Update(Weights({}), min(float(split.held_back.count), job.plan.max_weight), metrics))
    training = newest(split.training, job.plan.max_examples)
    _require_enough(training.count, job.plan)
    done = train(job, bundle, base, training, runtime, clock, go_on, progress)
    delta = done.weights - base
    require_finite(delta)
    if job.plan.clip_norm:
        delta = delta.clipped(job.plan.clip_norm)
    used = min(done.steps * job.plan.batch_size, training.count)
    sums = {TRAIN_LOSS: done.loss, TRAIN_EXAMPLES: float(done.examples)}
    return _checked(Update(delta, min(float(used), job.plan.max_weight), add_metrics(metrics, sums)))


def train(
    job: Job,
    bundle: Bundle,
    base: Weights,
    examples: Examples,
    runtime: Runtime,
    clock: Clock,
    go_on: GoOn = always,
    progress: Progress | None = None,
) -> Progress:
    """Train from `base` as the plan says; arguments and errors as in `run`."""
    began = clock.now()
    now = progress or Progress(0, base, Weights({}), 0.0, 0, 0.0)
    gathering = Gathering(job, bundle.manifest, examples.count)
    session = runtime.train(bundle, now.weights, gathering.hyperparameters(now.steps), now.slots if progress else None)
    loss, seen, steps = now.loss, now.examples, now.steps

    def stand(slots: Weights) -> Progress:
        spent = now.seconds + clock.now() - began
        return Progress(steps, session.weights(), slots, loss, seen, spent)

    for rows in _batches(job, examples.count, skip=steps):
        over = job.plan.max_seconds and now.seconds + clock.now() - began >= job.plan.max_seconds
        if over and steps and gathering.is_between_steps(steps):
            break
        against = go_on()
        if against:
            raise Stopped(against, stand(session.slots()))
        if gathering.shrinks_at(steps):
            session = runtime.train(bundle, session.weights(), gathering.hyperparameters(steps), session.slots())
        batch = examples.take(rows)
        loss += session.step(batch.inputs, batch.targets) * batch.count
        seen += batch.count
        steps += 1
    return stand(Weights({}))  # where nothing is left to do, no slot is asked for: they may be as large as the model


class Gathering:
    """How many batches make one step of the optimiser, where a model gathers gradients over several.

    When a run's batches don't divide evenly, its last ones make a smaller step, so that none is lost.

    Args:
        job: what is done.
        manifest: says how many batches make a step, unless the job's plan does.
        count: how many examples there are.
    """

    def __init__(self, job: Job, manifest: Manifest, count: int) -> None:
        self._chosen = job.hyperparameters(manifest)
        self.each = math.floor({**manifest.hyperparameters, **self._chosen}.get(ACCUMULATE, 1.0) + 0.5)
        batches = job.plan.epochs * math.ceil(count / job.plan.batch_size)
        batches = min(batches, job.plan.max_steps or batches)
        self.left = batches % max(self.each, 1)
        self.last = batches - self.left

    def hyperparameters(self, batch: int) -> dict[str, float]:
        """What the training graph is given from this batch on."""
        left = {ACCUMULATE: float(self.left)} if self.left and batch >= self.last else {}
        return {**self._chosen, **left}

    def shrinks_at(self, batch: int) -> bool:
        """Whether the last, smaller step begins with this batch."""
        return bool(self.left) and batch == self.last

    def is_between_steps(self, batch: int) -> bool:
        """Whether nothing has been gathered before this batch."""
        return self.each <= 1 or batch % self.each == 0


def evaluate(
    bundle: Bundle, weights: Weights, examples: Examples, runtime: Runtime, *, at_once: int = EVALUATE_BATCH
) -> Metrics:
    """Metric sums over `examples`, so many at once; nothing over none."""
    sums: Metrics = {}
    if examples.count:
        session = runtime.evaluate(bundle, weights)
        for start in range(0, examples.count, at_once):
            batch = examples.take(slice(start, start + at_once))
            sums = add_metrics(sums, session(batch.inputs, batch.targets))
    return sums


def newest(examples: Examples, most: int) -> Examples:
    """Only the newest `most` examples; 0 means all."""
    if not most or examples.count <= most:
        return examples
    return examples.take(slice(examples.count - most, None))


def _batches(job: Job, count: int, skip: int) -> Iterator[NDArray[np.intp]]:
    """The rows of each batch, epoch after epoch; the last batch of an epoch may be smaller."""
    step = 0
    for epoch in range(job.plan.epochs):
        order = job.order(epoch, count)
        for start in range(0, count, job.plan.batch_size):
            if job.plan.max_steps and step >= job.plan.max_steps:
                return
            if step >= skip:
                yield order[start : start + job.plan.batch_size]
            step += 1


def _require_enough(count: int, plan: Plan) -> None:
    least = max(plan.min_examples, 1)
    if count < least:
        raise OutOfBounds(f"{count} examples on this device, the plan asks for {least}")


def _checked(update: Update) -> Update:
    for metric, value in update.metrics.items():
        if not math.isfinite(value):
            raise NotFinite(f"metric {metric!r} came out as {value}; nothing is sent")
    return replace(update, metrics=dict(update.metrics))
