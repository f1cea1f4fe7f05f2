"""What `Predictor` adds to a bare call of its own native session: one window of a smartwatch, one answer."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from tests.benchmarks.harness import Table, seconds
from umbel.bundle import Bundle
from umbel.runtime.onnx import OnnxRuntime
from umbel_client.predictor import Predictor
from umbel_models.zoo import bundle_path
from umbel_simulations.smartwatch import load_wearers

CALLS, TURNS = 200, 60


def run() -> Table:
    bundle = Bundle.open(bundle_path("smartwatch"))
    predictor = Predictor(bundle, bundle.weights(), OnnxRuntime(), "benchmark")
    window = load_wearers()[0].held_back.x[:1]
    inputs = {"x": window}
    # The very session that the predictor runs, so that only the way to it is compared.
    native = predictor._session._session  # type: ignore[attr-defined]
    names = [spec.name for spec in bundle.manifest.outputs]
    ways: dict[str, Callable[[], object]] = {
        "bare session run": lambda: native.run(names, inputs),
        "predictor(x)": lambda: predictor(window),
        "predictor({'x': x})": lambda: predictor(inputs),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(TURNS):
        # In turns, so that whatever else the machine does falls on all alike.
        for name, call in ways.items():
            found[name].append(seconds(lambda call=call: [call() for _ in range(CALLS)]) / CALLS * 1e6)  # type: ignore[misc]
    rows = [(name, statistics.median(times), min(times)) for name, times in found.items()]
    bare = statistics.median(found["bare session run"])
    beyond = statistics.median(found["predictor(x)"]) - bare
    return Table(
        "One prediction on the device (smartwatch, batch of 1)",
        ("way", "median us", "best us"),
        rows,
        {"microseconds beyond the bare run": beyond, "share of the bare run": beyond / bare},
        {"microseconds beyond the bare run": ("<=", 15.0)},
    )
