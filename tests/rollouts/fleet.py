"""A real coordinator and real devices in one process: every message is encoded and decoded, time is the test's."""

from __future__ import annotations

import copy
import functools
import shutil
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tests.client.recordings import recordings
from tests.databases import new_sqlite
from umbel.bundle import Bundle, file_refs
from umbel.digests import Digest
from umbel.identity import DeviceId
from umbel.manifest import Manifest
from umbel.messages import (
    check_in_from_message,
    check_in_reply_from_message,
    check_in_reply_to_message,
    check_in_to_message,
)
from umbel.plan import Plan
from umbel.randomness import generator
from umbel.runtime.onnx import OnnxRuntime
from umbel.successor import successor
from umbel.v1 import device_pb2 as pb
from umbel.visit import CheckIn, CheckInReply, ReportBegin, RetryWindow
from umbel.weights import Weights
from umbel_client import ALWAYS, Device, HostStatus, Identity, PersonalSettings
from umbel_client.channel import Traffic
from umbel_client.enrolment import new_key
from umbel_client.examples import Examples
from umbel_client.trainer import Job, train
from umbel_models.zoo import bundle_path
from umbel_server import heads
from umbel_server.aggregation import LeaderKey
from umbel_server.blobs import Blobs
from umbel_server.coordinator import Coordinator
from umbel_server.gates import GatePolicy
from umbel_server.keyring import Keyring
from umbel_server.repository import Repository
from umbel_server.rollout_spec import Audience, RolloutSpec, Wave
from umbel_server.signing import ReleaseSigner
from umbel_server.steering import LEASE_SECONDS
from umbel_server.store import Store
from umbel_server.surroundings import Surroundings
from umbel_server.tables import DEVICES
from umbel_server.task import Task
from umbel_server.versions import Lineage, VersionState

MODEL, POPULATION = "smartwatch", "wrists"
AUTHOR, SECOND = "operator:ada", "operator:grace"
RUNTIME = OnnxRuntime()
QUICK = PersonalSettings(epochs=0, margin=0.2, trial_seconds=30.0)
EAGER = GatePolicy(least_answers=1, ceiling_devices=1, ceiling_share=0.0, margin=0.0, most_kept_own_share=0.5)
WAVES = tuple(Wave(percent, soak_seconds=10.0, deadline_seconds=3600.0) for percent in (5.0, 25.0, 100.0))


@functools.cache
def trained() -> Weights:
    """Weights of the packaged model that tell the recordings' classes apart."""
    bundle = Bundle.open(bundle_path("smartwatch"))
    plan = Plan(epochs=6, batch_size=16, hyperparameters={"lr": 0.1})
    inputs, targets = recordings(280, "trained")
    examples = Examples({bundle.manifest.inputs[0].name: inputs}, {bundle.manifest.targets[0].name: targets}, 280)
    done = train(Job(plan, "trained", 0, "test"), bundle, bundle.shared_weights(), examples, RUNTIME, SetClock())
    return done.weights


@dataclass
class SetClock:
    instant: float = 1_790_000_000.0

    def now(self) -> float:
        return self.instant


def at_once(work: Callable[..., Any], *arguments: Any) -> Awaitable[Any]:
    async def result() -> Any:
        return work(*arguments)

    return result()


@dataclass
class DirectChannel:
    """A device's channel to a coordinator in the same process."""

    fleet: Fleet
    device: DeviceId
    traffic: Traffic = field(default_factory=Traffic)
    lies: dict[str, bytes] = field(default_factory=dict)
    """Listing files that a hostile way hands out instead."""
    replay: pb.CheckInResponse | None = None
    spoil: Callable[[bytes], bytes] = lambda data: data
    """What the way makes of a file's bytes."""
    say: Callable[[CheckIn], CheckIn] = lambda check_in: check_in
    """What the device tells instead."""

    async def check_in(self, check_in: CheckIn) -> CheckInReply:
        sent = check_in_to_message(self.say(check_in)).SerializeToString()
        answer = await self.fleet.coordinator.check_in(
            self.device, check_in_from_message(pb.CheckInRequest.FromString(sent))
        )
        message = check_in_reply_to_message(answer)
        if self.replay is not None:
            message.offer.CopyFrom(self.replay.offer)
        self.last = message
        return check_in_reply_from_message(message)

    async def fetch(self, digest: Digest, offset: int) -> AsyncGenerator[bytes, None]:
        data = self.spoil(self.fleet.coordinator.fetch(digest).read_bytes())
        self.traffic.down += len(data) - offset
        yield data[offset:]

    async def read_listing(self, name: str, limit: int) -> bytes:
        data = self.lies.get(name) or self.fleet.coordinator.listing_file(name)
        self.traffic.down += len(data)
        assert len(data) <= limit
        return data

    async def report(self, begin: ReportBegin, sealed: bytes) -> RetryWindow:
        raise AssertionError("nobody trains here")

    async def renew(self, certificate_request: bytes) -> bytes:
        raise AssertionError("nobody renews here")

    async def close(self) -> None:
        pass


