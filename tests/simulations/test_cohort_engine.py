"""The cohort engine plays whole scenarios: the same for any number of workers, and whether it was killed or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.simulations import tiny
from umbel.bundle import Bundle
from umbel.errors import BadInput, MalformedMessage, OutOfBounds
from umbel.update import Metrics
from umbel.weights import Weights
from umbel_client.examples import Examples
from umbel_models.optimizers import SGD
from umbel_server import flower
from umbel_simulations import judging
from umbel_simulations.cohort import checkpoint, ray_engine
from umbel_simulations.cohort.algorithm import Stage
from umbel_simulations.cohort.clients import Start
from umbel_simulations.cohort.engine import backend_of, play, run
from umbel_simulations.cohort.fedbuff import FedBuff
from umbel_simulations.cohort.personal import personalise
from umbel_simulations.cohort.pool import Pool
from umbel_simulations.cohort.resident import OnnxBackend
from umbel_simulations.cohort.rounds import Call, Cohort, chosen, train
from umbel_simulations.cohort.scaffold import Scaffold
from umbel_simulations.cohort.strategies import StrategyRounds
from umbel_simulations.data import ClientData
from umbel_simulations.engines import Engine, Silent
from umbel_simulations.outcome import Outcome
from umbel_simulations.scenario import Algorithm, Data, PlanPart, Scenario, StrategyPart, TaskPart
from umbel_simulations.scenario_file import changed
from umbel_simulations.world import Adversary, Shift

ALGORITHMS = {
    "FedAvg": (Algorithm(), StrategyPart()),
    "FedAdam": (Algorithm(), StrategyPart("FedAdam", {"eta": 0.05})),
    "FedYogi": (Algorithm(), StrategyPart("FedYogi", {"eta": 0.05})),
    "Krum": (Algorithm(), StrategyPart("Krum", {"num_malicious_nodes": 1})),
    "SCAFFOLD": (Algorithm("scaffold"), StrategyPart()),
    "FedBuff": (Algorithm("fedbuff", buffer=3), StrategyPart()),
}


class Killed(BaseException):
    """As if the process were killed."""


class KillAfter(Silent):
    def __init__(self, rounds: int) -> None:
        self.left = rounds

    def step(self, done: float, total: float, hours: float, message: str) -> None:
        self.left -= 1
        if not self.left:
            raise Killed


class Hurried:
    """A clock by which every round takes an hour, so that each is followed by a checkpoint."""

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        self._now += 3600
        return self._now


def scenario(algorithm: Algorithm | None = None, strategy: StrategyPart | None = None, rounds: int = 6) -> Scenario:
    plan, algorithm = PlanPart(epochs=1, batch_size=4, lr=0.2), algorithm or Algorithm()
    minimum = min(5, algorithm.buffer)
    task = TaskPart(rounds=rounds, goal=6, minimum=minimum, plan=plan, strategy=strategy or StrategyPart())
    return Scenario("tiny", "tiny", Data("smartwatch"), engine="cohort", task=task, algorithm=algorithm)


def played(told: Scenario, bundle: Bundle, folder: Path, workers: int = 2, progress: Silent | None = None) -> Outcome:
    folder.mkdir(exist_ok=True)
    return play(
        told, tiny.setting(bundle), workers=workers, progress=progress or Silent(), folder=folder, clock=Hurried()
    )


@pytest.mark.parametrize("name", ALGORITHMS)
def test_workers_and_kills_leave_no_trace_in_the_outcome(tiny_bundle: Bundle, tmp_path: Path, name: str) -> None:
    told = scenario(*ALGORITHMS[name])
    unbroken = played(told, tiny_bundle, tmp_path / "one", workers=1)
    for rounds in (2, 3):
        with pytest.raises(Killed):
            played(told, tiny_bundle, tmp_path / "killed", progress=KillAfter(rounds))
    # Killed in the second round, and in the third from there: three are on disk, and three are left.
    left = KillAfter(4)
    resumed = played(told, tiny_bundle, tmp_path / "killed", workers=3, progress=left)
    assert (resumed.digest(), left.left) == (unbroken.digest(), 1)
    assert [one.number for one in unbroken.rounds] == [1, 2, 3, 4, 5, 6]
    assert all(one.verdict == "accepted" for one in unbroken.rounds)


@pytest.mark.parametrize("name", ["FedAvg", "FedAdam", "FedYogi", "SCAFFOLD", "FedBuff"])
def test_every_algorithm_learns(tiny_bundle: Bundle, tmp_path: Path, name: str) -> None:
    outcome = played(scenario(*ALGORITHMS[name], rounds=25), tiny_bundle, tmp_path)
    assert outcome.accuracy is not None
    assert outcome.first_accuracy is not None
    assert outcome.accuracy > max(0.75, outcome.first_accuracy + 0.2)


def test_on_the_way_a_sample_is_judged_now_and_then_and_at_the_end_all(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "SAMPLE", 10)
    outcome = play(scenario(rounds=51), tiny.setting(tiny_bundle), workers=1, progress=Silent(), folder=tmp_path)
    looks = {one.number: one.accuracy for one in outcome.rounds if one.accuracy is not None}
    assert list(looks) == [*range(2, 51, 2), 51]
    assert looks.pop(51) == outcome.accuracy
    assert all(round(share * 10) == pytest.approx(share * 10) for share in looks.values()), "of 48 examples, ten"
    assert len(set(looks.values())) > 1


@pytest.mark.parametrize("way", ["fine-tune", "head", "interpolate"])
def test_personal_models_are_judged_on_each_users_own_examples(tiny_bundle: Bundle, tmp_path: Path, way: str) -> None:
    algorithm = Algorithm(personalisation=way, personal_epochs=2)  # type: ignore[arg-type]
    outcome = played(scenario(algorithm), tiny_bundle, tmp_path)
    plain = played(scenario(), tiny_bundle, tmp_path / "plain")
    assert outcome.weights == plain.weights
    assert outcome.per_device["personal_accuracy"].count == 12
    assert outcome.per_device["personal_accuracy"] != outcome.per_device["accuracy"]


def personal_models(bundle: Bundle, max_steps: int = 0, **choice: Any) -> list[Weights]:
    """What each user makes of the first version, by the weights that are judged."""
    told = changed(scenario(Algorithm(**choice)), {"task.plan.max_steps": max_steps})
    stage, judged = stage_of(bundle, told), list[Weights]()

    class Judge(OnnxBackend):
        def evaluate(self, weights: Weights, examples: Examples) -> Metrics:
            judged.append(weights)
            return super().evaluate(weights, examples)

    personalise(stage, bundle.shared_weights(), lambda setting, moving: Judge(setting.bundle, moving=moving), 1)
    return judged


def test_each_way_to_a_personal_model_moves_what_it_says(tiny_bundle: Bundle) -> None:
    base = tiny_bundle.shared_weights()
    tuned, heads, between = (
        personal_models(tiny_bundle, personalisation=way, personal_epochs=2)
        for way in ("fine-tune", "head", "interpolate")
    )
    for whole, head, half in zip(tuned, heads, between, strict=True):
        assert all((whole - base)[name].any() for name in base)
        assert {name for name in base if (head - base)[name].any()} == {"p_head.bias", "p_head.weight"}
        np.testing.assert_allclose((half - base).to_vector(), 0.5 * (whole - base).to_vector(), atol=1e-6)


def test_personal_training_has_epochs_and_a_rate_of_its_own(tiny_bundle: Bundle) -> None:
    base = tiny_bundle.shared_weights()
    plain, longer, slower = (
        [(one - base).norm() for one in personal_models(tiny_bundle, personalisation="fine-tune", **choice)]
        for choice in ({"personal_epochs": 1}, {"personal_epochs": 4}, {"personal_epochs": 1, "personal_lr": 0.002})
    )
    assert all(far > near for far, near in zip(longer, plain, strict=True))
    assert slower == pytest.approx([0.01 * one for one in plain], rel=0.5)
    unbound = personal_models(tiny_bundle, max_steps=1, personalisation="fine-tune", personal_epochs=1)
    assert [(one - base).norm() for one in unbound] == plain, "a round's most steps are the round's"


@pytest.mark.parametrize("kind", ["scaffold", "fedbuff"])
def test_a_servers_rate_scales_its_step(tiny_bundle: Bundle, kind: str) -> None:
    weights, moved = tiny_bundle.shared_weights(), []
    for rate in (1.0, 0.25):
        stage = stage_of(
            tiny_bundle,
            scenario(Algorithm(kind, server_lr=rate)),  # type: ignore[arg-type]
            with_drift=kind == "scaffold",
        )
        algorithm = Scaffold(stage) if kind == "scaffold" else FedBuff(stage)
        moved.append((algorithm.step(1, weights).weights - weights).to_vector())
    np.testing.assert_allclose(moved[1], 0.25 * moved[0], atol=1e-6)
    assert moved[0].any()


def test_too_few_reports_make_no_version(tiny_bundle: Bundle, tmp_path: Path) -> None:
    plan = PlanPart(batch_size=4, lr=1e30)
    task = TaskPart(rounds=2, goal=6, minimum=5, plan=plan)
    told = Scenario("tiny", "tiny", Data("smartwatch"), engine="cohort", task=task)
    outcome = played(told, tiny_bundle, tmp_path)
    assert [one.verdict for one in outcome.rounds] == ["abandoned", "abandoned"]
    assert outcome.accuracy == outcome.first_accuracy


def test_who_has_no_example_to_learn_from_is_not_asked(tiny_bundle: Bundle) -> None:
    setting, backend = tiny.setting(tiny_bundle), OnnxBackend(tiny_bundle)
    _, *others = setting.federation.clients
    nothing = ClientData("nothing", tiny.examples(0, 0), tiny.examples(4, 1))
    setting = replace(setting, federation=replace(setting.federation, clients=(nothing, *others)))
    assert list(Stage.of(scenario(), setting, backend, Pool(backend, 1)).clients) == others


def test_a_client_takes_as_long_as_what_it_trains_on(tiny_bundle: Bundle) -> None:
    plain = scenario()
    client = stage_of(tiny_bundle, plain).clients[5]
    assert client.training.count == 10

    def seconds(**plan: int) -> float:
        told = changed(plain, {f"task.plan.{key}": value for key, value in plan.items()})
        return stage_of(tiny_bundle, told).seconds(client)

    whole = seconds()
    assert seconds(epochs=3) == pytest.approx(3 * whole)
    assert seconds(max_examples=4, epochs=2) == pytest.approx(0.8 * whole)
    assert seconds(max_steps=1) == pytest.approx(whole / 3), "one of three batches"
    assert seconds(max_steps=9) == pytest.approx(whole), "there are only three"


@pytest.mark.parametrize("kind", ["strategy", "scaffold", "fedbuff"])
def test_where_nobody_has_an_example_to_learn_from_nothing_comes_of_a_round(tiny_bundle: Bundle, kind: str) -> None:
    told, weights = scenario(Algorithm(kind)), tiny_bundle.shared_weights()  # type: ignore[arg-type]
    nobody = replace(stage_of(tiny_bundle, told, with_drift=kind == "scaffold"), clients=())
    make = {"strategy": StrategyRounds, "scaffold": Scaffold, "fedbuff": FedBuff}[kind]
    found = make(nobody).step(1, weights)
    assert (found.verdict, found.reported, found.weights) == ("abandoned", 0, weights)


@pytest.mark.parametrize("kind", ["scaffold", "fedbuff"])
def test_a_step_that_overflows_makes_no_version_and_leaves_nothing_behind(tiny_bundle: Bundle, kind: str) -> None:
    told, weights = scenario(Algorithm(kind, server_lr=1e41)), tiny_bundle.shared_weights()  # type: ignore[arg-type]
    stage = stage_of(tiny_bundle, told, with_drift=kind == "scaffold")
    algorithm = Scaffold(stage) if kind == "scaffold" else FedBuff(stage)
    before = algorithm.memory()
    found = algorithm.step(1, weights)
    assert (found.verdict, found.reason, found.weights) == ("refused", "the step leads to NaN or infinity", weights)
    assert kind == "fedbuff" or algorithm.memory() == before


def test_reports_of_a_round_that_came_to_nothing_are_wasted(tiny_bundle: Bundle, tmp_path: Path) -> None:
    told = changed(scenario(rounds=2), {"task.goal": 6, "task.minimum": 6})
    setting = tiny.setting(tiny_bundle, users=5)
    outcome = play(told, setting, workers=1, progress=Silent(), folder=tmp_path)
    assert [(one.verdict, one.reported) for one in outcome.rounds] == [("abandoned", 5)] * 2
    assert outcome.trained == outcome.wasted == 10


def test_a_checkpoint_of_another_run_is_refused(tiny_bundle: Bundle, tmp_path: Path) -> None:
    played(scenario(rounds=1), tiny_bundle, tmp_path)
    with pytest.raises(BadInput, match="another scenario or seed"):
        played(scenario(rounds=2), tiny_bundle, tmp_path)
    (tmp_path / checkpoint.FILE).write_bytes(b"not one")
    with pytest.raises(MalformedMessage, match="delete it"):
        played(scenario(rounds=2), tiny_bundle, tmp_path)


@pytest.mark.parametrize("play_it", [run, ray_engine.run], ids=["cohort", "ray"])
def test_what_only_a_fleet_has_is_refused(tmp_path: Path, play_it: Engine) -> None:
    liars = replace(scenario(), adversaries=(Adversary("sign-flip", 0.1),))
    noise = {f"task.privacy.{key}": value for key, value in (("on", True), ("noise_multiplier", 1.0))}
    noise |= {"task.privacy.metric_bound": 10.0, "task.plan.clip_norm": 1.0}
    shifted = replace(scenario(), shifts=(Shift(1.0),))
    for told, what in (
        (liars, "adversaries"),
        (shifted, "shifts"),
        (changed(scenario(), noise), "noise_multiplier"),
    ):
        with pytest.raises(BadInput, match=f'{what}.*engine = "fleet"'):
            play_it(told, workers=1, progress=Silent(), folder=tmp_path)


def stage_of(bundle: Bundle, told: Scenario, *, with_drift: bool = False) -> Stage:
    setting = tiny.setting(bundle)
    backend = backend_of(setting, with_drift=with_drift)
    return Stage.of(told, setting, backend, Pool(backend, 1))


def test_scaffolds_directions_add_up(tiny_bundle: Bundle) -> None:
    """The server's direction is the mean of the clients', as all begin at zero."""
    stage = stage_of(tiny_bundle, scenario(Algorithm("scaffold")), with_drift=True)
    scaffold, weights = Scaffold(stage), tiny_bundle.shared_weights()
    for number in range(1, 5):
        weights = scaffold.step(number, weights).weights
    mean = sum(scaffold._clients.values()) / np.float32(len(stage.clients))
    np.testing.assert_allclose(scaffold._server, mean, atol=1e-5)


def test_scaffold_needs_momentum_switched_off(tmp_path: Path) -> None:
    """Then, and only then, an optimiser with a velocity is plain gradient descent."""
    bundle, plain = tiny.compiled(tmp_path / "velocity", SGD(momentum=0.9)), tiny.compiled(tmp_path / "plain", SGD())
    told = scenario(Algorithm("scaffold"))
    with pytest.raises(BadInput, match=r"task\.plan\.momentum = 0"):
        Scaffold(stage_of(bundle, told, with_drift=True))
    still = changed(told, {"task.plan.momentum": 0.0})
    weights = bundle.shared_weights()
    found = Scaffold(stage_of(bundle, still, with_drift=True)).step(1, weights).weights
    wanted = Scaffold(stage_of(plain, told, with_drift=True)).step(1, weights).weights
    np.testing.assert_allclose(found.to_vector(), wanted.to_vector(), atol=1e-6)


@pytest.mark.parametrize("rate", [0.0, 1e-50])
def test_scaffold_needs_a_rate(tiny_bundle: Bundle, rate: float) -> None:
    """Its directions are steps divided by their rate, in float32: those of no length would be no number."""
    stage = stage_of(tiny_bundle, scenario(Algorithm("scaffold")), with_drift=True)
    with pytest.raises(BadInput, match=r"set task\.plan\.lr"):
        Scaffold(replace(stage, plan=replace(stage.plan, hyperparameters={"lr": rate})))


def test_stale_updates_count_less(tiny_bundle: Bundle) -> None:
    """With a staleness exponent so large that a stale update counts nothing, fresh ones alone move the model."""
    told = scenario(Algorithm("fedbuff", buffer=2, staleness=200.0))
    buffered, weights = FedBuff(stage_of(tiny_bundle, told)), tiny_bundle.shared_weights()
    first = buffered.step(1, weights)
    assert first.weights != weights
    assert first.reported == 2
    second = buffered.step(2, first.weights)
    assert second.reported == 2
    assert second.weights == first.weights, "who was done first had begun with the model before"
    versions = [running.version for running in buffered._running]
    assert len(versions) == 5, "the place of the arrival that filled the buffer is taken after the step"
    assert set(versions) == {0, 1}
    weights = second.weights
    for number in range(3, 7):
        weights = buffered.step(number, weights).weights
    in_use = {running.version for running in buffered._running}
    assert set(buffered._models) == in_use, "a model that nobody trains from any more is let go"


def test_a_buffer_with_fewer_reports_than_the_task_asks_for_makes_no_version(tiny_bundle: Bundle) -> None:
    told = changed(scenario(Algorithm("fedbuff", buffer=3)), {"task.minimum": 3, "task.goal": 3})
    stage, weights = stage_of(tiny_bundle, told), tiny_bundle.shared_weights()
    endless = ClientData("user00", tiny.examples(5, 0), tiny.examples(4, 100))
    endless.training.inputs["x"][:] = np.inf
    found = FedBuff(replace(stage, clients=(endless, *stage.clients[1:3]))).step(1, weights)
    assert (found.verdict, found.reported, found.silent) == ("abandoned", 2, 1)
    assert found.reason == "2 reports, the task asks for 3"
    assert found.weights == weights
    with pytest.raises(OutOfBounds, match="a buffer of 3 never holds the 4 reports"):
        changed(told, {"task.minimum": 4})


def test_one_client_at_a_time_and_a_buffer_of_one_is_training_without_staleness(tiny_bundle: Bundle) -> None:
    told = scenario(Algorithm("fedbuff", buffer=1, staleness=200.0))
    one = changed(told, {"task.goal": 1, "task.minimum": 1})
    buffered, weights = FedBuff(stage_of(tiny_bundle, one)), tiny_bundle.shared_weights()
    for number in range(1, 5):
        before, weights = weights, buffered.step(number, weights).weights
        assert np.abs(weights.to_vector() - before.to_vector()).max() > 1e-3


def test_who_trains_twice_from_one_model_sees_its_examples_in_another_order(tiny_bundle: Bundle) -> None:
    weights, found = tiny_bundle.shared_weights(), []
    for times in (1, 2):
        told = changed(scenario(Algorithm("fedbuff", buffer=times)), {"task.minimum": 1, "task.goal": 1})
        stage = stage_of(tiny_bundle, told)
        found.append(FedBuff(replace(stage, clients=stage.clients[5:6])).step(1, weights).weights)
    assert found[0] != found[1], "else the mean of two would be the one"


def test_a_round_that_came_to_nothing_is_no_step_of_the_servers_optimiser(tiny_bundle: Bundle) -> None:
    """As in the product: Adam's correction of its first steps would be over before the first of them."""
    stage, lost = stage_of(tiny_bundle, scenario(*ALGORITHMS["FedAdam"])), 4

    def trains(cohort: Sequence[ClientData], call: Call, start: Start, *, wants_singles: bool) -> Cohort:
        late = Cohort(start, wants_singles)
        return late if call.round <= lost else train(stage.pool, cohort, call, start, wants_singles=wants_singles)

    weights = tiny_bundle.shared_weights()
    rounds = StrategyRounds(stage, trains)
    for number in range(1, lost + 1):
        assert rounds.step(number, weights).verdict == "abandoned"
    resumed = StrategyRounds(stage, trains)
    resumed.restore(rounds.memory())
    found = resumed.step(lost + 1, weights).weights
    cohort = chosen(stage.clients, stage.task.goal, stage.task.seed, stage.task.name, lost + 1)
    collected = train(stage.pool, cohort, stage.call(lost + 1), Start(weights)).collected()
    assert found == flower.apply(stage.task.strategy, b"", weights, collected, 1)[0]


