"""Clients that train abreast beside the same clients one after the other: whole cohorts, in turns, in one process.

The packaged nets for flights and digits, the reference 784-64-10, and 784-200-200-10 (McMahan et al.,
arXiv:1602.05629); 180 users with 50 examples of noise each, or 20 to 79, cohorts of 50, two workers.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch.nn.functional as F  # noqa: N812 - torch's own custom
from numpy.typing import NDArray
from torch import arange, manual_seed, nn, randn

from tests.benchmarks.bench_models import mlp
from tests.benchmarks.harness import Table
from umbel.bundle import Bundle
from umbel.manifest import TensorSpec
from umbel.plan import Plan
from umbel_client.examples import NONE, Examples
from umbel_models.compile import compile_model
from umbel_models.optimizers import SGD
from umbel_models.spec import ModelSpec
from umbel_models.zoo import bundle_path
from umbel_simulations.cohort import rounds
from umbel_simulations.cohort.clients import Start
from umbel_simulations.cohort.pool import Pool
from umbel_simulations.cohort.resident import OnnxBackend
from umbel_simulations.data import ClientData

USERS, COHORT, WORKERS, TURNS = 180, 50, 2, 21
RATE = {"lr": 0.01}
"""Low, as what is learnt is noise."""
COLUMNS = ("model", "batch", "epochs", "examples", "clients/s, one by one", "abreast", "cpu us, one by one", "abreast ")


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
                    alone, abreast = _measured(bundle, batch, epochs, (least, most))
                    rows.append((name, batch, epochs, some, COHORT / alone[0], COHORT / abreast[0]))
                    rows[-1] += (1e6 * alone[1] / COHORT, 1e6 * abreast[1] / COHORT)
                    ratios[f"times as many clients a second, {name}, {epochs} epochs of {some}"] = alone[0] / abreast[0]
                    ratios[f"times less processor time, {name}, {epochs} epochs of {some}"] = alone[1] / abreast[1]
    return Table("Clients abreast beside one after the other", COLUMNS, rows, ratios)


def _two_layers() -> ModelSpec:
    manual_seed(0)
    layers = nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)
    inputs, targets = {"x": randn(10, 784)}, {"y": arange(10)}
    return ModelSpec("2nn", nn.Sequential(*layers), F.cross_entropy, inputs, targets, optimizer=SGD(lr=0.01))


def _measured(bundle: Bundle, batch: int, epochs: int, counts: tuple[int, int]) -> list[tuple[float, float]]:
    """Real and processor seconds of a cohort: one after the other, and abreast."""
    chance, start = np.random.default_rng(0), Start(bundle.shared_weights())
    clients = [_client(bundle, user, chance, int(chance.integers(counts[0], counts[1] + 1))) for user in range(USERS)]
    plan = Plan(batch_size=batch, epochs=epochs, hyperparameters=RATE)
    pools = [Pool(OnnxBackend(bundle, abreast=abreast), WORKERS) for abreast in (False, True)]
    spent: list[list[tuple[float, float]]] = [[], []]
    for turn in range(TURNS):
        cohort = [clients[at] for at in chance.permutation(USERS)[:COHORT]]
        for pool, found in zip(pools, spent, strict=True):
            real, used = time.perf_counter(), time.process_time()
            rounds.train(pool, cohort, rounds.Call(plan, "task", turn), start)
            found.append((time.perf_counter() - real, time.process_time() - used))
    return [(median(real for real, _ in found[3:]), median(used for _, used in found[3:])) for found in spent]


def _client(bundle: Bundle, user: int, chance: np.random.Generator, count: int) -> ClientData:
    def some(spec: TensorSpec) -> NDArray[np.generic]:
        shape = (count, *(size or 0 for size in spec.shape[1:]))
        return chance.integers(0, 3, shape) if spec.dtype == "int64" else chance.random(shape, np.float32)

    inputs, targets = bundle.manifest.inputs, bundle.manifest.targets
    examples = Examples({one.name: some(one) for one in inputs}, {one.name: some(one) for one in targets}, count)
    return ClientData(f"user{user}", examples, NONE)
