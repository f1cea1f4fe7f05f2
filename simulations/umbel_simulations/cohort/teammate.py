"""A process of a `Team`: trains its parts of each cohort, as long as its parent asks.

Started by `team`, with two open files: a connection to the parent, and what it trains with, as `mapped` lays it out.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Final

import numpy as np

from umbel.bundle import Bundle
from umbel.errors import UmbelError
from umbel.weights import Weights
from umbel_simulations.cohort.clients import Start, Worker
from umbel_simulations.cohort.mapped import take_up
from umbel_simulations.cohort.pool import SILENT
from umbel_simulations.cohort.resident import OnnxBackend
from umbel_simulations.cohort.rounds import Call, Cohort, part_of
from umbel_simulations.data import ClientData

_ELSEWHERE: Final = Start(Weights({}))
"""In place of what the parent knows already."""


@dataclass(frozen=True, slots=True)
class Duty:
    """What a process trains, whatever the round."""

    bundle: Bundle
    clients: tuple[ClientData, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """A round's cohort, the same for all processes: each does the parts that are its own."""

    call: Call
    weights: Weights
    parts: Sequence[Sequence[int]]
    """Places among the clients of its `Duty`."""


Answer = list[Cohort] | UmbelError
"""What each of its parts came to, or why there is none."""


def main() -> None:
    """Say that all is ready, then answer until the parent goes.

    Arguments: the numbers of both files, which process of the team this is, and how many there are.
    """
    connection, duty = Connection(int(sys.argv[1])), take_up(int(sys.argv[2]))
    mine = slice(int(sys.argv[3]), None, int(sys.argv[4]))
    worker = OnnxBackend(duty.bundle).worker()
    try:
        connection.send(None)
        while True:
            connection.send(_answered(worker, duty, connection.recv(), mine))
    except (EOFError, ConnectionError):
        return


def _answered(worker: Worker, duty: Duty, asked: Request, mine: slice) -> Answer:
    start = Start(asked.weights)
    try:
        with np.errstate(**SILENT):
            parts = [[asked.call.share(duty.clients[at]) for at in part] for part in asked.parts[mine]]
            return [replace(part_of(worker, shares, start), start=_ELSEWHERE) for shares in parts]
    except UmbelError as error:
        return error
