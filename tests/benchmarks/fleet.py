"""The fleet engine: days of 10,000 devices, what a check-in costs in fleets of any size, and a sleeping device.

Check-ins are told in processor time, since all of them run on one thread; a day in real time too, with the two threads
for training that `umbel-simulate run` takes: once with a tiny model, which leaves the engine's own cost, and once with
a net of convolutions, whose training and judging is a third of it. Each fleet has a process of its own.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.benchmarks.harness import Table, child, peak_mb
from umbel_simulations.engines import Silent
from umbel_simulations.fleet.engine import Run
from umbel_simulations.fleet.house import listening
from umbel_simulations.fleet.virtual_time import run as run_loop
from umbel_simulations.outcome import Outcome
from umbel_simulations.scenario import Data, Scenario, TaskPart
from umbel_simulations.scratch import scratch
from umbel_simulations.setting import prepare
from umbel_simulations.world import Population

FLEETS = (1_000, 10_000, 100_000)
CHECK_INS = 4_000
WORKERS = 2
TINY, LARGER = "flights", "smartwatch"
"""Models that are packages' own, and federations of the same names."""
DAY, FLAT, ASLEEP = (
    "real seconds of a day, 10,000 devices, 50 rounds, a tiny model",
    "cost of a check-in, 100,000 devices over 1,000",
    "bytes of memory per device, 100,000 devices",
)
COLUMNS = ("fleet", "devices", "check-ins", "sessions", "ms/check-in", "processor s", "real s", "peak MB")


def run() -> Table:
    rows: list[tuple[str | float, ...]] = []
    cost: dict[int, float] = {}
    asleep = 0.0
    for devices in FLEETS:
        found = child("tests.benchmarks.fleet", "looking-in", str(devices))
        cost[devices], asleep = found["ms"], found["bytes"]
        rows.append(("only looking in", devices, found["check_ins"], 0, *_told(found)))
    days = {model: child("tests.benchmarks.fleet", f"day-{model}", "10000") for model in (TINY, LARGER)}
    for model, found in days.items():
        rows.append((f"a day, {model}", 10_000, found["check_ins"], found["sessions"], *_told(found)))
    ratios = {DAY: days[TINY]["all"], FLAT: cost[FLEETS[-1]] / cost[FLEETS[0]], ASLEEP: asleep}
    aims = {DAY: ("<=", 60.0), FLAT: ("<=", 1.5), ASLEEP: ("<=", 20_000.0)}
    return Table("The fleet engine: real devices and a real coordinator on virtual time", COLUMNS, rows, ratios, aims)


def _told(found: dict[str, Any]) -> tuple[float, ...]:
    return found["ms"], found["cpu"], found["all"], found["peak"]


class Timed(Run):
    """Tells what its parts cost."""

    stops_when_done = False
    began = before = 0.0

    def _enrol(self) -> Any:
        gc.collect()
        self.before = resident()
        return super()._enrol()

    def _wake_everybody(self) -> None:
        super()._wake_everybody()
        self.began = time.process_time()

    def _outcome(self) -> Outcome:
        self.spent = time.process_time() - self.began
        gc.collect()
        self.per_device = (resident() - self.before) / self._scenario.population.devices
        return super()._outcome()


def resident() -> float:
    """Bytes that this process has resident now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024.0
    raise RuntimeError("/proc/self/status tells no VmRSS")


def looking_in(devices: int) -> Scenario:
    """Devices that only ask and are told to come back: as many times, in the same time, in fleets of any size."""
    hours = 2.0
    population = Population(devices=devices, availability="always", check_in_hours=hours * devices / CHECK_INS)
    task = TaskPart(rounds=1, goal=1, over_selection=1.0)
    return Scenario("looking-in", "smartwatch", Data("smartwatch"), hours=hours, task=task, population=population)


def day(devices: int, model: str) -> Scenario:
    """A day and a night: 50 rounds, then devices look in until it is over."""
    population = Population(devices=devices, check_in_hours=2.0)
    task = TaskPart(rounds=50, goal=40, minimum=30, over_selection=1.1, deadline_seconds=1800.0)
    return Scenario("day", model, Data(model, most_examples=16), task=task, population=population)


def measure(scenario: Scenario, workers: int = WORKERS) -> dict[str, float]:
    """Play it, and tell what it cost."""
    runs: list[Timed] = []

    def timed(loop: Any) -> Any:
        runs.append(Timed(loop, scenario, prepare(scenario), workers, Silent(), place, failures))
        return runs[0].play()

    began, spent = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder, scratch(Path(folder)) as place, listening() as failures:
        outcome = run_loop(timed)
    check_ins = sum(hour.check_ins for hour in outcome.hourly)
    return {
        "check_ins": check_ins,
        "sessions": outcome.sessions,
        "rounds": sum(one.verdict == "accepted" for one in outcome.rounds),
        "ms": 1e3 * runs[0].spent / max(check_ins, 1),
        "bytes": runs[0].per_device,
        "all": time.perf_counter() - began,
        "cpu": time.process_time() - spent,
        "peak": peak_mb(),
    }


if __name__ == "__main__":
    kind, _, model = sys.argv[1].partition("-")
    scenario = day(int(sys.argv[2]), model) if kind == "day" else looking_in(int(sys.argv[2]))
    print(json.dumps(measure(scenario, int(sys.argv[3]) if sys.argv[3:] else WORKERS)))
