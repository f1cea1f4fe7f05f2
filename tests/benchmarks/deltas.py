"""What deltas save on models that really learn, what a quantised release costs in accuracy, and what rebuilding takes.

Two federations train as in `tests.benchmarks.learning`: twenty wearers of a smartwatch on the packaged model, and ten
devices with handwritten digits on a dense net of a million weights, whose head alone is then tuned. After each round
the new weights are written as a delta from those before: lossless, and as int8. The times and the memory of ten million
weights are those of made-up ones, in a process of its own.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np

from tests.benchmarks import learning
from tests.benchmarks.harness import Table, child, peak_mb
from umbel.bundle import Bundle
from umbel.delta import Ends, is_worth_it, rebuild, write_lossless
from umbel.digests import Digest, digest_of, digest_of_file
from umbel.manifest import GOLDEN_FILE, WEIGHTS_FILE, FileRef
from umbel.plan import Plan
from umbel.quantised import quantise
from umbel.randomness import generator
from umbel.successor import successor
from umbel.update import Aggregate, Update
from umbel.weights import Weights
from umbel_client.examples import Examples, Split
from umbel_client.trainer import Job, evaluate, train
from umbel_server.aggregation import Presummed
from umbel_server.flower import StrategySpec, apply

ROUNDS, SKIPPED = 12, 4
"""Rounds of each federation, and how many at the beginning aren't looked at: a model that has learnt moves less."""
DEVICES = 10
NUMBERS = 10_000_000
STRATEGY = StrategySpec("FedAvgM", {"server_momentum": 0.9})
Score = Callable[[Weights], float]


@dataclass(frozen=True, slots=True)
class Federation:
    """Who trains what, and how well a model answers on everybody's held-back examples."""

    title: str
    bundle: Bundle
    splits: dict[str, Split]
    lr: float

    def score(self, weights: Weights) -> float:
        found = [evaluate(self.bundle, weights, split.held_back, learning.RUNTIME) for split in self.splits.values()]
        return sum(one["correct"] for one in found) / sum(one["examples"] for one in found)

    def versions(self, start: Weights, rounds: int) -> Iterator[Weights]:
        """The weights after each round."""
        plan = Plan(epochs=1, batch_size=16, hyperparameters={"lr": self.lr})
        current, state = start, b""
        for number in range(1, rounds + 1):
            total = Aggregate.zero(start.shapes)
            for name, split in self.splits.items():
                job = Job(plan, self.title, number, name)
                done = train(job, self.bundle, current, split.training, learning.RUNTIME, learning.CLOCK)
                total.accumulate(Update(done.weights - current, float(split.training.count), {}))
            current, state = apply(STRATEGY, state, current, Presummed(total), number)
            yield current


def run() -> Table:
    rows: list[tuple[str | float, ...]] = []
    ratios: dict[str, float] = {}
    watch = Federation("smartwatch", learning.BUNDLE, learning.wearers(), 0.1)
    seen = list(watch.versions(learning.START, ROUNDS))[SKIPPED:]
    rows += [_row(watch, "a round apart", seen, 1), _row(watch, "five rounds apart", seen, 5)]
    ratios |= _bytes_of_a_device(watch.bundle, seen[-2], seen[-1])
    with tempfile.TemporaryDirectory() as folder:
        dense, head = _dense(Path(folder))
        seen = list(dense.versions(dense.bundle.shared_weights(), ROUNDS))[SKIPPED:]
        rows += [_row(dense, "a round apart", seen, 1), _row(dense, "five rounds apart", seen, 5)]
        rows.append(_head_row(dense, head, seen[-1]))
        ratios |= child("tests.benchmarks.deltas", "--make", folder)
        ratios |= child("tests.benchmarks.deltas", "--rebuild", folder)
    drops = [100 * (float(row[4]) - float(row[5])) for row in rows]
    ratios["largest drop in accuracy by int8, points"] = max(drops)
    columns = ("versions", "weights", "lossless %", "int8 %", "accuracy", "accuracy, int8")
    aims = {
        "largest drop in accuracy by int8, points": ("<=", 0.5),
        "apply: MB of memory above the start, 10M weights": ("<=", 20.0),
    }
    return Table("Deltas: per cent of the weights file (median over rounds)", columns, rows, ratios, aims)


def _row(where: Federation, title: str, versions: list[Weights], apart: int) -> tuple[str | float, ...]:
    lossless, small, exact, rough = [], [], [], []
    for before, after in zip(versions, versions[apart:], strict=False):
        old, new = _file(where, before), _file(where, after)
        made = quantise(old, new)
        lossless.append(100 * len(lossless_delta(old, new)) / len(new))
        small.append(100 * len(made.delta) / len(new))
        exact.append(where.score(after))
        rough.append(where.score(_shared(where, made.weights)))
    # Of accuracies the pair that differs most is told.
    worst = int(np.argmin(np.array(rough) - np.array(exact)))
    return f"{where.title}, {title}", versions[0].size, median(lossless), median(small), exact[worst], rough[worst]


def _head_row(dense: Federation, head: Federation, start: Weights) -> tuple[str | float, ...]:
    names = list(head.bundle.manifest.shared_shapes)
    tuned = list(head.versions(start.subset(names), 1))[-1]
    after = Weights({**start.arrays, **tuned.arrays})
    title, size, *rest = _row(dense, "its head tuned", [start, after], 1)
    return (title, size, *rest)


def _file(where: Federation, shared: Weights) -> bytes:
    frozen = where.bundle.weights().subset([spec.name for spec in where.bundle.manifest.frozen])
    return Weights({**shared.arrays, **frozen.arrays}).to_bytes()


def _shared(where: Federation, file: bytes) -> Weights:
    return Weights.from_bytes(file).subset(list(where.bundle.manifest.shared_shapes))


