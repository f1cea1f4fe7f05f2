"""Drift: how often it is noticed, by how large a part of a fleet moved, and what counting and comparing cost.

Fleets are numbers: each device has a mean of its own and ten examples, the means differ half as much again as a
device's examples do; in the last five of fifteen rounds a part of the devices has values half a standard deviation
larger. Counting is the smartwatch net's judging of 32 examples, with six channels in sixteen bins each and three
histograms more.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from tests.benchmarks.harness import Table, seconds
from tests.databases import new_sqlite
from tests.server.drifting import metrics, write_rounds
from tests.server.driving import TASK, World, task
from tests.server.test_drift import compared, fleets
from umbel.runtime import EvaluateSession
from umbel.runtime.named import runtime_named
from umbel_models.compile import compile_model
from umbel_models.histograms import confidence, edges_of, feature, label, predicted
from umbel_models.spec import ModelSpec
from umbel_models.zoo import smartwatch
from umbel_server import task_records
from umbel_server.drift import Verdict
from umbel_server.drift_windows import MOST, Windows
from umbel_server.task_records import TaskRecord

FLEETS, AT_ONCE = 1_000, 200
ROUNDS = 10_000
CALLS, TURNS = 50, 15
AGES = (0.4, 0.3, 0.2, 0.1)


def run() -> Table:
    torch.set_num_threads(1)
    rows: list[tuple[str | float, ...]] = []
    ratios: dict[str, float] = {}
    for devices in (20, 60, 200):
        for share in (0.0, 0.25, 0.5, 1.0):
            found = _noticed(devices, share)
            rows.append((f"cohorts of {devices}, {share:.0%} of the devices moved", f"{found:.1%} of fleets"))
    for runtime in ("onnx", "litert"):
        plain, counting = _judging(runtime)
        rows += [(f"judging, {runtime}", f"{plain:.0f} us"), (f"judging and counting, {runtime}", f"{counting:.0f} us")]
        ratios[f"judging and counting / judging, {runtime}"] = counting / plain
    rows += [(f"a report over {what}", f"{spent * 1e3:.0f} ms") for what, spent in _reports()]
    return Table("Noticing drift", ("what", "seen"), rows, ratios)


def _noticed(devices: int, share: float) -> float:
    """Which part of fleets is called drifting below 0.001."""
    found = 0
    for seed in range(FLEETS // AT_ONCE):
        simulated = fleets(AT_ONCE, rounds=15, shifted=5, share=share, seed=seed, devices=devices)
        found += sum(compared(bins, 5, below=0.001).verdict is Verdict.DRIFT for bins in simulated)
    return found / FLEETS


def _judging(runtime: str) -> tuple[float, float]:
    """Microseconds of processor time for a batch of 32, without histograms and with them."""
    plain = smartwatch.spec()
    x = plain.inputs["x"]
    named = {f"channel{place}": feature("x", place, edges_of(x[:, place])) for place in range(x.shape[1])}
    named |= {"label": label("y", 7), "says": predicted("logits", 7), "sure": confidence("logits")}
    both = [_session(spec, runtime) for spec in (plain, replace(plain, histograms=named))]
    inputs, targets = ({name: one.numpy() for name, one in part.items()} for part in plain.batch(32))
    found: list[list[float]] = [[], []]
    for _ in range(TURNS):
        for session, times in zip(both, found, strict=True):
            began = time.thread_time()
            for _ in range(CALLS):
                session(inputs, targets)
            times.append((time.thread_time() - began) / CALLS * 1e6)
    return median(found[0]), median(found[1])


def _session(spec: ModelSpec, runtime: str) -> EvaluateSession:
    with tempfile.TemporaryDirectory() as folder:
        bundle = compile_model(spec, Path(folder), (runtime,)).bundle
        return runtime_named(runtime).evaluate(bundle, bundle.weights())


def _reports() -> list[tuple[str, float]]:
    """What `umbel tasks drift` waits for at the coordinator, of a task with many rounds."""
    with tempfile.TemporaryDirectory() as folder:
        world = World(new_sqlite(Path(folder) / "umbel.db"), Path(folder) / "blobs")
        with world.store.transaction() as connection:
            task_records.insert(connection, TaskRecord(task(), 0.0))
        measured = [metrics(AGES, seed=number) for number in range(ROUNDS)]
        write_rounds(world.store, world.coordinator.registry, measured, TASK)
        windows = {"the first 10 and the last 5": Windows(), f"{MOST} and {MOST}": Windows(reference=MOST, recent=MOST)}
        found = [
            (
                f"{ROUNDS:,} rounds, {what}",
                seconds(lambda chosen=chosen: world.coordinator.operations.drift(TASK, chosen)),
            )  # type: ignore[misc]
            for what, chosen in windows.items()
        ]
        world.store.close()
    return found
