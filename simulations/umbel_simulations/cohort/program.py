"""Somebody's Flower `ServerApp`, as it is, over the clients of a scenario: what `umbel serve --app` runs over devices.

    app --messages--> DeviceGrid --CohortOrder--> ProgramRounds --> clients, side by side
    app <--replies--- DeviceGrid <--Update------- ProgramRounds <-- those within the task's goal and deadline

The app's rounds are its own, so what a step made of a cohort is only seen in the next message that it sends.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from umbel.errors import BadInput, OutOfBounds
from umbel.identity import DeviceId
from umbel.plan import Kind, Plan
from umbel.randomness import generator
from umbel.update import Metrics, Update, add_metrics
from umbel.weights import Shapes, Weights
from umbel_client.trainer import TRAIN_EXAMPLES, TRAIN_LOSS
from umbel_server.cohort import CohortOrder
from umbel_server.flower.program import Program, load_app
from umbel_server.validation import ReportRules, report_rules
from umbel_simulations.cohort.algorithm import Stage
from umbel_simulations.cohort.clients import Start
from umbel_simulations.cohort.rounds import Call, chosen, evaluate_each, train_each
from umbel_simulations.data import ClientData
from umbel_simulations.outcome import RoundOutcome

Judge = Callable[[Weights], tuple[float | None, float | None]]
"""Weights -> accuracy and loss on what is held back."""
Tell = Callable[[RoundOutcome], None]
Reports = list[tuple[DeviceId, Update]]


@dataclass(slots=True, eq=False)
class ProgramRounds:
    """The clients of a stage as a program meets them; see `umbel_server.flower.grid.CohortPort`.

    Args:
        stage: who there is, and the task whose goal, minimum and deadline count.
        judge: asked what the weights are worth that came of a round.
        tell: told of each round when it is over.
    """

    stage: Stage
    judge: Judge
    tell: Tell
    rounds: list[RoundOutcome] = field(default_factory=list)
    """Those that trained."""
    sessions: Counter[str] = field(default_factory=Counter)
    """How often each client was invited to train."""
    weights: Weights = field(init=False)
    """What the program sent last; the scenario's own before that."""
    _orders: int = 0

    def __post_init__(self) -> None:
        self.weights = self.stage.setting.bundle.shared_weights()

    @property
    def plan(self) -> Plan:
        """What clients run unless a message says otherwise."""
        return self.stage.plan

    def shapes(self) -> Shapes:
        """Names and shapes of the model's shared weights."""
        return self.stage.setting.bundle.manifest.shared_shapes

    def rules(self, order: CohortOrder) -> ReportRules:
        """What a coordinator would hold each report to."""
        manifest = self.stage.setting.bundle.manifest
        return report_rules(order.plan, manifest, order.weights.norm(), self.stage.task.validation)

    def device_ids(self) -> Sequence[DeviceId]:
        """All clients with as many examples as the plan asks for."""
        return [DeviceId(client.name) for client in self.stage.clients]

    def run(self, order: CohortOrder, timeout: float | None) -> Reports:
        """One cohort: as many reports as the task's goal, of those invited who are done in time, the quickest first.

        Raises:
            OutOfBounds: fewer clients than the task's minimum, or hyper-parameters that the model doesn't have.
        """
        task, names = self.stage.task, {*order.devices}
        if len(names) < task.minimum:
            raise OutOfBounds(f"{len(names)} clients asked, task.minimum is {task.minimum}; sample more, or lower it")
        self._see(order.weights)
        self._orders += 1
        stage = replace(self.stage, plan=order.plan, durations={})
        asked = [client for client in stage.clients if client.name in names]
        task = replace(task, goal=min(task.goal, len(asked)))
        # Whoever calls first is invited; who that is, is chance.
        invited = chosen(asked, task.slots, task.seed, task.name, self._orders)
        if order.plan.kind is Kind.EVALUATE:
            return self._if_enough(_judgements(stage, invited[: task.goal], order.weights))
        longest = min(task.deadline_seconds, math.inf if timeout is None else timeout)
        able = [client for client in invited if client.training.count >= order.plan.min_examples]
        quickest = sorted(able, key=lambda client: (stage.seconds(client), client.name))
        done = [client for client in quickest if stage.seconds(client) <= longest][: task.goal]
        found = self._if_enough(_updates(stage, done, order.weights, self._orders))
        self._close(invited, found, stage.seconds(done[-1]) if len(done) == task.goal else longest)
        return found

    def _if_enough(self, found: Reports) -> Reports:
        return found if len(found) >= self.stage.task.minimum else []

    def _see(self, weights: Weights) -> None:
        """What the program has made of its last round shows in what it sends now."""
        if self.rounds and self.rounds[-1].accuracy is None and weights != self.weights:
            accuracy, loss = self.judge(weights)
            self.rounds[-1] = replace(self.rounds[-1], accuracy=accuracy, loss=loss)
        self.weights = weights

    def _close(self, invited: Sequence[ClientData], found: Reports, seconds: float) -> None:
        self.sessions.update(client.name for client in invited)
        opened = self.rounds[-1].closed_hour if self.rounds else 0.0
        loss = sum(update.metrics[TRAIN_LOSS] for _, update in found)
        seen = sum(update.metrics[TRAIN_EXAMPLES] for _, update in found)
        over = RoundOutcome(
            number=len(self.rounds) + 1,
            verdict="accepted" if found else "abandoned",
            opened_hour=opened,
            closed_hour=opened + seconds / 3600,
            invited=len(invited),
            reported=len(found),
            train_loss=loss / seen if seen else None,
            reason="" if found else f"fewer reports in time than task.minimum, {self.stage.task.minimum}",
        )
        self.rounds.append(over)
        self.tell(over)


