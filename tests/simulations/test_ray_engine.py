"""The ray engine comes to the cohort engine's weights, through Flower's simulation runtime."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from tests.simulations import tiny
from umbel.bundle import Bundle
from umbel.errors import BadInput, RuntimeFailure
from umbel.plan import Plan
from umbel.update import Update
from umbel.weights import Weights
from umbel_server.flower.simulation import Request, ray_of
from umbel_simulations.cohort import rounds
from umbel_simulations.cohort.clients import Start
from umbel_simulations.cohort.pool import Pool
from umbel_simulations.cohort.ray_engine import run, trained_by
from umbel_simulations.cohort.resident import OnnxBackend
from umbel_simulations.engines import Silent
from umbel_simulations.scenario import Algorithm, Data, Scenario

# A process of its own: Ray warns, and leaves threads behind.
PLAY = """
import json, sys, tempfile
from pathlib import Path
from umbel_simulations.engines import Silent, engine
from umbel_simulations.scenario import Data, PlanPart, Scenario, TaskPart

if __name__ == "__main__":
    task = TaskPart(rounds=2, goal=3, plan=PlanPart(lr=0.1, max_examples=32))
    found = {}
    model, data = "smartwatch", Data("smartwatch", users=4)
    if sys.argv[1:]:
        model, data = "digits", Data("own", folder=sys.argv[1])
    for name in ("cohort", "ray"):
        told = Scenario("watch", model, data, engine=name, seed=5, task=task)
        with tempfile.TemporaryDirectory() as folder:
            outcome = engine(name)(told, workers=2, progress=Silent(), folder=Path(folder))
        found[name] = [outcome.weights, outcome.accuracy, [one.train_loss for one in outcome.rounds]]
    from ray._common.usage.usage_lib import usage_stats_enabled
    found["told its maker"] = usage_stats_enabled()
    import ray
    try:
        ray.put("asked after the end")
    except ray.exceptions.RaySystemError:
        pass
    found["began anew"] = ray.is_initialized()
    print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize("own", [False, True], ids=["wearers", "one's own users"])
def test_rays_actors_come_to_the_same_weights_as_threads(tmp_path: Path, own: bool) -> None:
    program, chance = tmp_path / "play.py", np.random.default_rng(1)
    program.write_text(PLAY)
    for count in (20, 30, 40, 25) if own else ():
        x = chance.uniform(0, 16, (count, 64)).astype(np.float32)
        np.savez(tmp_path / f"user{count}.npz", x=x, y=chance.integers(0, 10, count))
    command = [sys.executable, str(program), *([str(tmp_path)] if own else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    ray, cohort = found["ray"], found["cohort"]
    assert ray[1:] == [pytest.approx(cohort[1]), pytest.approx(cohort[2])]
    # Threads train this model's clients abreast if it is the dense one: other kernels, and so other roundings.
    assert own or ray[0] == cohort[0]
    assert (found["told its maker"], found["began anew"]) == (False, False)


@pytest.mark.slow
def test_ctrl_c_ends_a_run_on_ray_that_waits_for_answers(tmp_path: Path) -> None:
    # As in a terminal: it listens to Ctrl-C, also where the tests run in the background and don't.
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    start = f"{listen}; from umbel_simulations.cli import main; main()"
    long = ("--engine", "ray", "--set", "task.rounds=100000", "-o", str(tmp_path / "run"))
    command = [sys.executable, "-c", start, "run", "digits-dirichlet", *long]
    with (tmp_path / "told").open("w+") as told:
        process = subprocess.Popen(command, stderr=told, start_new_session=True)
        try:
            while not any(tmp_path.glob("run/state/*")):
                assert process.poll() is None
                time.sleep(0.1)
            os.killpg(process.pid, signal.SIGINT)
            assert process.wait(timeout=60) == 130
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        told.seek(0)
        assert told.read().rstrip().endswith("Stopped; the same command goes on.")


@pytest.mark.parametrize("wants_singles", [False, True])
def test_whoever_answers_the_sum_is_the_same(tiny_bundle: Bundle, wants_singles: bool) -> None:
    clients = {client.name: client for client in tiny.setting(tiny_bundle, users=30).federation.clients}
    backend = OnnxBackend(tiny_bundle)
    call, start = rounds.Call(Plan(batch_size=4), "task", 1), Start(tiny_bundle.shared_weights())

    def ask(requests: Sequence[Request]) -> list[Update | None]:
        worker, found = backend.worker(), list[Update | None]()
        for request in requests:
            share = call.share(clients[str(request.config["client"])])
            report = rounds.report_of(worker, share, Start(request.weights))
            assert report is not None
            delta = Weights.from_vector(report.delta, request.weights.shapes)
            found.append(Update(delta, report.weight, report.count.metrics()))
        return found

    cohort = list(clients.values())
    there = trained_by(ask, "{}")(cohort, call, start, wants_singles=wants_singles).collected()
    with Pool(backend, 2) as pool:
        here = rounds.train(pool, cohort, call, start, wants_singles=wants_singles).collected()
    assert (there.count, there.weight) == (here.count, here.weight)
    assert there.metrics == pytest.approx(here.metrics)
    if not wants_singles:
        np.testing.assert_allclose(there.aggregate.total, here.aggregate.total, rtol=1e-5, atol=1e-4)  # type: ignore[union-attr]


def test_a_cluster_that_runs_is_joined_with_the_processors_that_it_has() -> None:
    assert ray_of(2, "")["num_cpus"] == 2
    with socket.create_server(("127.0.0.1", 0)) as cluster:
        address = f"127.0.0.1:{cluster.getsockname()[1]}"
        assert "num_cpus" not in ray_of(2, address), "Ray refuses to join with a number of processors"
    with pytest.raises(RuntimeFailure, match=f"no cluster of Ray answers at {address}"):
        ray_of(2, address)


def test_an_algorithm_that_ray_doesnt_run_is_refused(tmp_path: Path) -> None:
    told = Scenario("buffered", "smartwatch", Data("smartwatch"), engine="ray", algorithm=Algorithm("fedbuff"))
    with pytest.raises(BadInput, match='engine = "cohort"'):
        run(told, workers=1, progress=Silent(), folder=tmp_path)
