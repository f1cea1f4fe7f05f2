"""Bytes from elsewhere: whatever comes, a decoder gives a value that may be used, or an error of the tree."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from google.protobuf.message import DecodeError

from tests.private.parties import NOW, Cohort, Party, delta
from umbel import secure_sum
from umbel.cohort_sum import HelperAnswer, answer_statement, combine
from umbel.descriptor import descriptor_from_bytes
from umbel.errors import MalformedMessage, OutOfBounds, UmbelError
from umbel.helper_card import HelperCard
from umbel.sealing import open_with, seal_to
from umbel.secure_report import MAX_CAPSULE_BYTES, MAX_HEADER_BYTES, SealedShares, report_from_bytes
from umbel.secure_sum import HelperItem, header_of, open_as_helper, open_as_leader
from umbel.shares import HelperTotal, LeaderShare
from umbel.v1 import secure_sum_pb2 as pb
from umbel_server.helper import service


def mutations(good: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Flipped bits, cut ends, doubled pieces, and noise."""
    dice = random.Random(seed)
    for _ in range(count):
        spoilt = bytearray(good)
        for _ in range(dice.randint(1, 6)):
            match dice.randrange(5):
                case 0 if spoilt:
                    spoilt[dice.randrange(len(spoilt))] ^= 1 << dice.randrange(8)
                case 1 if spoilt:
                    del spoilt[dice.randrange(len(spoilt)) :]
                case 2 if spoilt:
                    start = dice.randrange(len(spoilt))
                    spoilt[start:start] = spoilt[start : start + dice.randrange(40)]
                case 3:
                    at = dice.randrange(len(spoilt) + 1)
                    spoilt[at:at] = dice.randbytes(dice.randrange(12))
                case _:
                    spoilt[:4] = dice.randbytes(4)
        yield bytes(spoilt)


@dataclass(frozen=True)
class Parts:
    """A round with one report; its bytes are what gets spoilt."""

    party: Party
    cohort: Cohort
    shares: SealedShares
    items: list[HelperItem]

    @classmethod
    def make(cls) -> Parts:
        party = Party()
        cohort = party.open(size=20, minimum=2)
        shares = cohort.report(party.device(), cohort.encoded(delta(1, 20)))
        cohort.take(shares)
        return cls(party, cohort, shares, cohort.items())


Case = tuple[bytes, Callable[[bytes], object]]


def a_report(parts: Parts) -> Case:
    return parts.shares.to_bytes(), report_from_bytes


def a_descriptor(parts: Parts) -> Case:
    return parts.cohort.descriptor.to_bytes(), descriptor_from_bytes


def a_card(parts: Parts) -> Case:
    return HelperCard("host:1", bytes(32), b"PEM", "us").to_text().encode(), HelperCard.from_text


def a_share_sealed_to_the_leader(parts: Parts) -> Case:
    """What a dishonest device seals properly to the leader, of any length and content."""
    cohort, key, into = parts.cohort, bytes(32), LeaderShare(parts.cohort.sum._total.layout)
    header = header_of(cohort.agreed.rd, parts.shares.report_id)
    public = cohort.descriptor.leader_key
    capsule = seal_to(public, key, secure_sum._info(header, b"leader", public))

    def open_it(data: bytes) -> object:
        body = AESGCM(key).encrypt(bytes(12), data, secure_sum._associated(header, b"any"))
        shares = SealedShares(cohort.agreed.rd, parts.shares.report_id, capsule, b"any", memoryview(body))
        return open_as_leader(cohort.descriptor, cohort.agreed.rd, shares, parts.party.leader._key, into)

    return into.to_bytes(), open_it


def a_seed_sealed_to_the_helper(parts: Parts) -> Case:
    """What a dishonest device seals properly to the helper."""
    cohort, item, authority = parts.cohort, parts.items[0], parts.party.people.authority
    held = parts.party.records.round_by_rd(cohort.agreed.rd)
    assert held is not None and held.private_key is not None
    key, public = X25519PrivateKey.from_private_bytes(held.private_key), cohort.descriptor.helper_keys[0]
    info = secure_sum._info(header_of(cohort.agreed.rd, item.report_id), b"helper", public)

    def open_it(data: bytes) -> object:
        sealed = replace(item, capsule=seal_to(public, data, info))
        return open_as_helper(cohort.descriptor, cohort.agreed.rd, sealed, key, authority, NOW)

    return open_with(key, item.capsule, info), open_it


