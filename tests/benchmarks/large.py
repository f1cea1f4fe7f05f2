"""A device with a model of 12.6 million weights (50 MB): memory while it answers, tests a release, trains, and rests.

Each way in a process of its own, set up as `umbel-device` is: all weights trained with momentum, or a head on frozen
ones. Memory is what is resident beyond the empty process, in sizes of the model; "own" leaves out what stands in files
and the system may forget, such as the mapped weights. Beside it a process that trains the same in torch.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.benchmarks.harness import Table, child, peak_mb
from tests.benchmarks.private_memory import set_back
from umbel.bundle import Bundle
from umbel.clock import SystemClock
from umbel.memory import give_back_what_is_freed
from umbel.plan import Plan
from umbel.runtime.onnx import OnnxRuntime
from umbel_client.examples import Examples, Split
from umbel_client.personal import PersonalSettings, judge_release
from umbel_client.predictor import Predictor
from umbel_client.trainer import Job
from umbel_client.trainer import run as train

MODULE = "tests.benchmarks.large"
INPUTS, CLASSES, BATCH, EXAMPLES = 1024, 10, 16, 64
WAYS = {"whole": "all weights, momentum", "head": "a head on frozen weights"}
PHASES = ("answers", "tests a release", "trains")


def run() -> Table:
    from tests.benchmarks import bench_models
    from umbel_models.compile import compile_model

    rows: list[tuple[str | float, ...]] = []
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for way, title in WAYS.items():
            folder = Path(scratch) / way
            compile_model(bench_models.wide(head_only=way == "head"), folder)
            found = child(MODULE, "umbel", str(folder))
            torch = child(MODULE, "torch", way)
            rows += [(title, phase, *found[phase]) for phase in (*PHASES, "rests")]
            ratios[f"{title}: peak of the whole process, torch trains / a device does it all"] = (
                torch["peak"] / found["peak"]
            )
            ratios[f"{title}: models' worth of memory kept by work that is over"] = (
                found["rests"][1] - found["answers"][1]
            )
    aims = {name: ("<=", 0.5) for name in ratios if "kept" in name}
    return Table(
        "A large model on a device, memory in models", ("model", "while it", "peak", "own"), rows, ratios, aims
    )


def _device(folder: Path) -> dict[str, object]:
    give_back_what_is_freed()
    bundle, runtime, clock = Bundle.open(folder), OnnxRuntime(), SystemClock()
    chance = np.random.default_rng(0)
    inputs, targets = chance.normal(size=(EXAMPLES, INPUTS)).astype(np.float32), chance.integers(0, CLASSES, EXAMPLES)
    examples = Examples({"x": inputs}, {"y": targets}, EXAMPLES)
    model = bundle.paths["weights.safetensors"].stat().st_size / 1e6
    before, own, found = set_back(), _own(), dict[str, object]()

    def measured(phase: str, work: Callable[[], object]) -> object:
        set_back()
        kept = work()
        found[phase] = (peak_mb() - before) / model, (_own() - own) / model
        return kept

    predictor = measured("answers", lambda: Predictor(bundle, bundle.weights(), runtime, "release 1"))
    split, present = Split(examples, examples), (bundle, bundle.shared_weights())
    settings, plan = PersonalSettings(epochs=1, batch_size=BATCH), Plan(batch_size=BATCH, clip_norm=4.0)
    measured("tests a release", lambda: judge_release(bundle, present, split, settings, runtime, clock, "device"))
    measured("trains", lambda: train(Job(plan, "learn", 1, "device"), bundle, split, runtime, clock))
    measured("rests", lambda: None)
    assert predictor is not None
    return found | {"peak": before + max(found[phase][0] for phase in PHASES) * model}  # type: ignore[index]


def _own() -> float:
    """MB that are resident and stand in no file."""
    resident, shared = (int(pages) for pages in Path("/proc/self/statm").read_text().split()[1:3])
    return (resident - shared) * 4096 / 1e6


def _torch(way: str) -> dict[str, object]:
    import torch

    from tests.benchmarks import bench_models

    torch.set_num_threads(1)
    module = bench_models.wide(head_only=way == "head").module
    trained = list(module.parameters() if way == "whole" else module[-1].parameters())  # type: ignore[index]
    for parameter in module.parameters():
        parameter.requires_grad_(any(parameter is one for one in trained))
    optimizer = torch.optim.SGD(trained, lr=0.01, momentum=0.9)
    x, y = torch.randn(BATCH, INPUTS), torch.arange(BATCH) % CLASSES
    for _ in range(EXAMPLES // BATCH):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(x), y).backward()
        optimizer.step()
    return {"peak": peak_mb()}


if __name__ == "__main__":
    print(json.dumps(_device(Path(sys.argv[2])) if sys.argv[1] == "umbel" else _torch(sys.argv[2])))
