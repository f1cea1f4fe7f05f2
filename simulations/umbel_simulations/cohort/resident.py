"""Training on resident ONNX Runtime sessions, one for each worker.

    a client's examples --run--> the sum of what all clients have moved so far

So train models that have no form for many clients at a time (`abreast`), and clients with a drift of their own. A
session is single-threaded and its `run` lets Python's lock go, so workers in a pool of threads keep every core
busy; nothing is pickled and no process is started. Weights and examples go in by reference, and one call is all that
a client costs: with a small model, Python between two calls costs as much as the training, and two threads that want
Python at once wait for each other. Sessions share the frozen weights, and nothing that has a lock: on one session for
all, two workers spend a quarter of their time at the lock of its arena.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from umbel.bundle import Bundle
from umbel.errors import NotFinite
from umbel.plan import Plan
from umbel.randomness import SEED
from umbel.runtime.onnx import OnnxRuntime, failures_of
from umbel.runtime.signature import (
    BatchCheck,
    check_batch,
    frozen_weights,
    resolve_hyperparameters,
    starting_slots,
)
from umbel.update import Metrics
from umbel.weights import Shapes, Weights
from umbel_client.examples import Examples
from umbel_simulations.cohort import graphs
from umbel_simulations.cohort.abreast import TOGETHER, AbreastWorker
from umbel_simulations.cohort.binding import Array, Binding, session_of
from umbel_simulations.cohort.clients import Count, Share, Start, Trained, Vector, Worker, one_by_one
from umbel_simulations.cohort.dual_layer import Products
from umbel_simulations.cohort.step_graph import steps_of
from umbel_simulations.judging import evaluate


class OnnxBackend:
    """Trains on ONNX Runtime; one of these serves a whole simulation.

    Args:
        bundle: where graphs and frozen weights come from.
        moving: the trainable weights that move; all of them unless given.
        with_drift: whether each `Start` has a drift: such clients are trained one after the other.
        abreast: whether workers train many clients at a time, if the model has a form for that.

    Raises:
        BundleInvalid, BadInput: see `over_steps`.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        moving: Collection[str] | None = None,
        with_drift: bool = False,
        abreast: bool = True,
    ) -> None:
        self.bundle = bundle
        self.graph = graphs.over_steps(bundle, moving=moving, with_drift=with_drift)
        self._forms = steps_of(bundle, moving) if abreast and not with_drift else []
        self._products = Products()
        self.together = TOGETHER if self._forms else 1
        self.what = f"the training graph of {bundle.manifest.model!r}"
        # Kept, as sessions only borrow them.
        self._frozen = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in frozen_weights(bundle).items()}
        self._judge = OnnxRuntime()

    def worker(self) -> Worker:
        """A worker for one thread; raises `RuntimeFailure` if ONNX Runtime can't load the graph."""
        with failures_of(self.what):
            worker: Worker = OnnxWorker(self, session_of(self.graph.model, self._frozen))
            for form in reversed(self._forms):
                worker = AbreastWorker(self.bundle, form, self._frozen, self._products, worker)
            return worker

    def evaluate(self, weights: Weights, examples: Examples) -> Metrics:
        """Metric sums over examples; see `Backend`."""
        return evaluate(self.bundle, weights, examples, self._judge)


