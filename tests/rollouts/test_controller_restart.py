"""The controller may die before any of its transactions: whoever starts next goes on, and nothing is done twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.rollouts.fleet import AUTHOR, EAGER, MODEL, POPULATION, SECOND, WAVES, Fleet
from umbel.errors import AlreadyExists, NotAllowed, NotFound, WrongState
from umbel_server import audit, requests, rollout_records
from umbel_server.repository import role_of
from umbel_server.requests import Call
from umbel_server.rollout import Stage
from umbel_server.rollout_spec import RolloutSpec


class Crash(BaseException):
    pass


@pytest.mark.parametrize(
    ("broken", "first"),
    [
        pytest.param(False, 4, id="good-4"),
        pytest.param(True, 7, id="broken-7"),
        pytest.param(False, 7, id="good-7", marks=pytest.mark.slow),
        pytest.param(True, 4, id="broken-4", marks=pytest.mark.slow),
    ],
)
async def test_a_rollout_converges_whichever_transaction_the_controller_dies_in(
    tmp_path: Path, broken: bool, first: int
) -> None:
    """Killed again and again, visits and steering alike, each life a durable step longer than the one before.

    Lives of one length could all end in the same transaction, and nobody would get past it.
    """
    fleet = Fleet(tmp_path, devices=4)
    fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    await fleet.visits()
    version = fleet.broken_version() if broken else fleet.good_version()
    begun = fleet.begin_rollout("r", version)
    steps, crashes = 0, 0

    def on_step(step: str) -> None:
        nonlocal steps
        steps += 1
        if steps == first + crashes:
            raise Crash(step)

    fleet.restart(on_step)
    for _ in range(60):
        try:
            await fleet.visits(seconds=4.0)
        except Crash:
            steps, crashes = 0, crashes + 1
            fleet.restart(on_step)
        if fleet.verbs.get("r").rollout.stage in (Stage.SUCCEEDED, Stage.ROLLED_BACK):
            break
    assert crashes >= 2
    fleet.restart()
    ended = fleet.verbs.get("r").rollout
    assert ended.stage is (Stage.ROLLED_BACK if broken else Stage.SUCCEEDED)
    with fleet.coordinator.store.reading() as connection:
        assert audit.verify(connection) > 0
    await fleet.visits()
    assert set(fleet.releases()) <= (
        {begun.spec.from_release, begun.spec.revert_release} if broken else {begun.spec.release}
    )


async def test_two_controllers_share_a_store_without_a_step_taken_twice(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, devices=3)
    fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    await fleet.visits()
    fleet.begin_rollout("r", fleet.good_version())
    first = fleet.coordinator
    for _ in range(10):
        await fleet.visits()
        second = fleet.restart()
        assert second.rollouts is not None and first.rollouts is not None
        second.rollouts.reconcile()
        first.rollouts.reconcile()
    rows = []
    with fleet.coordinator.store.reading() as connection:
        rows = [row.action for row in audit.rows(connection, 1000) if row.object == "r"]
    assert rows.count("rollout.succeeded") == 1
    assert rows.count("rollout.running") == len(WAVES)


@pytest.mark.parametrize("restarts", [False, True], ids=["lives on", "starts anew"])
async def test_a_controller_whose_clock_was_ahead_goes_on_once_it_is_set_right(tmp_path: Path, restarts: bool) -> None:
    fleet, month = Fleet(tmp_path, devices=1), 30 * 86_400.0
    fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    fleet.clock.instant += month
    await fleet.coordinator.tick()
    fleet.clock.instant -= month
    if restarts:
        fleet.restart()
    await fleet.coordinator.tick()
    await fleet.devices[0].wake()
    begun = fleet.begin_rollout("r", fleet.good_version(), waves=WAVES[-1:])
    for _ in range(3):
        fleet.clock.instant += 11.0
        await fleet.devices[0].wake()
        await fleet.coordinator.tick()
    assert fleet.verbs.get("r").rollout.stage is Stage.SUCCEEDED
    assert fleet.releases() == [begun.spec.release]


async def test_a_lease_lets_one_controller_steer_until_it_runs_out(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    with fleet.coordinator.store.transaction() as connection:
        assert rollout_records.take_lease(connection, "x", "one", 0.0, 10.0)
        assert not rollout_records.take_lease(connection, "x", "two", 9.0, 10.0)
        assert rollout_records.take_lease(connection, "x", "one", 9.0, 10.0)
        assert rollout_records.take_lease(connection, "x", "two", 19.5, 10.0)
        assert not rollout_records.take_lease(connection, "x", "one", 20.0, 10.0)


async def test_a_call_made_again_under_its_request_id_is_done_once(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, devices=1)
    version = fleet.good_version()
    first = fleet.verbs.prepare(MODEL, version, "stable", AUTHOR, Call("call-1"))
    assert fleet.verbs.prepare(MODEL, version, "stable", AUTHOR, Call("call-1")) == first
    spec = RolloutSpec(MODEL, "stable", POPULATION, first.number, waves=WAVES, gate=EAGER)
    fleet.verbs.create("r", spec, AUTHOR, Call("call-2"))
    assert fleet.verbs.create("r", spec, AUTHOR, Call("call-2")).rollout.revision == 0
    fleet.verbs.submit("r", AUTHOR, 0, "call-3")
    assert fleet.verbs.submit("r", AUTHOR, 0, "call-3").rollout.stage is Stage.PENDING_APPROVAL
    with pytest.raises(AlreadyExists, match="request id"):
        fleet.verbs.submit("r", SECOND, 0, "call-3")


async def test_a_signed_listing_that_is_submitted_again_is_listed_once(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    prepared = fleet.verbs.prepare(MODEL, 1, "stable", AUTHOR)
    listed = fleet.repository.releases(MODEL)[0]
    assert listed.number == prepared.number
    draft = fleet.repository.draft_releases([replace(listed, number=prepared.number + 1)], fleet.clock.now())
    signed = fleet.repository.sign(draft, role_of(MODEL))
    with fleet.coordinator.store.reading() as connection:
        seen = requests.revisions(connection, "release", [MODEL])[MODEL]
    with pytest.raises(WrongState, match="revision"):
        fleet.verbs.submit_listing(MODEL, signed, SECOND, Call("s-0", seen + 1))
    fleet.verbs.submit_listing(MODEL, signed, SECOND, Call("s-1", seen))
    rows = fleet.coordinator.operations.verify_audit()
    fleet.verbs.submit_listing(MODEL, signed, SECOND, Call("s-1", seen))
    assert fleet.coordinator.operations.verify_audit() == rows
    assert [release.number for release in fleet.repository.releases(MODEL)] == [prepared.number, prepared.number + 1]


async def test_a_caller_who_has_not_seen_the_newest_revision_is_refused(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, devices=1)
    prepared = fleet.verbs.prepare(MODEL, fleet.good_version(), "stable", AUTHOR)
    spec = RolloutSpec(MODEL, "stable", POPULATION, prepared.number, waves=WAVES, gate=EAGER)
    fleet.verbs.create("r", spec, AUTHOR)
    fleet.verbs.submit("r", AUTHOR, 0)
    with pytest.raises(WrongState, match="revision"):
        fleet.verbs.approve("r", SECOND, spec.subject, 0)
    with pytest.raises(NotAllowed):
        fleet.verbs.approve("r", AUTHOR, spec.subject, 1)
    assert fleet.verbs.stop("r", "cancel", AUTHOR, "no").rollout.stage is Stage.CANCELED


async def test_a_release_that_is_not_listed_cannot_be_rolled_out(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, devices=1)
    with pytest.raises(NotFound, match="aren't listed"):
        fleet.verbs.create("r", RolloutSpec(MODEL, "stable", POPULATION, 77, waves=WAVES), AUTHOR)


async def test_a_hold_stops_all_offers_at_once_and_survives_a_restart(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, devices=2)
    fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    fleet.verbs.hold(MODEL, AUTHOR, "wrong labels")
    fleet.restart()
    await fleet.visits()
    assert fleet.releases() == [0, 0]
    fleet.verbs.lift(MODEL, SECOND)
    await fleet.visits()
    assert 0 not in fleet.releases()


async def test_a_rollout_that_succeeded_can_be_taken_back_from_everybody(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, devices=3)
    fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    await fleet.visits()
    begun = fleet.begin_rollout("r", fleet.good_version())
    for _ in range(8):
        await fleet.visits()
    assert fleet.releases() == [begun.spec.release] * 3
    fleet.verbs.stop("r", "roll-back", AUTHOR, "a user called")
    newcomer = fleet.enrol(9)
    fleet.devices.append(newcomer)
    for _ in range(3):
        await fleet.visits()
    assert set(fleet.releases()) == {begun.spec.revert_release}
    assert fleet.verbs.get("r").rollout.stage is Stage.ROLLED_BACK


async def test_a_preview_writes_nothing_and_tells_what_then_happens(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, devices=8)
    fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    await fleet.visits()
    begun = fleet.begin_rollout("r", fleet.good_version())
    canary = set(fleet.verbs.preview(begun)[0])
    assert canary, "a small fleet gets a canary all the same"
    await fleet.visits(seconds=1.0)
    moved = {
        device.id
        for device, number in zip(fleet.devices, fleet.releases(), strict=True)
        if number == begun.spec.release
    }
    assert moved == canary
