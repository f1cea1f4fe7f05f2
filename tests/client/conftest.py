"""A device in a fresh home, joined to a small coordinator in one process."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.client.coordinator import POPULATION, Coordinator, DirectChannel
from tests.client.recordings import recordings
from umbel.plan import Plan
from umbel.runtime.onnx import OnnxRuntime
from umbel_client import ALWAYS, Device, HostStatus, Identity, PersonalSettings
from umbel_client.enrolment import new_key

RUNTIME = OnnxRuntime()


@dataclass
class SetClock:
    """A clock that a test moves."""

    instant: float = 1_700_000_000.0

    def now(self) -> float:
        return self.instant


def at_once(work: Callable[[], Any]) -> Awaitable[Any]:
    """Heavy work without a thread, as a simulation does it."""

    async def result() -> Any:
        return work()

    return result()


LEARNS = PersonalSettings(epochs=30, hyperparameters={"lr": 0.1})


@dataclass
class Bench:
    """Everything round one device."""

    home: Path
    clock: SetClock
    coordinator: Coordinator
    channel: DirectChannel
    identity: Identity
    status: HostStatus = field(default_factory=HostStatus)

    def open(self, **parts: Any) -> Device:
        """The device, as after a start of its process."""
        defaults: dict[str, Any] = {
            "identity": self.identity, "channel": self.channel, "runtime": RUNTIME, "clock": self.clock,
            "status": self.status, "policy": ALWAYS, "offload": at_once,
        }  # fmt: skip
        return Device.open(self.home, **(defaults | parts))

    def device_with_examples(self, count: int = 70, **parts: Any) -> Device:
        """The device, after it has seen something."""
        device = self.open(**parts)
        device.learn_from(*recordings(count, "own"))
        return device


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    clock = SetClock()
    coordinator = Coordinator(clock.now)
    identity = Identity(
        private_key=new_key(),
        certificate_chain=b"",
        server_authority=b"",
        release_key=coordinator.release_key.public_key().public_bytes_raw(),
        population=POPULATION,
        device_address="",
    )
    return Bench(tmp_path / "home", clock, coordinator, DirectChannel(coordinator), identity)


async def learnt_from_anna(bench: Bench) -> Device:
    """With a model of its own, and a report that was sealed and not sent."""
    bench.coordinator.publish()
    device = bench.open(personal=LEARNS)
    device.learn_from(*recordings(70, "anna", shift=2), subject="anna")
    bench.coordinator.tasks = [Plan(epochs=1)]
    bench.coordinator.break_upload_after = 0
    await device.wake()
    assert device.kit.shelf.slots.personal is not None and (bench.home / "session" / "sealed.bin").exists()
    return device
