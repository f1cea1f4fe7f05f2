"""Attacks on single reports: each is refused with its own error, and the sum is as if it had never come."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.private.parties import NOW, POPULATION, Cohort, Party, changed, delta, flipped
from umbel.errors import (
    AlreadyReported,
    CertificateRefused,
    CohortTooSmall,
    MalformedMessage,
    NotAllowed,
    NotFinite,
    OutOfBounds,
    SealBroken,
    SumImplausible,
    UmbelError,
    WeightsMismatch,
    WrongState,
)
from umbel.participants import issue
from umbel.ring import from_lane, to_lane
from umbel.secure_sum import Participant
from umbel.shares import Cleartext


@pytest.fixture
def cohort(party: Party) -> Cohort:
    """Four honest reports are in; one more is on its way."""
    cohort = party.open(minimum=4)
    cohort.fill(party.devices(4))
    return cohort


def refused_at_leader(cohort: Cohort, error: type[UmbelError], **parts: bytes) -> None:
    shares = cohort.report(cohort.party.device(), cohort.encoded(delta(9)))
    before = cohort.sum._total.to_bytes()
    with pytest.raises(error):
        cohort.take(changed(shares, **parts))
    assert cohort.sum._total.to_bytes() == before
    assert cohort.sum.close().count == 4


def refused_by_helper(cohort: Cohort, reason: type[UmbelError]) -> None:
    """All that the leader took is summed but what the helper refused, for this reason."""
    count = len(cohort.spool)
    found = cohort.sum.close()
    assert cohort.sum.prepared is not None
    assert set(cohort.sum.prepared.refused.values()) == {reason.code}
    assert found.count == count - len(cohort.sum.prepared.refused)
    assert np.linalg.norm(found.aggregate.total) < 10


# At the leader.


def test_the_same_report_twice_counts_once(cohort: Cohort) -> None:
    shares = cohort.report(cohort.party.device(), cohort.encoded(delta(9)))
    cohort.take(shares)
    before = cohort.sum._total.to_bytes()
    with pytest.raises(MalformedMessage):
        cohort.take(shares)
    assert cohort.sum._total.to_bytes() == before


def test_a_report_out_of_order_is_refused(cohort: Cohort) -> None:
    shares = cohort.report(cohort.party.device(), cohort.encoded(delta(9)))
    with pytest.raises(WrongState):
        cohort.sum.accept(cohort.sealed(shares.to_bytes(), shares.report_id, 3))


def test_a_report_for_another_round_is_refused(cohort: Cohort) -> None:
    other = cohort.party.open(number=2)
    shares = other.report(cohort.party.device(), other.encoded(delta(9)))
    with pytest.raises(SealBroken, match="another round"):
        cohort.take(shares)
    # And renamed, it doesn't open.
    with pytest.raises(SealBroken, match="doesn't open"):
        cohort.take(changed(shares, rd=cohort.agreed.rd))


def test_a_report_under_another_id_is_refused(cohort: Cohort) -> None:
    shares = cohort.report(cohort.party.device(), cohort.encoded(delta(9)))
    with pytest.raises(MalformedMessage, match="another id"):
        cohort.take(shares, report_id=bytes(16))
    with pytest.raises(SealBroken):
        cohort.take(changed(shares, report_id=bytes(16)))


@pytest.mark.parametrize("part", ["leader_capsule", "helper_capsule", "body"])
def test_a_flipped_bit_breaks_the_seal(cohort: Cohort, part: str) -> None:
    shares = cohort.report(cohort.party.device(), cohort.encoded(delta(8)))
    refused_at_leader(cohort, SealBroken, **{part: flipped(getattr(shares, part), len(getattr(shares, part)) // 2)})


@pytest.mark.parametrize("size", [0, 15, 100, 10_000])
def test_a_vector_of_another_length_is_refused_before_any_decryption(cohort: Cohort, size: int) -> None:
    refused_at_leader(cohort, WeightsMismatch, body=bytes(size))


def test_an_empty_or_endless_capsule_is_refused(cohort: Cohort) -> None:
    refused_at_leader(cohort, OutOfBounds, leader_capsule=b"")
    refused_at_leader(cohort, OutOfBounds, helper_capsule=bytes(4097))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_random_corruption_ever_yields_an_aggregate_silently(data: st.DataObject) -> None:
    party = Party()
    cohort = party.open(minimum=2, size=30)
    cohort.fill(party.devices(2))
    good = cohort.report(party.device(), cohort.encoded(delta(5, 30))).to_bytes()
    position = data.draw(st.integers(0, len(good) - 1))
    bad = flipped(good, position, data.draw(st.integers(1, 255)))
    with pytest.raises(UmbelError):
        cohort.sum.accept(cohort.sealed(bad, bytes(16), 2))
    assert cohort.sum.close().count == 2


# At the helper.


def test_swapped_capsules_are_refused(cohort: Cohort) -> None:
    """Two devices' capsules exchanged below the leader's check: a leader that cheats, or a broken store."""
    left, right = cohort.items()[:2]
    cohort.sum._items[left.report_id] = replace(left, capsule=right.capsule)
    cohort.sum._items[right.report_id] = replace(right, capsule=left.capsule)
    with pytest.raises(CohortTooSmall, match="seal-broken"):
        cohort.sum.close()


def test_halves_of_two_reports_of_one_device_do_not_go_together(cohort: Cohort) -> None:
    first = cohort.items()[0]
    cohort.sum._items[first.report_id] = replace(first, commitment=flipped(first.commitment))
    with pytest.raises(CohortTooSmall, match="seal-broken"):
        cohort.sum.close()


def test_one_device_counts_once(cohort: Cohort) -> None:
    device = cohort.party.device()
    for number in range(5):
        cohort.take(cohort.report(device, cohort.encoded(delta(number)), report_id=bytes([number]) * 16))
    refused_by_helper(cohort, AlreadyReported)
    assert cohort.sum.close().count == 5


def test_a_foreign_certificate_does_not_count(cohort: Cohort) -> None:
    key = Ed25519PrivateKey.generate()
    forged = issue(POPULATION, key.public_key().public_bytes_raw(), NOW + 1e6, Ed25519PrivateKey.generate())
    cohort.take(cohort.report(Participant(key, forged), cohort.encoded(delta(9))))
    refused_by_helper(cohort, CertificateRefused)


def test_another_populations_device_does_not_count(cohort: Cohort) -> None:
    party, key = cohort.party, Ed25519PrivateKey.generate()
    party.records.enrol("", key.public_key().public_bytes_raw(), "ankles", NOW)
    other = issue("ankles", key.public_key().public_bytes_raw(), NOW + 1e6, party.authority)
    cohort.take(cohort.report(Participant(key, other), cohort.encoded(delta(9))))
    refused_by_helper(cohort, CertificateRefused)


def test_an_expired_certificate_does_not_count(cohort: Cohort) -> None:
    party, key = cohort.party, Ed25519PrivateKey.generate()
    party.records.enrol("", key.public_key().public_bytes_raw(), POPULATION, NOW)
    old = issue(POPULATION, key.public_key().public_bytes_raw(), NOW - 1, party.authority)
    cohort.take(cohort.report(Participant(key, old), cohort.encoded(delta(9))))
    refused_by_helper(cohort, CertificateRefused)


def test_a_borrowed_certificate_does_not_count(cohort: Cohort) -> None:
    thief = Participant(Ed25519PrivateKey.generate(), cohort.party.device().certificate)
    cohort.take(cohort.report(thief, cohort.encoded(delta(9))))
    count = len(cohort.spool)
    assert cohort.sum.close().count == count - 1
    assert cohort.sum.prepared is not None and set(cohort.sum.prepared.refused.values()) == {"signature-invalid"}


def test_a_revoked_device_does_not_count(cohort: Cohort) -> None:
    device = cohort.party.device()
    cohort.take(cohort.report(device, cohort.encoded(delta(9))))
    cohort.party.people.revoke(device.certificate.public_key)
    refused_by_helper(cohort, CertificateRefused)


@pytest.mark.parametrize("policy", [{"max_reports_per_day": 1}, {"max_reports_per_task": 1}])
def test_a_device_is_summed_no_more_often_than_it_may(policy: dict[str, int]) -> None:
    party = Party(policy)
    people = party.devices(4)
    party.open().fill(people)
    first = party.open(number=2)
    first.fill(people)
    first.sum.close()
    second = party.open(number=3)
    second.fill(people)
    with pytest.raises(CohortTooSmall, match=NotAllowed.code):
        second.sum.close()
    if "max_reports_per_day" in policy:
        party.clock.instant += 86_401
        later = party.open(number=4)
        later.fill(people)
        assert later.sum.close().count == 4


def test_a_helper_keeps_to_the_cap_that_the_ledger_reckons_with() -> None:
    """Whatever its own settings say: the coordinator tells its operator an epsilon for so many rounds."""
    party = Party()
    people = party.devices(4)
    for number in (1, 2):
        cohort = party.open(number=number, rounds_per_device=2)
        cohort.fill(people)
        assert cohort.sum.close().count == 4
    third = party.open(number=3, rounds_per_device=2)
    third.fill(people)
    with pytest.raises(CohortTooSmall, match=NotAllowed.code):
        third.sum.close()


def test_rounds_that_were_prepared_together_do_not_pass_a_cap_together() -> None:
    party = Party()
    people = party.devices(4)
    rounds = [party.open(number=number, rounds_per_device=1) for number in (1, 2)]
    for cohort in rounds:
        cohort.fill(people)
        party.port.prepare(cohort.agreed.rd, cohort.items())
    party.port.commit(rounds[0].agreed.rd, sorted(rounds[0].spool))
    with pytest.raises(WrongState, match="as many sums of this task"):
        party.port.commit(rounds[1].agreed.rd, sorted(rounds[1].spool))


def test_a_device_that_is_revoked_after_the_capsules_were_shown_is_not_summed(cohort: Cohort) -> None:
    party = cohort.party
    device = party.device()
    cohort.take(cohort.report(device, cohort.encoded(delta(9))))
    party.port.prepare(cohort.agreed.rd, cohort.items())
    party.people.revoke(device.certificate.public_key)
    with pytest.raises(WrongState, match="revoked"):
        party.port.commit(cohort.agreed.rd, sorted(cohort.spool))
    assert cohort.sum.close().count == len(cohort.spool) - 1


def test_a_report_that_was_summed_is_spent(cohort: Cohort) -> None:
    cohort.sum.close()
    spent = next(iter(cohort.spool))
    later = cohort.party.open(number=2)
    later.fill(cohort.party.devices(4))
    later.take(later.report(cohort.party.device(), later.encoded(delta(3)), report_id=spent))
    refused_by_helper(later, AlreadyReported)


def test_a_report_that_was_left_out_of_a_sum_is_spent_too(cohort: Cohort) -> None:
    party, left_out = cohort.party, cohort.items()[0].report_id
    cohort.take(cohort.report(party.device(), cohort.encoded(delta(9))))
    party.port.prepare(cohort.agreed.rd, cohort.items())
    party.port.commit(cohort.agreed.rd, sorted(set(cohort.spool) - {left_out}))
    assert party.records.is_spent(left_out)


def test_an_id_shown_twice_in_one_batch_is_refused_the_second_time(cohort: Cohort) -> None:
    party, first = cohort.party, cohort.items()[0]
    twin = cohort.report(party.device(), cohort.encoded(delta(9)), report_id=first.report_id)
    again = replace(first, capsule=twin.helper_capsule)
    found = party.port.prepare(cohort.agreed.rd, [*cohort.items(), again])
    assert found.refused == {first.report_id: AlreadyReported.code} and len(found.accepted) == 4


# At the device, before anything is sent.


def test_a_number_keeps_to_its_level(party: Party) -> None:
    descriptor = party.describe(level=100)
    steep = Cohort(party, party.agree(replace(descriptor, scale=descriptor.scale * 50)))
    vector = np.zeros(300, np.float32)
    vector[:2] = 0.5, -0.5
    numbers = steep.encoded(vector, weight=2).numbers.view(np.int32)
    assert numbers[:2].tolist() == [200, -200] and not numbers[2:].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_delta_that_is_not_finite_is_not_sent(cohort: Cohort, bad: float) -> None:
    vector = delta(1)
    vector[3] = bad
    with pytest.raises(NotFinite):
        cohort.encoded(vector)


@pytest.mark.parametrize("weight", [0, -1, 9])
def test_a_weight_out_of_bounds_is_not_sent(cohort: Cohort, weight: int) -> None:
    with pytest.raises(OutOfBounds):
        cohort.encoded(delta(1), weight)


def test_a_delta_of_another_shape_is_not_sent(cohort: Cohort) -> None:
    with pytest.raises(WeightsMismatch):
        cohort.encoded(delta(1, 301))


def test_a_metric_is_cut_to_its_bound_and_a_broken_one_is_not_sent(party: Party) -> None:
    cohort = party.open(minimum=2)
    for device in party.devices(2):
        cohort.take(cohort.report(device, cohort.encoded(delta(1), loss=1e9, correct=1.0)))
    assert cohort.sum.close().metrics["loss"] == 2000.0
    with pytest.raises(NotFinite):
        cohort.encoded(delta(1), loss=float("nan"))


@pytest.mark.parametrize("bound", [1.0, 0.5, 1e-5, 1e-7, 0.3, 1e15])
@pytest.mark.parametrize("value", [1e308, -1e308, 1.0, -0.0, 0.2999999])
def test_no_metric_is_rounded_over_its_bound(bound: float, value: float) -> None:
    """Noise is measured against the bound, so half a unit more would be half a unit without noise."""
    assert abs(from_lane(to_lane(value, bound))) <= min(bound, abs(value) + 2**-17)


# What a dishonest but enrolled device can and can't do.


def poisoned(cohort: Cohort, number: int, weight: int, loss: int = 0) -> Cleartext:
    raw = Cleartext(cohort.encoded(delta(1)).layout)
    raw.numbers[:] = np.array(number).astype(raw.numbers.dtype)
    raw.lanes[0], raw.lanes[1] = np.array(weight).astype(np.uint64), np.array(loss).astype(np.uint64)
    return raw


@pytest.mark.parametrize(
    ("number", "weight", "loss", "what"),
    [
        (2**28, 1, 0, "larger|norm"),
        (0, 60_000, 0, "weigh"),
        (0, -100, 0, "weigh"),
        (0, 1, 2**60, "metric"),
    ],
)
def test_what_no_cohort_can_make_costs_the_round_and_nothing_else(
    cohort: Cohort, number: int, weight: int, loss: int, what: str
) -> None:
    cohort.take(cohort.report(cohort.party.device(), poisoned(cohort, number, weight, loss)))
    with pytest.raises(SumImplausible, match=what):
        cohort.sum.close()


def test_a_single_number_out_of_range_is_seen(party: Party) -> None:
    cohort = party.open(minimum=4, size=300, max_weight=1, maximum=8, level=1000, clip_norm=100.0)
    cohort.fill(party.devices(4))
    raw = poisoned(cohort, 0, 1)
    raw.numbers[7] = 8000
    cohort.take(cohort.report(party.device(), raw))
    with pytest.raises(SumImplausible, match="a number of the sum"):
        cohort.sum.close()


def test_a_norm_beyond_the_cohorts_is_seen(party: Party) -> None:
    cohort = party.open(minimum=4, max_weight=1)
    cohort.fill(party.devices(4))
    cohort.take(cohort.report(party.device(), poisoned(cohort, cohort.descriptor.level, 1)))
    with pytest.raises(SumImplausible, match="norm"):
        cohort.sum.close()


def test_within_its_bounds_a_dishonest_device_counts(cohort: Cohort) -> None:
    """Documented: nothing proves a value. Bounds, validation and rollback have to do."""
    cohort.take(cohort.report(cohort.party.device(), poisoned(cohort, 1000, 1)))
    assert cohort.sum.close().count == 5
