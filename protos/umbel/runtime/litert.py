"""The `Runtime` on stock LiteRT (TensorFlow Lite's interpreter): `pip install 'umbel[litert]'`.

Graphs leave the batch open; an interpreter is made ready for one batch size at a time, and again when that changes.
While it trains, the weights stay in its memory: after each step that went well, what it gave is copied over what it
took. For answering, weights are bound as constants (`binding.py`).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from ai_edge_litert.interpreter import Interpreter
from numpy.typing import NDArray

from umbel.errors import OutOfBounds, RuntimeFailure
from umbel.manifest import ANCHOR_PREFIX, NEXT_PREFIX
from umbel.runtime import Arrays
from umbel.runtime.binding import bind_constants
from umbel.runtime.signature import (
    BatchCheck,
    bind_weights,
    check_batch,
    require_finite_loss,
    resolve_hyperparameters,
    starting_slots,
)
from umbel.update import Metrics
from umbel.weights import Weights

if TYPE_CHECKING:
    from umbel.bundle import Bundle

NAME: Final = "litert"
_FAILURES: Final = (
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    MemoryError,
    struct.error,
)
"""What the interpreter throws, and what reading a damaged flatbuffer does."""


@contextmanager
def _failures_of(what: str) -> Iterator[None]:
    """Turn whatever LiteRT throws into one `RuntimeFailure` that says where."""
    try:
        yield
    except _FAILURES as error:
        raise RuntimeFailure(f"LiteRT failed on {what}: {error}") from error


class LiteRTRuntime:
    """Runs bundles on LiteRT's CPU interpreter.

    Args:
        threads: how many threads one run may use; results are bit-equal only between equal numbers.
    """

    def __init__(self, threads: int = 1) -> None:
        if threads < 1:
            raise OutOfBounds(f"threads is {threads}; it must be at least 1")
        self._threads = threads

    @property
    def name(self) -> str:
        """The key of this runtime's graphs in a manifest."""
        return NAME

    def infer(self, bundle: Bundle, weights: Weights) -> LiteRTInfer:
        """Bind weights as constants for answering."""
        return LiteRTInfer(bundle, weights, self._threads)

    def evaluate(self, bundle: Bundle, weights: Weights) -> LiteRTEvaluate:
        """Bind weights for judging."""
        return LiteRTEvaluate(bundle, weights, self._threads)

    def train(
        self,
        bundle: Bundle,
        weights: Weights,
        hyperparameters: Mapping[str, float] | None = None,
        slots: Weights | None = None,
    ) -> LiteRTTrain:
        """Start to train from these weights; see `Runtime.train`."""
        resolved = resolve_hyperparameters(bundle.manifest, hyperparameters)
        return LiteRTTrain(bundle, weights, resolved, slots, self._threads)


class _Tensors(dict[str, int]):
    """Where an interpreter has its inputs or outputs, by their names."""

    def __missing__(self, name: str) -> int:
        raise RuntimeFailure(
            f"a LiteRT graph has no tensor {name!r}, which the manifest speaks of; fetch the bundle again"
        )


class _Graph:
    """One signature in an interpreter of its own, ready for one batch size at a time.

    What doesn't change with the batch (weights, slots, hyper-parameters) is held here until the interpreter has
    memory for it, and again while it gets other memory.

    Before a batch larger than any before it, one more example is run for nothing. The pieces of a graph that XNNPACK
    works out share a workspace; when a later piece makes it grow, it may move, and earlier pieces go on using what was
    freed: LiteRT 2.3.0 then gives wrong numbers from the second run on, or not, as memory happens to lie. A workspace
    that has been large enough once doesn't move again.
    """

    def __init__(self, graph: bytes, held: Mapping[str, NDArray[Any]], threads: int, what: str) -> None:
        self._what = what
        self._held = dict(held)
        self._fixed = list(held)
        self._batch = 0
        self._largest = 0
        """The largest batch that was run."""
        with _failures_of(what):
            self._native = Interpreter(model_content=graph, num_threads=threads)
            self._inputs = _Tensors({entry["name"]: entry["index"] for entry in self._native.get_input_details()})
            self._outputs = _Tensors({entry["name"]: entry["index"] for entry in self._native.get_output_details()})

    def run(self, *batches: Arrays) -> None:
        """Run on a batch."""
        given = {name: array for arrays in batches for name, array in arrays.items()}
        size = _size(given)
        with _failures_of(self._what):
            if size > self._largest:
                self._invoke({name: np.concatenate([array, array[-1:]]) for name, array in given.items()})
                self._largest = size
            self._invoke(given)

    def output(self, name: str) -> NDArray[Any]:
        """A copy of what the last run gave."""
        array: NDArray[Any] = self._native.get_tensor(self._outputs[name])
        return array

    def advance(self, names: Sequence[str]) -> None:
        """Copy what the last run gave as `next_…` over what it took."""
        for name in names:
            given: Any = self._native.tensor(self._outputs[NEXT_PREFIX + name])()
            if isinstance(given, np.ndarray):
                np.copyto(self._native.tensor(self._inputs[name])(), given)
            else:
                self._native.set_tensor(self._inputs[name], given)  # a number, which comes as a copy
            del given  # the interpreter runs only when nobody looks into its memory

    def fixed(self, name: str) -> NDArray[Any]:
        """A copy of an input that doesn't change with the batch, as it is now."""
        found = self._native.get_tensor(self._inputs[name]) if self._batch else self._held[name]
        return np.array(found)

    def _invoke(self, given: Arrays) -> None:
        if _size(given) != self._batch:
            self._lay_out(given)
        for name, array in given.items():
            self._native.set_tensor(self._inputs[name], array)
        self._native.invoke()

    def _lay_out(self, given: Arrays) -> None:
        held = {name: self.fixed(name) for name in self._fixed}
        # Until all is in place, what is held counts.
        self._held, self._batch = held, 0
        for name, array in given.items():
            self._native.resize_tensor_input(self._inputs[name], array.shape, strict=True)
        self._native.allocate_tensors()
        for name, array in held.items():
            self._native.set_tensor(self._inputs[name], array)
        self._held, self._batch = {}, _size(given)


