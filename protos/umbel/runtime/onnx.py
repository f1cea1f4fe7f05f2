"""The `Runtime` on stock ONNX Runtime: inference, judging and training with the package everyone installs.

Sessions of `evaluate` and `train` take weights as inputs, so one native session per graph serves every round.
Those of `infer` take them as constants, so that ONNX Runtime can fold and pre-pack them once per version.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as native

from umbel.digests import Digest
from umbel.errors import OutOfBounds, RuntimeFailure
from umbel.manifest import ANCHOR_PREFIX, NEXT_PREFIX
from umbel.runtime import Arrays
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

NAME: Final = "onnx"

# ONNX Runtime's own exceptions share no base class of their own.
_FAILURES: Final[tuple[type[Exception], ...]] = (
    *(kind for kind in vars(native).values() if isinstance(kind, type) and issubclass(kind, Exception)),
    RuntimeError,
    ValueError,
    TypeError,
)


@contextmanager
def failures_of(what: str) -> Iterator[None]:
    """Turn whatever ONNX Runtime throws into one `RuntimeFailure` that says where."""
    try:
        yield
    except _FAILURES as error:
        raise RuntimeFailure(f"ONNX Runtime failed on {what}: {error}") from error


def _session(path: Path, options: ort.SessionOptions, what: str) -> ort.InferenceSession:
    with failures_of(what):
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"], enable_fallback=0)


def _label(bundle: Bundle, signature: str) -> str:
    return f"the {signature!r} graph of {bundle.manifest.model!r}"


class OnnxRuntime:
    """Runs bundles on ONNX Runtime's CPU provider.

    Args:
        threads: how many threads one run may use; results are bit-equal only between equal numbers.
        keep: how many native sessions for judging and training are kept for the next round.
    """

    def __init__(self, threads: int = 1, keep: int = 4) -> None:
        if threads < 1 or keep < 1:
            raise OutOfBounds(f"threads is {threads} and keep is {keep}; both must be at least 1")
        self._threads = threads
        self._keep = keep
        self._kept: OrderedDict[Digest, ort.InferenceSession] = OrderedDict()
        self._lock = Lock()

    @property
    def name(self) -> str:
        """The key of this runtime's graphs in a manifest."""
        return NAME

    def infer(self, bundle: Bundle, weights: Weights) -> OnnxInfer:
        """Bind weights as constants for answering."""
        return OnnxInfer(bundle, weights, self._options())

    def evaluate(self, bundle: Bundle, weights: Weights) -> OnnxEvaluate:
        """Bind weights for judging."""
        return OnnxEvaluate(bundle, weights, self._shared(bundle, "evaluate"))

    def train(
        self,
        bundle: Bundle,
        weights: Weights,
        hyperparameters: Mapping[str, float] | None = None,
        slots: Weights | None = None,
    ) -> OnnxTrain:
        """Start to train from these weights; see `Runtime.train`."""
        resolved = resolve_hyperparameters(bundle.manifest, hyperparameters)
        return OnnxTrain(bundle, weights, resolved, slots, self._shared(bundle, "train"))

    def _options(self) -> ort.SessionOptions:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        # The arena keeps the peak of the largest batch ever seen, the plan of memory one copy per batch size;
        # on a phone freed memory is worth more than the few per cent that they save.
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
        return options

    def _shared(self, bundle: Bundle, signature: str) -> ort.InferenceSession:
        path = bundle.graph_path(NAME, signature)
        digest = bundle.manifest.files[bundle.graph_file(NAME, signature)].digest
        with self._lock:
            session = self._kept.pop(digest, None)
            if session is None:
                session = _session(path, self._options(), _label(bundle, signature))
            self._kept[digest] = session
            while len(self._kept) > self._keep:
                self._kept.popitem(last=False)
        return session


