"""Processes that train beside each other come to what threads come to, to the bit, and none outlives its run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tests.server.processes import wait_until
from tests.simulations import tiny
from umbel.bundle import Bundle
from umbel.errors import InputMismatch, Unavailable
from umbel.plan import Plan
from umbel_client.examples import Examples
from umbel_simulations.cohort import rounds
from umbel_simulations.cohort import team as teams
from umbel_simulations.cohort.algorithm import Stage
from umbel_simulations.cohort.clients import Start
from umbel_simulations.cohort.engine import play
from umbel_simulations.cohort.mapped import lay_out, take_up
from umbel_simulations.cohort.pool import Pool
from umbel_simulations.cohort.resident import OnnxBackend
from umbel_simulations.cohort.rounds import Call, train
from umbel_simulations.cohort.team import Team, others_worth, team
from umbel_simulations.data import ClientData, Federation
from umbel_simulations.engines import Silent
from umbel_simulations.scenario import Data, PlanPart, Scenario, StrategyPart, TaskPart

USERS, PATIENCE = 16, 60.0
PLAN = Plan(batch_size=4, epochs=2, hyperparameters={"lr": 0.2})


@pytest.fixture(autouse=True)
def four_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that sixteen clients are four parts on any machine."""
    monkeypatch.setattr(rounds, "_CORES", 4)


def scenario(plan: PlanPart | None = None, **task: object) -> Scenario:
    some = {"rounds": 8, "goal": USERS, "minimum": 2, "plan": plan or PlanPart(epochs=2, batch_size=4, lr=0.2), **task}
    return Scenario("tiny", "tiny", Data("smartwatch"), engine="cohort", task=TaskPart(**some))  # type: ignore[arg-type]


@contextmanager
def staged(bundle: Bundle, told: Scenario | None = None, *broken: ClientData) -> Iterator[Stage]:
    setting = tiny.setting(bundle, USERS)
    by_name = {client.name: client for client in (*setting.federation.clients, *broken)}
    setting = replace(setting, federation=Federation("tiny", tuple(by_name.values()), setting.federation.central))
    backend = OnnxBackend(bundle)
    with Pool(backend, 2) as pool:
        yield Stage.of(told or scenario(), setting, backend, pool)


@contextmanager
def ready(stage: Stage, others: int, folder: Path) -> Iterator[Team]:
    with team(stage, others, folder) as found:
        assert found.is_ready(PATIENCE)
        yield found


def with_nan(name: str) -> ClientData:
    own = tiny.examples(9, 1)
    x = own.inputs["x"].copy()
    x[3, 2] = np.nan
    return ClientData(name, Examples({"x": x}, own.targets, 9), own)


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("others", [1, 2, 3])
def test_a_team_of_any_size_comes_to_the_sum_of_threads_to_the_bit(
    tiny_bundle: Bundle, tmp_path: Path, others: int
) -> None:
    with staged(tiny_bundle) as stage, ready(stage, others, tmp_path) as found:
        assert len(rounds.in_parts(range(USERS), stage.pool.together)) == 4
        weights = tiny_bundle.shared_weights()
        for number in range(1, 4):
            cohort = rounds.chosen(stage.clients, 10 + number, 5, "tiny", number)
            call, start = stage.call(number), Start(weights)
            here = train(stage.pool, cohort, call, start)
            there = found.train(cohort, call, start, wants_singles=False)
            assert np.array_equal(here.total, there.total)
            assert (here.weight, here.count, here.loss, here.examples, here.silent) == (
                there.weight,
                there.count,
                there.loss,
                there.examples,
                there.silent,
            )
            weights = type(weights).from_vector(weights.to_vector() + here.total / here.weight, weights.shapes)


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_a_client_that_goes_to_nan_in_another_process_reports_nothing(
    tiny_bundle: Bundle, tmp_path: Path, clip: float
) -> None:
    told = scenario(PlanPart(epochs=1, batch_size=4, lr=0.2, clip_norm=clip))
    with staged(tiny_bundle, told, with_nan("user03")) as stage, ready(stage, 3, tmp_path) as found:
        call, start = stage.call(1), Start(tiny_bundle.shared_weights())
        here = train(stage.pool, stage.clients, call, start)
        there = found.train(stage.clients, call, start, wants_singles=False)
        assert (there.silent, there.count) == (here.silent, here.count) == (1, USERS - 1)
        assert np.isfinite(there.total).all()
        assert np.array_equal(here.total, there.total)


