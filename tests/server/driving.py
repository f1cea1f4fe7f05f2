"""A coordinator to drive in one process: real store, blobs and seals; its clock and its crashes are the test's."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import sqlalchemy as sa

from umbel.bundle import Bundle
from umbel.digests import Digest, digest_of
from umbel.errors import NotFound, RoundClosed
from umbel.identity import DeviceId
from umbel.messages import release_from_bytes, update_to_bytes
from umbel.plan import Kind, Plan
from umbel.randomness import generator
from umbel.release import verify_statement
from umbel.runtime.onnx import OnnxRuntime
from umbel.sealing import SEALED, Binding, seal
from umbel.update import Update
from umbel.visit import Assignment, CheckIn, CheckInReply, ReportBegin, RetryWindow
from umbel.weights import Weights
from umbel_models.zoo import bundle_path
from umbel_server.aggregation import LeaderKey
from umbel_server.blobs import Blobs
from umbel_server.coordinator import Coordinator
from umbel_server.flower.spec import StrategySpec
from umbel_server.signing import ReleaseSigner
from umbel_server.store import Store
from umbel_server.surroundings import Surroundings
from umbel_server.tables import DEVICES
from umbel_server.task import Task

MODEL, POPULATION, TASK, OPERATOR = "smartwatch", "wrists", "learn", "operator:test"
BUNDLE = Bundle.open(bundle_path("smartwatch"))
SHAPES = BUNDLE.manifest.shared_shapes
METRICS = {"loss": 10.0, "correct": 12.0, "examples": 20.0}
RUNTIME = OnnxRuntime()
T = TypeVar("T")


class Crash(BaseException):
    """The process dies here."""


@dataclass
class ManualClock:
    """Time stands still until a test moves it."""

    instant: float = 1_000_000.0

    def now(self) -> float:
        return self.instant


async def inline(function: Callable[..., T], *arguments: Any) -> T:
    """Do the heavy work here and now."""
    return function(*arguments)


@dataclass
class Plug:
    """Pulled at the durable steps whose numbers are in `at`; counts them all."""

    at: set[int] = field(default_factory=set)
    steps: list[str] = field(default_factory=list)
    kind: type[BaseException] = Crash

    def __call__(self, step: str) -> None:
        self.steps.append(step)
        if len(self.steps) in self.at:
            raise self.kind(f"{len(self.steps)}: {step}")


class World:
    """One coordinator's disk, keys and clock; `restart` throws the process away and starts another."""

    def __init__(
        self, url: str, blobs: Path, signer: ReleaseSigner | None = None, leader: LeaderKey | None = None
    ) -> None:
        self.url, self.blobs_path = url, blobs
        self.signer, self.leader = signer or ReleaseSigner.generate(), leader or LeaderKey.generate()
        self.clock = ManualClock()
        self.plug = Plug()
        self.offload: Callable[..., Awaitable[Any]] = inline
        self.start()
        self.coordinator.operations.add_model(MODEL, bundle_path("smartwatch"), OPERATOR)

    def start(self) -> None:
        self.store = Store.open(self.url, self.plug)
        self.blobs = Blobs(self.blobs_path, self.plug)
        self.coordinator = Coordinator(
            self.store, self.blobs, self.signer, self.leader, self.clock, Surroundings(self.offload, runtime=RUNTIME)
        )

    def restart(self) -> None:
        self.store.close()
        self.start()

    def pass_time_while_adding(self, seconds: float) -> list[asyncio.Task[None]]:
        """Start anew, and let time pass as a second report is added up; the looks at the clock that come with it."""
        looks: list[asyncio.Task[None]] = []

        async def meanwhile(function: Callable[..., Any], *arguments: Any) -> Any:
            found = await inline(function, *arguments)
            if function.__name__ == "add" and self.coordinator.runner(TASK).active.reports:  # type: ignore[union-attr]
                self.clock.instant += seconds
                looks.append(asyncio.create_task(self.coordinator.tick()))
                await asyncio.sleep(0)  # it goes as far as it can
            return found

        self.offload = meanwhile
        self.restart()
        return looks

    async def surely(self, act: Callable[[], Awaitable[T]]) -> T:
        """Do something again, on a new process, until it comes through."""
        while True:
            try:
                return await act()
            except Crash:
                self.restart()

    def enrol(self, *names: str, population: str = POPULATION) -> list[SimulatedDevice]:
        devices = [SimulatedDevice(self, name, population) for name in names]
        fresh = {"enrolled_at": self.clock.now(), "runtimes": "", "sdk": "", "visits": 0, "reports": 0}
        with self.store.transaction() as connection:
            for device in devices:
                connection.execute(DEVICES.insert().values(id=device.id, population=population, **fresh))
        return devices

    async def begin(self, task: Task) -> None:
        """Create a task and open its first round."""
        self.coordinator.operations.create_task(task, OPERATOR)
        await self.coordinator.tick()

    def base_of(self, assignment: Assignment) -> Digest:
        """The bundle that an assignment starts from."""
        statement = verify_statement(assignment.base, self.signer.public_key)
        return release_from_bytes(statement).bundle

    def weights(self) -> Weights:
        """Of the newest accepted version."""
        with self.store.reading() as connection:
            version = self.coordinator.registry.newest_accepted(connection, MODEL)
        return self.coordinator.registry.bundle(version.bundle).shared_weights()

    def dump(self, table: sa.Table) -> list[tuple[object, ...]]:
        """A whole table, in the order of its key."""
        with self.store.reading() as connection:
            rows = connection.execute(sa.select(table).order_by(*table.primary_key.columns))
            return [tuple(row) for row in rows]


