"""What a leader may ask of its helper, and how it proves that it is the leader.

Every request carries a signature of the leader's key over all that it says, so the helper needn't trust a connection.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from umbel.cohort_sum import HelperAnswer, set_digest
from umbel.descriptor import LABEL
from umbel.plan import Kind
from umbel.secure_sum import HelperItem


@dataclass(frozen=True, slots=True)
class Prepared:
    """What the helper found in a round's capsules: which may be summed. Nothing about their content."""

    accepted: tuple[bytes, ...]
    """In rising order."""
    refused: Mapping[bytes, str]
    """Report id -> code of an error."""


class HelperPort(Protocol):
    """The helper as a leader sees it. Every call can be made again, after any failure, with the same effect."""

    @property
    def identity(self) -> bytes:
        """The helper's identity key (Ed25519, raw), as the leader's operator pinned it."""

    def offer_key(self, task: str, number: int, kind: Kind) -> bytes:
        """The helper's public key for a round."""

    def countersign(self, statement: bytes, leader_signature: bytes) -> bytes:
        """The helper's signature over a round descriptor."""

    def prepare(self, rd: bytes, items: Sequence[HelperItem]) -> Prepared:
        """Show the capsules; for a round already summed, answers the set that it was summed over."""

    def commit(self, rd: bytes, ids: Sequence[bytes]) -> HelperAnswer:
        """Have the round summed over this set, for good.

        Raises:
            Unreachable: no answer; ask again.
            WrongState: prepare it (again) first.
            SetRefused, CohortTooSmall: not over this set.
        """


def offer_statement(task: str, number: int, kind: Kind) -> bytes:
    """What is signed to ask for a key."""
    name = task.encode()
    length, round_number = len(name).to_bytes(4, "little"), number.to_bytes(8, "little")
    return LABEL + b"/offer\0" + length + name + round_number + kind.value.encode()


def prepare_statement(rd: bytes, items: Iterable[HelperItem]) -> bytes:
    """What is signed to show capsules."""
    digest = hashlib.sha256()
    for item in items:
        for part in (item.report_id, item.capsule, item.commitment):
            digest.update(len(part).to_bytes(4, "little") + part)
    return LABEL + b"/prepare\0" + rd + digest.digest()


def commit_statement(rd: bytes, ids: Sequence[bytes]) -> bytes:
    """What is signed to have a round summed."""
    return LABEL + b"/commit\0" + rd + set_digest(rd, ids)


@dataclass(frozen=True, slots=True)
class LeaderSigner:
    """The key by which the helper knows the leader: the one that signs releases and descriptors."""

    key: Ed25519PrivateKey

    @property
    def public(self) -> bytes:
        """Raw."""
        return self.key.public_key().public_bytes_raw()

    def __call__(self, statement: bytes) -> bytes:
        """Sign (Ed25519)."""
        return self.key.sign(statement)

    def __repr__(self) -> str:
        return "LeaderSigner(a key)"
