"""What all ways to simulate have in common: the same data and cohorts, and a parent that calls for rounds in turn.

Each way is a program of its own in an environment of its own, so nothing here but numpy. A program prints one JSON
object when it is ready, then one for each line of its input, which says how many rounds to run.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

_BEGAN = time.perf_counter()

COHORT, BATCH, RATE = 50, 10, 0.05


def load() -> tuple[Any, Any, Any, Any]:
    """Users' examples x [users, examples, ...] and y, and held-back x and y, from the file that the parent wrote."""
    data = np.load(sys.argv[1])
    return data["x"], data["y"], data["held_x"], data["held_y"]


def cohort(number: int, users: int) -> Any:
    return np.random.default_rng(number).choice(users, min(COHORT, users), replace=False)


def order(number: int, user: int, count: int) -> Any:
    return np.random.default_rng((number, user)).permutation(count)


class Turns:
    """Waits for the parent, times the rounds it asks for, and says how it went."""

    def __init__(self) -> None:
        self._left = 0
        self._wall = self._cpu = 0.0

    def ready(self) -> None:
        self._say({"start_seconds": time.perf_counter() - _BEGAN, "start_cpu": time.process_time()})

    def round_done(self, accuracy: Callable[[], float]) -> None:
        self._left -= 1
        if not self._left:
            seconds, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
            self._say({"seconds": seconds, "cpu": cpu, "accuracy": float(accuracy())})

    def _say(self, what: dict[str, float]) -> None:
        print(json.dumps(what), flush=True)
        line = sys.stdin.readline()
        if not line.strip():
            # At once: some frameworks take long to put their things away, or hang.
            os._exit(0)
        self._left = int(line)
        self._wall, self._cpu = time.perf_counter(), time.process_time()