def a_capsule_for_the_helper(parts: Parts) -> Case:
    """What the leader shows the helper, as it travels."""
    item = parts.items[0]
    message = pb.HelperItem(report_id=item.report_id, capsule=item.capsule, commitment=item.commitment)
    return message.SerializeToString(), lambda data: service._item(_parsed(pb.HelperItem, data))


def a_set_of_reports(parts: Parts) -> Case:
    return bytes(range(64)), service.split_ids


def a_helpers_total(parts: Parts) -> Case:
    """What a dishonest helper signs properly."""
    party, cohort = parts.party, parts.cohort
    ids = [parts.shares.report_id, b"\xff" * 16]
    total = HelperTotal(cohort.sum._total.layout).to_bytes()

    def combine_it(data: bytes) -> object:
        answer = HelperAnswer(data, party.identity.sign(answer_statement(cohort.agreed.rd, ids, data)))
        return combine(cohort.descriptor, cohort.agreed.rd, party.helper.identity, cohort.fresh_total(), ids, answer)

    return total, combine_it


def _parsed(kind: type[pb.HelperItem], data: bytes) -> pb.HelperItem:
    try:
        return kind.FromString(data)
    except DecodeError as error:  # gRPC answers for the server then
        raise MalformedMessage("no such message") from error


CASES = {
    a_report: 20_000,
    a_descriptor: 20_000,
    a_card: 20_000,
    a_capsule_for_the_helper: 20_000,
    a_set_of_reports: 20_000,
    a_share_sealed_to_the_leader: 3_000,
    a_seed_sealed_to_the_helper: 3_000,
    a_helpers_total: 3_000,
}
"""Decoders, with inputs for each in the quick tests: over 10^5 in all."""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_no_decoder_breaks(case: Callable[[Parts], Case]) -> None:
    try_out(case, CASES[case], seed=7)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_no_decoder_breaks_in_thirty_thousand_tries(case: Callable[[Parts], Case]) -> None:
    try_out(case, 30_000, seed=8)


def try_out(case: Callable[[Parts], Case], count: int, seed: int) -> None:
    good, decode = case(Parts.make())
    refused = 0
    for data in mutations(good, count, seed):
        try:
            decode(data)
        except UmbelError:
            refused += 1
    assert refused > count / 3


def header(**changes: object) -> bytes:
    values = {"suite": "umbel-2agg/1", "rd": bytes(32), "report_id": bytes(16), "leader_capsule": b"a"}
    message = pb.ReportHeader(**(values | {"helper_capsules": [b"b"]} | changes))  # type: ignore[arg-type]
    data = message.SerializeToString()
    return len(data).to_bytes(4, "little") + data + b"body"


def test_a_report_is_taken_apart_without_a_copy() -> None:
    data = header()
    assert bytes(report_from_bytes(data).body) == b"body"
    assert report_from_bytes(data).to_bytes() == data


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"", MalformedMessage),
        (header()[:20], MalformedMessage),
        (b"\xff\x0f\0\0" + header()[4:-4], MalformedMessage),
        ((MAX_HEADER_BYTES + 1).to_bytes(4, "little") + bytes(MAX_HEADER_BYTES + 8), OutOfBounds),
        (header(suite="umbel-2agg/2"), MalformedMessage),
        (header(suite=""), MalformedMessage),
        (header(rd=bytes(31)), MalformedMessage),
        (header(report_id=bytes(17)), MalformedMessage),
        (header(helper_capsules=[]), MalformedMessage),
        (header(helper_capsules=[b"b", b"c"]), MalformedMessage),
        (header(leader_capsule=b""), OutOfBounds),
        (header(helper_capsules=[bytes(4097)]), OutOfBounds),
    ],
)
def test_a_malformed_report_is_refused(data: bytes, error: type[UmbelError]) -> None:
    with pytest.raises(error):
        report_from_bytes(data)


@pytest.mark.parametrize(
    ("part", "value", "error"),
    [
        ("capsule", b"", OutOfBounds),
        ("capsule", bytes(MAX_CAPSULE_BYTES + 1), OutOfBounds),
        ("report_id", bytes(15), MalformedMessage),
        ("commitment", bytes(33), MalformedMessage),
    ],
)
def test_a_part_of_no_reports_length_is_refused_before_anything_is_opened(
    part: str, value: bytes, error: type[UmbelError]
) -> None:
    good = {"report_id": bytes(16), "capsule": b"sealed", "commitment": bytes(32)}
    service._item(pb.HelperItem(**good))
    with pytest.raises(error):
        service._item(pb.HelperItem(**good | {part: value}))


def test_an_endless_descriptor_is_refused() -> None:
    with pytest.raises(OutOfBounds):
        descriptor_from_bytes(bytes(1 << 17))
