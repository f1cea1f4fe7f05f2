"""What each party holds tells it nothing of one device; both together get the sum, once."""

from __future__ import annotations

import numpy as np
import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from tests.private import look_inside, show_secrecy
from tests.private.parties import Cohort, Party, delta
from umbel.errors import SealBroken
from umbel.secure_sum import open_as_helper, open_as_leader
from umbel.shares import LeaderShare


def test_neither_party_alone_can_tell_an_update_from_chance_and_both_get_only_the_sum() -> None:
    assert show_secrecy.main() == 0


@pytest.mark.slow
def test_files_and_memory_of_real_processes_hold_no_piece_of_an_update() -> None:
    assert look_inside.main() == 0


def test_neither_key_opens_the_others_half(cohort: Cohort) -> None:
    party = cohort.party
    shares = cohort.report(party.device(), cohort.encoded(delta(1)))
    hpke = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
    held = party.records.round_by_rd(cohort.agreed.rd)
    assert held is not None and held.private_key is not None
    helper_key, leader_key = X25519PrivateKey.from_private_bytes(held.private_key), party.leader._key
    for info in (b"", b"leader", b"helper"):
        with pytest.raises(InvalidTag):
            hpke.decrypt(shares.helper_capsule, leader_key, info)
    into = LeaderShare(cohort.sum._buffer.layout)
    with pytest.raises(SealBroken):
        open_as_leader(cohort.descriptor, cohort.agreed.rd, shares, helper_key, into)
    item = cohort.items()[0]
    with pytest.raises(SealBroken):
        open_as_helper(cohort.descriptor, cohort.agreed.rd, item, leader_key, party.people.authority, 0.0)


def uniform(data: bytes) -> float:
    """Chi-squared of the bytes against uniform, in standard deviations from its mean."""
    counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
    expected = len(data) / 256
    return float((((counts - expected) ** 2 / expected).sum() - 255) / np.sqrt(2 * 255))


def test_what_each_party_holds_of_one_device_looks_random(party: Party) -> None:
    cohort = party.open(size=50_000, minimum=2)
    cohort.take(cohort.report(party.device(), cohort.encoded(np.zeros(50_000, np.float32))))
    assert abs(uniform(cohort.sum._total.to_bytes())) < 6
    cohort.take(cohort.report(party.device(), cohort.encoded(np.zeros(50_000, np.float32))))
    party.port.prepare(cohort.agreed.rd, cohort.items())
    answer = party.port.commit(cohort.agreed.rd, sorted(cohort.spool))
    assert abs(uniform(answer.total)) < 6
    assert cohort.sum.close().count == 2