class Fleet:
    """A coordinator's disk, and the devices' homes."""

    def __init__(self, folder: Path, devices: int = 0, url: str = "") -> None:
        self.folder, self.clock = folder, SetClock()
        self._steps = 0
        self.signer, self.leader = ReleaseSigner.generate(), LeaderKey.generate()
        self.keys = Keyring.create(folder / "keys")
        self.repository = Repository.create(folder / "listing", self.keys, self.clock.now())
        self.url = url or new_sqlite(folder / "umbel.db")
        self.coordinator = self.restart()
        self.coordinator.operations.add_model(MODEL, bundle_path("smartwatch"), AUTHOR)
        # A population's task says which model it has; nobody trains in these tests.
        task = Task("learn", POPULATION, MODEL, Plan(), goal=1, minimum=1, rounds=1, updates_private=False)
        self.coordinator.operations.create_task(task, AUTHOR)
        self.coordinator.operations.stop_task("learn", AUTHOR)
        self.devices = [self.enrol(number) for number in range(devices)]

    def restart(self, on_step: Callable[[str], None] = lambda step: None) -> Coordinator:
        store = Store.open(self.url, on_step, durable=False)
        self.coordinator = Coordinator(
            store,
            Blobs(self.folder / "blobs", durable=False),
            self.signer,
            self.leader,
            self.clock,
            Surroundings(at_once, runtime=RUNTIME),
            listing=(Repository(self.folder / "listing", self.keys), self.keys),
        )
        return self.coordinator

    @property
    def verbs(self) -> Any:
        return self.coordinator.verbs

    def enrol(self, number: int, population: str = POPULATION, **parts: Any) -> Device:
        key = new_key()
        identity = Identity(
            private_key=key,
            certificate_chain=b"",
            server_authority=b"",
            release_key=self.signer.public_key,
            population=population,
            device_address="",
            release_root=self.repository.first_root,
        )
        with self.coordinator.store.transaction() as connection:
            row = {"id": identity.device_id, "population": population, "enrolled_at": self.clock.now()}
            connection.execute(DEVICES.insert().values(row | {"runtimes": "", "sdk": "", "visits": 0, "reports": 0}))
        device = self.open(self.folder / f"home-{number}", identity, **parts)
        device.learn_from(*recordings(42, "fleet", number))
        return device

    def open(self, home: Path, identity: Identity, **parts: Any) -> Device:
        channel = DirectChannel(self, identity.device_id)
        defaults: dict[str, Any] = {
            "identity": identity, "channel": channel, "runtime": RUNTIME, "clock": self.clock, "status": HostStatus(),
            "policy": ALWAYS, "personal": QUICK, "offload": at_once,
        }  # fmt: skip
        return Device.open(home, **(defaults | parts))

    def reopen(self, index: int, **parts: Any) -> Device:
        """As after a start of the device's process."""
        kit = self.devices[index].kit
        self.devices[index] = self.open(self.folder / kit.home.name, kit.identity, **parts)
        return self.devices[index]

    def copied(self, folder: Path) -> Fleet:
        """The whole fleet as it lies on its disks now, once more; its devices aren't started before `reopen`."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        other = copy.copy(self)
        other.folder, other.clock = folder, SetClock(self.clock.instant)
        other.url = f"sqlite:///{folder / 'umbel.db'}"
        other.devices = list(self.devices)
        other.keys = Keyring(folder / "keys")
        other.repository = Repository(folder / "listing", other.keys)
        other.restart()
        return other

    # Versions.

    def add_version(self, change: Callable[[Weights], Weights]) -> int:
        """Register an accepted version whose weights are the trained ones, changed."""
        return self._register(*successor(Bundle.open(bundle_path("smartwatch")), change(trained()), RUNTIME))

    def lying_version(self) -> int:
        """Weights that don't answer the golden examples as its manifest's golden answers say."""
        manifest, files = successor(Bundle.open(bundle_path("smartwatch")), trained(), RUNTIME)
        other = {"weights.safetensors": trained().scaled(1.5).to_bytes()}
        return self._register(replace(manifest, files={**manifest.files, **file_refs(other)}), files | other)

    def _register(self, manifest: Manifest, files: dict[str, bytes]) -> int:
        registry = self.coordinator.registry
        registry.keep_successor(manifest, files)
        with self.coordinator.store.transaction() as connection:
            made = registry.add_version(
                connection, MODEL, 1, manifest, Lineage(registered_by="test"), self.clock.now(), VersionState.ACCEPTED
            )
        return made.number

    def good_version(self) -> int:
        self._steps += 1
        return self.add_version(lambda weights: weights.scaled(1.0 + 0.001 * self._steps))

    def broken_version(self) -> int:
        """Weights that answer every question with the same class, and can't be fine-tuned within an epoch."""

        def spoil(weights: Weights) -> Weights:
            chance = generator("broken")
            return Weights(
                {n: (chance.normal(0, 3.0, a.shape) * 40).astype(np.float32) for n, a in weights.arrays.items()}
            )

        return self.add_version(spoil)

    # Time goes on.

    async def visits(self, seconds: float = 11.0) -> None:
        """Every device visits once, and the coordinator steers."""
        self.clock.instant += seconds
        for device in self.devices:
            await device.wake()
        self.steer()

    def steer(self) -> None:
        self.clock.instant += 2.0
        assert self.coordinator.rollouts is not None
        self.coordinator.rollouts.reconcile()
        self.coordinator.fleet.flush(self.clock.instant)

    def releases(self) -> list[int]:
        """The release that answers, device by device."""
        return [active.number if (active := device.kit.shelf.slots.active) else 0 for device in self.devices]

    def begin_rollout(self, name: str, version: int, **spec: Any) -> Any:
        """Prepare, draft, submit, approve, start."""
        whose = spec.get("population", POPULATION)
        prepared = self.verbs.prepare(MODEL, version, "stable", AUTHOR, population=whose)
        head = self.head(whose)
        defaults = {"from_release": head, "revert_release": prepared.revert, "waves": WAVES, "gate": EAGER}
        defaults |= {"model": MODEL, "channel": "stable", "population": POPULATION, "release": prepared.number}
        planned = RolloutSpec(**(defaults | spec))
        self.verbs.create(name, planned, AUTHOR)
        self.verbs.submit(name, AUTHOR, 0)
        self.verbs.approve(name, SECOND, planned.subject, 1)
        return self.verbs.start(name, AUTHOR, 2).rollout

    def head(self, population: str = POPULATION) -> int:
        """What a population gets on the stable channel."""
        with self.coordinator.store.reading() as connection:
            return heads.read(connection).of(Audience(MODEL, "stable", population))

    def id_of(self, index: int) -> str:
        return self.devices[index].id


BEGINNINGS: dict[int, Fleet] = {}
"""Fleets by their size, each as its devices have got a first release."""


async def fleet_of(folder: Path, devices: int) -> Fleet:
    """A fleet whose devices have a first release, on the stable channel: a copy of one that this process made once.

    That one lies beside the folder, which is a test's own.
    """
    if devices not in BEGINNINGS:
        beginning = Fleet(folder.with_name(f"fleet-of-{devices}"), devices)
        beginning.verbs.publish(MODEL, beginning.good_version(), "stable", AUTHOR)
        await beginning.visits()
        BEGINNINGS[devices] = beginning
    fleet = BEGINNINGS[devices].copied(folder)
    fleet.clock.instant += LEASE_SECONDS  # that one's controller steers no more
    for index in range(devices):
        fleet.reopen(index)
    return fleet
