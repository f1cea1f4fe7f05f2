"""Umbel's cohort engine: the rounds of `StrategyRounds` with FedAvg. Arguments: data, folder of a bundle, workers."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.benchmarks.baselines.turns import BATCH, COHORT, RATE, Turns, load
from umbel.bundle import Bundle
from umbel_client.examples import NONE, Examples
from umbel_simulations.cohort.algorithm import Stage
from umbel_simulations.cohort.engine import backend_of
from umbel_simulations.cohort.pool import Pool
from umbel_simulations.cohort.rounds import evaluate
from umbel_simulations.cohort.strategies import StrategyRounds
from umbel_simulations.data import ClientData, Federation
from umbel_simulations.outcome import mean_of
from umbel_simulations.scenario import Data, PlanPart, Scenario, TaskPart
from umbel_simulations.setting import Setting


def main() -> None:
    x, y, held_x, held_y = load()
    clients = tuple(
        ClientData(f"user-{user}", Examples({"x": x[user]}, {"y": y[user]}, len(y[user])), NONE)
        for user in range(len(x))
    )
    held_out = Examples({"x": held_x}, {"y": held_y}, len(held_y))
    setting = Setting(Bundle.open(Path(sys.argv[2])), Federation("bench", clients, held_out))
    plan = PlanPart(batch_size=BATCH, lr=RATE)
    task = TaskPart(rounds=1, goal=min(COHORT, len(x)), plan=plan)
    told = Scenario("bench", "bench", Data("smartwatch"), engine="cohort", task=task)
    backend = backend_of(setting)
    with Pool(backend, int(sys.argv[3])) as pool:
        rounds = StrategyRounds(Stage.of(told, setting, backend, pool))
        weights, turns, number = setting.bundle.shared_weights(), Turns(), 0
        turns.ready()
        while True:
            number += 1
            step = rounds.step(number, weights)
            assert step.verdict == "accepted", step.reason
            weights = step.weights

            def accuracy(weights=weights) -> float:  # type: ignore[no-untyped-def]
                return mean_of(evaluate(pool, backend, weights, held_out), "correct") or 0.0

            turns.round_done(accuracy)


if __name__ == "__main__":
    main()
