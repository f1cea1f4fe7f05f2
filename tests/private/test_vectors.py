"""Other languages' devices can be checked against these: committed bytes, good and bad, mean what they meant."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from tests.private.make_vectors import FILE, key, rotation
from umbel.cohort_sum import answer_statement
from umbel.descriptor import SignedDescriptor, layout_of, rd_of, verify_descriptor
from umbel.errors import BY_CODE, UmbelError
from umbel.secure_report import report_from_bytes
from umbel.secure_sum import HelperItem, HelperSeed, header_of, open_as_helper, open_as_leader, total_of_masks
from umbel.shares import Cleartext, LeaderShare

TREE = json.loads(FILE.read_text())
CASES = TREE["vectors"]


def public(number: int) -> bytes:
    return Ed25519PrivateKey.from_private_bytes(key(number)).public_key().public_bytes_raw()


class Case:
    def __init__(self, tree: dict[str, Any]) -> None:
        self.tree = tree
        self.signed = SignedDescriptor(*(self[n] for n in ("descriptor", "leader_signature", "helper_signature")))
        self.descriptor = verify_descriptor(self.signed, public(8), public(3))
        self.rd = rd_of(self.signed.statement)
        self.layout = layout_of(self.descriptor)

    def __getitem__(self, name: str) -> bytes:
        return bytes.fromhex(self.tree[name])

    def open(self, report: bytes) -> tuple[bytes, HelperItem]:
        into = LeaderShare(self.layout)
        leader = X25519PrivateKey.from_private_bytes(key(1))
        item = open_as_leader(self.descriptor, self.rd, report_from_bytes(report), leader, into)
        return into.to_bytes(), item


@pytest.fixture(params=CASES, ids=[case["name"] for case in CASES])
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_a_descriptor_is_named_and_encoded_as_ever(case: Case) -> None:
    assert case.rd == case["rd"]
    assert case.descriptor.to_bytes() == case["descriptor"]


def test_the_public_map_is_the_same_everywhere(case: Case) -> None:
    delta, travels = np.frombuffer(case["delta"], "<f4"), np.frombuffer(case["travels"], "<f4")
    np.testing.assert_allclose(case.descriptor.transform.forward(delta), travels, atol=1e-6)
    back = case.descriptor.transform.backward(travels)
    kept = back != 0
    assert kept.sum() == case.descriptor.sent
    np.testing.assert_allclose(back[kept], delta[kept], atol=1e-6)


def test_several_blocks_are_put_together_as_ever() -> None:
    assert TREE["rotations"] == [rotation(one["numbers"]) for one in TREE["rotations"]]


def test_a_vote_is_encoded_as_ever() -> None:
    case = Case(next(one for one in CASES if one["name"] == "a vote against the clip"))
    clear = Cleartext.from_bytes(case.layout, case["cleartext"])
    assert [lane.name for lane in case.descriptor.lanes] == ["within_clip"]
    assert np.linalg.norm(np.frombuffer(case["delta"], "<f4")) > case.descriptor.clip_norm
    assert int(clear.lanes[1]) == 2**64 - 2**15


def test_masking_is_the_same_everywhere(case: Case) -> None:
    clear = Cleartext.from_bytes(case.layout, case["cleartext"])
    assert clear.mask(case["seed"], header_of(case.rd, case["report_id"])).to_bytes() == case["masked"]
    seeds = [HelperSeed(case["report_id"], case["seed"], b"")]
    assert total_of_masks(case.descriptor, case.rd, seeds, bytes).to_bytes() == case["mask"]


def test_both_halves_of_a_committed_report_open(case: Case) -> None:
    share, item = case.open(case["report"])
    assert share == case["masked"]
    helper = X25519PrivateKey.from_private_bytes(key(2))
    found = open_as_helper(case.descriptor, case.rd, item, helper, public(4), TREE["now"])
    assert (found.seed, found.participant) == (case["seed"], public(5))


def test_an_answers_statement_is_the_same_everywhere(case: Case) -> None:
    ids = [bytes.fromhex(one) for one in case.tree["set"]]
    assert answer_statement(case.rd, ids, case["mask"]) == case["answer_statement"]


def test_bad_reports_are_refused_with_their_own_error(case: Case) -> None:
    for bad in case.tree["bad"]:
        with pytest.raises(UmbelError) as caught:
            case.open(bytes.fromhex(bad["report"]))
        assert type(caught.value) is BY_CODE[bad["error"]], bad["name"]