def test_scaffolds_clients_forget_a_round_that_came_to_nothing(tiny_bundle: Bundle) -> None:
    stage = stage_of(tiny_bundle, scenario(Algorithm("scaffold")), with_drift=True)
    scaffold, weights = Scaffold(replace(stage, task=replace(stage.task, minimum=6))), tiny_bundle.shared_weights()
    weights = scaffold.step(1, weights).weights
    before = scaffold.memory()
    few = replace(stage, task=replace(stage.task, minimum=7, goal=7), clients=stage.clients[:6])
    starved = Scaffold(few)
    starved.restore(before)
    assert starved.step(2, weights).verdict == "abandoned"
    assert starved.memory() == before


def test_scaffolds_directions_are_those_of_training_that_wasnt_clipped(tiny_bundle: Bundle) -> None:
    plain, clipped = (
        scenario(Algorithm("scaffold")),
        changed(scenario(Algorithm("scaffold")), {"task.plan.clip_norm": 0.01}),
    )
    weights = tiny_bundle.shared_weights()
    free, held = (Scaffold(stage_of(tiny_bundle, told, with_drift=True)) for told in (plain, clipped))
    far, near = free.step(1, weights).weights, held.step(1, weights).weights
    assert (near - weights).norm() <= 0.0100001 < (far - weights).norm()
    np.testing.assert_array_equal(held._server, free._server)