def lossless_delta(old: bytes, new: bytes) -> bytes:
    out = io.BytesIO()
    write_lossless(Ends(digest_of(old), digest_of(new), len(new)), io.BytesIO(old), io.BytesIO(new), out)
    return out.getvalue()


def _bytes_of_a_device(bundle: Bundle, before: Weights, after: Weights) -> dict[str, float]:
    """What an ONNX device fetches of the packaged model, in kB."""
    (one, old), (two, new) = (successor(bundle, weights, learning.RUNTIME) for weights in (before, after))
    size = len(two.to_bytes())
    changed = sum(map(len, new.values()))
    deltas = {name: _offered(lossless_delta(old[name], new[name]), new[name]) for name in (WEIGHTS_FILE, GOLDEN_FILE)}
    small = len(quantise(old[WEIGHTS_FILE], new[WEIGHTS_FILE]).delta)
    told = {
        "whole bundle": size + sum(ref.size for ref in two.files.values()),
        "first release, own runtime only": size + sum(ref.size for ref in one.files_for("onnx").values()),
        "next release, files that changed": size + changed,
        "next release, lossless deltas where offered": size + sum(deltas.values()),
        "next release, int8 delta": size + small + deltas[GOLDEN_FILE],
    }
    return {f"kB fetched, {name}": count / 1000 for name, count in told.items()}


def _offered(delta: bytes, file: bytes) -> int:
    """What a device fetches: a delta that is no use isn't offered."""
    return len(delta) if is_worth_it(len(delta), len(file)) else len(file)


def _dense(folder: Path) -> tuple[Federation, Federation]:
    """A dense net of a million weights on handwritten digits, and the same of which only the head is trained."""
    import torch
    import torch.nn.functional as F  # noqa: N812 - torch's own custom
    from torch import nn

    from umbel_models.compile import compile_model
    from umbel_models.optimizers import SGD
    from umbel_models.spec import ModelSpec
    from umbel_models.trainable import Head
    from umbel_simulations.data.digits import load_digits

    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 992), nn.ReLU(), nn.Linear(992, 992), nn.ReLU(), nn.Linear(992, 10))
    spec = ModelSpec(
        name="dense",
        module=module,
        loss=F.cross_entropy,
        inputs={"x": torch.rand(16, 64) * 16},
        targets={"y": torch.arange(16) % 10},
        optimizer=SGD(lr=0.01),
    )
    training, held_back = load_digits()
    splits = {f"device-{number}": Split(_part(training, number), _part(held_back, number)) for number in range(DEVICES)}
    made = [
        compile_model(replace(spec, trainable=kind), folder / name).bundle
        for name, kind in (("all", spec.trainable), ("head", Head()))
    ]
    return Federation("dense net", made[0], splits, 0.01), Federation("dense net's head", made[1], splits, 0.01)


def _part(examples: Examples, number: int) -> Examples:
    x, y = examples.inputs["x"][number::DEVICES], examples.targets["y"][number::DEVICES]
    return Examples({"x": np.asarray(x, np.float32).reshape(len(x), 64)}, {"y": y}, len(x))


# Ten million weights, in processes of their own.


def _made_up(folder: Path) -> tuple[Path, Path, Path]:
    return folder / "base", folder / "target", folder / "delta"


def _make(folder: Path) -> dict[str, float]:
    base, target, delta = _made_up(folder)
    chance = generator("ten million")
    old = chance.normal(0, 0.05, (1000, NUMBERS // 1000)).astype("f4")
    weights = [Weights({"p_w": array}) for array in (old, (old + 1e-4 * chance.normal(0, 1, old.shape)).astype("f4"))]
    for path, one in zip((base, target), weights, strict=True):
        path.write_bytes(one.to_bytes())
    ends = Ends(digest_of_file(base), digest_of_file(target), target.stat().st_size)

    def lossless() -> None:
        with base.open("rb") as one, target.open("rb") as two, delta.open("wb") as out:
            write_lossless(ends, one, two, out)

    made: list[int] = []
    two = base.read_bytes(), target.read_bytes()
    int8_seconds = _processor(lambda: made.append(len(quantise(*two).delta)))
    return {
        "make: seconds of a lossless delta, 10M weights": _processor(lossless),
        "make: seconds of an int8 delta, 10M weights": int8_seconds,
        "made-up weights: lossless %": 100 * delta.stat().st_size / ends.size,
        "made-up weights: int8 %": 100 * made[-1] / ends.size,
    }


def _rebuild(folder: Path) -> dict[str, float]:
    base, target, delta = _made_up(folder)
    names, ref = digest_of_file(base), FileRef(Digest(digest_of_file(target)), target.stat().st_size)

    def whole() -> None:
        # What a device does with a file that came whole: write it, then hash it.
        with target.open("rb") as source, (folder / "copy").open("wb") as out:
            while block := source.read(1 << 18):
                out.write(block)
        digest_of_file(folder / "copy")

    def applied() -> None:
        with delta.open("rb") as steps, base.open("rb") as old, (folder / "rebuilt").open("wb") as out:
            rebuild(steps, old, out, names, ref)

    whole_seconds, before = _processor(whole), peak_mb()
    seconds = _processor(applied)
    return {
        "apply: seconds, 10M weights": seconds,
        "apply: seconds beside those of writing and hashing the whole": seconds / whole_seconds,
        "apply: MB of memory above the start, 10M weights": peak_mb() - before,
    }


def _processor(work: Callable[[], object], repeats: int = 3) -> float:
    spent = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        spent.append(time.process_time() - began)
    return median(spent)


if __name__ == "__main__":
    print(json.dumps({"--make": _make, "--rebuild": _rebuild}[sys.argv[1]](Path(sys.argv[2]))))
