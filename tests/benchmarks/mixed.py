"""What a mixed fleet costs in accuracy: twenty wearers on ONNX Runtime, and the same with one in four on LiteRT.

The same federated rounds as `learning`, task by task with the same batches on both fleets; only the runtime differs.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean

from tests.benchmarks import learning
from tests.benchmarks.harness import Table
from umbel.plan import Plan
from umbel.runtime import Runtime
from umbel.runtime.named import runtime_named
from umbel.update import Aggregate, Update
from umbel.weights import Weights
from umbel_client.trainer import Job, train
from umbel_server.aggregation import Presummed
from umbel_server.flower import StrategySpec, apply

TASKS = ("first", "second", "third")
"""Another name of a task is another order of the examples everywhere."""
ROUNDS = 30
COST = "points that a mixed fleet loses, mean of the tasks"


def run() -> Table:
    onnx, litert = runtime_named("onnx"), runtime_named("litert")
    fleets: dict[str, Callable[[int], Runtime]] = {
        "20 on ONNX Runtime": lambda device: onnx,
        "15 on ONNX Runtime, 5 on LiteRT": lambda device: litert if device % 4 == 3 else onnx,
    }
    rows: list[tuple[str | float, ...]] = []
    overall: dict[str, list[float]] = {}
    for title, runtime_of in fleets.items():
        for task in TASKS:
            found = learning.accuracies(_federated(task, runtime_of))
            rows.append((f"{title}, {task} task", found.overall, found.mean, found.worst))
            overall.setdefault(title, []).append(found.overall)
    alone, mixed = (mean(found) for found in overall.values())
    spread = 100 * (max(max(f) for f in overall.values()) - min(min(f) for f in overall.values()))
    return Table(
        f"A mixed fleet: FedAvgM, {ROUNDS} rounds of an epoch, smartwatch",
        ("fleet", "accuracy", "mean wearer", "worst wearer"),
        rows,
        {COST: 100 * (alone - mixed), "points between the best and the worst of all": spread},
        {COST: ("<=", 0.5)},
    )


def _federated(task: str, runtime_of: Callable[[int], Runtime]) -> Weights:
    plan = Plan(epochs=1, batch_size=16, hyperparameters={"lr": 0.1})
    strategy = StrategySpec("FedAvgM", {"server_momentum": 0.9})
    current, state = learning.START, b""
    for number in range(1, ROUNDS + 1):
        total = Aggregate.zero(learning.START.shapes)
        for device, (name, split) in enumerate(learning.wearers().items()):
            job = Job(plan, task, number, name)
            done = train(job, learning.BUNDLE, current, split.training, runtime_of(device), learning.CLOCK)
            total.accumulate(Update(done.weights - current, float(split.training.count), {}))
        current, state = apply(strategy, state, current, Presummed(total), number)
    return current
