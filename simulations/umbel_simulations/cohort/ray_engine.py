"""The ray engine: the cohort engine's rounds, trained by Flower's simulation runtime on Ray's actors.

For many machines or GPUs. Cohorts, examples and chances are those of the cohort engine; only who trains differs. The
outcome is the same, up to rounding where that engine trains clients abreast. On one machine it is much faster: nothing
is pickled there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Final

from umbel.bundle import MANIFEST_FILE
from umbel.errors import BadInput
from umbel.update import Update
from umbel.weights import Weights
from umbel_client.trainer import TRAIN_EXAMPLES, TRAIN_LOSS
from umbel_server.flower.simulation import Ask, Request, Value, on_ray
from umbel_simulations.cohort.algorithm import Stage
from umbel_simulations.cohort.clients import Count, Start, Worker
from umbel_simulations.cohort.engine import backend_of, play, require_cohort
from umbel_simulations.cohort.pool import Pool
from umbel_simulations.cohort.rounds import Call, Cohort, Report, added_up, report_of
from umbel_simulations.cohort.strategies import Trains
from umbel_simulations.data import ClientData
from umbel_simulations.engines import Progress
from umbel_simulations.outcome import Outcome
from umbel_simulations.scenario import SCENARIOS, Scenario, to_tree
from umbel_simulations.setting import prepare

WORK: Final = f"{__name__}:train_one"
_SCENARIO, _ROUND, _CLIENT = "scenario", "round", "client"


def run(scenario: Scenario, *, workers: int, progress: Progress, folder: Path) -> Outcome:
    """Play a scenario; see `umbel_simulations.engines.Engine`.

    Raises:
        NotFound: Ray isn't installed.
        BadInput: the scenario asks for something that this engine doesn't do.
        UmbelError: the bundle or the data are refused; see `prepare`.
    """
    require_cohort(scenario)
    if scenario.algorithm.kind != "strategy":
        raise BadInput(
            f'algorithm.kind = "{scenario.algorithm.kind}" needs engine = "cohort"; Ray runs strategies only'
        )
    if (Path(scenario.model) / MANIFEST_FILE).is_file():
        # An actor may stand in another folder.
        scenario = replace(scenario, model=str(Path(scenario.model).resolve()))
    if scenario.data.folder:
        scenario = replace(scenario, data=replace(scenario.data, folder=str(Path(scenario.data.folder).resolve())))
    setting = prepare(scenario)
    found: list[Outcome] = []

    def main(ask: Ask) -> None:
        trains = trained_by(ask, json.dumps(to_tree(scenario)))
        found.append(play(scenario, setting, workers=workers, progress=progress, folder=folder, trains=trains))

    nodes = min(scenario.task.goal, len(setting.federation.clients))
    on_ray(main, WORK, nodes, workers)
    return found[0]


def trained_by(ask: Ask, told: str) -> Trains:
    """Cohorts trained by whoever answers, for the scenario `told` as JSON."""

    def trains(cohort: Sequence[ClientData], call: Call, start: Start, *, wants_singles: bool) -> Cohort:
        config: dict[str, Value] = {_SCENARIO: told, _ROUND: call.round}
        updates = ask([Request({**config, _CLIENT: client.name}, start.weights) for client in cohort])
        reports = [None if update is None else _report(update) for update in updates]
        return added_up(reports, start, wants_singles=wants_singles)

    return trains


def train_one(request: Request) -> Update | None:
    """One client's training, in an actor; None if it went to NaN or infinity."""
    stage, worker, clients = _at_work(str(request.config[_SCENARIO]))
    client = clients[str(request.config[_CLIENT])]
    report = report_of(worker, stage.call(int(request.config[_ROUND])).share(client), Start(request.weights))
    if report is None:
        return None
    delta = Weights.from_vector(report.delta, request.weights.shapes)
    return Update(delta, report.weight, report.count.metrics())


@lru_cache(maxsize=1)
def _at_work(told: str) -> tuple[Stage, Worker, dict[str, ClientData]]:
    """What an actor keeps from request to request: the data, and a resident session."""
    scenario = SCENARIOS.validate_json(told)
    setting = prepare(scenario)
    backend = backend_of(setting)
    stage = Stage.of(scenario, setting, backend, Pool(backend, 1))
    return stage, backend.worker(), {client.name: client for client in stage.clients}


def _report(update: Update) -> Report:
    examples = int(update.metrics[TRAIN_EXAMPLES])
    return Report(update.delta.to_vector(), update.weight, Count(0, update.metrics[TRAIN_LOSS], examples))
