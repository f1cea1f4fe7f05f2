"""What each user makes of the last global model for itself, and how much better that answers its held-back examples.

Three ways: a copy fine-tuned on the user's own examples; only its head fine-tuned, the body shared by all (after
FedPer, arXiv:1912.00818); and the mean of the global model and the fine-tuned copy (after APFL, arXiv:2003.13461). All
begin when the global model is done; FedPer keeps heads apart from the first round on, and APFL trains both at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from umbel.bundle import Bundle
from umbel.errors import BadInput
from umbel.update import Metrics
from umbel.weights import Weights
from umbel_client.trainer import Job
from umbel_simulations.cohort.algorithm import Stage
from umbel_simulations.cohort.clients import Backend, Share, Start, Worker
from umbel_simulations.cohort.pool import Pool
from umbel_simulations.cohort.rounds import in_parts
from umbel_simulations.data import ClientData

_HEAD: Final = "p_head."
_ROUND: Final = 0
"""Rounds count from 1: personal training draws orders of its own."""


def head_of(bundle: Bundle) -> list[str]:
    """The weights of a model's head.

    Raises:
        BadInput: the model has none by that name.
    """
    found = [spec.name for spec in bundle.manifest.trainable if spec.name.startswith(_HEAD)]
    if not found:
        raise BadInput(f"{bundle.manifest.model!r} has no layer named 'head'; name its last layer so, or fine-tune all")
    return found


def personalise(stage: Stage, weights: Weights, make: Callable[..., Backend], workers: int) -> list[Metrics]:
    """The metric sums of each client's own model, over what that client held back.

    Args:
        stage: who there is.
        weights: the global model.
        make: makes a back end for a setting; takes `moving`.
        workers: how many threads.

    Raises:
        BadInput: a head is asked for, and the model has none.
    """
    algorithm = stage.scenario.algorithm
    rate = {"lr": algorithm.personal_lr} if algorithm.personal_lr else {}
    plan = replace(
        stage.plan,
        epochs=algorithm.personal_epochs,
        max_steps=0,
        hyperparameters={**stage.plan.hyperparameters, **rate},
    )
    bundle = stage.setting.bundle
    moving = head_of(bundle) if algorithm.personalisation == "head" else None
    backend, start = make(stage.setting, moving=moving), Start(weights)
    found: list[Metrics] = []

    def work(worker: Worker, clients: Sequence[ClientData]) -> list[Metrics]:
        shares = [Share.of(Job(plan, stage.task.name, _ROUND, client.name), client.training) for client in clients]
        judged = []
        for client, trained in zip(clients, worker.train_each(shares, start), strict=True):
            own = start.vector if trained is None else start.vector + trained.delta
            if algorithm.personalisation == "interpolate":
                own = (own + start.vector) / np.float32(2)
            judged.append(backend.evaluate(Weights.from_vector(own, weights.shapes), client.held_back))
        return judged

    with Pool(backend, workers) as pool:
        judged = [client for client in stage.clients if client.held_back.count]
        pool.each(in_parts(judged, pool.together), work, lambda _clients, metrics: found.extend(metrics))
    return found
