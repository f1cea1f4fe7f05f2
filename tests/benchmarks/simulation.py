"""The cohort engine beside other ways to simulate the same rounds: same users, same cohorts, same steps, in turn.

The reference: 180 users with 50 images of digits, 784-64-10, cohorts of 50, batches of 10, one epoch. Frameworks run in
environments of their own, which are installed into UMBEL_BENCH_CACHE (the user's cache unless set) at first; one that
can't be installed is named and left out. Then the same against a bare torch loop for convolutions and a Transformer.

On a busy machine speeds say little; processor time a client says more. "On two idle cores" is what our two workers
would come to there, beside a loop that has one thread.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.baselines.turns import COHORT
from tests.benchmarks.harness import Table
from tests.benchmarks.ways import Child, Measured, NotInstalled, Way

OURS = "tests.benchmarks.baselines.umbel_cohort"
TURNS = 7


def run() -> Table:
    rows: list[tuple[str | float, ...]] = []
    ratios: dict[str, float] = {}
    aims: dict[str, tuple[str, float]] = {}
    cache = Path(os.environ.get("UMBEL_BENCH_CACHE") or Path.home() / ".cache" / "umbel" / "benchmarks")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        reference = _measure(_reference_ways(folder), _digits(folder), cache)
        rows += [_row("784-64-10", one) for one in reference.values()]
        ours = reference["umbel, two workers"].speed
        for title, one in reference.items():
            if not title.startswith("umbel"):
                ratios[f"umbel's speed / {title}'s"] = ours / one.speed
                ratios[f"{title}'s processor time / umbel's"] = one.cpu / reference["umbel, two workers"].cpu
        ratios["clients a second, two workers"] = ours
        ratios["clients a second by processor time, on two idle cores"] = 2 / reference["umbel, two workers"].cpu
        ratios["seconds to start"] = reference["umbel, two workers"].start_seconds
        ratios["processor seconds to start"] = reference["umbel, two workers"].start_cpu
        for name, model in (("LeNet", "lenet"), ("Transformer", "shakespeare")):
            found = _measure(_model_ways(folder, model), _data_for(folder, model), cache)
            rows += [_row(name, one) for one in found.values()]
            ratios[f"{name}: umbel's speed / a bare torch loop's"] = (
                found["umbel, two workers"].speed / found["bare torch loop"].speed
            )
            ratios[f"{name}: by processor time, on two idle cores"] = (
                2 * found["bare torch loop"].cpu / found["umbel, two workers"].cpu
            )
            aims[f"{name}: umbel's speed / a bare torch loop's"] = (">=", 2.0)
    aims |= {
        "umbel's speed / FedJAX's": (">=", 2.5),
        "umbel's speed / bare numpy loop's": (">=", 4.0),
        "clients a second, two workers": (">=", 6000.0),
        "seconds to start": ("<=", 3.0),
    }
    columns = ("model", "way", "clients/s", "cpu us/client", "start s", "accuracy")
    known = {name: aim for name, aim in aims.items() if name in ratios}
    return Table("Simulation: cohorts of 50, one epoch", columns, rows, ratios, known)


def _reference_ways(folder: Path) -> list[Way]:
    bundle = _compiled(folder, "mlp")
    return [
        Way("umbel, one worker", OURS, (bundle, "1")),
        Way("umbel, two workers", OURS, (bundle, "2")),
        Way("bare numpy loop", "numpy_loop.py"),
        Way("bare torch loop", "torch_loop.py", ("mlp",), rounds=10),
        Way(
            "FedJAX",
            "fedjax_rounds.py",
            packages=("fedjax==0.0.17", "jax==0.4.25", "jaxlib==0.4.25", "numpy<2", "dm-haiku<0.0.13", "scipy<1.13"),
        ),
        Way("pfl-research", "pfl_rounds.py", packages=("pfl==0.6.0", "torch==2.13.0"), rounds=5),
        Way("Flower on Ray", "flower_ray.py", packages=("flwr[simulation]==1.41.0",), rounds=1),
    ]


def _model_ways(folder: Path, model: str) -> list[Way]:
    bundle = _compiled(folder, model)
    return [
        Way("umbel, one worker", OURS, (bundle, "1"), rounds=1),
        Way("umbel, two workers", OURS, (bundle, "2"), rounds=1),
        Way("bare torch loop", "torch_loop.py", (f"tests.benchmarks.bench_models:{model}",), rounds=1),
    ]


def _measure(ways: list[Way], data: Path, cache: Path) -> dict[str, Measured]:
    children = []
    for way in ways:
        try:
            children.append(Child(way, data, cache))
        except NotInstalled as error:
            print(f"left out, {error}", file=sys.stderr, flush=True)
    with np.load(data) as arrays:
        cohort = min(COHORT, len(arrays["x"]))
    for child in children:
        child.turn(max(1, child.measured.way.rounds // 4), cohort, counts=False)
    for _ in range(TURNS):
        for child in children:
            child.turn(child.measured.way.rounds, cohort)
    for child in children:
        child.end()
    return {child.measured.way.title: child.measured for child in children}


def _row(model: str, found: Measured) -> tuple[str | float, ...]:
    return (model, found.way.title, found.speed, 1e6 * found.cpu, found.start_seconds, found.accuracy)


def _compiled(folder: Path, model: str) -> str:
    from tests.benchmarks import bench_models
    from umbel_models.compile import compile_model

    target = folder / f"bundle-{model}"
    compile_model(getattr(bench_models, model)(), target)
    return str(target)


def _digits(folder: Path) -> Path:
    """Scikit-learn's digits, three times as large, with a rim of two, and a little noise."""
    from sklearn.datasets import load_digits

    found, rng = load_digits(), np.random.default_rng(0)
    large = np.pad(np.kron(found.images / 16, np.ones((1, 3, 3))), ((0, 0), (2, 2), (2, 2)))
    x, y = large.reshape(-1, 784).astype(np.float32), found.target.astype(np.int64)
    rows = rng.permutation(len(x))
    held, users = rows[1497:], rng.choice(rows[:1497], (180, 50))
    noise = rng.normal(0, 0.05, (180, 50, 784)).astype(np.float32)
    return _saved(folder / "digits.npz", x=x[users] + noise, y=y[users], held_x=x[held], held_y=y[held])


def _data_for(folder: Path, model: str) -> Path:
    rng = np.random.default_rng(0)
    if model == "shakespeare":
        text = rng.integers(1, 60, (20, 20, 81))
        return _saved(
            folder / "text.npz", x=text[..., :-1], y=text[..., 1:], held_x=text[0, :, :-1], held_y=text[0, :, 1:]
        )
    with np.load(_digits(folder)) as found:
        parts: dict[str, Any] = {name: found[name] for name in ("x", "y", "held_x", "held_y")}
    return _saved(
        folder / "images.npz",
        x=parts["x"][:60].reshape(60, 50, 1, 28, 28),
        y=parts["y"][:60],
        held_x=parts["held_x"].reshape(-1, 1, 28, 28),
        held_y=parts["held_y"],
    )


def _saved(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path
