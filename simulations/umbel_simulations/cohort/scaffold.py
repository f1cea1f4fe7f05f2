"""SCAFFOLD: control variates against the drift of clients with unlike data (Karimireddy et al., arXiv:1910.06378).

Server and clients each remember a direction, c and c_i. A client corrects every gradient by c - c_i; with plain
gradient descent that is a fixed drift of lr * (c - c_i) after each step, which the rewritten training graph takes off.
After K steps from w to w_i (option II of the paper):

    c_i' = c_i - c + (w - w_i) / (K lr)        w' = w + server_lr * mean(w_i - w)        c' = c + sum(c_i' - c_i) / N

Clients remember from round to round, which devices that come once don't: a method for silos and for comparison.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np
import safetensors
import safetensors.numpy

from umbel.errors import BadInput, MalformedMessage
from umbel.weights import Weights
from umbel_simulations.cohort.algorithm import Stage, Step, stepped
from umbel_simulations.cohort.clients import Start, Vector, Worker, clipped
from umbel_simulations.cohort.rounds import Report, chosen, report_of
from umbel_simulations.data import ClientData

_SERVER: Final = "server"
_CLIENT: Final = "client/"


class Scaffold:
    """See the module.

    Raises:
        BadInput: clients would train with momentum, whose velocity the correction would bypass; or at a rate of 0, by
            which nothing can be divided.
    """

    def __init__(self, stage: Stage) -> None:
        if stage.hyperparameters.get("momentum"):
            raise BadInput("algorithm: SCAFFOLD corrects plain gradient descent; set task.plan.momentum = 0.0")
        if not np.float32(stage.hyperparameters["lr"]):
            raise BadInput(
                "algorithm: SCAFFOLD learns directions from steps, and a rate of 0 takes none; set task.plan.lr"
            )
        self._stage = stage
        shapes = stage.setting.bundle.manifest.shared_shapes
        self._server: Vector = Weights.zeros(shapes).to_vector()
        self._clients: dict[str, Vector] = {}

    def step(self, number: int, weights: Weights) -> Step:
        """One round; see `Algorithm`."""
        stage, task = self._stage, self._stage.task
        cohort = chosen(stage.clients, task.goal, task.seed, task.name, number)
        # Clipped after a client's direction is known, or that would be too short.
        call = replace(stage.call(number), plan=replace(stage.plan, clip_norm=0.0))
        lr, clip = stage.hyperparameters["lr"], stage.plan.clip_norm
        moved, turned = np.zeros_like(self._server), np.zeros_like(self._server)
        # Statistics that a step moves, as batch norm's, follow no gradient.
        corrected = [spec.name for spec in stage.setting.bundle.manifest.trainable]
        found: list[Report] = []
        directions: dict[str, Vector] = {}

        def work(worker: Worker, client: ClientData) -> Report | None:
            drift = Weights.from_vector(np.float32(lr) * (self._server - self._direction(client)), weights.shapes)
            return report_of(worker, call.share(client), Start(weights, drift.subset(corrected).arrays))

        def take(client: ClientData, report: Report | None) -> None:
            if report is None:
                return
            change = report.delta / np.float32(-report.count.steps * lr) - self._server
            directions[client.name] = self._direction(client) + change
            np.add(moved, clipped(report.delta, clip) if clip else report.delta, out=moved)
            np.add(turned, change, out=turned)
            found.append(report)

        stage.pool.each(cohort, work, take)
        seconds = max(map(stage.seconds, cohort), default=0.0)
        step = stepped(stage, weights, cohort, found, moved, seconds)
        if step.verdict == "accepted":
            self._server = self._server + turned / np.float32(len(stage.clients))
            self._clients |= directions
        return step

    def memory(self) -> bytes:
        """All directions."""
        kept = {_CLIENT + name: direction for name, direction in self._clients.items()}
        return safetensors.numpy.save({_SERVER: self._server, **kept})

    def restore(self, memory: bytes) -> None:
        """Go on with these directions."""
        try:
            kept = safetensors.numpy.load(memory)
            self._server = kept.pop(_SERVER)
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise MalformedMessage(f"not what SCAFFOLD remembers: {error}") from error
        self._clients = {name.removeprefix(_CLIENT): direction for name, direction in kept.items()}

    def _direction(self, client: ClientData) -> Vector:
        found = self._clients.get(client.name)
        return np.zeros_like(self._server) if found is None else found
