"""The `Runtime` on stock ONNX Runtime: inference, judging and training with the package everyone installs.

Sessions of `evaluate` and `train` take shared weights as inputs, so one native session per graph can serve many rounds.
Frozen weights, and all weights of `infer`, are constants, so that ONNX Runtime can fold and pre-pack them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as native

from umbel.digests import Digest, digest_of
from umbel.errors import OutOfBounds, RuntimeFailure
from umbel.manifest import ANCHOR_PREFIX, NEXT_PREFIX, WEIGHTS_FILE
from umbel.runtime import Arrays
from umbel.runtime.onnx_files import require_no_files
from umbel.runtime.signature import (
    BatchCheck,
    bind_weights,
    check_batch,
    frozen_weights,
    require_finite_loss,
    resolve_hyperparameters,
    shared_weights,
    starting_slots,
)
from umbel.update import Metrics
from umbel.weights import Weights

if TYPE_CHECKING:
    from umbel.bundle import Bundle

NAME: Final = "onnx"
_SMALL: Final = 4 << 20
"""Bytes of the weights of a model whose sessions are kept."""

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


class OnnxRuntime:
    """Runs bundles on ONNX Runtime's CPU provider.

    Args:
        threads: how many threads one run may use; results are bit-equal only between equal numbers.
        keep: how many native sessions of small models are kept for the next round, for judging and training. To make
            one takes milliseconds; one of a large model would hold the memory of a training step all day.
    """

    def __init__(self, threads: int = 1, keep: int = 4) -> None:
        if threads < 1 or keep < 1:
            raise OutOfBounds(f"threads is {threads} and keep is {keep}; both must be at least 1")
        self._threads = threads
        self._keep = keep
        self._kept: OrderedDict[tuple[Digest, ...], _Native] = OrderedDict()
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
        # The arena uses buffers again from step to step, which halves a step's time where freed memory goes back to the
        # system, for a megabyte or a few. A plan of memory for each batch size would cost more than it saves.
        options.enable_cpu_mem_arena = True
        options.enable_mem_pattern = False
        return options

    def _shared(self, bundle: Bundle, signature: str) -> _Native:
        frozen = frozen_weights(bundle)
        if bundle.manifest.files[WEIGHTS_FILE].size > _SMALL:
            return _Native(bundle, signature, frozen, self._options())
        digest = bundle.manifest.files[bundle.graph_file(NAME, signature)].digest
        key = (digest, digest_of(Weights(frozen).to_bytes())) if frozen else (digest,)
        with self._lock:
            session = self._kept.pop(key, None)
            if session is None:
                session = _Native(bundle, signature, frozen, self._options())
            self._kept[key] = session
            while len(self._kept) > self._keep:
                self._kept.popitem(last=False)
        return session


class _Native:
    """A native session, and the constants that it may go on reading from."""

    def __init__(
        self, bundle: Bundle, signature: str, constants: Mapping[str, NDArray[Any]], options: ort.SessionOptions
    ) -> None:
        self.what = f"the {signature!r} graph of {bundle.manifest.model!r}"
        self._constants = [ort.OrtValue.ortvalue_from_numpy(array) for array in constants.values()]
        path = bundle.graph_path(NAME, signature)
        require_no_files(path.read_bytes(), constants)
        with failures_of(self.what):
            options.add_external_initializers(list(constants), self._constants)
            self.session = ort.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"], enable_fallback=0
            )


class OnnxInfer:
    """A model whose weights are constants of its session."""

    def __init__(self, bundle: Bundle, weights: Weights, options: ort.SessionOptions) -> None:
        self._native = _Native(bundle, "infer", bind_weights(bundle, weights), options)
        self._session, self._what = self._native.session, self._native.what
        self._check = BatchCheck("input", bundle.manifest.inputs)
        self._names = [spec.name for spec in bundle.manifest.outputs]

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

    def __init__(self, bundle: Bundle, weights: Weights, native: _Native) -> None:
        self._native = native
        self._session, self._what = native.session, native.what
        self._weights = shared_weights(bundle, weights)
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
        native: _Native,
    ) -> None:
        manifest = bundle.manifest
        self._native = native
        self._session, self._what = native.session, native.what
        self._inputs = BatchCheck("input", manifest.inputs)
        self._targets = BatchCheck("target", manifest.targets)
        self._shared = list(manifest.shared_shapes)
        self._slots = [spec.name for spec in manifest.slots]
        self._steps = 0
        state: dict[str, NDArray[Any]] = {**shared_weights(bundle, weights), **starting_slots(manifest, weights, slots)}
        self._constants: dict[str, NDArray[Any]] = {
            n: array for n, array in state.items() if n.startswith(ANCHOR_PREFIX)
        }
        self._constants |= {name: np.array(value, np.float32) for name, value in hyperparameters.items()}
        moving = {name: array for name, array in state.items() if name not in self._constants}
        self._now = {name: np.array(array) for name, array in moving.items()}
        self._next = {name: np.empty_like(array) for name, array in self._now.items()}
        self._loss = np.zeros((), np.float32)
        with failures_of(self._what):
            self._forth: ort.IOBinding | None = self._binding(self._now, self._next)
        self._back: ort.IOBinding | None = None
        """Made for the second step, which many a device with few examples never takes."""
        self._is_lent = False
        """Whether somebody holds the set that is read next, who must never see it change."""

    def step(self, inputs: Arrays, targets: Arrays) -> float:
        """Take one optimiser step on a batch; see `TrainSession`."""
        check_batch(self._inputs, self._targets, inputs, targets)
        with failures_of(self._what):
            binding = self._forth = self._forth or self._binding(self._now, self._next)
            for name, array in (*inputs.items(), *targets.items()):
                binding.bind_cpu_input(name, array)
            self._session.run_with_iobinding(binding)
        loss = float(self._loss)
        require_finite_loss(loss, self._steps)
        self._now, self._next = self._next, self._now
        self._forth, self._back = self._back, self._forth
        if self._is_lent:
            self._next = {name: np.empty_like(array) for name, array in self._now.items()}
            self._forth, self._back, self._is_lent = None, None, False
        self._steps += 1
        return loss

    def weights(self) -> Weights:
        """The shared weights as they are now; nothing is copied unless a next step is taken."""
        self._is_lent = True
        return Weights({name: self._now[name] for name in self._shared})

    def slots(self) -> Weights:
        """The optimiser's slots as they are now; nothing is copied unless a next step is taken."""
        self._is_lent = True
        state = {**self._constants, **self._now}
        return Weights({name: state[name] for name in self._slots})

    def _binding(self, source: Mapping[str, NDArray[Any]], target: Mapping[str, NDArray[Any]]) -> ort.IOBinding:
        binding = self._session.io_binding()
        for name, array in (*source.items(), *self._constants.items()):
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        for name, array in (*target.items(), ("loss", self._loss)):
            output = name if name == "loss" else NEXT_PREFIX + name
            binding.bind_ortvalue_output(output, ort.OrtValue.ortvalue_from_numpy(array))
        return binding
