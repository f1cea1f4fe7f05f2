"""Adding 50 updates of 10 million numbers: Umbel's sum, numpy's streaming sum, and Flower's FedAvg.

Each in a process of its own, the fastest of three. What is timed is the adding: the updates lie there as arrays (Umbel
and numpy take the same one again and again; Flower wants all 50 at once), or for the last row as sealed reports.
"""

from __future__ import annotations

import json
import sys

import numpy as np

from tests.benchmarks.harness import Table, child, peak_mb, seconds
from umbel.update import Aggregate, Update
from umbel.weights import Weights

MODULE = "tests.benchmarks.aggregation"
UPDATES, ARRAYS, NUMBERS = 50, 10, 1_000_000
SHAPES = {f"p_{index:02}": (NUMBERS,) for index in range(ARRAYS)}
ROWS = {
    "numpy": "numpy streaming sum",
    "umbel": "umbel Aggregate.accumulate",
    "presummed": "umbel sum, then Flower's FedAvg",
    "flower": "flwr FedAvg.aggregate_train",
    "sealed": "umbel PlainSum, from sealed reports",
}


def run() -> Table:
    found = {mode: min((child(MODULE, mode) for _ in range(3)), key=lambda one: one["seconds"]) for mode in ROWS}
    size = UPDATES * ARRAYS * NUMBERS * 4 / 1e9
    rows = [
        (title, found[mode]["seconds"], size / found[mode]["seconds"], found[mode]["peak_mb"])
        for mode, title in ROWS.items()
    ]
    ratios = {
        "umbel's time / numpy's streaming sum": found["umbel"]["seconds"] / found["numpy"]["seconds"],
        "umbel's memory beyond numpy's, in models": (found["umbel"]["peak_mb"] - found["numpy"]["peak_mb"]) / 40,
        "flower's time / umbel's with strategy": found["flower"]["seconds"] / found["presummed"]["seconds"],
        "flower's memory / umbel's with strategy": found["flower"]["peak_mb"] / found["presummed"]["peak_mb"],
        "sealed path's memory, in models": found["sealed"]["peak_mb"] / 40,
    }
    aims = {
        "umbel's time / numpy's streaming sum": ("<=", 1.5),
        "umbel's memory beyond numpy's, in models": ("<=", 1.0),
    }
    title = f"Aggregation: {UPDATES} updates x {ARRAYS * NUMBERS / 1e6:.0f}M float32 ({size:.1f} GB)"
    return Table(title, ("way", "seconds", "GB/s", "peak MB"), rows, ratios, aims)


def _update() -> Update:
    chance = np.random.default_rng(0)
    return Update(
        Weights({name: chance.standard_normal(NUMBERS, np.float32) * np.float32(1e-3) for name in SHAPES}), 3.0, {}
    )


def _numpy(update: Update) -> float:
    totals = {name: np.zeros(NUMBERS, np.float32) for name in SHAPES}

    def add() -> None:
        for _ in range(UPDATES):
            for name, total in totals.items():
                total += np.float32(update.weight) * update.delta[name]

    return seconds(add)


def _umbel(update: Update) -> float:
    total = Aggregate.zero(SHAPES)
    return seconds(lambda: [total.accumulate(update) for _ in range(UPDATES)])


def _presummed(update: Update) -> float:
    from umbel_server.aggregation import Presummed
    from umbel_server.flower.engine import apply
    from umbel_server.flower.spec import StrategySpec

    total, base = Aggregate.zero(SHAPES), Weights.zeros(SHAPES)

    def work() -> None:
        for _ in range(UPDATES):
            total.accumulate(update)
        apply(StrategySpec(), b"", base, Presummed(total), 1)

    return seconds(work)


def _flower(update: Update) -> float:
    from umbel_server.flower.compat import reply_without_request  # loads flwr quietly

    from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict  # isort: skip
    from flwr.serverapp.strategy import FedAvg  # isort: skip

    replies = []
    for node in range(UPDATES):
        arrays = ArrayRecord({name: Array(array) for name, array in update.delta.arrays.items()})
        metrics = MetricRecord({"num-examples": update.weight})
        replies.append(reply_without_request(RecordDict({"arrays": arrays, "metrics": metrics}), node))
    strategy = FedAvg()
    return seconds(lambda: strategy.aggregate_train(1, replies))


def _sealed(update: Update) -> float:
    from umbel.digests import Digest
    from umbel.messages import update_to_bytes
    from umbel.sealing import Binding, seal
    from umbel_server.aggregation import LeaderKey, PlainSum, SealedReport
    from umbel_server.validation import ReportRules

    key = LeaderKey.generate()
    binding = Binding("task", 1, "session", "0" * 32, Digest("0" * 64))
    sealed = seal(update_to_bytes(update), key.sealing, binding)
    total = PlainSum(key, ReportRules(SHAPES, frozenset(), 10.0, 1e9))
    return seconds(lambda: [total.accept(SealedReport(binding, sealed, index)) for index in range(UPDATES)])


if __name__ == "__main__":
    work = {"numpy": _numpy, "umbel": _umbel, "presummed": _presummed, "flower": _flower, "sealed": _sealed}
    spent = work[sys.argv[1]](_update())
    print(json.dumps({"seconds": spent, "peak_mb": peak_mb()}))
