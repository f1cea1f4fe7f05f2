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
from pathlib import Path
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


def processor_seconds() -> float:
    """What this process has taken so far, and those that it has started and that still run."""
    return time.process_time() + sum(map(_processor_seconds_of, _children_of(os.getpid())))


def _processor_seconds_of(pid: int) -> float:
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK") + sum(map(_processor_seconds_of, _children_of(pid)))


def _children_of(pid: int) -> list[int]:
    files = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for file in files for child in file.read_text().split()]


class Turns:
    """Waits for the parent, times the rounds it asks for, and says how it went."""

    def __init__(self) -> None:
        self._left = 0
        self._wall = self._cpu = 0.0

    def ready(self) -> None:
        self._say({"start_seconds": time.perf_counter() - _BEGAN, "start_cpu": processor_seconds()})

    def round_done(self, accuracy: Callable[[], float]) -> None:
        self._left -= 1
        if not self._left:
            seconds, cpu = time.perf_counter() - self._wall, processor_seconds() - self._cpu
            self._say({"seconds": seconds, "cpu": cpu, "accuracy": float(accuracy())})

    def _say(self, what: dict[str, float]) -> None:
        print(json.dumps(what), flush=True)
        line = sys.stdin.readline()
        if not line.strip():
            # At once: some frameworks take long to put their things away, or hang.
            os._exit(0)
        self._left = int(line)
        self._wall, self._cpu = time.perf_counter(), processor_seconds()
