"""Sessions of ONNX Runtime for one thread, and arrays that they read and write where they stand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnxruntime as ort
from numpy.typing import NDArray

Array = NDArray[Any]


def session_of(model: bytes, frozen: Mapping[str, ort.OrtValue]) -> ort.InferenceSession:
    """A session for one thread; `frozen` weights are shared with others, and must be kept alive."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    # Unlike on a phone, memory is there to be kept.
    options.enable_cpu_mem_arena = options.enable_mem_pattern = True
    options.add_external_initializers(list(frozen), list(frozen.values()))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class Binding:
    """Where a run reads and writes; kept alive here, as ONNX Runtime only borrows it."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self.native = session.io_binding()
        self._bound: dict[str, Array] = {}

    def input(self, name: str, array: Array) -> None:
        """Read from this array, unless that is so already."""
        if self._bound.get(name) is not array:
            self.native.bind_cpu_input(name, array)
            self._bound[name] = array

    def output(self, name: str, array: Array) -> None:
        """Write into this array."""
        self.native.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(array))
        self._bound[name] = array