def test_single_updates_are_all_there(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with staged(tiny_bundle) as stage, ready(stage, 1, tmp_path) as found:
        start = Start(tiny_bundle.shared_weights())
        there = found.train(stage.clients, stage.call(1), start, wants_singles=True)
        assert len(there.singles) == USERS


def test_threads_train_until_all_processes_are_there(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with staged(tiny_bundle) as stage, team(stage, 1, tmp_path) as found:
        os.kill(found._others[0].pid, signal.SIGSTOP)
        assert os.getpgid(found._others[0].pid) != os.getpgid(0), "Ctrl-C is for this process, which ends the others"
        call, start = stage.call(1), Start(tiny_bundle.shared_weights())
        there = found.train(stage.clients, call, start, wants_singles=False)
        assert not found.is_ready()
        os.kill(found._others[0].pid, signal.SIGCONT)
        assert found.is_ready(PATIENCE)
        again = found.train(stage.clients, call, start, wants_singles=False)
        assert np.array_equal(there.total, again.total)


def test_what_a_process_refuses_is_raised_here_as_what_it_is(tiny_bundle: Bundle, tmp_path: Path) -> None:
    own = tiny.examples(6, 1)
    wrong = ClientData("user05", Examples({"x": own.inputs["x"][:, :3]}, own.targets, 6), own)
    with staged(tiny_bundle, None, wrong) as stage, ready(stage, 3, tmp_path) as found:
        parts = rounds.parts_of(stage.clients, stage.call(1), stage.pool.together)
        assert all(client.name != wrong.name for client in parts[0]), "this process would refuse it itself"
        pids = [other.pid for other in found._others]
        with pytest.raises(InputMismatch, match="'x'"):
            found.train(stage.clients, stage.call(1), Start(tiny_bundle.shared_weights()), wants_singles=False)
        assert all(map(is_gone, pids)), "an answer that was under way would be taken for the next one"


@pytest.mark.parametrize("when", ["before it is ready", "between two rounds", "in a round"])
def test_a_process_that_is_killed_is_told_with_what_to_do(tiny_bundle: Bundle, tmp_path: Path, when: str) -> None:
    with staged(tiny_bundle) as stage, team(stage, 2, tmp_path) as found:
        if when != "before it is ready":
            assert found.is_ready(PATIENCE)
        first, second = (other.pid for other in found._others)
        call: Call = stage.call(1)
        if when == "in a round":
            call = KillsWhenShared(call.plan, call.task, call.round)
            KillsWhenShared.pid = second
        else:
            os.kill(second, signal.SIGKILL)
        start = Start(tiny_bundle.shared_weights())
        with pytest.raises(Unavailable, match=rf"process {second} .*killed by signal 9.*--workers 1"):
            # Threads go on until the first is ready too; then it is seen that the second never will be.
            while True:
                found.train(stage.clients, call, start, wants_singles=False)
    assert is_gone(first)


class KillsWhenShared(Call):
    """A round in which another process is killed while this one draws its shares."""

    pid = 0

    def share(self, client: ClientData) -> rounds.Share:
        os.kill(self.pid, signal.SIGSTOP)
        os.kill(self.pid, signal.SIGKILL)
        return super().share(client)

    def __reduce__(self) -> tuple[type[Call], tuple[object, ...]]:
        return Call, (self.plan, self.task, self.round)


def test_a_whole_run_is_the_same_with_processes_and_leaves_none_of_them(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    trained = Team._trained

    def watched(self: Team, *given: object) -> object:
        seen.extend(other.pid for other in self._others)
        return trained(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(Team, "_trained", watched)
    monkeypatch.setattr(Team, "is_ready", lambda self, _ready=Team.is_ready: _ready(self, PATIENCE))
    monkeypatch.setattr(teams, "_WORTH", 0)
    setting, outcomes = tiny.setting(tiny_bundle, USERS), []
    for workers in (1, 2, 4):
        folder = tmp_path / str(workers)
        folder.mkdir()
        outcomes.append(play(scenario(), setting, workers=workers, progress=Silent(), folder=folder))
        assert len(set(seen)) == {1: 0, 2: 1, 4: 4}[workers]
        assert all(map(is_gone, seen))
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert outcomes[0].accuracy != outcomes[0].first_accuracy


def test_processes_end_when_their_run_is_killed(tiny_bundle: Bundle, tmp_path: Path) -> None:
    program = """
import sys, time
from pathlib import Path
from umbel.bundle import Bundle
from umbel_simulations.cohort.algorithm import Stage
from umbel_simulations.cohort.engine import backend_of
from umbel_simulations.cohort.pool import Pool
from umbel_simulations.cohort.team import team
from umbel_simulations.data import Federation
from umbel_simulations.scenario import Data, Scenario
from umbel_simulations.setting import Setting
setting = Setting(Bundle.open(Path(sys.argv[1])), Federation("nobody", (), None))
backend = backend_of(setting)
with Pool(backend, 1) as pool:
    stage = Stage.of(Scenario("tiny", "tiny", Data("smartwatch"), engine="cohort"), setting, backend, pool)
    with team(stage, 2, Path(sys.argv[2])) as found:
        assert found.is_ready(60)
        print(*(other.pid for other in found._others), flush=True)
        time.sleep(600)
"""
    bundle = next(iter(tiny_bundle.paths.values())).parent
    files = tmp_path / "files"
    files.mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", program, str(bundle), str(files)], stdout=subprocess.PIPE, text=True, env=environment
    ) as run:
        assert run.stdout is not None
        pids = [int(word) for word in run.stdout.readline().split()]
        assert len(pids) == 2
        assert not any(map(is_gone, pids))
        assert not list(files.iterdir()), "what is shared has no name"
        run.kill()
    wait_until(lambda: all(map(is_gone, pids)), "the processes are gone")


def test_processes_are_started_only_where_they_pay(tiny_bundle: Bundle) -> None:
    def worth(told: Scenario, workers: int = 4, **backend: bool) -> int:
        setting, trainer = tiny.setting(tiny_bundle, USERS), OnnxBackend(tiny_bundle, **backend)
        with Pool(trainer, 1) as pool:
            return others_worth(Stage.of(told, setting, trainer, pool), workers)

    long, krum = scenario(rounds=100_000), StrategyPart("Krum", {"num_malicious_nodes": 1})
    assert worth(long) == 3
    assert worth(long, workers=2) == 1
    assert worth(long, workers=9) == 3, "a cohort of sixteen is in four parts"
    assert worth(scenario(rounds=100_000, goal=7)) == 0, "one part"
    assert worth(long, workers=1) == 0
    assert worth(scenario()) == 0, "short"
    assert worth(long, abreast=False) == 0, "long calls: threads do as well"
    assert worth(scenario(rounds=100_000, strategy=krum, minimum=5)) == 0


def test_examples_that_are_too_many_to_lay_out_stay_with_threads(
    tiny_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with staged(tiny_bundle, scenario(rounds=100_000)) as stage:
        size = sum(teams._bytes_of(client) for client in stage.clients)
        assert size == sum(client.training.count * (4 * tiny.FEATURES + 8) for client in stage.clients)
        monkeypatch.setattr(teams, "_MOST_BYTES", size)
        assert others_worth(stage, 2) == 1
        monkeypatch.setattr(teams, "_MOST_BYTES", size - 1)
        assert others_worth(stage, 2) == 0


KINDS = st.sampled_from([np.float32, np.int64, np.uint8, np.bool_])


@settings(deadline=None, max_examples=50)
@given(
    st.dictionaries(st.text(), KINDS.flatmap(lambda kind: arrays.arrays(kind, arrays.array_shapes(min_dims=0)))),
    st.booleans(),
)
def test_what_is_laid_out_is_taken_up_the_same(value: dict[str, np.ndarray], turned: bool) -> None:  # type: ignore[type-arg]
    given = {name: array.T if turned else array for name, array in value.items()} | {"": np.zeros((0, 3))}
    with TemporaryFile() as file:
        lay_out((given, "rest"), file)
        found, rest = take_up(file.fileno())
    assert rest == "rest"
    assert found.keys() == given.keys()
    for name, array in given.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array, equal_nan=array.dtype == np.float32)


def test_arrays_that_are_taken_up_are_shared_and_cannot_be_changed() -> None:
    array = np.arange(1000.0)
    with TemporaryFile() as file:
        lay_out([array, np.ones(3, np.uint8), array + 1], file)
        found = take_up(file.fileno())
        written = os.pread(file.fileno(), 1 << 20, 0)
        at, later = written.index(array.tobytes()), written.index((array + 1).tobytes())
        assert at % 64 == later % 64 == 0
        os.pwrite(file.fileno(), np.float64(7).tobytes(), at)
    assert found[0][0] == 7, "a copy"
    with pytest.raises(ValueError, match="read-only"):
        found[0][0] = 1
