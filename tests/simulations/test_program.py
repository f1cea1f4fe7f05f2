"""A Flower `ServerApp` runs over a scenario's clients as over devices: by the task's rules, and alike every time."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

# First, because it loads flwr quietly.
from umbel_server.flower.grid import DeviceGrid  # noqa: F401

# isort: split
import flwr.serverapp.strategy as flower
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp

from tests.simulations import tiny
from umbel.bundle import Bundle
from umbel.errors import BadInput, OutOfBounds
from umbel.weights import Weights
from umbel_client.examples import Examples
from umbel_simulations.cohort import program
from umbel_simulations.cohort.algorithm import Stage
from umbel_simulations.cohort.engine import play
from umbel_simulations.cohort.pool import Pool
from umbel_simulations.cohort.resident import OnnxBackend
from umbel_simulations.cohort.strategies import StrategyRounds
from umbel_simulations.data import ClientData, Federation
from umbel_simulations.engines import Silent
from umbel_simulations.outcome import Outcome
from umbel_simulations.scenario import Algorithm, Data, PlanPart, PrivacyPart, Scenario, TaskPart
from umbel_simulations.setting import Setting
from umbel_simulations.world import Population

USERS = 12
Main = Callable[[Grid, Context], None]


def scenario(app: str = "here:app", **task: Any) -> Scenario:
    some = {"rounds": 3, "goal": USERS, "minimum": 2, "plan": PlanPart(epochs=2, batch_size=4, lr=0.2), **task}
    algorithm = Algorithm(app=app) if app else Algorithm()
    slow = Population(examples_per_second=1.0)
    return Scenario(
        "tiny", "tiny", Data("smartwatch"), engine="cohort", task=TaskPart(**some), algorithm=algorithm, population=slow
    )


def arrays(weights: Weights) -> ArrayRecord:
    return ArrayRecord({name: Array(np.array(array)) for name, array in weights.arrays.items()})


def learnt(result: flower.Result) -> Weights:
    return Weights({name: array.numpy() for name, array in result.arrays.items()})


@pytest.fixture
def played(tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Plays a scenario whose app is the main function given."""

    def played(main: Main, told: Scenario | None = None, setting: Setting | None = None, workers: int = 2) -> Outcome:
        app = ServerApp()
        app.main()(main)
        monkeypatch.setattr(program, "load_app", lambda name: app)
        setting = setting or tiny.setting(tiny_bundle, USERS)
        return play(told or scenario(), setting, workers=workers, progress=Silent(), folder=tmp_path)

    return played


def fedavg(start: Weights, rounds: int = 3, into: list[flower.Result] | None = None, **chosen: Any) -> Main:
    def main(grid: Grid, context: Context) -> None:
        strategy = flower.FedAvg(**{"min_available_nodes": 2, **chosen})
        result = strategy.start(grid, arrays(start), num_rounds=rounds)
        if into is not None:
            into.append(result)

    return main


def test_fedavg_over_all_clients_comes_to_what_the_engines_own_rounds_come_to(
    played: Callable[..., Outcome], tiny_bundle: Bundle
) -> None:
    results: list[flower.Result] = []
    played(fedavg(tiny_bundle.shared_weights(), into=results, fraction_evaluate=0.0))
    own = played_plainly(tiny_bundle)
    for name, array in learnt(results[0]).arrays.items():
        np.testing.assert_allclose(array, own[name], atol=1e-6)


def played_plainly(bundle: Bundle) -> Weights:
    backend = OnnxBackend(bundle)
    with Pool(backend, 1) as pool:
        rounds = StrategyRounds(Stage.of(scenario(""), tiny.setting(bundle, USERS), backend, pool))
        weights = bundle.shared_weights()
        for number in (1, 2, 3):
            weights = rounds.step(number, weights).weights
        return weights


def test_a_round_is_worth_what_the_next_message_shows(played: Callable[..., Outcome], tiny_bundle: Bundle) -> None:
    outcome = played(fedavg(tiny_bundle.shared_weights()))
    assert [(one.verdict, one.invited, one.reported) for one in outcome.rounds] == [("accepted", USERS, USERS)] * 3
    assert outcome.rounds[-1].accuracy == outcome.accuracy, "the last message, to judge, had the last weights"
    assert outcome.accuracy > outcome.first_accuracy + 0.2
    assert outcome.sessions == 3 * USERS
    assert outcome.hours == outcome.rounds[-1].closed_hour > 0
    assert [one.opened_hour for one in outcome.rounds] == [0.0, *(one.closed_hour for one in outcome.rounds[:-1])]
    unseen = played(fedavg(tiny_bundle.shared_weights(), fraction_evaluate=0.0))
    assert [one.accuracy is None for one in unseen.rounds] == [False, False, True]
    assert unseen.accuracy == unseen.rounds[1].accuracy, "nobody was sent what came of the last round"