def _size(given: Arrays) -> int:
    return len(next(iter(given.values())))


def _graph(
    bundle: Bundle, signature: str, held: Mapping[str, NDArray[Any]], threads: int, weights: Arrays | None = None
) -> _Graph:
    what = f"the {signature!r} graph of {bundle.manifest.model!r}"
    data = bundle.graph_path(NAME, signature).read_bytes()
    if weights is not None:
        with _failures_of(what):
            data = bind_constants(data, weights)
    return _Graph(data, held, threads, what)


class LiteRTInfer:
    """A model whose weights are constants of its graph."""

    def __init__(self, bundle: Bundle, weights: Weights, threads: int) -> None:
        self._check = BatchCheck("input", bundle.manifest.inputs)
        self._names = [spec.name for spec in bundle.manifest.outputs]
        self._graph = _graph(bundle, "infer", {}, threads, bind_weights(bundle, weights))
        self._alone = Lock()
        """An interpreter has one place for what it is given: of two threads, one would get the other's answers."""

    def __call__(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """The model's outputs for a batch; see `InferSession`."""
        self._check(inputs)
        with self._alone:
            self._graph.run(inputs)
            return {name: self._graph.output(name) for name in self._names}


class LiteRTEvaluate:
    """A model whose weights are inputs, set once."""

    def __init__(self, bundle: Bundle, weights: Weights, threads: int) -> None:
        self._inputs = BatchCheck("input", bundle.manifest.inputs)
        self._targets = BatchCheck("target", bundle.manifest.targets)
        self._names = list(bundle.manifest.metrics)
        self._graph = _graph(bundle, "evaluate", bind_weights(bundle, weights), threads)

    def __call__(self, inputs: Arrays, targets: Arrays) -> Metrics:
        """Metric sums over the batch; see `EvaluateSession`."""
        check_batch(self._inputs, self._targets, inputs, targets)
        self._graph.run(inputs, targets)
        return {name: float(self._graph.output(name)) for name in self._names}


class LiteRTTrain:
    """Weights that move, in the interpreter's memory."""

    def __init__(
        self,
        bundle: Bundle,
        weights: Weights,
        hyperparameters: Mapping[str, float],
        slots: Weights | None,
        threads: int,
    ) -> None:
        manifest = bundle.manifest
        self._inputs = BatchCheck("input", manifest.inputs)
        self._targets = BatchCheck("target", manifest.targets)
        self._shared = list(manifest.shared_shapes)
        self._slots = [spec.name for spec in manifest.slots]
        self._steps = 0
        held: dict[str, NDArray[Any]] = bind_weights(bundle, weights) | starting_slots(manifest, weights, slots)
        self._moving = [n for n in (*self._shared, *self._slots) if not n.startswith(ANCHOR_PREFIX)]
        held |= {name: np.array(value, np.float32) for name, value in hyperparameters.items()}
        self._graph = _graph(bundle, "train", held, threads)

    def step(self, inputs: Arrays, targets: Arrays) -> float:
        """Take one optimiser step on a batch; see `TrainSession`."""
        check_batch(self._inputs, self._targets, inputs, targets)
        self._graph.run(inputs, targets)
        loss = float(self._graph.output("loss"))
        require_finite_loss(loss, self._steps)
        self._graph.advance(self._moving)
        self._steps += 1
        return loss

    def weights(self) -> Weights:
        """A copy of the shared weights as they are now."""
        return Weights({name: self._graph.fixed(name) for name in self._shared})

    def slots(self) -> Weights:
        """A copy of the optimiser's slots as they are now."""
        return Weights({name: self._graph.fixed(name) for name in self._slots})
