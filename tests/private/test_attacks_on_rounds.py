"""Attacks on whole rounds, most of them by a leader: the helper refuses, for good where it matters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from tests.private.parties import PLAN, TASK, Cohort, Party, delta, flipped
from umbel.cohort_sum import HelperAnswer, combine
from umbel.descriptor import SignedDescriptor, descriptor_from_bytes, rd_of, sign_as_leader, verify_descriptor
from umbel.errors import (
    AlreadyExists,
    CohortTooSmall,
    MalformedMessage,
    NotAllowed,
    NotFound,
    OutOfBounds,
    RoundClosed,
    SetRefused,
    SignatureInvalid,
    SumImplausible,
    UmbelError,
    WeightsMismatch,
    WrongState,
)
from umbel.plan import Kind
from umbel.v1 import secure_sum_pb2 as pb
from umbel_server.helper.local import LocalHelper
from umbel_server.helper.port import LeaderSigner


def prepared(cohort: Cohort) -> list[bytes]:
    return list(cohort.party.port.prepare(cohort.agreed.rd, cohort.items()).accepted)


# Cohorts and sets.


def test_too_small_a_cohort_gives_nothing(party: Party) -> None:
    cohort = party.open(minimum=4)
    cohort.fill(party.devices(3))
    with pytest.raises(CohortTooSmall):
        cohort.sum.close()
    with pytest.raises(WrongState):
        party.port.commit(cohort.agreed.rd, sorted(cohort.spool))


def test_a_set_made_smaller_at_commit_is_refused(cohort: Cohort) -> None:
    ids = prepared(cohort)
    with pytest.raises(CohortTooSmall):
        cohort.party.port.commit(cohort.agreed.rd, ids[:3])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda ids: sorted([*ids, bytes(16)]),
        lambda ids: [*ids, ids[-1]],
        lambda ids: [ids[0], *ids],
        lambda ids: ids[::-1],
    ],
)
def test_a_set_that_was_padded_repeated_or_disordered_is_refused(
    cohort: Cohort, spoil: Callable[[list[bytes]], list[bytes]]
) -> None:
    ids = prepared(cohort)
    with pytest.raises(SetRefused):
        cohort.party.port.commit(cohort.agreed.rd, spoil(ids))


def test_differencing_inside_a_round_is_refused(cohort: Cohort) -> None:
    """Two sums whose sets differ by one device would give that device's update."""
    ids = prepared(cohort)
    answer = cohort.party.port.commit(cohort.agreed.rd, ids)
    for other in (ids[1:], ids[:-1]):
        with pytest.raises(SetRefused):
            cohort.party.port.commit(cohort.agreed.rd, other)
    assert cohort.party.port.commit(cohort.agreed.rd, ids) == answer
    assert prepared(cohort) == ids


def test_more_reports_than_agreed_are_refused(party: Party) -> None:
    cohort = party.open(minimum=2, maximum=3)
    cohort.fill(party.devices(4))
    with pytest.raises(OutOfBounds, match="at most 3"):
        party.port.prepare(cohort.agreed.rd, cohort.items())


def test_a_full_set_is_checked_against_the_maximum(cohort: Cohort) -> None:
    answer = cohort.party.port.commit(cohort.agreed.rd, prepared(cohort))
    few = replace(cohort.descriptor, maximum=5)
    with pytest.raises(OutOfBounds):
        combine(few, cohort.agreed.rd, cohort.party.helper.identity, cohort.sum._total, sorted(cohort.spool), answer)


def test_noise_is_drawn_once(party: Party) -> None:
    cohort = party.open(noise_variance=10_000, max_weight=1, minimum=4)
    cohort.fill(party.devices(4))
    ids = prepared(cohort)
    first = party.port.commit(cohort.agreed.rd, ids)
    assert party.port.commit(cohort.agreed.rd, ids) == first
    party.restart_helper()
    assert party.port.commit(cohort.agreed.rd, ids) == first


# Descriptors.


