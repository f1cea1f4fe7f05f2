"""How fast a bundle answers and trains on this machine, against torch eager where its module is at hand.

Every way takes turns with the others and runs on one thread. Processor time is counted, not the clock's, so that
other work on the machine weighs less; the median turn stands.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from umbel.bundle import Bundle
from umbel.errors import OutOfBounds
from umbel.runtime import Runtime
from umbel.runtime.precision import fastest
from umbel_models.threads import one_torch_thread

if TYPE_CHECKING:
    from umbel_models.spec import ModelSpec

BATCHES: Final = (1, 16, 32)
TURNS: Final = 9
TURN_SECONDS: Final = 0.02
"""How long a turn of one way should take at least."""
TORCH: Final = "torch"

Arrays = dict[str, NDArray[Any]]
Work = Callable[[], object]
Progress = Callable[[int, int], None]
"""(turns done, turns in all)"""


@dataclass(frozen=True, slots=True)
class Speed:
    """Processor time of one call, in microseconds."""

    way: str
    """A runtime's name, or "torch"."""
    batch: int
    train: float
    infer: float


def measure(
    bundle: Bundle,
    runtimes: Sequence[Runtime],
    spec: ModelSpec | None = None,
    batches: Sequence[int] = BATCHES,
    turns: int = TURNS,
    progress: Progress = lambda done, of: None,
) -> tuple[Speed, ...]:
    """Measure training steps and answers of a bundle.

    Args:
        bundle: whose graphs and weights.
        runtimes: each with one thread.
        spec: gives the torch module to compare with, and examples; without it the golden ones are used.
        batches: numbers of examples in a call.
        turns: how often each way is measured.
        progress: told after each turn.

    Raises:
        OutOfBounds: no batch, an empty one, no turn, or nothing to measure.
        ParityFailed: the spec has other weights than the bundle, or trains others.
        UmbelError: a runtime can't run the bundle.
    """
    ways = len(runtimes) + (spec is not None)
    if not batches or min(batches) < 1 or turns < 1 or not ways:
        raise OutOfBounds(f"batches are {list(batches)}, turns {turns}, runtimes {ways}; give at least one of each")
    if spec is not None:
        from umbel_models.adapters import resolved
        from umbel_models.parity import require_same_names

        spec = resolved(spec)
        require_same_names(spec, bundle)
    found: list[Speed] = []
    for batch in batches:
        works: dict[tuple[str, str], Work] = {}
        inputs, targets = _examples(bundle, spec, batch)
        for runtime in runtimes:
            works |= _runtime_works(bundle, runtime, inputs, targets)
        if spec is not None:
            works |= torch_works(spec, batch)
        done = len(found) // ways * turns
        with one_torch_thread() if spec is not None else nullcontext():
            times = in_turns(works, turns, partial(_tell, progress, done, turns * len(batches)))
        names = dict.fromkeys(way for way, _ in works)
        found += [Speed(way, batch, times[way, "train"], times[way, "infer"]) for way in names]
    return tuple(found)


def _tell(progress: Progress, done: int, of: int, turn: int) -> None:
    progress(done + turn, of)


def ratios(speeds: Sequence[Speed]) -> dict[tuple[str, int], tuple[float, float]]:
    """How many times as fast as torch a runtime trains and answers, by runtime and batch."""
    torch = {speed.batch: speed for speed in speeds if speed.way == TORCH}
    return {
        (speed.way, speed.batch): (torch[speed.batch].train / speed.train, torch[speed.batch].infer / speed.infer)
        for speed in speeds
        if speed.way != TORCH and speed.batch in torch
    }


def tell_speeds(speeds: Sequence[Speed]) -> dict[str, Any]:
    """Measured speeds as plain data, by way and batch."""
    faster = ratios(speeds)
    told: dict[str, Any] = {}
    for speed in speeds:
        entry = {"train_us": round(speed.train, 1), "infer_us": round(speed.infer, 1)}
        if (speed.way, speed.batch) in faster:
            train, infer = faster[speed.way, speed.batch]
            entry |= {"train_times_torch": round(train, 2), "infer_times_torch": round(infer, 2)}
        told[f"{speed.way} batch {speed.batch}"] = entry
    return told


def _examples(bundle: Bundle, spec: ModelSpec | None, batch: int) -> tuple[Arrays, Arrays]:
    if spec is not None:
        from umbel_models.parity import to_numpy

        inputs, targets = spec.batch(batch)
        return to_numpy(inputs), to_numpy(targets)
    golden = bundle.golden().inputs
    taken = {name: array[np.arange(batch) % len(array)] for name, array in golden.items()}
    # Which target it is makes no difference to the work; zero is a class and a number.
    shapes = {one.name: tuple(batch if size is None else size for size in one.shape) for one in bundle.manifest.targets}
    return taken, {one.name: np.zeros(shapes[one.name], one.dtype) for one in bundle.manifest.targets}


def _runtime_works(bundle: Bundle, runtime: Runtime, inputs: Arrays, targets: Arrays) -> Mapping[tuple[str, str], Work]:
    weights = bundle.weights()
    # A step of no length: a thousand steps on one batch must not lead the weights anywhere.
    session = runtime.train(bundle, weights, {"lr": 0.0} if "lr" in bundle.manifest.hyperparameters else None)
    answering, _ = fastest(runtime, bundle, weights)
    return {
        (runtime.name, "train"): lambda: session.step(inputs, targets),
        (runtime.name, "infer"): lambda: answering(inputs),
    }


def torch_works(spec: ModelSpec, batch: int) -> Mapping[tuple[str, str], Work]:
    """A training step and an answer of the module itself, on a batch of its examples."""
    import torch

    from umbel_models.adapters import resolved
    from umbel_models.vetting import copied

    spec = resolved(spec)
    answering, training = copied(spec.module).eval(), copied(spec.module).train()
    inputs, targets = spec.batch(batch)
    for name, parameter in training.named_parameters():
        parameter.requires_grad_(spec.trains(name))
    optimizer = spec.optimizer.torch_optimizer([p for p in training.parameters() if p.requires_grad])
    optimizer.hold()

    def step() -> float:
        optimizer.zero_grad()
        loss = spec.loss(training(*inputs.values()), *targets.values())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step(float(batch))
        return float(loss.detach())

    def infer() -> object:
        with torch.inference_mode():
            return answering(*inputs.values())

    return {(TORCH, "train"): step, (TORCH, "infer"): infer}


def in_turns(
    works: Mapping[tuple[str, str], Work], turns: int, told: Callable[[int], None]
) -> dict[tuple[str, str], float]:
    """Median microseconds of processor time of each work; `told` hears the number of each turn that is done."""
    calls = {name: _calls(work) for name, work in works.items()}
    taken: dict[tuple[str, str], list[float]] = {name: [] for name in works}
    for turn in range(turns):
        for name, work in works.items():
            taken[name].append(_processor_seconds(work, calls[name]) / calls[name] * 1e6)
        told(turn + 1)
    return {name: statistics.median(times) for name, times in taken.items()}


def _calls(work: Work) -> int:
    """How many calls fill a turn; the first ones, which set things up, don't count."""
    _processor_seconds(work, 2)
    return max(1, round(TURN_SECONDS / max(_processor_seconds(work, 2) / 2, 1e-6)))


def _processor_seconds(work: Work, calls: int) -> float:
    began = time.process_time()
    for _ in range(calls):
        work()
    return time.process_time() - began
