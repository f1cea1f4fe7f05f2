"""Two engines, one truth: a cohort of real devices in a fleet and the cohort engine come to the same global weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from umbel.identity import id_of_key
from umbel.weights import Weights
from umbel_simulations.cohort import checkpoint
from umbel_simulations.cohort.engine import name_of, play
from umbel_simulations.data import Federation
from umbel_simulations.engines import Silent
from umbel_simulations.fleet.engine import Run
from umbel_simulations.fleet.entropy import device_key
from umbel_simulations.fleet.house import MODEL, listening
from umbel_simulations.fleet.virtual_time import run as run_loop
from umbel_simulations.outcome import Outcome
from umbel_simulations.scenario import Data, PlanPart, Scenario, StrategyPart, TaskPart
from umbel_simulations.scratch import scratch
from umbel_simulations.setting import prepare
from umbel_simulations.world import Population

SEED, DEVICES, ROUNDS = 7, 5, 3
SMARTWATCH = Data("smartwatch", users=DEVICES, most_examples=40)
DIGITS = Data("digits", partition="dirichlet", users=DEVICES, most_examples=60)
WHOLE = PlanPart(epochs=2, batch_size=8, lr=0.05)
CASES = {
    "FedAvg": ("smartwatch", SMARTWATCH, WHOLE, StrategyPart()),
    "FedAdam": ("digits", DIGITS, WHOLE, StrategyPart("FedAdam", {"eta": 0.02})),
    "FedProx, clipped, few steps": (
        "smartwatch",
        SMARTWATCH,
        PlanPart(batch_size=16, lr=0.05, mu=0.2, max_steps=2, max_examples=25, clip_norm=0.05, max_weight=20.0),
        StrategyPart(),
    ),
    "every update by itself": ("digits", DIGITS, WHOLE, StrategyPart("FedMedian")),
}


class Kept(Run):
    """A fleet whose last version outlives it."""

    last: Weights

    def _outcome(self) -> Outcome:
        operations = self._house.parts.coordinator.operations
        self.last = operations.bundle(MODEL, 1 + ROUNDS).shared_weights()
        return super()._outcome()


def scenario(model: str, data: Data, plan: PlanPart, strategy: StrategyPart) -> Scenario:
    """Every device is always free and none is lost, so that each round's cohort is all of them."""
    people = Population(devices=DEVICES, availability="always", drop_out=0.0, check_in_hours=0.1)
    task = TaskPart(ROUNDS, DEVICES, DEVICES, 1.0, deadline_seconds=7200.0, plan=plan, strategy=strategy)
    return Scenario("same", model, data, seed=SEED, task=task, population=people)


def of_the_fleet(told: Scenario, folder: Path) -> tuple[Outcome, Weights]:
    runs, setting = [], prepare(told)
    with scratch(folder) as place, listening() as failures:

        async def played(run: Kept) -> Outcome:
            runs.append(run)
            return await run.play()

        outcome = run_loop(lambda loop: played(Kept(loop, told, setting, 1, Silent(), place, failures)))
    return outcome, runs[0].last


def of_the_cohort(told: Scenario, folder: Path) -> tuple[Outcome, Weights]:
    """The same users under the names of the fleet's devices: by these, each draws the order of its examples."""
    told = replace(told, engine="cohort")
    setting = prepare(told)
    names = [id_of_key(load_pem_private_key(device_key(SEED, index), None).public_key()) for index in range(DEVICES)]
    clients = tuple(replace(one, name=name) for one, name in zip(setting.federation.clients, names, strict=True))
    setting = replace(setting, federation=Federation("same", clients, setting.federation.central))
    outcome = play(told, setting, workers=2, progress=Silent(), folder=folder)
    kept = checkpoint.read(folder, name_of(told), setting.bundle.manifest.shared_shapes)
    assert kept is not None
    return outcome, kept.weights


QUICK = ("FedProx, clipped, few steps",)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_a_fleet_and_a_cohort_come_to_the_same_weights(tmp_path: Path, name: str) -> None:
    told = scenario(*CASES[name])
    (tmp_path / "fleet").mkdir()
    (tmp_path / "cohort").mkdir()
    fleet, wanted = of_the_fleet(told, tmp_path / "fleet")
    cohort, found = of_the_cohort(told, tmp_path / "cohort")
    assert [one.reported for one in fleet.rounds] == [one.reported for one in cohort.rounds] == [DEVICES] * ROUNDS
    start = prepare(told).bundle.shared_weights()
    for tensor in wanted:
        np.testing.assert_allclose(found[tensor], wanted[tensor], rtol=1e-3, atol=2e-5, err_msg=tensor)
    moved = np.abs(wanted.to_vector() - start.to_vector()).max()
    assert moved > 100 * np.abs(found.to_vector() - wanted.to_vector()).max()
    for there, here in zip(fleet.rounds, cohort.rounds, strict=True):
        assert there.train_loss == pytest.approx(here.train_loss, rel=1e-3)
    assert fleet.accuracy == pytest.approx(cohort.accuracy, abs=0.005)
