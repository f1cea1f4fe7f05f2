"""A helper's calls come on many threads; one that comes in the midst of another finds nothing half decided."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest

from tests.crossing import Call, crossed
from tests.private.parties import TASK, Cohort, Party
from umbel.descriptor import RoundDescriptor, sign_as_leader
from umbel.errors import AlreadyExists, SetRefused, WrongState
from umbel.plan import Kind


def in_the_midst(party: Party, step: str, first: Call, second: Call) -> Future[Any]:
    """What becomes of a second call as the first one comes to a step of the helper's records."""
    return crossed(party.helper, party.records, step, first, second)[1]


def prepared(cohort: Cohort) -> list[bytes]:
    return list(cohort.party.port.prepare(cohort.agreed.rd, cohort.items()).accepted)


def test_two_sets_of_one_round_are_not_both_summed(cohort: Cohort) -> None:
    """Their difference would be one device's update."""
    party, rd, ids = cohort.party, cohort.agreed.rd, prepared(cohort)
    second = in_the_midst(party, "commit", lambda: party.port.commit(rd, ids), lambda: party.port.commit(rd, ids[1:]))
    with pytest.raises(SetRefused):
        second.result()


def test_one_round_is_not_agreed_in_two_ways(party: Party) -> None:
    one, other = party.describe(), party.describe(maximum=8)

    def countersign(descriptor: RoundDescriptor) -> bytes:
        statement = descriptor.to_bytes()
        return party.port.countersign(statement, sign_as_leader(statement, party.sign.key))

    second = in_the_midst(party, "countersign", lambda: countersign(one), lambda: countersign(other))
    with pytest.raises(AlreadyExists):
        second.result()


def test_a_round_that_was_asked_for_late_sets_no_task_back(party: Party) -> None:
    second = in_the_midst(
        party,
        "offer",
        lambda: party.port.offer_key(TASK, 1, Kind.TRAIN),
        lambda: party.port.offer_key(TASK, 2, Kind.TRAIN),
    )
    assert len(second.result()) == 32
    with pytest.raises(WrongState, match="only rise"):
        party.port.offer_key(TASK, 1, Kind.EVALUATE)


def test_two_rounds_do_not_both_take_the_last_report_that_a_device_may_give(party: Party) -> None:
    devices = party.devices(4)
    one, other = (party.open(number=number, rounds_per_device=1) for number in (1, 2))
    for cohort in (one, other):
        cohort.fill(devices)
    first, late = prepared(one), prepared(other)
    second = in_the_midst(
        party,
        "commit",
        lambda: party.port.commit(one.agreed.rd, first),
        lambda: party.port.commit(other.agreed.rd, late),
    )
    with pytest.raises(WrongState, match="as many sums of this task"):
        second.result()


def test_no_seed_is_left_of_a_round_that_is_summed_while_it_is_shown_again(cohort: Cohort) -> None:
    party, ids = cohort.party, prepared(cohort)
    second = in_the_midst(party, "is_spent", lambda: prepared(cohort), lambda: party.port.commit(cohort.agreed.rd, ids))
    assert second.result().total
    assert party.helper._prepared == {}


def test_a_round_that_is_shown_while_old_ones_are_swept_stops_no_sweep(party: Party) -> None:
    one, other = (party.open(number=number) for number in (1, 2))
    for cohort in (one, other):
        cohort.fill(party.devices(4))
    prepared(one)
    second = in_the_midst(party, "round_by_rd", party.helper.sweep, lambda: prepared(other))
    assert len(second.result()) == 4
