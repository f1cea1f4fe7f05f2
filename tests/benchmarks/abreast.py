"""Clients that train abreast beside the same clients one after the other, and abreast in two processes.

Whole cohorts, in turns. The packaged nets for flights and digits, the reference 784-64-10, and 784-200-200-10 (McMahan
et al., arXiv:1602.05629); 180 users with 50 examples of noise each, or 20 to 79, cohorts of 50, two workers.
"""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import fmean, median

import numpy as np
import torch.nn.functional as F  # noqa: N812 - torch's own custom
from numpy.typing import NDArray
from torch import arange, manual_seed, nn, randn

from tests.benchmarks.baselines.turns import processor_seconds
from tests.benchmarks.bench_models import mlp
from tests.benchmarks.harness import Table
from umbel.bundle import Bundle
from umbel.manifest import TensorSpec
from umbel_client.examples import NONE, Examples
from umbel_models.compile import compile_model
from umbel_models.optimizers import SGD
from umbel_models.spec import ModelSpec
from umbel_models.zoo import bundle_path
from umbel_simulations.cohort.algorithm import Stage
from umbel_simulations.cohort.clients import Start
from umbel_simulations.cohort.pool import Pool
from umbel_simulations.cohort.resident import OnnxBackend
from umbel_simulations.cohort.rounds import train
from umbel_simulations.cohort.team import team
from umbel_simulations.data import ClientData, Federation
from umbel_simulations.scenario import Data, PlanPart, Scenario, TaskPart
from umbel_simulations.setting import Setting

USERS, COHORT, WORKERS, TURNS = 180, 50, 2, 21
LOW = 0.01
"""Low, as what is learnt is noise."""
WAYS = ("one by one", "abreast", "in processes")
COLUMNS = ("model", "epochs", "examples", *(f"clients/s, {way}" for way in WAYS), *(f"cpu us, {way}" for way in WAYS))


def run() -> Table:
    rows: list[tuple[str | float, ...]] = []
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        reference = compile_model(mlp(), Path(folder) / "mlp").bundle
        wide = compile_model(_two_layers(), Path(folder) / "wide").bundle
        flights, digits = Bundle.open(bundle_path("flights")), Bundle.open(bundle_path("digits"))
        models = {"flights": (flights, 16), "digits": (digits, 16), "784-64-10": (reference, 10)}
        for name, (bundle, batch) in {**models, "784-200-200-10": (wide, 10)}.items():
            for epochs in (1, 5):
                for least, most in ((50, 50), (20, 79)):
                    some = f"{least} to {most}" if most > least else f"{least}"
                    found = _measured(bundle, batch, epochs, (least, most), Path(folder))
                    rows.append((name, epochs, some, *(COHORT / one[0] for one in found)))
                    rows[-1] += tuple(1e6 * one[1] / COHORT for one in found)
                    alone, abreast, processes = found
                    case = f"{name}, {epochs} epochs of {some}"
                    ratios[f"abreast, times as many clients a second, {case}"] = alone[0] / abreast[0]
                    ratios[f"abreast, times less processor time, {case}"] = alone[1] / abreast[1]
                    ratios[f"processes, times as many clients a second as threads, {case}"] = abreast[0] / processes[0]
    return Table("Clients abreast beside one after the other", COLUMNS, rows, ratios)


def _two_layers() -> ModelSpec:
    manual_seed(0)
    layers = nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)
    inputs, targets = {"x": randn(10, 784)}, {"y": arange(10)}
    return ModelSpec("2nn", nn.Sequential(*layers), F.cross_entropy, inputs, targets, optimizer=SGD(lr=0.01))


def _measured(
    bundle: Bundle, batch: int, epochs: int, counts: tuple[int, int], folder: Path
) -> list[tuple[float, float]]:
    """Real and processor seconds of a cohort: one after the other, abreast, and abreast in two processes."""
    chance, start = np.random.default_rng(0), Start(bundle.shared_weights())
    clients = [_client(bundle, user, chance, int(chance.integers(counts[0], counts[1] + 1))) for user in range(USERS)]
    setting = Setting(bundle, Federation("noise", tuple(clients), NONE))
    task = TaskPart(goal=COHORT, plan=PlanPart(batch_size=batch, epochs=epochs, lr=LOW))
    told = Scenario("bench", "bench", Data("smartwatch"), engine="cohort", task=task)
    spent: list[list[tuple[float, float]]] = [[], [], []]
    with ExitStack() as stack:
        backends = [OnnxBackend(bundle, abreast=abreast) for abreast in (False, True)]
        alone, abreast = [
            Stage.of(told, setting, backend, stack.enter_context(Pool(backend, WORKERS))) for backend in backends
        ]
        trainers = stack.enter_context(team(abreast, WORKERS - 1, folder))
        assert trainers.is_ready(60)
        ways = [partial(train, alone.pool), partial(train, abreast.pool), partial(trainers.train, wants_singles=False)]
        for turn in range(TURNS):
            cohort = [clients[at] for at in chance.permutation(USERS)[:COHORT]]
            for way, found in zip(ways, spent, strict=True):
                real, used = time.perf_counter(), processor_seconds()
                way(cohort, abreast.call(turn), start)
                found.append((time.perf_counter() - real, processor_seconds() - used))
    # A child's processor time comes in hundredths of a second: a mean over all turns, and not a median.
    return [(median(real for real, _ in found[3:]), fmean(used for _, used in found[3:])) for found in spent]


def _client(bundle: Bundle, user: int, chance: np.random.Generator, count: int) -> ClientData:
    def some(spec: TensorSpec) -> NDArray[np.generic]:
        shape = (count, *(size or 0 for size in spec.shape[1:]))
        return chance.integers(0, 3, shape) if spec.dtype == "int64" else chance.random(shape, np.float32)

    inputs, targets = bundle.manifest.inputs, bundle.manifest.targets
    examples = Examples({one.name: some(one) for one in inputs}, {one.name: some(one) for one in targets}, count)
    return ClientData(f"user{user}", examples, NONE)