def test_seconds_of_a_device_are_those_of_the_whole_run(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """As in a fleet, where most devices are asked now and then and some never."""
    told = changed(scenario(rounds=5), {"task.goal": 3, "task.minimum": 1, "population.speed_decades": 0.0})
    (tmp_path / "one").mkdir()
    outcome = played(told, tiny_bundle, tmp_path / "one")
    sessions, seconds = outcome.per_device["sessions"], outcome.per_device["seconds"]
    assert sessions.count == seconds.count == 12
    assert sessions.mean * 12 == outcome.sessions == 15
    chosen_each = [
        client
        for number in range(1, 6)
        for client in chosen(tiny.setting(tiny_bundle).federation.clients, 3, told.seed, told.name, number)
    ]
    rate = told.population.examples_per_second
    assert seconds.mean * 12 == pytest.approx(sum(one.training.count for one in chosen_each) / rate)


def test_a_plan_that_stops_early_takes_as_much_less_time(tiny_bundle: Bundle) -> None:
    """Six examples in batches of four: two steps an epoch, three epochs."""
    whole = changed(scenario(), {"task.plan.epochs": 3})
    stages = (stage_of(tiny_bundle, told) for told in (whole, changed(whole, {"task.plan.max_steps": 2})))
    long, short = (stage.seconds(stage.clients[1]) for stage in stages)
    assert short == pytest.approx(long / 3)


def test_a_memory_that_isnt_the_algorithms_is_refused(tiny_bundle: Bundle) -> None:
    stage = stage_of(tiny_bundle, scenario())
    for algorithm in (Scaffold(stage), FedBuff(stage)):
        with pytest.raises(MalformedMessage):
            algorithm.restore(b"something else")
