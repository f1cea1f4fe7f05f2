"""Training on resident ONNX Runtime sessions, one for each worker.

    examples --take--> one buffer of many batches --run--> weights after all of them

A session is single-threaded and its `run` lets Python's lock go, so workers in a pool of threads keep every core
busy; nothing is pickled and no process is started. Weights go in by reference and come out into buffers that each
worker keeps from client to client. Sessions share the frozen weights, and nothing that has a lock: on one session
for all, two workers spend a quarter of their time at the lock of its arena.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from umbel.bundle import Bundle
from umbel.manifest import ACCUMULATE, TensorSpec
from umbel.plan import Plan
from umbel.randomness import SEED
from umbel.runtime.onnx import OnnxRuntime, failures_of
from umbel.runtime.signature import (
    BatchCheck,
    check_batch,
    frozen_weights,
    require_finite_loss,
    resolve_hyperparameters,
    starting_slots,
)
from umbel.update import Metrics
from umbel.weights import Shapes, Weights
from umbel_client.examples import Examples
from umbel_client.trainer import Gathering, Job, evaluate
from umbel_simulations.cohort.clients import Orders, Start, Trained, runs
from umbel_simulations.cohort.graphs import DRIFT_PREFIX, LAST_PREFIX, LOSSES, StepsGraph, over_steps

Array = NDArray[Any]

MOST_BYTES: Final = 16 << 20
"""How many bytes of examples go into one call, if that is more than one batch."""


class OnnxBackend:
    """Trains on ONNX Runtime; one of these serves a whole simulation.

    Args:
        bundle: where graphs and frozen weights come from.
        moving: the trainable weights that move; all of them unless given.
        with_drift: whether each `Start` has a drift.

    Raises:
        BundleInvalid, BadInput: see `over_steps`.
    """

    def __init__(self, bundle: Bundle, *, moving: Collection[str] | None = None, with_drift: bool = False) -> None:
        self.bundle = bundle
        self.graph = over_steps(bundle, moving=moving, with_drift=with_drift)
        self.what = f"the training graph of {bundle.manifest.model!r}"
        # Kept, as sessions only borrow them.
        self._frozen = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in frozen_weights(bundle).items()}
        self._judge = OnnxRuntime()

    def worker(self) -> OnnxWorker:
        """A worker for one thread; raises `RuntimeFailure` if ONNX Runtime can't load the graph."""
        with failures_of(self.what):
            options = _options()
            options.add_external_initializers(list(self._frozen), list(self._frozen.values()))
            session = ort.InferenceSession(self.graph.model, options, providers=["CPUExecutionProvider"])
        return OnnxWorker(self, session)

    def evaluate(self, weights: Weights, examples: Examples) -> Metrics:
        """Metric sums over examples; see `Backend`."""
        return evaluate(self.bundle, weights, examples, self._judge)


def _options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    # Unlike on a phone, memory is there to be kept.
    options.enable_cpu_mem_arena = options.enable_mem_pattern = True
    return options


class OnnxWorker:
    """Trains one client after the other, on a session and in buffers of its own."""

    def __init__(self, backend: OnnxBackend, session: ort.InferenceSession) -> None:
        manifest = backend.bundle.manifest
        self._backend = backend
        self._session = session
        self._graph: StepsGraph = backend.graph
        self._batched = _Batched(manifest.inputs), _Batched(manifest.targets)
        self._most = MOST_BYTES // max(1, sum(batched.bytes_each for batched in self._batched))
        self._checks = BatchCheck("input", manifest.inputs), BatchCheck("target", manifest.targets)
        shapes = manifest.shared_shapes | {spec.name: spec.fixed_shape for spec in manifest.slots}
        slots = [name for name in self._graph.state if name.startswith("s_")]
        # Two sets, as a run can't write where it reads; the shared weights of each stand in one array, for quick sums.
        self._vectors = [np.empty(sum(map(math.prod, manifest.shared_shapes.values())), np.float32) for _ in range(2)]
        self._ends = [
            {**_views(vector, manifest.shared_shapes), **{name: np.empty(shapes[name], np.float32) for name in slots}}
            for vector in self._vectors
        ]
        self._seed = np.zeros((), np.float32)
        self._accumulate = np.zeros((), np.float32)
        self._begun: tuple[Start, Plan] | None = None
        self._bindings: list[_Binding] = []

    def train(self, job: Job, start: Start, examples: Examples, orders: Orders = ()) -> Trained:
        """Run a job's plan from `start`; see `Worker`."""
        check_batch(*self._checks, examples.inputs, examples.targets)
        if self._begun is None or self._begun[0] is not start or self._begun[1] is not job.plan:
            self._begin(start, job.plan)
        taken, gathering = runs(job, examples.count, self._most, orders), None
        if SEED in self._graph.constants:
            # Bound once; each client draws its own dropout.
            self._seed[()] = job.hyperparameters(self._backend.bundle.manifest)[SEED]
        if ACCUMULATE in self._graph.constants:
            gathering = Gathering(job, self._backend.bundle.manifest, examples.count)
            taken = parted(taken, gathering.last)
        steps, seen, loss, end = 0, 0, 0.0, 0
        for rows, size in taken:
            if gathering is not None:
                self._accumulate[()] = gathering.left if steps >= gathering.last else gathering.each
            binding = self._bindings[end]
            count = len(rows) // size
            losses = binding.losses(count)
            self._batched[0].take(examples.inputs, rows, size, binding)
            self._batched[1].take(examples.targets, rows, size, binding)
            with failures_of(self._backend.what):
                self._session.run_with_iobinding(binding.native)
            # Python's sum is in double precision too, and quicker for so few.
            total = sum(losses.tolist())
            require_finite_loss(total, steps)
            loss += total * size
            steps, seen = steps + count, seen + len(rows)
            end = 2 if end == 1 else 1
        # Binding 1 reads the first set of ends and writes the second, so what it would read next is the result.
        return Trained(self._vectors[end - 1] if end else start.vector, steps, loss, seen)

    def _begin(self, start: Start, plan: Plan) -> None:
        """Bind what stays the same for all clients that start here: no copy, as nobody writes into it."""
        manifest = self._backend.bundle.manifest
        given: dict[str, Array] = {**start.weights.arrays, **starting_slots(manifest, start.weights, None)}
        constants: dict[str, Array] = dict(given)
        hyperparameters = resolve_hyperparameters(manifest, plan.hyperparameters)
        constants |= {name: np.array(value, np.float32) for name, value in hyperparameters.items()}
        constants |= {SEED: self._seed, ACCUMULATE: self._accumulate}
        constants = {name: constants[name] for name in self._graph.constants}
        constants |= {DRIFT_PREFIX + name: start.drift[name] for name in self._graph.drift}
        for vector in self._vectors:
            # What doesn't move, if anything, stands there from now on.
            vector[:] = start.vector
        first, second = self._ends
        ways = ((given, first), (first, second), (second, first))
        self._bindings = [_Binding(self._session, self._graph, constants, source, target) for source, target in ways]
        self._begun = start, plan


