"""With too few of a role's keys on the machine, the controller goes on steering, and says who must sign."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.rollouts.fleet import AUTHOR, EAGER, MODEL, POPULATION, Fleet, fleet_of
from umbel.clock import DAY
from umbel.errors import NotFound
from umbel.visit import CheckIn
from umbel_models.zoo import bundle_path
from umbel_server.keyring import Keyring
from umbel_server.repository import role_of
from umbel_server.rollout import Stage
from umbel_server.rollout_spec import RolloutSpec, Wave

ROLE = role_of(MODEL)
EVERYBODY = (Wave(100.0, soak_seconds=10.0, deadline_seconds=3600.0),)


@pytest.fixture
async def fleet(tmp_path: Path) -> Fleet:
    """One device, a rollout to it that is prepared and signed, and then only one of the model's three keys."""
    made = await fleet_of(tmp_path, 1)
    made.begin_rollout("r", made.good_version(), waves=EVERYBODY)
    for signer in made.keys.signers(ROLE)[:2]:
        made.keys.forget(signer.public_key.keyid)
    return made


def version_of(fleet: Fleet, role: str) -> int:
    return next(it.version for it in fleet.repository.freshness() if it.role == role)


async def test_what_cannot_be_signed_here_waits_and_the_rollout_goes_on(fleet: Fleet) -> None:
    before = version_of(fleet, ROLE)
    prepared = fleet.verbs.prepare(MODEL, fleet.good_version(), "stable", AUTHOR)
    for _ in range(4):
        await fleet.visits()
    assert fleet.verbs.get("r").rollout.stage is Stage.SUCCEEDED
    assert fleet.releases() == [fleet.verbs.get("r").rollout.spec.release]
    assert version_of(fleet, ROLE) == before, "the role was left alone"
    spec = RolloutSpec(
        MODEL, "stable", POPULATION, prepared.number, revert_release=prepared.revert, waves=EVERYBODY, gate=EAGER
    )
    with pytest.raises(
        NotFound, match=f"{ROLE} needs 2 of its signers, 1 of their keys lie here; elsewhere"
    ) as refused:
        fleet.verbs.create("s", spec, AUTHOR)
    elsewhere = [it.key_id[:8] for it in fleet.repository.key_status() if it.role == ROLE and not it.held_here]
    assert len(elsewhere) == 2 and all(key in str(refused.value) for key in elsewhere)
    assert "umbel releases draft" in str(refused.value)


async def test_its_date_comes_near_and_the_controller_steers_on(fleet: Fleet) -> None:
    before, targets = version_of(fleet, ROLE), version_of(fleet, "targets")
    fleet.verbs.stop("r", "pause", AUTHOR, "a long holiday")
    fleet.clock.instant += 50 * DAY
    fleet.steer()
    assert version_of(fleet, ROLE) == before and version_of(fleet, "targets") > targets
    fleet.verbs.stop("r", "abort", AUTHOR, "wrong labels")
    fleet.steer()
    assert fleet.verbs.get("r").rollout.stage is Stage.ROLLED_BACK


async def test_a_replaced_key_that_still_lies_here_does_not_count(fleet: Fleet) -> None:
    """Two keys of the role on this machine, one of them not trusted any more: signing with both would be refused."""
    fleet.keys.add(ROLE, 1)
    before = version_of(fleet, ROLE)
    fleet.verbs.prepare(MODEL, fleet.good_version(), "stable", AUTHOR)
    assert fleet.coordinator.rollouts is not None
    fleet.coordinator.rollouts.desk.settle(fleet.clock.now())
    for _ in range(4):
        await fleet.visits()
    assert fleet.verbs.get("r").rollout.stage is Stage.SUCCEEDED
    assert version_of(fleet, ROLE) == before


async def test_without_the_online_keys_nothing_is_signed_and_a_rollout_still_goes_back(fleet: Fleet) -> None:
    for role in ("snapshot", "timestamp"):
        for signer in fleet.keys.signers(role):
            fleet.keys.forget(signer.public_key.keyid)
    taken = fleet.verbs.get("r").rollout.spec
    await fleet.visits(1.0)
    fleet.verbs.stop("r", "abort", AUTHOR, "wrong labels")
    fleet.clock.instant += 13 * 3600.0
    for _ in range(2):
        fleet.steer()
        await fleet.visits()
    assert fleet.releases() == [taken.revert_release]
    assert fleet.verbs.get("r").rollout.stage is Stage.ROLLED_BACK


async def test_a_coordinator_with_a_listing_sends_nobody_a_bare_release(fleet: Fleet) -> None:
    for release in (0, 1):
        asked = CheckIn(POPULATION, ("onnx",), (), offers_work=False, release=release)
        assert (await fleet.coordinator.check_in(fleet.id_of(0), asked)).newest is None


OTHER = "other"


def settle_another_model(fleet: Fleet) -> None:
    """A release of a model that had none before is to be signed."""
    fleet.coordinator.operations.add_model(OTHER, bundle_path("smartwatch"), AUTHOR)
    fleet.verbs.prepare(OTHER, 1, "stable", AUTHOR)
    assert fleet.coordinator.rollouts is not None
    fleet.coordinator.rollouts.desk.settle(fleet.clock.now())
    assert not fleet.repository.has_listing(OTHER)


async def test_a_new_model_waits_for_its_signers_to_be_named_where_the_keys_for_that_are(fleet: Fleet) -> None:
    for signer in fleet.keys.signers("targets")[1:]:
        fleet.keys.forget(signer.public_key.keyid)
    settle_another_model(fleet)
    assert OTHER not in fleet.repository.models()
    assert fleet.keys.signers(role_of(OTHER)) == [], "nobody will ever trust a key that was made for it here"


async def test_a_model_whose_signers_are_elsewhere_waits_for_their_empty_listing(fleet: Fleet, tmp_path: Path) -> None:
    signers = Keyring.create(tmp_path / "elsewhere").add(role_of(OTHER))
    draft = fleet.repository.draft_signers(OTHER, [it.public_key for it in signers], fleet.clock.now())
    fleet.repository.publish("targets", fleet.repository.sign(draft, "targets"), fleet.clock.now())
    settle_another_model(fleet)
    assert fleet.repository.models() == [OTHER, MODEL]
