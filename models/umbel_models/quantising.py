"""Fewer bits for answers, where that is measured to be faster and hardly less accurate; otherwise the reason why not.

Only `infer` is concerned: training and judging stay in float32, and so do the weights that travel. The graph in fewer
bits turns whatever weights it is opened with (`umbel_models.onnx.narrow`), and whoever opens it tries it against the
float32 graph first (`umbel.runtime.precision`). See `docs/decisions/0018-quantised-answers.md`.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from umbel.bundle import Bundle, file_refs, write_bundle
from umbel.errors import CannotCompile
from umbel.manifest import FLOAT32, Precision
from umbel.runtime import InferSession, Runtime
from umbel.runtime import onnx as onnx_runtime
from umbel.runtime.precision import largest_difference
from umbel_models.measure import in_turns
from umbel_models.onnx.narrow import KINDS, narrowed
from umbel_models.parity import to_numpy
from umbel_models.spec import ModelSpec

ROOM: Final = 3.0
"""How many times as far off as on the calibration examples answers may be with other weights or on other machines."""


@dataclass(frozen=True, slots=True)
class Quantise:
    """What is asked of a graph in fewer bits."""

    kinds: tuple[str, ...] = ("int8",)
    largest_drop: float = 0.01
    """Of accuracy (the share of `correct`); for models without that metric, of the loss, relatively."""
    least_gain: float = 1.1
    """Times as fast as float32, at each of the batch sizes."""
    batches: tuple[int, ...] = (1, 16)
    turns: int = 9

    def __post_init__(self) -> None:
        unknown = sorted(set(self.kinds) - set(KINDS))
        if unknown or not self.kinds:
            raise CannotCompile(f"can't quantise to {list(self.kinds)}; known are {', '.join(KINDS)}")
        if min(self.batches, default=0) < 1 or self.turns < 1:
            raise CannotCompile(f"batches are {list(self.batches)} and turns {self.turns}; give at least one of each")
        if not (math.isfinite(self.largest_drop) and math.isfinite(self.least_gain)):
            found = f"the largest drop is {self.largest_drop} and the least gain {self.least_gain}"
            raise CannotCompile(f"{found}; both must be numbers")


@dataclass(frozen=True, slots=True)
class Trial:
    """One kind as it was measured."""

    kind: str
    gains: Mapping[int, float]
    """Times as fast as float32, by batch size."""
    drop: float
    unit: str
    """What `drop` is a drop of."""
    examples: int
    off: float
    """The largest difference from float32 on the calibration examples, relatively."""

    def objection(self, wish: Quantise) -> str:
        """What speaks against it; nothing if it is as wished."""
        slowest = min(self.gains, key=lambda batch: self.gains[batch])
        if not self.gains[slowest] >= wish.least_gain:
            return (
                f"{self.kind} is {self.gains[slowest]:.2f} times as fast at a batch of {slowest}, "
                f"{wish.least_gain:g} is asked"
            )
        if not self.drop <= wish.largest_drop or not np.isfinite(self.off):
            return (
                f"{self.kind} loses {self.drop:.4f} of {self.unit} on {self.examples} examples, "
                f"{wish.largest_drop:g} is allowed"
            )
        return ""

    def precision(self) -> Precision:
        """What the manifest says of it when it is taken."""
        gains = ", ".join(f"{gain:.2f} times as fast at a batch of {batch}" for batch, gain in self.gains.items())
        reason = f"{gains}; loses {max(self.drop, 0.0):.4f} of {self.unit} on {self.examples} examples"
        return Precision(self.kind, reason, ROOM * self.off)


def quantise(spec: ModelSpec, bundle: Bundle, runtime: Runtime, wish: Quantise) -> tuple[Precision, bytes | None]:
    """Try the kinds that are wished for; the fastest that is good enough, with its graph, or why it stays float32.

    Args:
        spec: what the bundle was made from.
        bundle: has passed the gate, in float32.
        runtime: with one thread; what it is fast at is measured here, on this machine.
        wish: what is asked.
    """
    if runtime.name != onnx_runtime.NAME:
        return Precision(FLOAT32, f"graphs in fewer bits are made for {onnx_runtime.NAME} only"), None
    graph = bundle.graph_path(runtime.name, "infer").read_bytes()
    objections: list[str] = []
    good: list[tuple[Trial, bytes]] = []
    for kind in wish.kinds:
        data, layers = narrowed(graph, kind)
        if not layers:
            return Precision(FLOAT32, "no dense layer with weights of its own, and others gain nothing"), None
        trial = _trial(spec, bundle, runtime, wish, kind, data)
        objection = trial.objection(wish)
        if objection:
            objections.append(objection)
        else:
            good.append((trial, data))
    if not good:
        return Precision(FLOAT32, "; ".join(objections)), None
    best, data = max(good, key=lambda one: min(one[0].gains.values()))
    return best.precision(), data


def _trial(spec: ModelSpec, bundle: Bundle, runtime: Runtime, wish: Quantise, kind: str, data: bytes) -> Trial:
    sessions = {FLOAT32: runtime.infer(bundle, bundle.weights()), kind: _opened(bundle, runtime, data)}
    gains = {}
    for batch in wish.batches:
        given = to_numpy(spec.batch(batch)[0])
        works = {(name, "infer"): _work(session, given) for name, session in sessions.items()}
        times = in_turns(works, wish.turns, lambda turn: None)
        gains[batch] = times[FLOAT32, "infer"] / times[kind, "infer"]
    inputs, targets = spec.calibration or (spec.inputs, spec.targets)
    exact, narrow = (session(to_numpy(inputs)) for session in sessions.values())
    drop, unit = _drop(spec, exact, narrow, list(targets.values()))
    examples = len(next(iter(inputs.values())))
    return Trial(kind, gains, drop, unit, examples, largest_difference(narrow, exact))


def _work(session: InferSession, inputs: Mapping[str, NDArray[Any]]) -> Any:
    return lambda: session(inputs)


def _opened(bundle: Bundle, runtime: Runtime, data: bytes) -> InferSession:
    """A session of the graph in fewer bits, with the bundle's weights."""
    files = {file: path.read_bytes() for file, path in bundle.paths.items()}
    files[bundle.graph_file(runtime.name, "infer")] = data
    with tempfile.TemporaryDirectory(prefix="umbel-quantise-") as folder:
        draft = write_bundle(Path(folder), replace(bundle.manifest, files=file_refs(files)), files)
        return runtime.infer(draft, draft.weights())


