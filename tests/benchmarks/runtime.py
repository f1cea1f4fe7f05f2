"""The zoo's bundles against torch eager: training steps and answers by batch, time to compile, memory of training.

One thread, processor time, every way in turns with the others in one process; memory in a process of its own for
each way. Ratios above one mean that a runtime is faster than torch.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path

from tests.benchmarks.harness import Table, child
from umbel.bundle import Bundle
from umbel.runtime.named import runtime_named
from umbel_models.spec import ModelSpec
from umbel_models.trainable import Head, LoRA, Trainable

MODULE = "tests.benchmarks.training_process"
RUNTIMES = ("onnx", "litert")
BATCHES = (1, 16, 32)
TURNS = 7
MEMORY_OF = ("smartwatch", "residual", "shakespeare")


@dataclass(frozen=True, slots=True)
class Case:
    """A model, and what is asked of ONNX Runtime's training step, in times torch's speed."""

    name: str
    spec: str
    aim: float
    trainable: Trainable | None = None

    def load(self) -> ModelSpec:
        module, _, attribute = self.spec.partition(":")
        spec: ModelSpec = getattr(import_module(f"umbel_models.zoo.{module}"), attribute)()
        return spec if self.trainable is None else replace(spec, trainable=self.trainable)


CASES = (
    Case("digits, dense", "digits:mlp", 1.5),
    Case("flights, dense", "flights:spec", 1.5),
    Case("digits, convolutions", "digits:cnn", 0.9),
    Case("smartwatch", "smartwatch:spec", 0.9),
    Case("residual", "residual:spec", 0.9),
    Case("residual, batch norm", "residual:batch_normed", 0.9),
    Case("residual, head only", "residual:spec", 1.5, Head()),
    Case("shakespeare", "shakespeare:spec", 1.5),
    Case("shakespeare, LoRA", "shakespeare:spec", 1.5, LoRA(8, ("q", "v"))),
    Case("shakespeare, LSTM", "shakespeare_lstm:spec", 0.9),
)


def run() -> Table:
    rows: list[tuple[str | float, ...]] = []
    ratios: dict[str, float] = {}
    aims: dict[str, tuple[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(CASES):
            found = _speeds(case, Path(folder) / str(number))
            rows += found
            label = f"{case.name}: slowest training step on onnx, times torch"
            ratios[label] = min(float(row[3]) for row in found if row[1] == "onnx")
            aims[label] = (">=", case.aim)
        for name in MEMORY_OF:
            peaks = _peaks(name, Path(folder))
            rows += [(f"{name}: peak MB while training", way, "32", peak, "", "") for way, peak in peaks.items()]
            ratios[f"{name}: peak memory, torch / onnx"] = peaks["torch"] / peaks["onnx"]
            aims[f"{name}: peak memory, torch / onnx"] = (">=", 3.0)
    columns = (
        "model",
        "runtime",
        "batch",
        "training, times torch",
        "answers, times torch",
        "seconds to compile, again",
    )
    return Table("Bundles of the zoo against torch eager, one thread", columns, rows, ratios, aims)


def _speeds(case: Case, folder: Path) -> list[tuple[str | float, ...]]:
    from umbel_models.cache import GraphCache
    from umbel_models.compile import compile_model
    from umbel_models.measure import measure, ratios

    spec, cache = case.load(), GraphCache(folder / "cache")
    spent = [_processor_seconds(lambda: compile_model(spec, folder / "bundle", RUNTIMES, cache)) for _ in range(2)]
    bundle = Bundle.open(folder / "bundle")
    faster = ratios(measure(bundle, [runtime_named(name) for name in RUNTIMES], spec, BATCHES, TURNS))
    compiling = f"{spent[0]:.1f}, {spent[1]:.1f}"
    return [
        (case.name, name, str(batch), *faster[name, batch], compiling if batch == BATCHES[0] else "")
        for name in RUNTIMES
        for batch in BATCHES
    ]


def _processor_seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def _peaks(name: str, folder: Path) -> dict[str, float]:
    from umbel_models.compile import compile_model

    (case,) = (one for one in CASES if one.spec == f"{name}:spec" and one.trainable is None)
    compile_model(case.load(), folder / name, RUNTIMES)
    peaks = {way: child(MODULE, way, str(folder / name), str(BATCHES[-1])) for way in RUNTIMES}
    peaks["torch"] = child(MODULE, "torch", case.spec, str(BATCHES[-1]))
    return {way: float(found["peak_mb"]) for way, found in peaks.items()}
