"""`umbel-simulate`: real runs of the cohort engine, small; what goes wrong is told with an exit code of its own."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from umbel.errors import AlreadyExists, BadInput, MalformedMessage, NotFound, UmbelError, WrongState
from umbel_simulations import cli, runs, terminal
from umbel_simulations.engines import Silent
from umbel_simulations.scenario import Scenario
from umbel_simulations.scenario_file import changed, find
from umbel_simulations.sweep import name_of, pair_of, points, value_of, values_of
from umbel_simulations.terminal import Bar

Told = Callable[..., tuple[int, str, str]]
SMALL = ("--set", "task.rounds=4", "--set", "data.users=10", "--set", "thresholds.accepted_rounds=4")


@pytest.fixture
def simulate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Told:
    """Run the program in an empty folder: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def told(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["umbel-simulate", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return told


def small(**values: object) -> Scenario:
    scenario = find("digits-dirichlet")
    return changed(scenario, {"task.rounds": 6, "data.users": 10, "task.goal": 10, **values})


def test_run_writes_a_page_that_needs_nothing_else_and_its_json(simulate: Told, tmp_path: Path) -> None:
    code, out, _ = simulate("run", "digits-dirichlet", *SMALL, "--json", "-o", "mine")
    assert code == 0
    found = json.loads(out)
    assert (found["accepted rounds"], found["rounds"], found["wasted"]) == (4, 4, None)
    assert 0 < found["accuracy"] < 1
    page = (tmp_path / "mine/report.html").read_text()
    assert "<svg" in page and "Accuracy over rounds" in page
    assert not any(word in page for word in ("http://", "https://", "src=", "<script", "@import", "url("))
    assert runs.read(tmp_path / "mine").outcome.digest() == json.loads(out)["digest"]
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == [
        "report.html",
        "report.json",
        "scenario.json",
    ]


def test_go_is_0_and_no_go_is_1(simulate: Told) -> None:
    code, out, _ = simulate("go-no-go", "digits-dirichlet", *SMALL, "--set", "thresholds.accuracy=0.1", "-o", "run")
    assert (code, out.splitlines()[0].strip()) == (1, "no-go"), "four rounds can't reach the fairness floor"
    assert "fairness floor" in out and "fails" in out
    easy = ("--set", "thresholds.accuracy=0.1", "--set", "thresholds.fairness_floor=0.0", "--fresh")
    assert simulate("go-no-go", "digits-dirichlet", *SMALL, *easy, "-o", "run")[0] == 0
    code, out, _ = simulate("go-no-go", "run", "--json")
    assert (code, json.loads(out)["go"]) == (0, True)
    assert simulate("go-no-go", "run", "--seed", "3")[0] == 2


def test_what_makes_no_sense_is_2(simulate: Told) -> None:
    for arguments, told in (
        (("run", "smartwacht"), "did you mean 'smartwatch'"),
        (("run", "smartwatch", "--set", "task.gaol=3"), "did you mean 'goal'"),
        (("run", "smartwatch", "--set", "task.goal"), "write it as"),
        (("run", "smartwatch", "--engine", "flete"), "engine is 'flete'"),
        (("compare", "nowhere"), "no finished run"),
        (("sweep", "smartwatch", "--over", "task.goal=0,1"), "task.goal is 0"),
        (("sweep", "smartwatch", "--over", "seed=1,2,1"), "seed gets 1 twice"),
        (("sweep", "smartwatch", "--over", "seed=1", "--over", "seed=2"), "name all its values at once"),
        (("run", "smartwatch", "--seed", "-1"), "Invalid value"),
    ):
        code, _, err = simulate(*arguments)
        assert (code, told in err) == (2, True), err


def test_sweep_plays_a_grid_and_compare_puts_its_runs_side_by_side(simulate: Told, tmp_path: Path) -> None:
    grid = (
        "--over", "data.alpha=0.1,10", "--over", "data.partition=dirichlet", "-o", "grid", "--parallel", "1",
        "--over", "task.strategy={name='FedAvgM', arguments={server_momentum=0.5}}",
    )  # fmt: skip
    code, out, err = simulate("sweep", "digits-dirichlet", *SMALL, *grid, "--json")
    assert (code, [row["data.alpha"] for row in json.loads(out)]) == (0, [0.1, 10]), err
    folders = sorted(str(path) for path in (tmp_path / "grid").iterdir())
    code, out, _ = simulate("compare", *folders, "-o", "both.html")
    assert code == 0 and "accepted rounds" in out
    shutil.copytree(folders[0], tmp_path / "run [red] of [link=x]")
    assert "run [red] of [link=x]" in simulate("compare", "run [red] of [link=x]")[1], "brackets are no markup"
    assert (tmp_path / "both.html").read_text().count("<polyline") == 10
    code, out, _ = simulate("sweep", "digits-dirichlet", *SMALL, *grid)
    assert code == 0 and "data.alpha" in out and '{"name": "FedAvgM"' in out
    code, _, err = simulate("sweep", "digits-dirichlet", *SMALL, *grid, "--seed", "2")
    assert code == 1 and "begin anew by --fresh" in err
    code, out, _ = simulate("sweep", "digits-dirichlet", *SMALL, *grid, "--seed", "2", "--fresh")
    assert code == 0 and "data.alpha" in out


def test_a_state_that_a_kill_left_after_the_report_goes(simulate: Told, tmp_path: Path) -> None:
    run = ("run", "digits-dirichlet", *SMALL, "-o", "run", "--json")
    first = json.loads(simulate(*run)[1])["digest"]
    (tmp_path / "run" / "state").mkdir()
    (tmp_path / "run" / "state" / "cohort.checkpoint").write_bytes(b"left")
    assert json.loads(simulate(*run)[1])["digest"] == first
    assert not (tmp_path / "run" / "state").exists()


def test_a_file_that_cannot_be_used_is_told_in_one_line(simulate: Told, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for arguments in (("run", "-o", "file"), ("run", "-o", "file/inside"), ("go-no-go", "-o", "file")):
        code, _, err = simulate(arguments[0], "digits-dirichlet", *SMALL, *arguments[1:])
        assert (code, err.startswith("umbel-simulate: can't use file"), err.count("\n")) == (1, True, 1)
    code, out, err = simulate("sweep", "digits-dirichlet", *SMALL, "--over", "seed=1", "-o", "file", "--json")
    assert (code, json.loads(out)[0]["verdict"]) == (1, "failed") and "can't use file" in err


@pytest.mark.slow
def test_a_run_without_room_for_its_databases_is_told_in_one_line(tmp_path: Path) -> None:
    few = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
    program = f"{few}; from umbel_simulations.cli import main; main()"
    command = [sys.executable, "-c", program, "run", "smartwatch", "-o", "here"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n"), "no room" in done.stderr) == (1, 1, True), done.stderr


@pytest.mark.slow
def test_ctrl_c_ends_a_sweep_and_its_processes_with_one_line(tmp_path: Path) -> None:
    # As in a terminal: it listens to Ctrl-C, also where the tests run in the background and don't.
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    start = f"{listen}; from umbel_simulations.cli import main; main()"
    long = ("--set", "task.rounds=100000", "--over", "seed=1,2", "-o", str(tmp_path / "grid"))
    command = [sys.executable, "-c", start, "sweep", "digits-dirichlet", *long]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            while len(list(tmp_path.glob("grid/*/state"))) < 2:
                assert process.poll() is None
                time.sleep(0.02)
            os.killpg(process.pid, signal.SIGINT)
            # It ends when nobody holds its standard error any more: the processes of the runs hold it too.
            _, err = process.communicate(timeout=60)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert (process.returncode, err) == (130, "Stopped; the same command goes on.\n")


def test_a_terminal_on_which_nothing_can_be_drawn_over_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "_LINES_EVERY_SECONDS", 0.0)
    written = io.StringIO()
    with Bar("mine", Console(file=written, force_terminal=True, _environ={"TERM": "dumb"})) as bar:
        bar.step(1, 2, 0.5, "round 1")
    assert written.getvalue() == "mine: 50%, virtual 0.50 h, round 1\n"


def test_list_shows_the_library(simulate: Told) -> None:
    code, out, _ = simulate("list", "--json")
    assert (code, {"smartwatch", "night-100k"} <= {one["name"] for one in json.loads(out)}) == (0, True)
    assert "smartwatch" in simulate("list")[1]


class Killed(Exception):
    """Somebody pulled the plug."""


class PullsThePlug:
    def __init__(self, at: float) -> None:
        self._at = at

    def step(self, done: float, total: float, hours: float, message: str) -> None:
        if done >= self._at:
            raise Killed


def test_a_run_that_was_cut_off_ends_as_an_unbroken_one(tmp_path: Path) -> None:
    whole = runs.play(small(), tmp_path / "whole", workers=1, progress=Silent())
    for at in (2, 5):
        with pytest.raises(Killed):
            runs.play(small(), tmp_path / "broken", workers=1, progress=PullsThePlug(at))
        assert (tmp_path / "broken/state").is_dir() and not (tmp_path / "broken/report.json").exists()
    checkpoint = tmp_path / "broken/state/cohort.checkpoint"
    checkpoint.write_bytes(b"half of one")
    with pytest.raises(MalformedMessage, match="delete it"):
        runs.play(small(), tmp_path / "broken", workers=2, progress=Silent())
    checkpoint.unlink()
    resumed = runs.play(small(), tmp_path / "broken", workers=2, progress=Silent())
    assert resumed.outcome.canonical() == whole.outcome.canonical()
    assert runs.play(small(), tmp_path / "broken", workers=1, progress=PullsThePlug(0)).outcome == whole.outcome


def test_a_folder_belongs_to_one_run(tmp_path: Path) -> None:
    runs.play(small(), tmp_path / "run", workers=1, progress=Silent())
    with pytest.raises(AlreadyExists, match="--fresh"):
        runs.play(small(seed=2), tmp_path / "run", workers=1, progress=Silent())
    other = runs.play(small(seed=2), tmp_path / "run", workers=1, progress=Silent(), fresh=True)
    assert other.outcome.seed == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    with pytest.raises(AlreadyExists, match="isn't a run's"):
        runs.play(small(), tmp_path / "mine", workers=1, progress=Silent())
    with pytest.raises(NotFound):
        runs.read(tmp_path / "mine")


def test_a_run_whose_files_or_umbel_have_changed_since_it_began_does_not_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tmp_path / "trace.json"
    trace.write_text("{}")
    told = small(**{"population.availability": "trace", "population.trace": str(trace)})
    with pytest.raises(Killed):
        runs.play(told, tmp_path / "run", workers=1, progress=PullsThePlug(0))
    with monkeypatch.context() as changed, pytest.raises(AlreadyExists, match="another version of Umbel"):
        changed.setattr(runs, "VERSION", "9.9.9")
        runs.play(told, tmp_path / "run", workers=1, progress=Silent())
    trace.write_text("[]")
    with pytest.raises(AlreadyExists, match="files have changed since"):
        runs.play(told, tmp_path / "run", workers=1, progress=Silent())


@pytest.mark.parametrize("engine", ["cohort", "fleet"])
def test_a_run_that_never_began_leaves_its_folder_to_the_right_one(tmp_path: Path, engine: str) -> None:
    """As after a mistyped name, or what the engine refuses once it has looked."""
    no_trace = {"population.availability": "trace", "population.trace": "nowhere.json"}
    for wrong in ({"model": "digit"}, {"data.users": 1000}, {"task.plan.mu": 0.5}, no_trace):
        with pytest.raises(UmbelError):
            runs.play(small(engine=engine, **wrong), tmp_path / "run", workers=1, progress=Silent())
    told = small(engine=engine, hours=0.01)
    assert runs.play(told, tmp_path / "run", workers=1, progress=Silent()).outcome.engine == engine


def test_nothing_in_a_folder_of_other_things_is_deleted(tmp_path: Path) -> None:
    kept = ("state/mine.txt", "report.json", "report.html")
    (tmp_path / "state").mkdir()
    for name in kept:
        (tmp_path / name).write_text("mine")
    with pytest.raises(AlreadyExists, match="isn't a run's"):
        runs.play(small(), tmp_path, workers=1, progress=Silent(), fresh=True)
    assert all((tmp_path / name).read_text() == "mine" for name in kept)


def test_two_processes_dont_play_in_one_folder(tmp_path: Path) -> None:
    class TriesToo:
        def step(self, done: float, total: float, hours: float, message: str) -> None:
            with pytest.raises(WrongState, match="another process plays"):
                runs.play(small(), tmp_path, workers=1, progress=Silent(), fresh=True)

    first = runs.play(small(), tmp_path, workers=1, progress=TriesToo())
    assert runs.play(small(), tmp_path, workers=1, progress=Silent()).outcome == first.outcome


def test_a_damaged_folder_is_told_by_name_and_a_lost_page_is_written_again(tmp_path: Path) -> None:
    runs.play(small(), tmp_path, workers=1, progress=Silent())
    (tmp_path / "report.html").unlink()
    found = runs.play(small(), tmp_path, workers=1, progress=Silent())
    assert found.outcome.digest() in (tmp_path / "report.html").read_text()
    (tmp_path / "report.json").write_bytes(b"\xff{")
    with pytest.raises(MalformedMessage, match=str(tmp_path / "report.json")):
        runs.play(small(), tmp_path, workers=1, progress=Silent())
    (tmp_path / "scenario.json").write_bytes(b"\xff{")
    with pytest.raises(AlreadyExists, match="--fresh"):
        runs.play(small(), tmp_path, workers=1, progress=Silent())


def test_values_are_toml_or_plain_words() -> None:
    assert values_of("0.1,2") == [0.1, 2]
    assert values_of('[1, 2], "a"') == [[1, 2], "a"]
    assert values_of("iid,dirichlet") == ["iid", "dirichlet"]
    assert (value_of("true"), value_of("FedAdam")) == (True, "FedAdam")
    assert (value_of("9" * 5000), values_of("9" * 5000)) == ("9" * 5000, ["9" * 5000]), "longer than Python reads"
    assert pair_of(" seed = 1=2 ") == ("seed", "1=2")
    for text in ("=3", " =3", "seed=", "seed= ", "seed"):
        with pytest.raises(MalformedMessage, match="write it as"):
            pair_of(text)


def test_each_point_of_a_grid_has_a_folder_of_its_own() -> None:
    found = points(small(), {"task.plan.lr": [0.1, 0.01], "seed": [1, 2, 3]})
    assert len({name_of(point) for point in found}) == len(found) == 6
    texts = ["a b", "a_b", "a/b", "c" * 100, "c" * 101]
    names = {name_of(point) for point in points(small(), {"description": texts})}
    assert len(names) == len(texts) and max(map(len, names)) < 100 and not any("/" in name for name in names)
    for nothing in ({}, {"seed": []}):
        with pytest.raises(BadInput, match="at least one key with values"):
            points(small(), nothing)
