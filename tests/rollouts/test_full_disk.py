"""A device whose disk is full goes on answering, also while a release is on trial; and leftovers of kills go."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.client.recordings import recordings
from tests.power_cut import fills_up_at
from tests.rollouts.fleet import MODEL, Fleet
from tests.rollouts.test_power_cuts import a_release_in_use, nothing_here_yet
from umbel.errors import WrongState
from umbel_client.slots import TRIES


async def test_a_release_on_trial_waits_for_a_disk_that_can_count_its_tries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet, question = Fleet(tmp_path, devices=1), recordings(3)[0]
    await a_release_in_use(fleet)
    before, (good,) = fleet.devices[0].answers_with, fleet.releases()
    await fleet.visits()
    (tried,) = fleet.releases()
    assert tried > good
    with monkeypatch.context() as patch:
        fills_up_at(patch, 0)
        device = fleet.reopen(0)
        assert device.answers_with == before
        device.predict(question)
        await device.wake()
        assert device.answers_with == before
    assert fleet.devices[0].kit.shelf.slots.trial.tries_left == TRIES - 1  # type: ignore[union-attr]
    await fleet.visits()
    assert fleet.devices[0].answers_with.endswith(f"release {tried}")


async def test_an_answer_that_proves_a_release_is_given_though_the_disk_takes_no_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet, question = Fleet(tmp_path, devices=1), recordings(3)[0]
    await a_release_in_use(fleet)
    await fleet.visits()
    device = fleet.reopen(0)
    with monkeypatch.context() as patch:
        fills_up_at(patch, 0)
        for _ in range(2):
            assert len(device.predict(question)) > 0
    assert device.kit.shelf.slots.trial.tries_left < TRIES  # type: ignore[union-attr]
    device.predict(question)
    assert device.kit.shelf.slots.trial.tries_left == TRIES  # type: ignore[union-attr]


async def test_a_first_release_that_cannot_be_counted_answers_once_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = Fleet(tmp_path, devices=1)
    await nothing_here_yet(fleet)
    await fleet.visits()
    with monkeypatch.context() as patch:
        fills_up_at(patch, 0)
        with pytest.raises(WrongState, match="use its model now"):
            fleet.reopen(0).predict(recordings(1)[0])
    assert fleet.reopen(0).answers_with


async def test_metadata_that_a_killed_visit_was_writing_go_after_the_next_whole_one(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, devices=1)
    await nothing_here_yet(fleet)
    await fleet.visits()
    (listing,) = fleet.devices[0].kit.home.glob("*/timestamp.json")
    left = listing.with_name("tmpk1lled")
    left.write_bytes(b"half of a snapshot")
    os.utime(left, (1.0, 1.0))
    fleet.verbs.publish(MODEL, fleet.good_version(), "stable", "operator:ada")
    await fleet.visits()
    assert not left.exists()
