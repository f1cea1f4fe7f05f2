"""Runs that were killed outright, with no moment to tidy up: the same command goes on, and nothing is left of it."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from umbel.randomness import generator

FLEET = ("coordinator-crashes", "--set", "task.rounds=4")
COHORT = ("digits-dirichlet", "--set", "task.rounds=60", "--set", "data.users=10", "--set", "task.goal=10")


def command(folder: Path, *arguments: str, verb: str = "run") -> list[str]:
    # Sixty rounds take a second on some machines: checkpoints are written after each round, not every few seconds.
    often = "from umbel_simulations.cohort import engine; engine._CHECKPOINT_SECONDS = 0.0"
    start = f"{often}; from umbel_simulations.cli import main; main()"
    return [sys.executable, "-c", start, verb, *arguments, "--json", "-o", str(folder)]


def digest(folder: Path, *arguments: str) -> str:
    done = subprocess.run(command(folder, *arguments), capture_output=True, text=True, timeout=600, check=True)
    return str(json.loads(done.stdout)["digest"])


@dataclass(frozen=True)
class Whole:
    """A run that nobody disturbed: its folder, its digest, and how long it took."""

    folder: Path
    digest: str
    seconds: float


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> "Undisturbed":
    """Undisturbed runs on one thread, each played once for all tests here."""

    @cache
    def played(arguments: tuple[str, ...]) -> Whole:
        folder, began = tmp_path_factory.mktemp("whole"), time.monotonic()
        return Whole(folder, digest(folder, *arguments, "--workers", "1"), time.monotonic() - began)

    return played


Undisturbed = Callable[[tuple[str, ...]], Whole]


def kill_when_there(mark: Path, folder: Path, *arguments: str) -> None:
    """Start a run and kill it (SIGKILL) once a file of its state is there."""
    with subprocess.Popen(command(folder, *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while not mark.is_file():
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.02)
        process.kill()
    assert not (folder / "report.json").exists()


@pytest.mark.slow
def test_a_cohort_goes_on_from_its_checkpoint_bit_for_bit(tmp_path: Path, whole: Undisturbed) -> None:
    checkpoint = tmp_path / "killed/state/cohort.checkpoint"
    kill_when_there(checkpoint, tmp_path / "killed", *COHORT)
    assert digest(tmp_path / "killed", *COHORT) == whole(COHORT).digest
    assert not checkpoint.parent.exists()


@pytest.mark.slow
def test_a_fleet_is_played_again_bit_for_bit_and_leaves_nothing_in_memory(tmp_path: Path, whole: Undisturbed) -> None:
    scratch = tmp_path / "killed/state/scratch"
    kill_when_there(scratch, tmp_path / "killed", *FLEET)
    left = left_by(scratch)
    assert digest(tmp_path / "killed", *FLEET) == whole(FLEET).digest
    assert not left.exists() and not scratch.exists()


@pytest.mark.slow
def test_beginning_anew_after_a_kill_leaves_nothing_in_memory_either(tmp_path: Path) -> None:
    scratch = tmp_path / "killed/state/scratch"
    kill_when_there(scratch, tmp_path / "killed", *FLEET)
    left = left_by(scratch)
    # Another run in the same folder, by another engine: it knows nothing of the first one's files.
    digest(tmp_path / "killed", "digits-dirichlet", "--set", "task.rounds=1", "--fresh")
    assert not left.exists() and not scratch.exists()


def left_by(scratch: Path) -> Path:
    """The folder that a killed fleet left."""
    left = Path(scratch.read_text("utf-8"))
    assert left.is_dir(), "a kill leaves the run's own files behind"
    return left


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [COHORT, FLEET], ids=["cohort", "fleet"])
def test_a_run_that_is_killed_again_and_again_tells_in_the_end_what_an_unbroken_one_tells(
    tmp_path: Path, arguments: tuple[str, ...], whole: Undisturbed
) -> None:
    """At any moment: while it imports, plays, writes its report, or clears away."""
    chance, killed = generator("killer", *arguments), tmp_path / "killed"
    undisturbed = whole(arguments)
    for _ in range(3):
        with subprocess.Popen(command(killed, *arguments, "--workers", "2"), stdout=subprocess.DEVNULL) as process:
            with suppress(subprocess.TimeoutExpired):
                process.wait(chance.uniform(0.3, 1.1) * undisturbed.seconds)
            process.kill()
    assert digest(killed, *arguments, "--workers", "2") == undisturbed.digest
    reports = [json.loads((run / "report.json").read_bytes()) for run in (killed, undisturbed.folder)]
    assert reports[0]["outcome"] == reports[1]["outcome"]
    assert {path.name for path in killed.iterdir()} == {"scenario.json", "report.json", "report.html"}


@pytest.mark.slow
def test_a_sweep_that_is_killed_takes_its_processes_along_and_goes_on(tmp_path: Path) -> None:
    grid = (*COHORT, "--over", "task.plan.lr=0.02,0.05,0.1", "--parallel", "2")
    with subprocess.Popen(command(tmp_path / "grid", *grid, verb="sweep"), stdout=subprocess.DEVNULL) as process:
        while len(list(tmp_path.glob("grid/*/state"))) < 2:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.02)
        children = children_of(process.pid)
        process.kill()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{child}/cmdline").exists() for child in children):
        assert time.monotonic() < deadline, "processes that nobody asked for any more go on"
        time.sleep(0.05)
    told = subprocess.run(command(tmp_path / "grid", *grid, verb="sweep"), capture_output=True, timeout=600, check=True)
    assert [row["verdict"] for row in json.loads(told.stdout)] == ["go"] * 3
    assert not list(tmp_path.glob("grid/*/state"))


def children_of(process: int) -> list[str]:
    return Path(f"/proc/{process}/task/{process}/children").read_text().split()
