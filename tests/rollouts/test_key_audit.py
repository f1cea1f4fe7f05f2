"""Whoever changes the keys that devices trust, by whatever way: the audit log says it, once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.rollouts.fleet import AUTHOR, MODEL, Fleet
from umbel_server import audit, renewal
from umbel_server.key_audit import PUBLISHED
from umbel_server.repository import role_of
from umbel_server.steering import LEASE_SECONDS


def noted(fleet: Fleet) -> dict[str, dict[str, Any]]:
    """Which version -> what was written down of it; none may be there twice."""
    with fleet.coordinator.store.reading() as connection:
        rows = [row for row in audit.rows(connection, 1000) if row.action == PUBLISHED]
    found = {row.object: json.loads(row.body_json) for row in rows}
    assert len(found) == len(rows)
    return found


def rotate(fleet: Fleet, role: str) -> tuple[str, str]:
    """As `umbel keys rotate` does beside a coordinator; the old key and the new one."""
    old = fleet.keys.signers(role)[0].public_key.keyid
    return old, renewal.rotate(fleet.repository, fleet.keys, role, old, fleet.clock.now()).keyid


def test_keys_of_the_first_day_are_written_down_and_who_signs_for_a_model(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    fleet.coordinator.rollouts.reconcile()
    assert set(noted(fleet)) == {"root/1", "targets/1"}
    fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    signers = noted(fleet)["targets/2"]["roles"][role_of(MODEL)]
    assert signers["keys"] == sorted(key.public_key.keyid for key in fleet.keys.signers(role_of(MODEL)))
    assert signers["threshold"] == 2


def test_a_key_that_another_process_replaced_is_written_down_once_across_restarts(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    fleet.coordinator.rollouts.reconcile()
    old, new = rotate(fleet, "timestamp")
    fleet.coordinator.rollouts.reconcile()
    rows = noted(fleet)
    fleet.clock.instant += LEASE_SECONDS
    fleet.restart().rollouts.reconcile()
    assert noted(fleet) == rows
    assert set(rows) == {"root/1", "root/2", "targets/1"}
    assert (rows["root/1"]["roles"]["timestamp"]["keys"], rows["root/2"]["roles"]["timestamp"]["keys"]) == (
        [old],
        [new],
    )
    assert set(rows["root/2"]["signed_by"]) <= set(rows["root/1"]["roles"]["root"]["keys"])
    assert fleet.coordinator.operations.verify_audit() > 0


def test_all_that_happened_while_the_coordinator_was_down_is_written_down(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    fleet.coordinator.rollouts.reconcile()
    for role in ("root", "snapshot", "targets"):
        rotate(fleet, role)
    fleet.clock.instant += LEASE_SECONDS
    fleet.restart().rollouts.reconcile()
    assert {name for name in noted(fleet) if name.startswith("root/")} == {"root/1", "root/2", "root/3", "root/4"}