def parted(taken: Iterable[tuple[NDArray[np.intp], int]], at: int) -> Iterator[tuple[NDArray[np.intp], int]]:
    """The same batches, those before and after a number of batches apart."""
    done = 0
    for rows, size in taken:
        count = len(rows) // size
        if done < at < done + count:
            yield rows[: (at - done) * size], size
            yield rows[(at - done) * size :], size
        else:
            yield rows, size
        done += count


def _views(vector: NDArray[np.float32], shapes: Shapes) -> dict[str, Array]:
    """Writable views of the arrays that stand one after the other in `vector`."""
    views, start = {}, 0
    for name in sorted(shapes):
        size = math.prod(shapes[name])
        views[name] = vector[start : start + size].reshape(shapes[name])
        start += size
    return views


class _Binding:
    """One native binding: where a run reads and writes."""

    def __init__(
        self,
        session: ort.InferenceSession,
        graph: StepsGraph,
        constants: Mapping[str, Array],
        source: Mapping[str, Array],
        target: Mapping[str, Array],
    ) -> None:
        self.native = session.io_binding()
        self._bound: dict[str, Array] = {}
        self._losses = np.empty(0, np.float32)
        for name in graph.state:
            self.input(name, source[name])
            self.output(LAST_PREFIX + name, target[name])
        for name, array in constants.items():
            self.input(name, array)

    def input(self, name: str, array: Array) -> None:
        """Read from this array, unless that is so already."""
        if self._bound.get(name) is not array:
            self.native.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
            # Kept, as ONNX Runtime only borrows it.
            self._bound[name] = array

    def output(self, name: str, array: Array) -> None:
        """Write into this array."""
        self.native.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(array))
        self._bound[name] = array

    def losses(self, count: int) -> NDArray[np.float32]:
        """Where the losses of so many steps will stand."""
        if len(self._losses) != count:
            self._losses = np.empty(count, np.float32)
            self.output(LOSSES, self._losses)
        return self._losses


class _Batched:
    """Room for the batches of one run, kept from client to client."""

    def __init__(self, specs: tuple[TensorSpec, ...]) -> None:
        self._specs = specs
        self._rooms: dict[str, Array] = {}
        self._views: dict[tuple[str, int, int], tuple[Array, Array]] = {}
        tails = [int(np.prod([size for size in spec.shape[1:] if size])) for spec in specs]
        self.bytes_each = sum(tail * np.dtype(spec.dtype).itemsize for tail, spec in zip(tails, specs, strict=True))

    def take(self, arrays: Mapping[str, Array], rows: NDArray[np.intp], size: int, binding: _Binding) -> None:
        """Copy these rows, as batches of `size`, and bind them."""
        for spec in self._specs:
            flat, stacked = self._view(spec, len(rows), size)
            # "clip" because "raise" would go through one more copy; the rows are a permutation's.
            np.take(arrays[spec.name], rows, axis=0, out=flat, mode="clip")
            binding.input(spec.name, stacked)

    def _view(self, spec: TensorSpec, count: int, size: int) -> tuple[Array, Array]:
        key = spec.name, count, size
        if key not in self._views:
            tail = tuple(length for length in spec.shape[1:] if length is not None)
            room = self._rooms.get(spec.name)
            if room is None or len(room) < count:
                room = self._rooms[spec.name] = np.empty((count, *tail), spec.dtype)
                self._views = {kept: view for kept, view in self._views.items() if kept[0] != spec.name}
            flat = room[:count]
            self._views[key] = flat, flat.reshape(count // size, size, *tail)
        return self._views[key]