def _drop(
    spec: ModelSpec, exact: Mapping[str, NDArray[Any]], narrow: Mapping[str, NDArray[Any]], targets: list[Tensor]
) -> tuple[float, str]:
    """How much worse the answers in fewer bits are, and in what."""
    outputs = [_returned(spec, answers) for answers in (exact, narrow)]
    try:
        if "correct" in spec.metrics:
            count = float(len(next(iter(exact.values())))) if spec.count is None else spec.count(outputs[0], *targets)
            right = [float(spec.metrics["correct"](output, *targets)) for output in outputs]
            if not right[0]:
                return math.inf, "the accuracy for all one can tell (float32 gets none right)"
            return (right[0] - right[1]) / max(float(count), 1.0), "the accuracy"
        losses = [float(spec.loss(output, *targets)) for output in outputs]
    except KeyError as missing:
        return math.inf, f"the quality for all one can tell ({missing} of what the module returns is no answer)"
    return (losses[1] - losses[0]) / max(abs(losses[0]), 1e-12), "the loss, relatively,"


def _returned(spec: ModelSpec, answers: Mapping[str, NDArray[Any]]) -> Any:
    """Answers as the module would have returned them."""
    tensors = {name: torch.from_numpy(answers[name]) for name in spec.outputs}
    with torch.no_grad():
        returned = spec.module.eval()(*spec.inputs.values())
    if isinstance(returned, Mapping):
        return tensors
    return tuple(tensors.values()) if isinstance(returned, (tuple, list)) else tensors[spec.outputs[0]]
