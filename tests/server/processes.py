"""A coordinator and devices as the processes that users run, to be killed at any moment and started again."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import sqlalchemy as sa

from tests.client.recordings import recordings
from umbel.clock import SystemClock
from umbel.enrolment_code import EnrolmentCode
from umbel.v1 import admin_pb2 as pb
from umbel_client import Device
from umbel_client.cli import main as umbel_device
from umbel_client.enrolment import load_identity
from umbel_client.shelf import Shelf
from umbel_models.zoo import bundle_path
from umbel_server.app import Parts, build
from umbel_server.cli.connection import Caller, connect
from umbel_server.folder import Folder
from umbel_server.identity import ADDRESSES_FILE, Addresses
from umbel_server.settings import load_settings
from umbel_server.tables import RELEASES, VERSIONS
from umbel_server.task import Task

MODEL, TASK, POPULATION = "smartwatch", "learn", "wrists"
HELD_BACK = 7
_CONFIG = "pace_shortest_seconds = 0.2\npace_idle_seconds = 0.5\n"
ALWAYS_READY = """
[policy]
version = 1
require_idle = false
require_power = false
require_unmetered = false
allow_unknown = ["temperature", "storage"]
"""
_DEVICE_CONFIG = f"""{ALWAYS_READY}
[personal]
epochs = 1

[privacy]
minimum_cohort = 2
"""


@contextmanager
def hearing_the_terminal() -> Iterator[None]:
    """Programs that start inside notice when their terminal goes, though the tests were to outlive theirs (`nohup`)."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