def task(**changes: Any) -> Task:
    """A small task; `strategy` may be a name."""
    strategy = changes.pop("strategy", "FedAvg")
    spec = StrategySpec(strategy) if isinstance(strategy, str) else strategy
    values = {"goal": 2, "minimum": 1, "rounds": 2, "deadline_seconds": 100.0, "plan": Plan(), "seed": 7}
    values |= {"updates_private": False} | changes
    return Task(TASK, POPULATION, MODEL, strategy=spec, **values)


def offer(population: str = POPULATION, **changes: Any) -> CheckIn:
    values = {"runtimes": ("onnx",), "suites": (SEALED,), "training_examples": 50, "held_back_examples": 20} | changes
    return CheckIn(population, **values)


@dataclass
class Report:
    """A sealed report and the question before it."""

    begin: ReportBegin
    sealed: bytes


@dataclass
class SimulatedDevice:
    """Checks in, draws its update from its own seeded chance, seals it and reports it."""

    world: World
    name: str
    population: str
    pending: Report | None = None

    @property
    def id(self) -> DeviceId:
        return DeviceId(digest_of(self.name.encode())[:32])

    async def check_in(self, **changes: Any) -> CheckInReply:
        return await self.world.coordinator.check_in(self.id, offer(self.population, **changes))

    async def assignment(self) -> Assignment:
        reply = (await self.check_in()).reply
        assert isinstance(reply, Assignment), reply
        return reply

    def update(self, assignment: Assignment) -> Update:
        if assignment.plan.kind is Kind.EVALUATE:
            return Update(Weights({}), 20.0, METRICS)
        return self.drawn(assignment.task, assignment.round)

    def drawn(self, task_name: str, round_number: int) -> Update:
        """What it reports in a training round."""
        chance = generator("update", self.name, task_name, round_number)
        delta = {name: 0.01 * chance.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
        return Update(Weights(delta), 50.0, METRICS | {"train_loss": 30.0, "train_examples": 50.0})

    def report(self, assignment: Assignment, body: Update | bytes | None = None, **changes: Any) -> Report:
        """The report of this device for an assignment; `changes` spoil the question before it."""
        update = self.update(assignment) if body is None else body
        plain = update if isinstance(update, bytes) else update_to_bytes(update)
        name = f"{self.name}/{assignment.task}/{assignment.round}/{assignment.plan.kind}"
        report_id = str(changes.pop("report_id", digest_of(name.encode())[:32]))
        sealed = seal(plain, assignment.sealing, self.binding(assignment, report_id, **changes.pop("binding", {})))
        values = {
            "session_id": assignment.session_id,
            "report_id": report_id,
            "upload_token": assignment.upload_token,
            "sealed_size": len(sealed),
            "sealed_digest": digest_of(sealed),
        }
        return Report(ReportBegin(**(values | changes)), sealed)

    def binding(self, assignment: Assignment, report_id: str, **changes: Any) -> Binding:
        base = self.world.base_of(assignment)
        values = {"task": assignment.task, "round": assignment.round, "session_id": assignment.session_id}
        return Binding(**(values | {"report_id": report_id, "base": base} | changes))

    async def send(self, report: Report, chunk: int = 30_000) -> RetryWindow:
        """One upload, from wherever the coordinator says."""
        coordinator = self.world.coordinator
        offset = await coordinator.begin_report(report.begin)
        while offset < report.begin.sealed_size:
            part = report.sealed[offset : offset + chunk]
            await coordinator.append(report.begin.report_id, offset, part)
            offset += len(part)
        return await coordinator.finish_report(report.begin.report_id)

    async def visit(self) -> bool:
        """One visit, going on where the last one was cut off; returns whether a report was acknowledged."""
        if self.pending is None:
            reply = (await self.check_in()).reply
            if not isinstance(reply, Assignment):
                return False
            self.pending = self.report(reply)
        try:
            await self.send(self.pending)
        except (RoundClosed, NotFound):
            self.pending = None
            return False
        self.pending = None
        return True


async def together(*devices: SimulatedDevice) -> list[bool]:
    return await asyncio.gather(*(device.visit() for device in devices))
