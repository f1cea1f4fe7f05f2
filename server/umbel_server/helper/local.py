"""The helper's port without a network between."""

from __future__ import annotations

from collections.abc import Sequence

from umbel.cohort_sum import HelperAnswer
from umbel.plan import Kind
from umbel.secure_sum import HelperItem
from umbel_server.helper.core import Helper
from umbel_server.helper.port import LeaderSigner, Prepared, commit_statement, offer_statement, prepare_statement


class LocalHelper:
    """A helper in this very process: for tests and simulations, where one program plays all parties."""

    def __init__(self, helper: Helper, sign: LeaderSigner) -> None:
        self._helper = helper
        self._sign = sign

    @property
    def identity(self) -> bytes:
        """See `HelperPort`."""
        return self._helper.identity

    def offer_key(self, task: str, number: int, kind: Kind) -> bytes:
        """See `HelperPort`."""
        return self._helper.offer_key(task, number, kind, self._sign(offer_statement(task, number, kind)))

    def countersign(self, statement: bytes, leader_signature: bytes) -> bytes:
        """See `HelperPort`."""
        return self._helper.countersign(statement, leader_signature)

    def prepare(self, rd: bytes, items: Sequence[HelperItem]) -> Prepared:
        """See `HelperPort`."""
        return self._helper.prepare(rd, items, self._sign(prepare_statement(rd, items)))

    def commit(self, rd: bytes, ids: Sequence[bytes]) -> HelperAnswer:
        """See `HelperPort`."""
        return self._helper.commit(rd, ids, self._sign(commit_statement(rd, ids)))
