"""Bytes from elsewhere: whatever comes, a decoder gives a value that may be used, or an error of the tree."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest

from tests.private.parties import Party, delta
from umbel.descriptor import descriptor_from_bytes
from umbel.errors import MalformedMessage, OutOfBounds, UmbelError
from umbel.helper_card import HelperCard
from umbel.secure_report import MAX_HEADER_BYTES, report_from_bytes
from umbel.v1 import secure_sum_pb2 as pb

ROUNDS = 35_000
"""Inputs for each decoder: over 10^5 in all, in a few seconds."""


def mutations(good: bytes, seed: int) -> Iterator[bytes]:
    """Flipped bits, cut ends, doubled pieces, and noise."""
    dice = random.Random(seed)
    for _ in range(ROUNDS):
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


def good_report() -> bytes:
    party = Party()
    cohort = party.open(size=20)
    return cohort.report(party.device(), cohort.encoded(delta(1, 20))).to_bytes()


def good_descriptor() -> bytes:
    return Party().describe().to_bytes()


def good_card() -> bytes:
    return HelperCard("host:1", bytes(32), b"PEM", "us").to_text().encode()


@pytest.mark.parametrize(
    ("decode", "good"),
    [(report_from_bytes, good_report), (descriptor_from_bytes, good_descriptor), (HelperCard.from_text, good_card)],
)
def test_no_decoder_breaks(decode: Callable[[bytes], object], good: Callable[[], bytes]) -> None:
    refused = 0
    for data in mutations(good(), seed=7):
        try:
            decode(data)
        except UmbelError:
            refused += 1
    assert refused > ROUNDS / 3


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


def test_an_endless_descriptor_is_refused() -> None:
    with pytest.raises(OutOfBounds):
        descriptor_from_bytes(bytes(1 << 17))
