"""From a version one can see how it came onto devices, and who said so."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.rollouts.fleet import AUTHOR, MODEL, SECOND, Fleet
from umbel.errors import NotFound
from umbel_server.lineage_messages import lineage_to_message


async def test_a_version_tells_its_release_its_rollout_and_its_approval(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, devices=3)
    first, second = fleet.good_version(), fleet.good_version()
    fleet.verbs.publish(MODEL, first, "stable", AUTHOR)
    await fleet.visits()
    begun = fleet.begin_rollout("r", second)
    for _ in range(6):
        await fleet.visits()
    fleet.verbs.stop("r", "roll-back", AUTHOR, "a user called")
    for _ in range(3):
        await fleet.visits()

    steps = {step.version.number: step for step in fleet.coordinator.operations.trace(MODEL, second)}
    assert list(steps) == [second, 1]
    told = lineage_to_message(steps[second])
    (release,) = told.releases
    assert (release.number, release.channel, release.content_of) == (begun.spec.release, "stable", 0)
    assert [(event.actor, event.action) for event in release.events] == [(AUTHOR, "release.prepare")]
    (rollout,) = release.rollouts
    assert (rollout.id, rollout.stage, rollout.reason.splitlines()[0]) == ("r", "rolled-back", "a user called")
    assert (rollout.author, rollout.approved_by, rollout.subject) == (AUTHOR, SECOND, begun.spec.subject)
    assert sum(it.devices for it in rollout.counts) == 3
    actors = {event.action: event.actor for event in rollout.events}
    assert (actors["rollout.create"], actors["rollout.scheduled"]) == (AUTHOR, SECOND)
    assert actors["rollout.rolled-back"] == "coordinator"
    rows = [event.audit_row for event in rollout.events]
    assert rows == sorted(rows) and all(rows)

    before = lineage_to_message(fleet.coordinator.operations.trace(MODEL, first)[0])
    head, back = before.releases
    assert [event.action for event in head.events] == ["release.prepare", "release.publish"]
    assert (back.number, back.content_of) == (begun.spec.revert_release, head.number)
    assert [it.id for it in back.rollouts] == ["r"], "the way back belongs to the rollout that it ends"


def test_a_version_that_is_not_there_has_no_lineage(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        Fleet(tmp_path).coordinator.operations.trace(MODEL, 77)