@dataclass
class Program:
    """A command that is run again and again; what it prints goes to one log."""

    command: list[str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    kills: int = 0

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def kill(self) -> None:
        """SIGKILL: no handler, no farewell. It must have been alive until now."""
        assert self.process is not None
        assert self.process.poll() is None, f"it ended by itself:\n{self.log.read_text()[-2000:]}"
        self._end(signal.SIGKILL)
        self.kills += 1

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        return self._end(signal.SIGTERM)

    def end(self) -> None:
        """SIGTERM, also to one that was started a moment ago and can't end in good order yet."""
        code = self.stop()
        assert code in (0, -signal.SIGTERM), f"exit code {code}:\n{self.log.read_text()[-2000:]}"

    def _end(self, number: signal.Signals) -> int:
        if self.process is None:
            return 0
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(20)
        self.process = None
        return code


@dataclass
class RealDevice:
    """An enrolled device and its agent."""

    home: Path
    examples: int
    """For training; no two devices have as many, so that a sum of weights tells whose they were."""
    agent: Program = field(init=False)
    adopted: int = 0

    def __post_init__(self) -> None:
        command = [sys.executable, "-m", "umbel_client.cli", "--home", str(self.home), "run", "--json"]
        self.agent = Program(command, self.home.with_suffix(".log"))

    def settle(self, code: str, *words: str) -> None:
        """Enrol, and take over examples."""
        self.home.mkdir()
        (self.home / "device.toml").write_text(_DEVICE_CONFIG)
        count = self.examples + HELD_BACK
        x, y = recordings(count, self.home.name)
        archive = self.home / "mine.npz"
        np.savez(archive, x=x, y=y, held_back=np.arange(count) >= self.examples)
        for step in (["enrol", "--code", code, *words], ["examples", "import", str(archive)]):
            assert umbel_device(["--home", str(self.home), *step]) == 0

    def visit_now(self) -> None:
        """One visit by hand: it may be sleeping off a coordinator that it found dead many times in a row."""
        self.agent.end()
        assert umbel_device(["--home", str(self.home), "run", "--once", "--json"]) == 0
        self.agent.start()

    @property
    def id(self) -> str:
        return load_identity(self.home).device_id

    def state(self) -> dict[str, Any]:
        """What it remembers; empty while there is nothing."""
        path = self.home / "state.json"
        return dict(json.loads(path.read_bytes())) if path.exists() else {}

    def is_at_rest(self, newest: int) -> bool:
        """Whether nothing is left for it to tell or to test."""
        has_session = (self.home / "session" / "session.json").exists()
        return not has_session and self.state().get("judged", 0) >= newest

    def visits(self) -> Iterator[dict[str, Any]]:
        """What its agents have told of their visits."""
        for line in self.agent.log.read_text().splitlines():
            if line.startswith("{"):
                try:
                    yield json.loads(line)
                except ValueError:
                    continue  # cut off by a SIGKILL

    def require_good_slot(self) -> None:
        """Once a release has been adopted, what lies on the disk loads, is whole, proves itself and answers."""
        with tempfile.TemporaryDirectory() as folder:
            # A copy: the look must not mend anything.
            home = Path(shutil.copytree(self.home, Path(folder) / "home"))
            active = Shelf(home / "shelf").slots.active
            assert active is not None or not self.adopted, "an adopted release is lost"
            if active is not None:
                assert active.number >= self.adopted, "an older release came back"
                self.adopted = active.number
                device = Device.open(home)
                assert device.answers_with.endswith(f"release {active.number}"), device.answers_with
                assert np.isfinite(device.predict(recordings(2)[0])["logits"]).all()


@dataclass
class Federation:
    """One coordinator's folder and its devices."""

    folder: Path
    database_url: str
    device_count: int
    devices: list[RealDevice] = field(init=False, default_factory=list)
    coordinator: Program = field(init=False)
    _chosen: dict[str, Any] = field(init=False, default_factory=dict)
    """Settings beside the usual ones."""

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @contextmanager
    def parts(self) -> Iterator[Parts]:
        """The coordinator's insides, while its process doesn't run."""
        assert self.coordinator.process is None
        parts = build(load_settings(self.state, database_url=self.database_url, **self._chosen), SystemClock())
        try:
            yield parts
        finally:
            parts.store.close()

    def __enter__(self) -> Self:
        Folder.create(self.state, (), SystemClock().now())
        with (self.state / "config.toml").open("a") as config:
            config.write(_CONFIG)
        ports = [
            f"--{name}-port={port}" for name, port in zip(("device", "enrol", "admin"), free_ports(3), strict=True)
        ]
        serve = ["serve", "--state", str(self.state), "--database-url", self.database_url, *ports]
        self.coordinator = Program([sys.executable, "-m", "umbel_server.cli", *serve], self.folder / "coordinator.log")
        return self

    def __exit__(self, *error: object) -> None:
        for program in (self.coordinator, *(device.agent for device in self.devices)):
            if program.process is not None:
                program.process.kill()
                program.process.wait()

    def begin(self, task: Task) -> None:
        """Register a model, enrol the devices, create the task, start everything."""
        with self.parts() as parts:
            parts.coordinator.operations.add_model(MODEL, bundle_path(MODEL), "operator:test")
            tokens, _ = parts.access.create_tokens("operator:test", POPULATION, self.device_count, 3600.0)
            authority = parts.authorities.server.certificate_pem
            parts.coordinator.operations.create_task(task, "operator:test")
        self.coordinator.start()
        enrol = self.addresses().enrol
        for index, token in enumerate(tokens):
            device = RealDevice(self.folder / f"device-{index}", examples=200 + 2**index)
            device.settle(EnrolmentCode(enrol, token, authority).to_text(), *self.words_for_enrolment())
            self.devices.append(device)
            device.agent.start()

    def words_for_enrolment(self) -> list[str]:
        """What a device is told beside its code."""
        return []

    @property
    def kills(self) -> int:
        """How many processes were killed so far."""
        return self.coordinator.kills + sum(device.agent.kills for device in self.devices)

    def versions(self) -> int:
        """How many versions there are, by the store alone: the coordinator may be dead just now."""
        return int(self._ask(sa.select(sa.func.count()).select_from(VERSIONS)))

    def wake_all(self) -> None:
        """Let each device pay a visit now, to a coordinator that listens."""
        with connect(self.state, Caller(), self.addresses().admin) as (stub, _):
            stub.GetTask(pb.GetTaskRequest(name=TASK), wait_for_ready=True, timeout=60)
        for device in self.devices:
            device.visit_now()

    def stop_task(self) -> None:
        """What `umbel tasks stop` asks."""
        with connect(self.state, Caller(), self.addresses().admin) as (stub, _):
            stub.StopTask(pb.StopTaskRequest(name=TASK), wait_for_ready=True, timeout=60)

    def newest_release(self) -> int:
        """The number of the newest release for devices."""
        return int(self._ask(sa.select(sa.func.max(RELEASES.c.number)).where(RELEASES.c.channel == "stable")))

    def _ask(self, query: sa.Select[Any]) -> Any:
        engine = sa.create_engine(self.database_url)
        try:
            with engine.connect() as connection:
                return connection.scalar(query)
        finally:
            engine.dispose()

    def addresses(self) -> Addresses:
        """Where it listens, once it does."""
        wait_until((self.state / ADDRESSES_FILE).exists, "the coordinator listens")
        return Addresses.read(self.state)


def wait_until(done: Callable[[], object], what: str, seconds: float = 120.0) -> None:
    """Look again and again until it is so."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, f"still not so: {what}"
        time.sleep(0.05)


def names_in(folder: Path) -> set[str]:
    """What lies in a folder now; nothing before there is one."""
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at now."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