def test_rounds_of_a_task_only_rise(party: Party) -> None:
    party.port.offer_key(TASK, 5, Kind.TRAIN)
    party.port.offer_key(TASK, 5, Kind.EVALUATE)
    for number, kind in ((4, Kind.TRAIN), (4, Kind.EVALUATE), (1, Kind.TRAIN)):
        with pytest.raises(WrongState):
            party.port.offer_key(TASK, number, kind)
    party.port.offer_key(TASK, 6, Kind.EVALUATE)
    with pytest.raises(WrongState):
        party.port.offer_key(TASK, 6, Kind.TRAIN)


def test_rounds_only_rise_even_when_old_ones_were_swept(party: Party) -> None:
    party.agree(party.describe(5))
    party.clock.instant += 4000
    party.helper.sweep()
    with pytest.raises(WrongState):
        party.port.offer_key(TASK, 5, Kind.TRAIN)


def test_one_round_one_descriptor(party: Party) -> None:
    """Another model for one device is another descriptor, and there is no second."""
    descriptor = party.describe()
    party.agree(descriptor)
    party.agree(descriptor)
    for other in (replace(descriptor, base=descriptor.plan), replace(descriptor, public_seed=bytes(16))):
        with pytest.raises(AlreadyExists):
            party.agree(other)


def test_the_helpers_key_can_not_be_substituted(party: Party) -> None:
    foreign = X25519PrivateKey.generate().public_key().public_bytes_raw()
    party.port.offer_key(TASK, 1, Kind.TRAIN)
    with pytest.raises(OutOfBounds, match="another key"):
        party.agree(party.describe(helper_key=foreign))


def test_a_device_sees_a_substituted_helper(party: Party) -> None:
    """A leader that plays the helper itself can't countersign under the key that devices pinned."""
    signed = party.agree().signed
    impostor = Ed25519PrivateKey.generate()
    from umbel.descriptor import sign_as_helper

    forged = replace(signed, helper_signature=sign_as_helper(signed.statement, impostor))
    verify_descriptor(signed, party.sign.public, party.helper.identity)
    with pytest.raises(SignatureInvalid):
        verify_descriptor(forged, party.sign.public, party.helper.identity)
    unsigned = replace(signed, leader_signature=bytes(64))
    with pytest.raises(SignatureInvalid):
        verify_descriptor(unsigned, party.sign.public, party.helper.identity)


def test_one_partys_signature_is_not_the_others(party: Party) -> None:
    signed = party.agree().signed
    with pytest.raises(SignatureInvalid):
        verify_descriptor(signed, party.helper.identity, party.sign.public)
    swapped = SignedDescriptor(signed.statement, signed.helper_signature, signed.leader_signature)
    with pytest.raises(SignatureInvalid):
        verify_descriptor(swapped, party.helper.identity, party.sign.public)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"ring_bits": 16}, OutOfBounds),
        ({"ring_bits": 8}, OutOfBounds),
        ({"minimum": 1}, CohortTooSmall),
        ({"minimum": 0}, CohortTooSmall),
        ({"maximum": 2**19}, OutOfBounds),
        ({"maximum": 3}, OutOfBounds),
        ({"level": 2**31}, OutOfBounds),
        ({"level": 0}, OutOfBounds),
        ({"max_weight": 2**15}, OutOfBounds),
        ({"max_weight": 0}, OutOfBounds),
        ({"noise_variance": 2**60}, OutOfBounds),
        ({"scale": float("nan")}, OutOfBounds),
        ({"clip_norm": 0.0}, OutOfBounds),
        ({"sent": 0}, OutOfBounds),
        ({"sent": 301}, OutOfBounds),
        ({"size": 2**40, "sent": 1}, OutOfBounds),
        ({"not_after": 0.0}, OutOfBounds),
        ({"not_after": 1e9}, OutOfBounds),
        ({"helper_keys": ()}, MalformedMessage),
        ({"helper_keys": (bytes(31),)}, MalformedMessage),
        ({"helper_keys": (bytes(32), bytes([1]) * 32)}, MalformedMessage),
        ({"public_seed": b""}, MalformedMessage),
        ({"task": "../x"}, MalformedMessage),
        ({"kind": Kind.EVALUATE}, OutOfBounds),
    ],
)
def test_no_descriptor_breaks_the_rules(party: Party, change: dict[str, Any], error: type[UmbelError]) -> None:
    with pytest.raises(error):
        replace(party.describe(), **change)