def test_any_number_of_workers_and_any_chance_of_before_tell_the_same(
    played: Callable[..., Outcome], tiny_bundle: Bundle
) -> None:
    told = []
    for workers in (1, 2):
        random.seed(workers)
        np.random.seed(workers)
        before = random.getstate(), np.random.get_state()[1].tolist()
        told.append(
            played(fedavg(tiny_bundle.shared_weights(), fraction_train=0.5, fraction_evaluate=0.5), workers=workers)
        )
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before, "the process has its own chance back"
    assert told[0] == told[1]
    assert {one.invited for one in told[0].rounds} == {USERS // 2}
    assert told[0].rounds[0].closed_hour * 3600 < TaskPart().deadline_seconds, "all who were asked are enough"


def test_the_quickest_count_up_to_the_goal_and_none_after_the_deadline(
    played: Callable[..., Outcome], tiny_bundle: Bundle
) -> None:
    main = fedavg(tiny_bundle.shared_weights(), rounds=1, fraction_evaluate=0.0)
    whole = played(main)
    (some,) = played(main, scenario(goal=5)).rounds
    assert (some.invited, some.reported) == (7, 5), "as many as a coordinator would let in"
    for goal in (3, 5, 8):
        (few,) = played(main, scenario(goal=goal, over_selection=5.0)).rounds
        assert (few.invited, few.reported, few.verdict) == (USERS, goal, "accepted")
        assert few.closed_hour < whole.rounds[0].closed_hour
        deadline = few.closed_hour * 3600 * 1.0001
        (late,) = played(main, scenario(deadline_seconds=deadline)).rounds
        assert late.reported == goal
        assert late.closed_hour * 3600 == pytest.approx(deadline), "those who are slower were waited for in vain"


def test_a_round_with_too_few_in_time_comes_to_nothing(played: Callable[..., Outcome], tiny_bundle: Bundle) -> None:
    (none,) = played(fedavg(tiny_bundle.shared_weights(), rounds=1), scenario(deadline_seconds=1.0)).rounds
    assert (none.reported, none.verdict, none.train_loss, none.accuracy) == (0, "abandoned", None, None)
    assert "task.minimum" in none.reason


def test_clients_with_fewer_examples_than_a_message_asks_for_report_nothing(
    played: Callable[..., Outcome], tiny_bundle: Bundle
) -> None:
    def main(grid: Grid, context: Context) -> None:
        config = ConfigRecord({"min_examples": 10})
        flower.FedAvg().start(grid, arrays(tiny_bundle.shared_weights()), 1, train_config=config)

    (one,) = played(main).rounds
    assert (one.invited, one.reported) == (USERS, USERS - 5)


def test_no_more_judge_than_the_goal(played: Callable[..., Outcome], tiny_bundle: Bundle) -> None:
    counts: list[int] = []

    class Counting(flower.FedAvg):
        def aggregate_evaluate(self, server_round: int, replies: Any) -> Any:
            counts.append(len(replies := list(replies)))
            return super().aggregate_evaluate(server_round, replies)

    def main(grid: Grid, context: Context) -> None:
        Counting().start(grid, arrays(tiny_bundle.shared_weights()), 1)

    played(main, scenario(goal=5))
    assert counts == [5]


def test_a_program_sees_each_clients_reply_with_what_a_device_tells(
    played: Callable[..., Outcome], tiny_bundle: Bundle
) -> None:
    seen: list[dict[str, Any]] = []

    class Curious(flower.FedAvg):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            replies = list(replies)
            seen.extend(dict(next(iter(reply.content.metric_records.values()))) for reply in replies)
            return super().aggregate_train(server_round, replies)

    def main(grid: Grid, context: Context) -> None:
        config = ConfigRecord({"epochs": 1, "lr": 0.1})
        Curious(fraction_evaluate=0.0).start(grid, arrays(tiny_bundle.shared_weights()), 1, train_config=config)

    played(main)
    assert sorted(one["num-examples"] for one in seen) == [float(5 + user) for user in range(USERS)]
    assert {*seen[0]} == {"num-examples", "train_loss", "loss", "correct"}


def test_a_client_that_goes_to_nan_is_left_out(played: Callable[..., Outcome], tiny_bundle: Bundle) -> None:
    setting = tiny.setting(tiny_bundle, USERS)
    own = setting.federation.clients[3]
    x = own.training.inputs["x"].copy()
    x[0] = np.nan
    broken = ClientData(own.name, Examples({"x": x}, own.training.targets, own.training.count), own.held_back)
    clients = tuple(broken if one is own else one for one in setting.federation.clients)
    setting = replace(setting, federation=Federation("tiny", clients, setting.federation.central))
    outcome = played(fedavg(tiny_bundle.shared_weights()), setting=setting)
    assert {one.reported for one in outcome.rounds} == {USERS - 1}
    assert outcome.accuracy > outcome.first_accuracy


def test_what_no_device_could_do_is_refused(played: Callable[..., Outcome], tiny_bundle: Bundle) -> None:
    start = tiny_bundle.shared_weights()

    def other(**config: Any) -> Main:
        record = ConfigRecord(config)
        return lambda grid, context: flower.FedAvg().start(grid, arrays(start), 1, train_config=record) and None

    with pytest.raises(OutOfBounds, match="heat"):
        played(other(heat=1.0))
    with pytest.raises(OutOfBounds, match=r"task\.minimum is 9"):
        played(fedavg(start, fraction_train=0.5), scenario(minimum=9))
    with pytest.raises(BadInput, match="asked no client to train"):
        played(lambda grid, context: None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"algorithm": {"kind": "fedbuff"}}, "runs the rounds itself"),
        ({"engine": "ray"}, 'needs engine = "cohort"'),
        ({"engine": "fleet"}, "the fleet runs the product"),
        ({"task": {"privacy": PrivacyPart(on=True)}}, "sees single updates"),
        ({"algorithm": {"app": "", "app_config": {"rounds": 3}}}, r"no algorithm\.app"),
    ],
)
def test_a_scenario_that_an_app_cannot_lead_is_refused(change: dict[str, Any], words: str) -> None:
    told = scenario()
    task, algorithm = (
        replace(told.task, **change.get("task", {})),
        replace(told.algorithm, **change.get("algorithm", {})),
    )
    with pytest.raises(BadInput, match=words):
        replace(told, task=task, algorithm=algorithm, engine=change.get("engine", "cohort"))


