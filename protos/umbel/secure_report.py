"""A private report as bytes: a short header in protobuf, then the masked vector, so that neither side copies it.

4 bytes   length of the header, little-endian
header    umbel.v1.ReportHeader
rest      the masked vector under AES-256-GCM
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from umbel.descriptor import TWO_AGGREGATORS, RoundDescriptor, layout_of
from umbel.errors import MalformedMessage, OutOfBounds
from umbel.messages import parse
from umbel.v1 import secure_sum_pb2 as pb

REPORT_ID_BYTES: Final = 16
_RD_BYTES: Final = 32
MAX_CAPSULE_BYTES: Final = 4096
MAX_HEADER_BYTES: Final = 3 * MAX_CAPSULE_BYTES
TAG_BYTES: Final = 16


@dataclass(frozen=True, slots=True)
class SealedShares:
    """Both halves of one report, each sealed to its aggregator."""

    rd: bytes
    report_id: bytes
    leader_capsule: bytes
    helper_capsule: bytes
    body: memoryview
    """The masked vector, encrypted."""

    def to_bytes(self) -> bytes:
        """What is uploaded."""
        header = pb.ReportHeader(
            suite=TWO_AGGREGATORS,
            rd=self.rd,
            report_id=self.report_id,
            leader_capsule=self.leader_capsule,
            helper_capsules=[self.helper_capsule],
        ).SerializeToString(deterministic=True)
        return b"".join((len(header).to_bytes(4, "little"), header, self.body))

    def __repr__(self) -> str:
        return f"SealedShares({self.report_id.hex()}, {len(self.body)} bytes)"


def report_from_bytes(data: bytes | memoryview) -> SealedShares:
    """Take a report apart; the body stays where it is. Nothing in it is authentic yet.

    Raises:
        MalformedMessage: not a report of this suite.
        OutOfBounds: a header or capsule that is too long.
    """
    view = memoryview(data)
    length = int.from_bytes(view[:4], "little")
    if length > MAX_HEADER_BYTES:
        raise OutOfBounds(f"a report header of {length} bytes; the limit is {MAX_HEADER_BYTES}")
    if len(view) < 4 + length:
        raise MalformedMessage(f"a report of {len(view)} bytes ends inside its header")
    header = parse(pb.ReportHeader, bytes(view[4 : 4 + length]))
    if header.suite != TWO_AGGREGATORS:
        raise MalformedMessage(f"a report of suite {header.suite[:80]!r}; this round's is {TWO_AGGREGATORS}")
    if len(header.helper_capsules) != 1:
        raise MalformedMessage(f"a report for {len(header.helper_capsules)} helpers; the suite has one")
    if len(header.rd) != _RD_BYTES or len(header.report_id) != REPORT_ID_BYTES:
        raise MalformedMessage("a report's round or id has the wrong length")
    for capsule in (header.leader_capsule, header.helper_capsules[0]):
        if not 0 < len(capsule) <= MAX_CAPSULE_BYTES:
            raise OutOfBounds(f"a capsule of {len(capsule)} bytes; 1 to {MAX_CAPSULE_BYTES}")
    return SealedShares(
        header.rd, header.report_id, header.leader_capsule, header.helper_capsules[0], view[4 + length :]
    )


def largest_report(descriptor: RoundDescriptor) -> int:
    """Bytes that no report of this round exceeds."""
    return 4 + MAX_HEADER_BYTES + layout_of(descriptor).size + TAG_BYTES
