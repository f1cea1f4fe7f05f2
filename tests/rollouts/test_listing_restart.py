"""Wherever a coordinator dies while it makes keys and lists a release, the next one ends where it would have ended."""

from __future__ import annotations

import itertools
import os
from contextlib import suppress
from pathlib import Path

import pytest

from tests.power_cut import PowerCut, dies_at
from tests.rollouts.fleet import AUTHOR, MODEL, Fleet
from umbel.errors import AlreadyExists
from umbel_server import renewal
from umbel_server.folder import Folder
from umbel_server.keyring import RULES, Keyring
from umbel_server.repository import role_of
from umbel_server.requests import Call


async def test_a_release_is_listed_wherever_the_power_goes_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Fleet(tmp_path / "before", devices=1)
    version = before.good_version()
    for last in itertools.count():
        fleet = before.copied(tmp_path / f"cut-{last}")
        fleet.reopen(0)
        with monkeypatch.context() as patch, suppress(PowerCut):
            taken = dies_at(patch, last)
            fleet.verbs.publish(MODEL, version, "stable", AUTHOR, Call("first"))
        fleet.restart()
        number = fleet.verbs.publish(MODEL, version, "stable", AUTHOR, Call("first"))
        fleet.coordinator.rollouts.reconcile()
        assert len(fleet.keys.signers(role_of(MODEL))) == RULES["releases"].keys, f"cut at step {last}: {taken}"
        await fleet.visits()
        assert fleet.releases() == [number], f"cut at step {last}: {taken}"
        if len(taken) < last:
            break
    assert taken.count("replace") >= RULES["releases"].keys + 5, "keys, signers, listing twice, snapshots, timestamps"


async def test_devices_believe_the_listing_wherever_the_power_goes_while_an_online_key_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Fleet(tmp_path / "before", devices=1)
    number = before.verbs.publish(MODEL, before.good_version(), "stable", AUTHOR)
    for role in ("timestamp", "snapshot"):
        await replaced_wherever_the_power_goes(before, role, number, monkeypatch)


@pytest.mark.parametrize("role", [role_of(MODEL), pytest.param("targets", marks=pytest.mark.slow)])
async def test_so_while_a_signers_key_is_replaced_where_no_more_lie_than_must_sign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    before = Fleet(tmp_path / "before", devices=1)
    number = before.verbs.publish(MODEL, before.good_version(), "stable", AUTHOR)
    elsewhere = before.keys.signers(role)[RULES["releases"].threshold :]
    assert elsewhere
    for signer in elsewhere:
        before.keys.forget(signer.public_key.keyid)
    await replaced_wherever_the_power_goes(before, role, number, monkeypatch)


async def replaced_wherever_the_power_goes(
    before: Fleet, role: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replace the first key of a role; cut after cut, a new device finds the release once the coordinator is back."""
    for last in itertools.count():
        fleet = before.copied(before.folder.with_name(f"cut-{role}-{last}"))
        fleet.reopen(0)
        old = fleet.keys.signers(role)[0].public_key.keyid
        with monkeypatch.context() as patch, suppress(PowerCut):
            taken = dies_at(patch, last)
            renewal.rotate(fleet.repository, fleet.keys, role, old, fleet.clock.now())
        fleet.restart()
        fleet.coordinator.rollouts.reconcile()
        await fleet.visits()
        assert fleet.releases() == [number], f"cut at step {last} of {role}: {taken}"
        if len(taken) < last:
            break
    assert last > 8


def test_a_folder_whose_making_was_broken_off_is_told_from_a_complete_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        dies_at(patch, 30)
        Folder.create(tmp_path / "state", (), 1_790_000_000.0)
    with pytest.raises(AlreadyExists, match="broken off"):
        Folder.create(tmp_path / "state", (), 1_790_000_000.0)


def test_a_key_is_never_written_over(tmp_path: Path) -> None:
    ring = Keyring.create(tmp_path)
    held = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(AlreadyExists):
        Keyring.create(tmp_path)
    assert ring.complete("timestamp")[0].public_key == ring.signers("timestamp")[0].public_key
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == held


def test_metadata_that_a_killed_process_was_writing_go_with_the_next_listing(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    left, being_written = (fleet.folder / "listing" / f".7.snapshot.json.{end}" for end in ("0123abcd", "4567abcd"))
    for path, ahead in ((left, -1000.0), (being_written, 1000.0)):
        path.write_bytes(b"half")
        instant = (fleet.folder / "listing" / "timestamp.json").stat().st_mtime + ahead
        os.utime(path, (instant, instant))
    fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    assert (left.exists(), being_written.exists()) == (False, True)
