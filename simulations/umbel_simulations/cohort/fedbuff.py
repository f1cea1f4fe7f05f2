"""FedBuff: no rounds, a buffer (Nguyen et al. 2022, arXiv:2106.06639).

A fixed number of clients train at any time. Whoever is done puts its update into the buffer; when the buffer holds K
updates, the server takes a step of their mean; then another client starts from the newest model. An update whose model
was s steps old when it was counted counts (1 + s)^-a.

How long each client takes is known beforehand, so all arrivals up to the next step are worked out first, without any
training; then their clients are trained side by side.
"""

from __future__ import annotations

import heapq
import json
from dataclasses import asdict, dataclass
from typing import Final

import numpy as np
import safetensors
import safetensors.numpy

from umbel.errors import MalformedMessage
from umbel.randomness import generator
from umbel.weights import Weights
from umbel_simulations.cohort.algorithm import Stage, Step, stepped
from umbel_simulations.cohort.clients import Start, Worker
from umbel_simulations.cohort.rounds import Report, report_of
from umbel_simulations.data import ClientData

_RUNNING: Final = "running"


@dataclass(frozen=True, slots=True, order=True)
class Running:
    """A client that trains; sorted by when it will be done."""

    done: float
    """Virtual seconds."""
    started: int
    """How many had started before it: its number, and what ties are broken by."""
    client: int
    version: int
    """The step whose model it started from."""


class FedBuff:
    """See the module."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._running: list[Running] = []
        self._models: dict[int, Start] = {}
        self._started = 0
        self._now = 0.0

    def step(self, number: int, weights: Weights) -> Step:
        """Fill the buffer once and empty it; see `Algorithm`."""
        algorithm, task = self._stage.scenario.algorithm, self._stage.task
        version, began = number - 1, self._now
        self._models[version] = Start(weights)
        while len(self._running) < min(task.goal, len(self._stage.clients)):
            self._start_one(version)
        arrivals = self._arrivals(version, algorithm.buffer) if self._stage.clients else []
        clients = [self._stage.clients[arrival.client] for arrival in arrivals]
        total = np.zeros_like(self._models[version].vector)
        found: list[Report] = []

        def take(arrival: Running, report: Report | None) -> None:
            if report is not None:
                share = np.float32((1.0 + version - arrival.version) ** -algorithm.staleness)
                np.add(total, share * report.delta, out=total)
                found.append(report)

        self._stage.pool.each(arrivals, self._train, take)
        used = {running.version for running in self._running}
        self._models = {step: start for step, start in self._models.items() if step in used}
        return stepped(self._stage, weights, clients, found, total, self._now - began)

    def memory(self) -> bytes:
        """Who trains from which model."""
        models = {str(version): start.vector for version, start in self._models.items()}
        clock = {"started": self._started, "now": self._now, _RUNNING: [asdict(one) for one in self._running]}
        return safetensors.numpy.save(models, {_RUNNING: json.dumps(clock)})

    def restore(self, memory: bytes) -> None:
        """Go on with these clients at work."""
        shapes = self._stage.setting.bundle.manifest.shared_shapes
        try:
            models = safetensors.numpy.load(memory)
            header = json.loads(memory[8 : 8 + int.from_bytes(memory[:8], "little")])
            clock = json.loads(header["__metadata__"][_RUNNING])
            self._running = [Running(**one) for one in clock[_RUNNING]]
            self._started, self._now = int(clock["started"]), float(clock["now"])
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise MalformedMessage(f"not what FedBuff remembers: {error}") from error
        self._models = {int(version): Start(Weights.from_vector(model, shapes)) for version, model in models.items()}

    def _start_one(self, version: int) -> None:
        stage = self._stage
        busy = {running.client for running in self._running}
        free = [index for index in range(len(stage.clients)) if index not in busy]
        client = free[int(generator(stage.task.seed, stage.task.name, self._started, "start").integers(len(free)))]
        done = self._now + stage.seconds(stage.clients[client])
        heapq.heappush(self._running, Running(done, self._started, client, version))
        self._started += 1

    def _arrivals(self, version: int, count: int) -> list[Running]:
        """Who fills the buffer. The place of the last one stays free: who takes it starts from the step to come."""
        arrivals: list[Running] = []
        while len(arrivals) < count:
            if arrivals:
                self._start_one(version)
            arrivals.append(heapq.heappop(self._running))
            self._now = arrivals[-1].done
        return arrivals

    def _train(self, worker: Worker, arrival: Running) -> Report | None:
        client: ClientData = self._stage.clients[arrival.client]
        # The number of the start stands for the round: whoever trains twice sees its examples in another order.
        return report_of(worker, self._stage.call(arrival.started + 1).share(client), self._models[arrival.version])
