"""Training in torch, for models that can't be lowered: the trainer of a device on torch as its runtime.

Torch is loaded when this module's `TorchBackend` is made, by `umbel_models`. Much slower than the resident session:
Python runs every step, and torch every operator.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from umbel.bundle import Bundle
from umbel.clock import SystemClock
from umbel.errors import NotFinite, RuntimeFailure
from umbel.update import Metrics
from umbel.weights import Weights
from umbel_client import trainer
from umbel_client.examples import Examples
from umbel_simulations.cohort.clients import Count, Share, Start, Trained, Vector, one_by_one
from umbel_simulations.cohort.graphs import require_no_memory, state_of
from umbel_simulations.judging import evaluate

if TYPE_CHECKING:
    from umbel_models.eager import EagerRuntime
    from umbel_models.spec import ModelSpec


class TorchBackend:
    """Trains in torch; one of these serves a whole simulation.

    Args:
        bundle: of the model, without graphs; see `umbel_models.eager.write_uncompiled`.
        spec: the model.
        moving: the trainable weights that move; all of them unless given.
        with_drift: whether each `Start` has a drift.

    Raises:
        BadInput: `moving` names no weight of the model, or the optimiser has a memory that a drift would bypass.
    """

    together = 1

    def __init__(
        self, bundle: Bundle, spec: ModelSpec, *, moving: Collection[str] | None = None, with_drift: bool = False
    ) -> None:
        from umbel_models.threads import stay_on_one_torch_thread

        state_of(bundle.manifest, moving)
        if with_drift:
            require_no_memory(bundle.manifest)
        # Workers are threads already, and sums over several threads would differ from run to run.
        stay_on_one_torch_thread()
        self.bundle, self._spec, self._moving = bundle, spec, moving
        self._own = threading.local()

    def worker(self) -> TorchWorker:
        """A worker for one thread, with a module of its own."""
        return TorchWorker(self.bundle, self._runtime())

    def evaluate(self, weights: Weights, examples: Examples) -> Metrics:
        """Metric sums over examples; see `Backend`."""
        if not hasattr(self._own, "runtime"):
            self._own.runtime = self._runtime()
        return evaluate(self.bundle, weights, examples, self._own.runtime)

    def _runtime(self) -> EagerRuntime:
        from umbel_models.eager import EagerRuntime

        return EagerRuntime(self._spec, self._moving)


class TorchWorker:
    """Trains one client after the other, as a device would if it had torch."""

    def __init__(self, bundle: Bundle, runtime: EagerRuntime) -> None:
        self._bundle, self._runtime = bundle, runtime

    def train(self, shares: Sequence[Share], start: Start, *, weighed: bool = True) -> tuple[Vector, list[Count]]:
        """Train some clients from `start`; see `Worker`."""
        self._runtime.drift = start.drift
        total, counts = np.zeros_like(start.vector), []
        for share in shares:
            done = self._trained(share, start)
            moved = (done.weights - start.weights).to_vector()
            np.add(total, moved * np.float32(share.weight if weighed else 1.0), out=total)
            counts.append(Count(done.steps, done.loss, done.examples))
        if not np.isfinite(total).all():
            raise NotFinite("a weight went to NaN or infinity; lower the learning rate")
        return total, counts

    def train_each(self, shares: Sequence[Share], start: Start) -> Iterable[Trained | None]:
        """Train each of some clients from `start`; see `Worker`."""
        return one_by_one(self, shares, start)

    def _trained(self, share: Share, start: Start) -> trainer.Progress:
        job, examples = share.job, share.examples
        try:
            return trainer.train(job, self._bundle, start.weights, examples, self._runtime, SystemClock())
        except RuntimeFailure as error:
            batches = f"{examples.count} examples in batches of {job.plan.batch_size}"
            raise RuntimeFailure(f"{job.device}, with {batches}: {error}") from error