APP = """
import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from umbel.bundle import Bundle
from umbel_models.zoo import BUNDLES

app = ServerApp()


@app.main()
def main(grid, context):
    weights = Bundle.open(BUNDLES / "digits").shared_weights()
    arrays = ArrayRecord({name: Array(np.array(array)) for name, array in weights.arrays.items()})
    FedAvg(fraction_train=0.2).start(grid, arrays, num_rounds=int(context.run_config["num-server-rounds"]))
"""


@pytest.mark.slow
def test_the_command_runs_the_app_in_the_folder_mended_if_need_be_and_sees_that_it_changed(tmp_path: Path) -> None:
    (tmp_path / "my_app.py").write_text(APP.replace("    weights =", "    raise ValueError('mine')\n    weights ="))
    sets = ["algorithm.app=my_app:app", "algorithm.app_config.num-server-rounds=2"]
    command = [
        Path(sys.executable).parent / "umbel-simulate",
        "run",
        "digits-dirichlet",
        "--engine",
        "cohort",
        "-o",
        "out",
    ]
    command += [word for one in sets for word in ("--set", one)]

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env={**os.environ})

    failed = run()
    assert failed.returncode == 1
    assert "ValueError: mine" in failed.stderr
    (tmp_path / "my_app.py").write_text(APP)
    done = run()
    assert done.returncode == 0, done.stderr
    assert "2 of 2" in done.stdout
    (tmp_path / "my_app.py").write_text(APP + "# another\n")
    again = run()
    assert again.returncode != 0
    assert "files have changed" in again.stderr
    command[-3] = "algorithm.app=nowhere:app"
    command[command.index("out")] = "other"
    missing = run()
    assert missing.returncode != 0
    assert "can't load 'nowhere:app'" in missing.stderr