class OnnxWorker:
    """Trains one client after the other, on a session and in buffers of its own."""

    def __init__(self, backend: OnnxBackend, session: ort.InferenceSession) -> None:
        self._what, self._graph = backend.what, backend.graph
        self._manifest = manifest = backend.bundle.manifest
        self._session = session
        self._checks = BatchCheck("input", manifest.inputs), BatchCheck("target", manifest.targets)
        self._seed, self._weight, self._loss = np.zeros((), np.float32), np.zeros((), np.float32), np.zeros(1)
        size = sum(map(math.prod, manifest.shared_shapes.values()))
        zero, *self._sums = (np.zeros(size, np.float32) for _ in range(3))
        # Two sums, as a run can't write where it reads: from nothing to the first, and to and fro from there.
        ways = (zero, self._sums[0]), self._sums, self._sums[::-1]
        self._bindings = [self._binding(*way) for way in ways]
        self._begun: tuple[Start, Plan] | None = None

    def train(self, shares: Sequence[Share], start: Start, *, weighed: bool = True) -> tuple[Vector, list[Count]]:
        """Train some clients from `start`; see `Worker`."""
        plan = shares[0].job.plan
        if self._begun is None or self._begun[0] is not start or self._begun[1] is not plan:
            self._begin(start, plan)
        counts = []
        for at, share in enumerate(shares):
            self._weight[()] = share.weight if weighed else 1.0
            self._run(self._bindings[2 - at % 2 if at else 0], share)
            counts.append(Count(len(share.begins), self._loss.item(), len(share.rows)))
        total = self._sums[(len(shares) - 1) % 2].copy()
        if not (np.isfinite(total).all() and all(math.isfinite(count.loss) for count in counts)):
            raise NotFinite("a loss or a weight went to NaN or infinity; lower the learning rate")
        return total, counts

    def train_each(self, shares: Sequence[Share], start: Start) -> Iterable[Trained | None]:
        """Train each of some clients from `start`; see `Worker`."""
        return one_by_one(self, shares, start)

    def _binding(self, so_far: Vector, total: Vector) -> Binding:
        """A binding that adds to one sum and writes another."""
        binding, shapes = Binding(self._session), self._manifest.shared_shapes
        before, after = _views(so_far, shapes), _views(total, shapes)
        for name in self._graph.summed:
            binding.input(graphs.SO_FAR_PREFIX + name, before[name])
            binding.output(graphs.SUM_PREFIX + name, after[name])
        binding.input(graphs.WEIGHT, self._weight)
        binding.output(graphs.LOSS, self._loss)
        return binding

    def _begin(self, start: Start, plan: Plan) -> None:
        """Bind what stays the same for all clients that start here: no copy, as nobody writes into it."""
        manifest = self._manifest
        given: dict[str, Array] = {**start.weights.arrays, **starting_slots(manifest, start.weights, None)}
        hyperparameters = resolve_hyperparameters(manifest, plan.hyperparameters)
        given |= {name: np.array(value, np.float32) for name, value in hyperparameters.items()}
        given |= {graphs.DRIFT_PREFIX + name: drift for name, drift in start.drift.items()} | {SEED: self._seed}
        for binding in self._bindings:
            for name in (*self._graph.state, *self._graph.constants):
                binding.input(name, given[name])
        self._begun = start, plan

    def _run(self, binding: Binding, share: Share) -> None:
        """Train one client; its examples are read where they stand."""
        inputs, targets = share.examples.inputs, share.examples.targets
        check_batch(*self._checks, inputs, targets)
        for name, array in (*inputs.items(), *targets.items()):
            binding.input(name, np.ascontiguousarray(array))
        binding.input(graphs.ROWS, share.rows)
        binding.input(graphs.BEGINS, share.begins)
        binding.input(graphs.ENDS, share.ends)
        if SEED in self._graph.constants:
            # Bound once; each client draws its own dropout.
            self._seed[()] = share.job.hyperparameters(self._manifest)[SEED]
        if self._graph.gathers:
            binding.input(graphs.EACH_ACCUMULATE, share.gathered(self._manifest))
        with failures_of(f"{self._what}, for {share.job.device}"):
            self._session.run_with_iobinding(binding.native)


def _views(vector: NDArray[np.float32], shapes: Shapes) -> dict[str, Array]:
    """Writable views of the arrays that stand one after the other in `vector`."""
    views, start = {}, 0
    for name in sorted(shapes):
        size = math.prod(shapes[name])
        views[name] = vector[start : start + size].reshape(shapes[name])
        start += size
    return views
