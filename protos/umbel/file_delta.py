"""What a device is told of a delta (`umbel.delta`): a hint; only the file that comes out is believed, by its digest."""

from __future__ import annotations

from dataclasses import dataclass

from umbel import fields
from umbel.digests import Digest, parse_digest
from umbel.v1 import device_pb2 as pb


@dataclass(frozen=True, slots=True)
class FileDelta:
    """A blob that turns one file of a bundle into another."""

    base: Digest
    target: Digest
    digest: Digest
    """Of the delta itself."""
    size: int


def file_delta_to_message(delta: FileDelta) -> pb.FileDelta:
    """Encode a hint."""
    return pb.FileDelta(base=delta.base, target=delta.target, digest=delta.digest, size=delta.size)


def file_delta_from_message(message: pb.FileDelta) -> FileDelta:
    """Decode a hint."""
    return FileDelta(
        base=parse_digest(message.base),
        target=parse_digest(message.target),
        digest=parse_digest(message.digest),
        size=fields.count(message.size, "delta size", least=1),
    )
