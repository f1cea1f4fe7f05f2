"""One run of the demo, from an empty folder to a report; `run` reads like the story that it tells."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Final

from rich.live import Live

import umbel.program  # noqa: F401 - before anything that imports gRPC
from umbel.errors import Unavailable
from umbel.v1 import admin_pb2 as pb
from umbel.v1.admin_pb2_grpc import AdminServiceStub
from umbel_models.zoo import bundle_path
from umbel_server.cli.connection import Caller, connect
from umbel_simulations.demo import fleet, rollouts
from umbel_simulations.demo.board import Board
from umbel_simulations.demo.operator import UMBEL, HelperOperator, Operator
from umbel_simulations.demo.page import render
from umbel_simulations.demo.programs import Programs
from umbel_simulations.demo.results import Results, RolloutResult, RoundResult
from umbel_simulations.smartwatch import load_wearers

MODEL: Final = "smartwatch"
TASK: Final = "shoulder"
POPULATION: Final = "watches"
COORDINATOR: Final = "coordinator"
HELPER: Final = "helper"
LOOK_SECONDS: Final = 0.25
PATIENCE_SECONDS: Final = 300.0
_PACE: Final = """
# Twenty devices on one machine needn't be spread out over hours.
pace_shortest_seconds = 0.4
pace_idle_seconds = 1.0
"""


@dataclass(frozen=True, slots=True)
class Options:
    """What can be chosen for a run."""

    folder: Path
    rounds: int = 20
    devices: int = 20
    private: bool = True
    """Whether a helper runs, and only sums are known."""

    @property
    def goal(self) -> int:
        """Reports that a round waits for."""
        return max(2, self.devices * 4 // 5)

    @property
    def minimum(self) -> int:
        """Fewest that make a sum; of one there is none."""
        return max(2, self.devices * 2 // 5)


def run(options: Options, live: Live) -> Results:
    """Run the whole demo; leaves the report and all state in the folder.

    Raises:
        ProgramFailed: the coordinator or a device ended before its time, or an operator's command was refused.
        Unavailable: nothing moved for minutes.
    """
    began = time.monotonic()
    _clear(options.folder)
    wearers = load_wearers()[: options.devices]
    board = Board(options.rounds, devices=len(wearers))
    live.update(board)
    operator = Operator(options.folder / "state")
    operator.init()
    helper = HelperOperator(options.folder / "helper") if options.private else None
    if helper:
        helper.init(operator.release_key, options.minimum)
    with Programs(options.folder / "logs") as programs, _parties(operator, helper, programs, board) as look:
        board.doing = "handing out enrolment codes and the helper's tokens"
        codes = _prepare(operator, options)
        tokens = helper.tokens(POPULATION, options.devices) if helper else []
        members = fleet.settle(options.folder / "devices", wearers, codes, helper.card if helper else None, tokens)
        fleet.start(members, programs)

        board.doing = "training"
        first_half = options.rounds // 2
        _wait(look, board, members, programs, lambda: _completed(board) >= first_half)
        operator.call("versions", "publish", MODEL, str(_newest(board)))
        _wait(look, board, members, programs, lambda: _task_is_done(board))
        ended = _roll_out(operator, options, members, board, lambda done: _wait(look, board, members, programs, done))
        board.doing = "done"
        look()
        devices = tuple(member.result() for member in members)
        trust = "; ".join(board.status.warnings) or "production"
        audit_rows = int(operator.call("audit", "verify")["rows"])
    results = Results(_rounds(board), devices, time.monotonic() - began, trust, ended, audit_rows)
    results.write_json(options.folder / "report.json")
    (options.folder / "report.html").write_text(render(results), encoding="utf-8")
    return results


def _roll_out(
    operator: Operator,
    options: Options,
    members: Sequence[fleet.Member],
    board: Board,
    wait: Callable[[Callable[[], bool]], None],
) -> tuple[RolloutResult, ...]:
    """The newest version goes out in waves; then a broken one, which must not come far."""
    approver = rollouts.second_person(operator, options.folder / "state")
    stage = rollouts.Stage(operator, approver, options.folder / "state", MODEL, POPULATION, members, wait)
    newest = _newest(board)
    board.doing = f"rolling out version {newest} to 5, 25 and 100 %: each device tests it against its own model"
    good = rollouts.roll_out(stage, "good", newest)
    board.doing = "rolling out a broken version: its canary should stop it"
    return good, rollouts.roll_out(stage, "broken", rollouts.break_version(stage, newest))


def _clear(folder: Path) -> None:
    """Start clean, but touch nothing in the folder that isn't the demo's."""
    for name in ("state", "helper", "devices", "logs"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("report.json", "report.html"):
        (folder / name).unlink(missing_ok=True)


@contextmanager
def _parties(
    operator: Operator, helper: HelperOperator | None, programs: Programs, board: Board
) -> Iterator[Callable[[], None]]:
    """Start helper and coordinator; gives a function that looks at the latter and puts what it sees on the board."""
    if helper:
        programs.start(HELPER, [*UMBEL, "helper", "run", "--state", str(helper.state)])
        _until(helper.listens, lambda: programs.finished(HELPER), "the helper to listen")
    with (operator.state / "config.toml").open("a") as config:
        config.write(_PACE)
    ready = operator.state / "ready.json"
    ports = [f"--{port}-port=0" for port in ("device", "enrol", "admin")]
    serve = ["serve", "--state", str(operator.state), "--ready-file", str(ready)]
    programs.start(COORDINATOR, [*UMBEL, *serve, *(["--helper", str(helper.card)] if helper else []), *ports])
    _until(ready.exists, lambda: programs.finished(COORDINATOR), "the coordinator to listen")
    with connect(operator.state, Caller(), "") as (stub, _):
        yield lambda: _look(stub, board)


def _prepare(operator: Operator, options: Options) -> list[str]:
    operator.call("models", "add", str(bundle_path(MODEL)), "--name", MODEL)
    with as_file(files(__package__) / "task.toml") as task:
        goal = ["--goal", str(options.goal), "--minimum", str(options.minimum)]
        how = "--private" if options.private else "--public"
        operator.call("tasks", "create", "--file", str(task), "--rounds", str(options.rounds), how, *goal)
    count = str(options.devices)
    made = operator.call("devices", "tokens", "create", "--population", POPULATION, "--count", count, "--codes")
    codes: list[str] = made["codes"]
    return codes


def _look(stub: AdminServiceStub, board: Board) -> None:
    board.status = stub.GetStatus(pb.GetStatusRequest()).status
    rounds = stub.ListRounds(pb.ListRoundsRequest(task=TASK)).rounds
    board.rounds = [entry for entry in rounds if entry.kind == "train"]


def _newest(board: Board) -> int:
    """The newest accepted version."""
    return max(entry.version for entry in board.rounds if entry.state == "completed")


def _completed(board: Board) -> int:
    return sum(entry.state == "completed" for entry in board.rounds)


def _task_is_done(board: Board) -> bool:
    return any(task.spec.name == TASK and task.state == "done" for task in board.status.tasks)


def _wait(
    look: Callable[[], None],
    board: Board,
    members: Sequence[fleet.Member],
    programs: Programs,
    done: Callable[[], bool],
) -> None:
    """Look on until `done`, and make sure that nobody has ended before."""

    def watch() -> None:
        look()
        board.devices_ready = sum(member.judged() > 0 for member in members)
        programs.all_well()

    _until(done, watch, "the fleet")


def _until(done: Callable[[], bool], look: Callable[[], object], whom: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not done():
        if time.monotonic() > deadline:
            raise Unavailable(f"waited {PATIENCE_SECONDS:.0f} seconds for {whom}; the logs stand in the demo's folder")
        time.sleep(LOOK_SECONDS)
        look()


def _rounds(board: Board) -> tuple[RoundResult, ...]:
    completed = sorted((entry for entry in board.rounds if entry.state == "completed"), key=lambda entry: entry.number)
    return tuple(
        RoundResult(
            round=entry.number,
            accuracy=entry.candidate_accuracy,
            reports=entry.reports,
            seconds=round(entry.seconds, 2),
            version=entry.version,
            bytes_up=entry.bytes_up,
            bytes_per_weight=round(entry.bytes_per_weight, 4),
        )
        for entry in completed
    )
