"""The controller dies once, at any one of its transactions: whoever starts next ends where it would have ended anyway.

Unlike in `test_controller_restart`, everything takes part: the operators' calls, which they make again under the same
request id, the visits of devices, and the steering.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.databases import new_postgresql
from tests.rollouts.fleet import AUTHOR, EAGER, MODEL, POPULATION, SECOND, Fleet
from umbel.errors import WrongState
from umbel_server import audit, rollout, rollout_records
from umbel_server.requests import Call
from umbel_server.rollout import Stage
from umbel_server.rollout_spec import RolloutSpec, Wave
from umbel_server.steering import LEASE_SECONDS

HALVES = tuple(Wave(percent, soak_seconds=10.0, deadline_seconds=3600.0) for percent in (50.0, 100.0))


class Crash(BaseException):
    """The process dies here."""


@dataclass
class Plug:
    """Kills the controller at the durable step of this number (0 is the first), once."""

    at: int
    steps: int = 0

    def __call__(self, step: str) -> None:
        self.steps += 1
        if self.steps == self.at + 1:
            raise Crash(step)


@dataclass(frozen=True)
class End:
    """What must be the same, crash or none."""

    stage: Stage
    releases: frozenset[int]
    done: Counter[str]
    """Audited actions."""


class Life:
    """A controller from the first call of a rollout to its end."""

    def __init__(self, fleet: Fleet, version: int, plug: Plug) -> None:
        self.fleet, self.version, self.plug = fleet, version, plug

    async def run(self) -> End:
        """Play it to its end."""
        fleet = self.fleet
        self._restart(self.plug)
        spec = self._insist(self._begin)
        for _ in range(14):
            await self._visits()
            stage = fleet.verbs.get("r").rollout.stage
            if stage in (Stage.SUCCEEDED, Stage.ROLLED_BACK):
                break
        await self._visits()
        with fleet.coordinator.store.reading() as connection:
            assert audit.verify(connection) > 0
            done = Counter(row.action for row in audit.rows(connection, 1000))
        fleet.coordinator.store.close()
        assert set(fleet.releases()) <= {spec.release, spec.revert_release, spec.from_release}
        return End(stage, frozenset(fleet.releases()), done)

    def _begin(self) -> RolloutSpec:
        """What two people ask for; each call may be made again."""
        verbs = self.fleet.verbs
        prepared = verbs.prepare(MODEL, self.version, "stable", AUTHOR, Call("1"))
        spec = RolloutSpec(
            MODEL, "stable", POPULATION, prepared.number, from_release=prepared.head, revert_release=prepared.revert,
            waves=HALVES, gate=EAGER,
        )  # fmt: skip
        verbs.create("r", spec, AUTHOR, Call("2"))
        verbs.submit("r", AUTHOR, 0, "3")
        verbs.approve("r", SECOND, spec.subject, 1, "4")
        verbs.start("r", AUTHOR, 2, "5")
        return spec

    def _insist(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except Crash:
            self._restart()
            return work()

    async def _visits(self) -> None:
        """Devices come again if nobody answered; the controller steers when it can."""
        self.fleet.clock.instant += 11.0
        for device in self.fleet.devices:
            try:
                await device.wake()
            except Crash:
                self._restart()
        self._insist(self.fleet.steer)

    def _restart(self, plug: Callable[[str], None] = lambda step: None) -> None:
        self.fleet.coordinator.store.close()
        self.fleet.restart(plug)


async def prepared(fleet: Fleet, broken: bool) -> tuple[Fleet, int]:
    """A fleet whose devices have a first release, and the version that is to be rolled out."""
    fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    version = fleet.broken_version() if broken else fleet.good_version()
    await fleet.visits()
    return fleet, version


Begin = Callable[[Path], Awaitable[tuple[Fleet, int]]]


async def copies(folder: Path, broken: bool) -> Begin:
    """Fleets that stand where one stood that was prepared once."""
    before, version = await prepared(Fleet(folder, 2), broken)

    async def begin(folder: Path) -> tuple[Fleet, int]:
        fleet = before.copied(folder)
        for index in range(len(fleet.devices)):
            fleet.reopen(index)
        return fleet, version

    return begin


async def _one_crash_at_a_time(folder: Path, begin: Begin, broken: bool, every: int) -> None:
    undisturbed = await Life(*await begin(folder / "undisturbed"), Plug(-1)).run()
    assert undisturbed.stage is (Stage.ROLLED_BACK if broken else Stage.SUCCEEDED)
    assert len(undisturbed.releases) == 1
    for step in itertools.count(1, every):
        life = Life(*await begin(folder / str(step)), Plug(step))
        assert await life.run() == undisturbed, f"after a crash at step {step}"
        if life.plug.steps <= step:
            break
    assert step > 30, "a rollout should have more durable steps than that"


async def test_a_controller_knows_the_devices_that_call_at_another_process(tmp_path: Path) -> None:
    """Or it would take a wave for one of nobody, and open the next."""
    fleet = Fleet(tmp_path, 2)
    steering = fleet.coordinator
    fleet.restart()
    fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    await fleet.visits()
    fleet.begin_rollout("r", fleet.broken_version(), waves=HALVES)
    fleet.clock.instant += 2 * HALVES[0].soak_seconds
    assert steering.rollouts is not None
    steering.rollouts.reconcile()
    ended = fleet.verbs.get("r").rollout
    assert (ended.stage, ended.wave) == (Stage.RUNNING, 0), "nobody has been asked yet"


async def test_only_who_has_the_lease_steers(tmp_path: Path) -> None:
    """The other controller takes over when the lease has run out."""
    fleet = Fleet(tmp_path, 2)
    fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    await fleet.visits()
    fleet.begin_rollout("r", fleet.good_version(), waves=HALVES)
    first, second = fleet.coordinator.rollouts, fleet.restart().rollouts
    assert first is not None and second is not None
    for _ in range(2):
        fleet.clock.instant += 4.0
        for device in fleet.devices:
            await device.wake()
        first.reconcile()
    fleet.clock.instant += 4.0  # the soak time is over, and the answers are there
    second.reconcile()
    assert fleet.verbs.get("r").rollout.wave == 0
    fleet.clock.instant += LEASE_SECONDS
    second.reconcile()
    assert fleet.verbs.get("r").rollout.wave == 1


def test_a_step_on_what_somebody_else_has_changed_is_not_written(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    begun = fleet.begin_rollout("r", fleet.good_version())
    paused, aborted = rollout.pause(begun, ""), rollout.abort(begun, "", 0.0)
    with fleet.coordinator.store.transaction() as connection:
        rollout_records.update(connection, begun, paused)
        with pytest.raises(WrongState, match="somebody else"):
            rollout_records.update(connection, begun, aborted)
    assert fleet.verbs.get("r").rollout == paused


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True], ids=["good", "broken"])
async def test_some_crashes_change_nothing_on_postgresql(tmp_path: Path, postgresql: str, broken: bool) -> None:
    def begin(folder: Path) -> Awaitable[tuple[Fleet, int]]:
        return prepared(Fleet(folder, 2, new_postgresql(postgresql)), broken)

    await _one_crash_at_a_time(tmp_path, begin, broken, every=17)


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True], ids=["good", "broken"])
async def test_a_crash_at_any_transaction_changes_nothing(tmp_path: Path, broken: bool) -> None:
    await _one_crash_at_a_time(tmp_path, await copies(tmp_path / "before", broken), broken, every=1)


async def test_some_crashes_change_nothing(tmp_path: Path) -> None:
    await _one_crash_at_a_time(tmp_path, await copies(tmp_path / "before", broken=True), broken=True, every=17)
