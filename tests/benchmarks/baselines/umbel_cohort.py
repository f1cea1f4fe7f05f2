"""Umbel's cohort engine: the rounds of `StrategyRounds` with FedAvg. Arguments: data, folder of a bundle, workers.

As in a long run: where processes pay, they are there before the first round.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.benchmarks.baselines.turns import BATCH, COHORT, RATE, Turns, load
from umbel.bundle import Bundle
from umbel_client.examples import NONE, Examples
from umbel_simulations.cohort.algorithm import Stage
from umbel_simulations.cohort.engine import backend_of
from umbel_simulations.cohort.pool import Pool
from umbel_simulations.cohort.rounds import evaluate
from umbel_simulations.cohort.strategies import StrategyRounds
from umbel_simulations.cohort.team import others_worth, team
from umbel_simulations.data import ClientData, Federation
from umbel_simulations.outcome import mean_of
from umbel_simulations.scenario import Data, PlanPart, Scenario, TaskPart
from umbel_simulations.setting import Setting

LONG = 10_000
"""Rounds of a run for which processes pay."""


def main() -> None:
    x, y, held_x, held_y = load()
    clients = tuple(
        ClientData(f"user-{user}", Examples({"x": x[user]}, {"y": y[user]}, len(y[user])), NONE)
        for user in range(len(x))
    )
    held_out = Examples({"x": held_x}, {"y": held_y}, len(held_y))
    setting = Setting(Bundle.open(Path(sys.argv[2])), Federation("bench", clients, held_out))
    plan = PlanPart(batch_size=BATCH, lr=RATE)
    task = TaskPart(rounds=LONG, goal=min(COHORT, len(x)), plan=plan)
    told = Scenario("bench", "bench", Data("smartwatch"), engine="cohort", task=task)
    backend = backend_of(setting)
    workers = int(sys.argv[3])
    with ExitStack() as stack:
        pool = stack.enter_context(Pool(backend, workers))
        stage = Stage.of(told, setting, backend, pool)
        others, folder = others_worth(stage, workers), Path(stack.enter_context(TemporaryDirectory()))
        trainers = stack.enter_context(team(stage, others, folder))
        assert trainers.is_ready(60) == (others > 0)
        rounds = StrategyRounds(stage, trainers.train)
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