def test_leader_and_helper_with_one_key_split_nothing(party: Party) -> None:
    descriptor = party.describe()
    with pytest.raises(MalformedMessage, match="same key"):
        replace(descriptor, helper_keys=(descriptor.leader_key,))


def test_lanes_keep_to_the_rules(party: Party) -> None:
    descriptor = party.describe()
    lane = descriptor.lanes[0]
    for lanes in ((lane, lane), (replace(lane, name=""),)):
        with pytest.raises(MalformedMessage):
            replace(descriptor, lanes=lanes)
    for bound in (0.0, float("inf"), 2.0**50):
        with pytest.raises(OutOfBounds):
            replace(descriptor, lanes=(replace(lane, bound=bound),))


@pytest.mark.parametrize(
    ("policy", "change", "error"),
    [
        ({"minimum_cohort": 5}, {}, CohortTooSmall),
        ({"populations": ("ankles",)}, {}, NotAllowed),
        ({"longest_seconds": 60.0}, {}, OutOfBounds),
        ({"minimum_noise_multiplier": 0.5}, {}, OutOfBounds),
        ({"minimum_noise_multiplier": 0.5}, {"noise_variance": 1}, OutOfBounds),
        ({}, {"not_before": 1_000_010.0}, WrongState),
    ],
)
def test_a_helper_keeps_its_own_floors(policy: dict[str, Any], change: dict[str, Any], error: type[UmbelError]) -> None:
    party = Party(policy)
    with pytest.raises(error):
        party.agree(party.describe(**change))


def test_a_promise_of_a_newer_version_is_refused_and_not_left_out(party: Party) -> None:
    """An older helper would countersign a cap that it doesn't keep, and the ledger would reckon with it."""
    good = pb.RoundDescriptor.FromString(party.describe().to_bytes())
    newer = bytes([0xA2, 0x06, 1, 7])  # field 100, one byte
    in_a_lane = pb.RoundDescriptor.FromString(good.SerializeToString())
    in_a_lane.lanes[0].MergeFromString(newer)
    for statement in (good.SerializeToString() + newer, in_a_lane.SerializeToString()):
        with pytest.raises(MalformedMessage, match="update umbel"):
            party.port.countersign(statement, sign_as_leader(statement, party.sign.key))


def test_the_suite_can_not_be_downgraded(party: Party) -> None:
    message = pb.RoundDescriptor.FromString(party.describe().to_bytes())
    for suite in ("umbel-2agg/0", "umbel-sealed/1", ""):
        message.suite = suite
        with pytest.raises(MalformedMessage, match="suite"):
            descriptor_from_bytes(message.SerializeToString())
    message.suite = "umbel-2agg/1"
    assert rd_of(message.SerializeToString()) != rd_of(replace(party.describe(2), minimum=3).to_bytes())


# Who asks.


def test_only_the_leader_is_answered(cohort: Cohort) -> None:
    party, rd = cohort.party, cohort.agreed.rd
    stranger = LocalHelper(party.helper, LeaderSigner(Ed25519PrivateKey.generate()))
    ids = prepared(cohort)
    statement = party.describe(2).to_bytes()
    for ask in (
        lambda: stranger.offer_key(TASK, 9, Kind.TRAIN),
        lambda: stranger.prepare(rd, cohort.items()),
        lambda: stranger.commit(rd, ids),
        lambda: party.helper.countersign(statement, sign_as_leader(statement, Ed25519PrivateKey.generate())),
    ):
        with pytest.raises(SignatureInvalid):
            ask()
    assert party.records.latest(TASK) == (2, 0)