def play(stage: Stage, judge: Judge, tell: Tell) -> ProgramRounds:
    """Run a scenario's program to its end; raises what it raises.

    Raises:
        BadInput: it isn't a `ServerApp`, or asked nobody to train.
        NotFound: there is no such app.
    """
    told, rounds = stage.scenario.algorithm, ProgramRounds(stage, judge, tell)
    with _chance_of(stage):
        Program(load_app(told.app), stage.task.name, told.app_config).run(rounds)
    if not rounds.rounds:
        raise BadInput(f"{told.app} has asked no client to train; let its strategy sample some (fraction_train)")
    return rounds


@contextmanager
def _chance_of(stage: Stage) -> Iterator[None]:
    """Flower's strategies draw by the generators of the process: these begin alike in every run of a seed."""
    seeds = generator(stage.task.seed, stage.task.name, "program").integers(2**32, size=2)
    before, before_of_numpy = random.getstate(), np.random.get_state()
    random.seed(int(seeds[0]))
    np.random.seed(int(seeds[1]))
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(before_of_numpy)


def _metrics(stage: Stage, clients: Sequence[ClientData], weights: Weights) -> dict[str, Metrics]:
    """What weights come to on the held-back examples of each client that has some."""
    judges = [client for client in clients if client.held_back.count]
    found = evaluate_each(stage.pool, stage.backend, weights, judges)
    return {client.name: metrics for client, metrics in zip(judges, found, strict=True)}


def _judgements(stage: Stage, clients: Sequence[ClientData], weights: Weights) -> Reports:
    """As a device answers a plan that only evaluates."""
    least = max(stage.plan.min_examples, 1)
    judges = [client for client in clients if client.held_back.count >= least]
    found = _metrics(stage, judges, weights)
    counts = {client.name: min(float(client.held_back.count), stage.plan.max_weight) for client in judges}
    return [(DeviceId(name), Update(Weights({}), counts[name], metrics)) for name, metrics in found.items()]


def _updates(stage: Stage, clients: Sequence[ClientData], weights: Weights, number: int) -> Reports:
    """As a device answers a plan that trains: it judges what it starts from as well."""
    call = Call(stage.plan, stage.task.name, number)
    judged = _metrics(stage, clients, weights)
    reports = train_each(stage.pool, clients, call, Start(weights))
    return [
        (
            DeviceId(client.name),
            Update(
                Weights.from_vector(report.delta, weights.shapes),
                report.weight,
                add_metrics(judged.get(client.name, {}), report.count.metrics()),
            ),
        )
        for client in clients
        if (report := reports[client.name]) is not None
    ]
