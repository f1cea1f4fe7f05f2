"""The time of an answer is compared fairly: in turns, and not at all where it can't be measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.client.recordings import recordings
from umbel.bundle import Bundle
from umbel.runtime.onnx import OnnxRuntime
from umbel_client.examples import NONE, Examples
from umbel_client.latency import latency_ratio
from umbel_models.zoo import bundle_path

BUNDLE = Bundle.open(bundle_path("smartwatch"))


@dataclass
class Ticking:
    """A clock that each answer moves on, by as much as its bundle takes."""

    instant: float = 0.0

    def now(self) -> float:
        return self.instant


@dataclass
class Slow:
    """A runtime whose answers take one and three seconds, the first bundle's longer."""

    clock: Ticking
    made: int = 0

    def infer(self, bundle: Bundle, weights: Any) -> Any:
        self.made += 1
        seconds = 3.0 if self.made == 1 else 1.0

        def answer(inputs: Any) -> dict[str, np.ndarray]:
            self.clock.instant += seconds
            return {}

        return answer


def examples() -> Examples:
    inputs, targets = recordings(5)
    return Examples({BUNDLE.manifest.inputs[0].name: inputs}, {BUNDLE.manifest.targets[0].name: targets}, 5)


def test_a_release_that_takes_three_times_as_long_is_told_as_that() -> None:
    clock = Ticking()
    assert latency_ratio(BUNDLE, BUNDLE, examples(), Slow(clock), clock) == 3.0  # type: ignore[arg-type]


def test_nothing_is_claimed_where_time_stands_still_or_there_are_no_examples() -> None:
    clock = Ticking()
    assert latency_ratio(BUNDLE, BUNDLE, examples(), OnnxRuntime(), clock) is None
    assert latency_ratio(BUNDLE, BUNDLE, NONE, OnnxRuntime(), clock) is None
