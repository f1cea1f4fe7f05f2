"""The facts about a candidate, gathered by running it: what `validation.judge_candidate` then judges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from umbel.bundle import Bundle
from umbel.errors import MalformedMessage, ModelUnusable
from umbel.manifest import Manifest
from umbel.runtime import Runtime
from umbel.self_check import answer
from umbel.update import Metrics, add_metrics
from umbel.weights import Weights
from umbel_server.validation import CandidateFacts, Comparison

_BATCH: Final = 256


@dataclass(frozen=True, slots=True, eq=False)
class HeldOut:
    """The server's own examples, if it has any: inputs and targets by the manifest's names, batch first."""

    inputs: Mapping[str, NDArray[Any]]
    targets: Mapping[str, NDArray[Any]]

    @classmethod
    def from_bytes(cls, data: bytes, manifest: Manifest) -> HeldOut:
        """Read a safetensors blob that holds one array for each input and target.

        Raises:
            MalformedMessage: not such a blob, or arrays of different lengths.
        """
        try:
            arrays = safetensors.numpy.load(data)
        except (safetensors.SafetensorError, ValueError, KeyError) as error:
            raise MalformedMessage(f"held-out examples are not a safetensors file: {error}") from error
        inputs = [spec.name for spec in manifest.inputs]
        targets = [spec.name for spec in manifest.targets]
        if set(arrays) != {*inputs, *targets}:
            raise MalformedMessage(f"held-out examples hold {sorted(arrays)}, the model wants {inputs + targets}")
        if any(array.ndim == 0 for array in arrays.values()) or len({len(array) for array in arrays.values()}) != 1:
            raise MalformedMessage("the arrays of held-out examples must have the same first dimension")
        return cls({name: arrays[name] for name in inputs}, {name: arrays[name] for name in targets})

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def measure(self, bundle: Bundle, weights: Weights, runtime: Runtime) -> Metrics:
        """Metric sums of one set of weights over all examples."""
        session = runtime.evaluate(bundle, weights)
        total: Metrics = {}
        for start in range(0, len(self), _BATCH):
            part = slice(start, start + _BATCH)
            inputs = {name: array[part] for name, array in self.inputs.items()}
            targets = {name: array[part] for name, array in self.targets.items()}
            total = add_metrics(total, session(inputs, targets))
        return total


def examine(
    parent: Bundle,
    candidate: Weights,
    runtime: Runtime,
    *,
    recent_norms: tuple[float, ...] = (),
    held_out: HeldOut | None = None,
) -> CandidateFacts:
    """Run a candidate where its parent ran.

    Args:
        parent: the bundle of the version that the round started from.
        candidate: shared weights (trainable and buffers) of the same architecture.
        runtime: runs golden and held-out examples.
        recent_norms: of the task's accepted steps, newest last.
        held_out: the server's own examples, if it has any.
    """
    base = parent.shared_weights()
    finite = candidate.is_finite()
    facts = CandidateFacts(finite, (candidate - base).norm() if finite else float("inf"), recent_norms)
    if not finite:
        return facts
    try:
        answer(runtime.infer(parent, candidate), parent.golden().inputs)
        compared = None
        if held_out is not None:
            compared = Comparison(
                candidate=held_out.measure(parent, candidate, runtime), parent=held_out.measure(parent, base, runtime)
            )
    except ModelUnusable as error:
        return CandidateFacts(True, facts.step_norm, recent_norms, golden_failure=str(error) or type(error).__name__)
    return CandidateFacts(True, facts.step_norm, recent_norms, "", compared)
