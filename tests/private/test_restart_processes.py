"""Private rounds as real processes, each killed with SIGKILL at random moments, the helper too: the books balance."""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import pytest
import sqlalchemy as sa

from tests.server.processes import POPULATION, Federation, Program, free_ports, wait_until
from tests.server.test_restart_processes import (
    Killer,
    let_it_end,
    require_an_unbroken_line,
    require_each_report_counts_once,
    require_that_devices_say_the_same,
    require_that_nothing_is_left_over,
    task,
    wait_for_a_moment,
)
from umbel.clock import SystemClock
from umbel.plan import Plan
from umbel_server.app import Parts
from umbel_server.folder import Folder
from umbel_server.helper import program
from umbel_server.helper.folder import HelperFolder, HelperSettings
from umbel_server.tables import ROUNDS

MOST_WEIGHT = 64.0
"""All devices have more examples than that: each counts the same, and a sum of weights tells how many there were."""


@dataclass
class PrivateFederation(Federation):
    """With a helper, whose folder and process are its own."""

    helper: Program = field(init=False)

    @property
    def helper_folder(self) -> HelperFolder:
        return HelperFolder(self.folder / "helper")

    def __enter__(self) -> Self:
        super().__enter__()
        (port,) = free_ports(1)
        leader = Folder(self.state).signer().public_key.hex()
        settings = HelperSettings(leader, port=port, minimum_cohort=2)
        HelperFolder.create(self.helper_folder.path, settings, f"127.0.0.1:{port}", "", SystemClock().now())
        self._chosen["helper"] = self.helper_folder.path / "card.json"
        self.coordinator.command += ["--helper", str(self._chosen["helper"])]
        run = ["helper", "run", "--state", str(self.helper_folder.path)]
        self.helper = Program([sys.executable, "-m", "umbel_server.cli", *run], self.folder / "helper.log")
        self.helper.start()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        if self.helper.process is not None:
            self.helper.process.kill()
            self.helper.process.wait()

    def words_for_enrolment(self) -> list[str]:
        with self.helper_parts() as parts:
            token = parts.people.new_token(POPULATION)
        wait_until(lambda: b"helper ready" in self.helper.log.read_bytes(), "the helper listens")
        return ["--helper", str(self._chosen["helper"]), "--helper-token", token]

    @contextmanager
    def helper_parts(self) -> Iterator[program.HelperParts]:
        """The helper's insides, as its own commands see them."""
        parts = program.build(self.helper_folder, self.helper_folder.settings(), SystemClock())
        try:
            yield parts
        finally:
            parts.records.close()


class PrivateKiller(Killer):
    """Kills the helper too, most of all when it has just written something down."""

    federation: PrivateFederation

    def strike(self) -> None:
        if self.chance.integers(0, 3):
            super().strike()
            return
        before = self._written()
        wait_for_a_moment(self.chance, self.federation.state / "blobs", "spool")
        for _ in range(1_000):
            if self._written() != before:
                break
        self.federation.helper.kill()
        self.federation.helper.start()

    def _written(self) -> tuple[int, int]:
        facts = (self.federation.helper_folder.path / "helper.db-wal").stat()
        return facts.st_size, facts.st_mtime_ns


def require_that_the_helper_says_the_same(federation: PrivateFederation, parts: Parts) -> None:
    """What the coordinator closed was summed there, each report once, and no key of it is left."""
    with parts.store.reading() as connection:
        completed = sa.select(sa.func.count()).select_from(ROUNDS).where(ROUNDS.c.state == "completed")
        rounds = int(connection.scalar(completed) or 0)
    versions = parts.coordinator.operations.versions("smartwatch", limit=10_000)
    cohorts = sum(version.lineage.cohort for version in versions)
    with closing(sqlite3.connect(federation.helper_folder.path / "helper.db")) as records:

        def count(query: str) -> int:
            return int(records.execute(query).fetchone()[0])

        assert count("SELECT count(*) FROM rounds WHERE ids IS NOT NULL AND private_key IS NOT NULL") == 0
        summed = count("SELECT count(*) FROM rounds WHERE ids IS NOT NULL")
        counted = count("SELECT count(*) FROM participations")
        assert count("SELECT count(*) FROM spent") >= counted
    # Stopping the task may have cut off one more round, between the helper's commit and the coordinator's end of it.
    assert rounds <= summed <= rounds + 1
    assert counted == cohorts or summed > rounds


def run_through_privately(federation: PrivateFederation, kills: int, seed: int) -> None:
    planned = task(devices=federation.device_count)
    plan = Plan(epochs=2, batch_size=16, hyperparameters={"lr": 0.05}, clip_norm=20.0, max_weight=MOST_WEIGHT)
    federation.begin(replace(planned, plan=plan, updates_private=True))
    killer = PrivateKiller(federation, seed)
    for _ in range(kills):
        killer.strike()
    let_it_end(federation)
    assert federation.helper.stop() == 0
    assert not (federation.helper_folder.path / "helper.db-wal").exists(), "a log that may hold keys"
    with federation.parts() as parts:
        require_an_unbroken_line(parts)
        require_each_report_counts_once(federation, parts)
        require_that_devices_say_the_same(federation, parts)
        require_that_nothing_is_left_over(federation, parts)
        require_that_the_helper_says_the_same(federation, parts)


@pytest.mark.slow
def test_private_rounds_lose_no_report_and_count_none_twice_whoever_is_killed(tmp_path: Path) -> None:
    with PrivateFederation(tmp_path, f"sqlite:///{tmp_path / 'umbel.db'}", device_count=4) as federation:
        run_through_privately(federation, kills=8, seed=1)
