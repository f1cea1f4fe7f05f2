"""Rollouts as real processes, killed with SIGKILL at random: coordinator, devices, and the commands of two people."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pytest
import sqlalchemy as sa

from tests.rollouts.fleet import Fleet
from tests.server.processes import MODEL, POPULATION, Federation, names_in, wait_until
from tests.server.test_restart_processes import Killer
from tests.server.test_restart_processes import task as training
from umbel.clock import SystemClock
from umbel_client.shelf import Shelf
from umbel_server.app import Parts
from umbel_server.tables import ROLLOUTS
from umbel_server.versions import Lineage, VersionState

DEVICES = 4
_OWN = "epochs = 0\nmargin = 0.2\ntrial_seconds = 1.0"
_SPEC = """\
model = "{model}"
channel = "stable"
population = "{population}"
release = {number}
revert_release = {revert}
from_release = {head}

[gate]
least_answers = 1
ceiling_devices = 1
ceiling_share = 0.0
most_kept_own_share = 1.0
margin = 0.0

[[waves]]
percent = 40.0
soak_seconds = 1.0
deadline_seconds = 300.0

[[waves]]
percent = 100.0
soak_seconds = 1.0
deadline_seconds = 300.0
"""
_NOBODY = re.compile(r"no answer from the coordinator|no coordinator is running")
"""What a command may say for itself when its coordinator was killed."""


@dataclass
class People:
    """Who writes rollouts and who lets them go, at their terminals; their commands are killed as well."""

    federation: Federation
    killer: Killer
    kills: int = 0
    approver: list[str] = field(default_factory=list)

    def type(self, *words: str) -> Any:
        """Type a command until it is answered, each time under the same request id."""
        shared = ["--request-id", self.killer.chance.bytes(8).hex(), "--state", str(self.federation.state), "--json"]
        command = [sys.executable, "-m", "umbel_server.cli", *words, *shared]
        for _ in range(20):
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
                if self.killer.chance.random() < 0.2:
                    time.sleep(self.killer.chance.uniform(0.5, 1.1))
                    self._kill_one_of_two(process)
                out, err = process.communicate()
            if process.returncode == 0:
                return json.loads(out)
            assert process.returncode == -9 or _NOBODY.search(err), f"{words}: {process.returncode} {err}"
            time.sleep(0.2)
        raise AssertionError(f"never answered: {words}")

    def _kill_one_of_two(self, process: subprocess.Popen[str]) -> None:
        self.kills += 1
        if self.killer.chance.random() < 0.5:
            process.kill()
        else:
            self.federation.coordinator.kill()
            self.federation.coordinator.start()

    def roll_out(self, name: str, version: int) -> int:
        """Prepare, write, submit, approve and start; the release's number."""
        prepared = self.type("releases", "prepare", MODEL, str(version))
        file = self.federation.folder / f"{name}.toml"
        spec = {"model": MODEL, "population": POPULATION} | prepared
        file.write_text(_SPEC.format(**spec))
        self.type("rollouts", "create", name, "--file", str(file))
        self.type("rollouts", "submit", name)
        self.type("rollouts", "approve", name, *self.approver)
        self.type("rollouts", "start", name)
        return int(prepared["number"])


@dataclass
class RolloutFederation(Federation):
    """With versions that nobody trained, and devices whose trials are short."""

    def __enter__(self) -> Self:
        super().__enter__()
        with (self.state / "config.toml").open("a") as config:
            config.write("stop_seconds = 0.2\n")
        return self

    def add_versions(self) -> list[int]:
        """A good one, one that answers its golden examples otherwise than its maker saw, and a good one."""
        # As another fleet's maker makes them, by the same words.
        maker = Fleet(self.folder / "maker")
        numbers = [maker.good_version(), maker.lying_version(), maker.good_version()]
        added = []
        with self.parts() as parts:
            registry = parts.coordinator.registry
            for number in numbers:
                made = maker.coordinator.operations.bundle(MODEL, number)
                registry.keep_successor(made.manifest, {name: path.read_bytes() for name, path in made.paths.items()})
                with parts.store.transaction() as connection:
                    lineage = Lineage(registered_by="test")
                    added.append(
                        registry.add_version(
                            connection, MODEL, 1, made.manifest, lineage, SystemClock().now(), VersionState.ACCEPTED
                        ).number
                    )
        return added

    def stage(self, rollout: str) -> str:
        """Where a rollout stands, by the store alone."""
        return str(self._ask(sa.select(ROLLOUTS.c.stage).where(ROLLOUTS.c.id == rollout)))

    def releases(self) -> list[int]:
        """What answers on each device."""
        slots = [Shelf(device.home / "shelf").slots for device in self.devices]
        return [found.active.number if found.active else 0 for found in slots]