class OnnxInfer:
    """A model whose weights are constants of its session."""

    def __init__(self, bundle: Bundle, weights: Weights, options: ort.SessionOptions) -> None:
        bound = bind_weights(bundle, weights)
        self._what = _label(bundle, "infer")
        self._check = BatchCheck("input", bundle.manifest.inputs)
        self._names = [spec.name for spec in bundle.manifest.outputs]
        # Kept for as long as the session: ONNX Runtime may go on reading from them.
        self._constants = [ort.OrtValue.ortvalue_from_numpy(array) for array in bound.values()]
        with failures_of(self._what):
            options.add_external_initializers(list(bound), self._constants)
        self._session = _session(bundle.graph_path(NAME, "infer"), options, self._what)

    def __call__(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """The model's outputs for a batch; see `InferSession`."""
        self._check(inputs)
        # Spelled out, not a context manager: this is the path that an app waits for.
        try:
            return dict(zip(self._names, self._session.run(self._names, inputs), strict=True))
        except _FAILURES as error:
            raise RuntimeFailure(f"ONNX Runtime failed on {self._what}: {error}") from error


class OnnxEvaluate:
    """A model whose weights are inputs of a session that others share."""

    def __init__(self, bundle: Bundle, weights: Weights, session: ort.InferenceSession) -> None:
        self._what = _label(bundle, "evaluate")
        self._session = session
        self._weights = bind_weights(bundle, weights)
        self._inputs = BatchCheck("input", bundle.manifest.inputs)
        self._targets = BatchCheck("target", bundle.manifest.targets)
        self._names = list(bundle.manifest.metrics)

    def __call__(self, inputs: Arrays, targets: Arrays) -> Metrics:
        """Metric sums over the batch; see `EvaluateSession`."""
        check_batch(self._inputs, self._targets, inputs, targets)
        with failures_of(self._what):
            values = self._session.run(self._names, {**self._weights, **inputs, **targets})
        return {name: float(value) for name, value in zip(self._names, values, strict=True)}


class OnnxTrain:
    """Weights that move between two sets of buffers, with a binding for each direction.

    A step reads one set and writes the other. The sets trade places only after a step that went well, so a step
    that fails leaves everything as it was.
    """

    def __init__(
        self,
        bundle: Bundle,
        weights: Weights,
        hyperparameters: Mapping[str, float],
        slots: Weights | None,
        session: ort.InferenceSession,
    ) -> None:
        manifest = bundle.manifest
        self._what = _label(bundle, "train")
        self._session = session
        self._inputs = BatchCheck("input", manifest.inputs)
        self._targets = BatchCheck("target", manifest.targets)
        self._shared = list(manifest.shared_shapes)
        self._slots = [spec.name for spec in manifest.slots]
        self._steps = 0
        bound = bind_weights(bundle, weights)
        state = {name: bound[name] for name in self._shared} | starting_slots(manifest, weights, slots)
        self._constants = {name: array for name, array in bound.items() if name not in state}
        self._constants |= {name: array for name, array in state.items() if name.startswith(ANCHOR_PREFIX)}
        self._constants |= {name: np.array(value, np.float32) for name, value in hyperparameters.items()}
        moving = {name: array for name, array in state.items() if name not in self._constants}
        self._now = {name: np.array(array) for name, array in moving.items()}
        self._next = {name: np.empty_like(array) for name, array in self._now.items()}
        self._loss = np.zeros((), np.float32)
        with failures_of(self._what):
            self._forth = self._binding(self._now, self._next)
            self._back = self._binding(self._next, self._now)

    def step(self, inputs: Arrays, targets: Arrays) -> float:
        """Take one optimiser step on a batch; see `TrainSession`."""
        check_batch(self._inputs, self._targets, inputs, targets)
        with failures_of(self._what):
            for name, array in (*inputs.items(), *targets.items()):
                self._forth.bind_cpu_input(name, array)
            self._session.run_with_iobinding(self._forth)
        loss = float(self._loss)
        require_finite_loss(loss, self._steps)
        self._now, self._next = self._next, self._now
        self._forth, self._back = self._back, self._forth
        self._steps += 1
        return loss

    def weights(self) -> Weights:
        """A copy of the shared weights as they are now."""
        return Weights({name: self._now[name].copy() for name in self._shared})

    def slots(self) -> Weights:
        """A copy of the optimiser's slots as they are now."""
        state = {**self._constants, **self._now}
        return Weights({name: np.array(state[name]) for name in self._slots})

    def _binding(self, source: Mapping[str, NDArray[Any]], target: Mapping[str, NDArray[Any]]) -> ort.IOBinding:
        binding = self._session.io_binding()
        for name, array in (*source.items(), *self._constants.items()):
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        for name, array in (*target.items(), ("loss", self._loss)):
            output = name if name == "loss" else NEXT_PREFIX + name
            binding.bind_ortvalue_output(output, ort.OrtValue.ortvalue_from_numpy(array))
        return binding