def test_a_signature_for_one_request_is_not_one_for_another(cohort: Cohort) -> None:
    from umbel_server.helper.port import commit_statement, prepare_statement

    party, rd, ids = cohort.party, cohort.agreed.rd, prepared(cohort)
    with pytest.raises(SignatureInvalid):
        party.helper.commit(rd, ids[1:], party.sign(commit_statement(rd, ids)))
    with pytest.raises(SignatureInvalid):
        party.helper.prepare(rd, cohort.items()[1:], party.sign(prepare_statement(rd, cohort.items())))


def test_unknown_rounds_are_not_answered(cohort: Cohort) -> None:
    with pytest.raises(NotFound):
        cohort.party.port.prepare(bytes(32), cohort.items())
    with pytest.raises(NotFound):
        cohort.party.port.commit(bytes(32), sorted(cohort.spool))


def test_an_expired_round_is_not_answered_and_its_key_is_gone(cohort: Cohort) -> None:
    party = cohort.party
    ids = prepared(cohort)
    party.clock.instant += 3601
    with pytest.raises(RoundClosed):
        party.port.commit(cohort.agreed.rd, ids)
    with pytest.raises(RoundClosed):
        cohort.sum.close()
    party.helper.sweep()
    assert party.records.round_by_rd(cohort.agreed.rd) is None
    with pytest.raises(NotFound):
        cohort.sum.close()


def test_the_rounds_key_goes_with_its_sum(cohort: Cohort) -> None:
    cohort.sum.close()
    held = cohort.party.records.round_by_rd(cohort.agreed.rd)
    assert held is not None and held.private_key is None


# What the helper answers.


@pytest.mark.parametrize("where", ["total", "signature"])
def test_a_changed_answer_is_not_believed(cohort: Cohort, where: str) -> None:
    ids = prepared(cohort)
    answer = cohort.party.port.commit(cohort.agreed.rd, ids)
    bad = replace(answer, **{where: flipped(getattr(answer, where))})
    with pytest.raises(SignatureInvalid):
        combine(cohort.descriptor, cohort.agreed.rd, cohort.party.helper.identity, cohort.sum._total, ids, bad)


def test_an_answer_for_another_set_is_not_believed(cohort: Cohort) -> None:
    ids = prepared(cohort)
    answer = cohort.party.port.commit(cohort.agreed.rd, ids)
    with pytest.raises(SignatureInvalid):
        combine(cohort.descriptor, cohort.agreed.rd, cohort.party.helper.identity, cohort.sum._total, ids[1:], answer)


def test_a_helper_that_lies_costs_the_round_and_nothing_else(cohort: Cohort) -> None:
    from umbel.cohort_sum import answer_statement

    ids, party = prepared(cohort), cohort.party
    honest = party.port.commit(cohort.agreed.rd, ids)
    for total, error in ((flipped(honest.total, -1, 64), SumImplausible), (honest.total[:-4], WeightsMismatch)):
        signature = party.identity.sign(answer_statement(cohort.agreed.rd, ids, total))
        with pytest.raises(error):
            combine(
                cohort.descriptor, cohort.agreed.rd, party.helper.identity, cohort.fresh_total(), ids,
                HelperAnswer(total, signature),
            )  # fmt: skip


def test_one_corrupted_share_makes_the_sum_implausible(cohort: Cohort) -> None:
    # A device whose two halves don't belong together: honest signatures, another seed.
    odd = cohort.encoded(delta(3))
    odd.numbers[:] = np.random.default_rng(1).integers(0, 2**32, odd.numbers.size, np.uint32)
    odd.lanes[0] = 1
    cohort.take(cohort.report(cohort.party.device(), odd))
    with pytest.raises(SumImplausible):
        cohort.sum.close()


def test_the_plan_is_part_of_the_descriptor(party: Party) -> None:
    from umbel.descriptor import plan_digest

    assert party.describe().plan == plan_digest(PLAN) != plan_digest(replace(PLAN, epochs=2))
