"""The device keeps to its own terms, whatever coordinator and helper agreed on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.private.parties import BASE, NOW, PLAN, POPULATION, TASK, Party
from umbel.descriptor import SignedDescriptor, sign_as_helper, sign_as_leader
from umbel.digests import digest_of
from umbel.errors import (
    CohortTooSmall,
    MalformedMessage,
    NotAllowed,
    OutOfBounds,
    RoundClosed,
    SignatureInvalid,
    UmbelError,
    WrongState,
)
from umbel.helper_card import HelperCard
from umbel.plan import Kind
from umbel.release import SignedRelease
from umbel.sealing import SEALED, Sealing
from umbel.update import Update
from umbel.visit import Assignment, RetryWindow
from umbel.weights import Weights
from umbel_client.private import (
    Pinned,
    PrivacyPolicy,
    in_words,
    load_pinned,
    pin,
    require_sealing,
    save_pinned,
    seal_privately,
    verify_round,
)

WINDOW = RetryWindow(1, 2)


def assignment(private: SignedDescriptor | None, **changes: Any) -> Assignment:
    values: dict[str, Any] = {"session_id": "s", "task": TASK, "round": 1, "plan": PLAN, "deadline": NOW + 60}
    values |= {"base": SignedRelease(b"", "", b""), "sealing": Sealing(SEALED, bytes(32)), "upload_token": b"t"}
    return Assignment(**(values | changes), if_accepted=WINDOW, if_rejected=WINDOW, private_round=private)


def verified(party: Party, signed: SignedDescriptor, now: float = NOW, **changes: Any) -> None:
    policy = changes.pop("policy", PrivacyPolicy(minimum_cohort=4))
    base, population = changes.pop("base", BASE), changes.pop("population", POPULATION)
    keys = (party.sign.public, changes.pop("helper", party.helper.identity))
    verify_round(signed, assignment(signed, **changes), base, population, keys, policy, now)


def test_a_round_that_both_signed_is_joined(party: Party) -> None:
    verified(party, party.agree().signed)


@pytest.mark.parametrize(
    "given",
    [
        {"task": "other"},
        {"round": 2},
        {"plan": replace(PLAN, epochs=9)},
        {"plan": replace(PLAN, kind=Kind.EVALUATE)},
        {"base": digest_of(b"a model for this device alone")},
        {"population": "ankles"},
    ],
)
def test_another_model_plan_or_round_for_one_device_is_refused(party: Party, given: dict[str, Any]) -> None:
    signed = party.agree().signed
    with pytest.raises(NotAllowed):
        verified(party, signed, **given)


@pytest.mark.parametrize(
    ("policy", "now", "error"),
    [
        (PrivacyPolicy(minimum_cohort=5), NOW, CohortTooSmall),
        (PrivacyPolicy(minimum_cohort=4, longest_seconds=60.0), NOW, OutOfBounds),
        (PrivacyPolicy(minimum_cohort=4, minimum_noise_multiplier=0.1), NOW, OutOfBounds),
        (PrivacyPolicy(minimum_cohort=4), NOW - 10, WrongState),
        (PrivacyPolicy(minimum_cohort=4), NOW + 3601, RoundClosed),
    ],
)
def test_a_device_keeps_its_own_floors(
    party: Party, policy: PrivacyPolicy, now: float, error: type[UmbelError]
) -> None:
    signed = party.agree().signed
    with pytest.raises(error):
        verified(party, signed, now, policy=policy)


def test_a_helper_that_is_not_the_pinned_one_is_refused(party: Party) -> None:
    statement = party.describe().to_bytes()
    impostor = Ed25519PrivateKey.generate()
    signed = SignedDescriptor(statement, sign_as_leader(statement, party.sign.key), sign_as_helper(statement, impostor))
    with pytest.raises(SignatureInvalid):
        verified(party, signed)


def pinned(party: Party) -> Pinned:
    participant = party.device()
    return pin(HelperCard("h:1", party.helper.identity, b"PEM", "ACME"), participant.key, participant.certificate, NOW)


def test_a_round_with_a_key_of_small_order_gets_no_report(party: Party) -> None:
    """The all-zero point would make the leader's half readable to everybody who sees it pass."""
    agreed = party.agree(party.describe(leader_key=bytes(32), size=1, lanes=()))
    update = Update(Weights({"p": np.zeros(1, np.float32)}), 1.0, {})
    with pytest.raises(MalformedMessage, match="not an X25519 public key"):
        seal_privately(
            agreed.descriptor, agreed.signed, assignment(agreed.signed), "0" * 32, update, pinned(party), "device"
        )


def test_a_device_with_a_helper_sends_nothing_that_the_coordinator_could_read(party: Party) -> None:
    with pytest.raises(NotAllowed, match="read alone"):
        require_sealing(assignment(None), pinned(party))
    require_sealing(assignment(party.agree().signed), pinned(party))


def test_a_device_without_a_helper_joins_no_private_round(party: Party) -> None:
    with pytest.raises(NotAllowed, match="pinned no helper"):
        require_sealing(assignment(party.agree().signed), None)
    require_sealing(assignment(None), None)


def test_a_pinned_helper_survives_the_disk_and_a_damaged_file_is_not_taken_for_none(
    party: Party, tmp_path: Path
) -> None:
    assert load_pinned(tmp_path) is None
    kept = pinned(party)
    save_pinned(tmp_path, kept)
    assert load_pinned(tmp_path) == kept
    assert kept.key.hex() not in repr(kept)
    assert (tmp_path / "helper.json").stat().st_mode & 0o077 == 0
    (tmp_path / "helper.json").write_text("{}")
    with pytest.raises(MalformedMessage):
        load_pinned(tmp_path)


def test_the_owner_is_told_who_can_read_updates(party: Party) -> None:
    assert "can read each one" in in_words(None)
    assert "ACME" in in_words(pinned(party))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"address": 1}'])
def test_a_card_is_checked(text: str) -> None:
    with pytest.raises(MalformedMessage):
        HelperCard.from_text(text)


def test_a_cards_key_and_address_are_checked() -> None:
    good = HelperCard("host:1", bytes(32), b"PEM", "us")
    assert HelperCard.from_text(good.to_text()) == good
    for bad in (replace(good, identity=bytes(31)), replace(good, address="host")):
        with pytest.raises(MalformedMessage):
            HelperCard.from_text(bad.to_text())