def strike_until(killer: Killer, kills: int, over: Callable[[], bool]) -> None:
    """Kill so many times, then look on; a device that sleeps off a dead coordinator is woken."""
    for _ in range(kills):
        killer.strike()
    for _ in range(20):
        with suppress(AssertionError):
            wait_until(over, "the rollout ends", seconds=2.0)
            return
        killer.federation.wake_all()
    raise AssertionError("the rollout never ends")


def run_through(federation: RolloutFederation, kills: int, seed: int) -> None:
    federation.begin(training(devices=DEVICES))
    for device in federation.devices:
        config = device.home / "device.toml"
        config.write_text(config.read_text().replace("epochs = 1", _OWN))
        device.agent.kill()
        device.agent.start()
    federation.stop_task()
    federation.coordinator.end()
    good, broken, better = federation.add_versions()
    federation.coordinator.start()
    people = People(federation, Killer(federation, seed))
    grace = federation.folder / "grace"
    people.type("operators", "add", "grace", "--role", "approver", "--out", str(grace))
    people.approver = ["--identity", str(grace)]
    ends = {}
    for name, version, end in (
        ("good", good, "succeeded"),
        ("broken", broken, "rolled-back"),
        ("better", better, "succeeded"),
    ):
        number = people.roll_out(name, version)

        def over(name: str = name, end: str = end) -> bool:
            stage = federation.stage(name)
            assert stage in (end, "running", "rolling-back"), (name, stage)
            return stage == end

        strike_until(people.killer, kills, over)
        ends[name] = number
        assert ends.get("broken") not in federation.releases()
    newest = ends["better"]
    strike_until(people.killer, 0, lambda: federation.releases() == [newest] * DEVICES)
    for device in federation.devices:
        device.agent.end()
        device.require_good_slot()
    federation.coordinator.end()
    with federation.parts() as parts:
        require_what_was_promised(federation, parts, ends)


def require_what_was_promised(federation: RolloutFederation, parts: Parts, ends: dict[str, int]) -> None:
    """Each command counts once, and what the listing, the audit and the devices say is one story."""
    operations, verbs = parts.coordinator.operations, parts.coordinator.verbs
    assert verbs is not None and operations.verify_audit() > 0
    assert parts.coordinator.witness is not None
    parts.coordinator.witness.verify(parts.store)
    actions = [(row.action, row.object) for row in operations.audit_rows(10_000)]
    for name in ends:
        for action in ("create", "pending-approval", "scheduled"):
            assert actions.count((f"rollout.{action}", name)) == 1, (action, name)
        waves = 1 if name == "broken" else 2
        assert actions.count(("rollout.running", name)) == waves, actions
    assert sum(action == "operator.add" for action, _ in actions) == 2, "the first admin, and grace"
    told = [visit["release"] for device in federation.devices for visit in device.visits() if visit.get("release")]
    assert not [it for it in told if it["number"] == ends["broken"] and it["outcome"] in ("adopted", "committed")]
    blobs = federation.state / "blobs"
    assert not [name for area in blobs.iterdir() for name in names_in(area) if name.startswith("aside-")]


@pytest.mark.slow
def test_rollouts_end_as_they_would_have_whoever_is_killed(tmp_path: Path) -> None:
    with RolloutFederation(tmp_path, f"sqlite:///{tmp_path / 'umbel.db'}", device_count=DEVICES) as federation:
        run_through(federation, kills=1, seed=1)
