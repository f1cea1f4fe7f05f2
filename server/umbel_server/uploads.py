"""Reports on their way in: bytes into the spool, resumable, one upload for each session."""

from __future__ import annotations

from typing import Final

from umbel.errors import Conflict, Interrupted, NotFound, OutOfBounds, RoundClosed
from umbel.sealing import OVERHEAD
from umbel.visit import ReportBegin
from umbel_server import round_records
from umbel_server.blobs import Blobs
from umbel_server.round import SessionState, require_same_report
from umbel_server.runner import require_token
from umbel_server.store import Store

OVER_KEPT: Final = 10_000
"""Uploads that are over and remembered: for devices that ask again whether theirs counts, or come too late."""


class Uploads:
    """The uploads that have begun and not ended. After a restart devices begin again, and go on where they were."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self._begun: dict[str, ReportBegin] = {}
        """By report id."""
        self._by_session: dict[str, str] = {}
        self._over: dict[str, ReportBegin | None] = {}
        """By report id, oldest first: one that is counted already; None for one cut off by its round's end."""

    def __len__(self) -> int:
        return len(self._begun)

    def begin(self, begin: ReportBegin, largest: int) -> int:
        """Start or resume an upload; returns how many bytes are here already.

        Raises:
            OutOfBounds: a size that no report of the model has.
            Conflict: the report id is in use by another session.
        """
        if not OVERHEAD < begin.sealed_size <= largest:
            raise OutOfBounds(f"a report of {begin.sealed_size} bytes; this model's have at most {largest}")
        known = self._begun.get(begin.report_id)
        if known is not None and known.session_id != begin.session_id:
            raise Conflict("the report id is in use; draw another one")
        self._drop_other(begin)
        self._over.pop(begin.report_id, None)
        self._begun[begin.report_id] = begin
        self._by_session[begin.session_id] = begin.report_id
        held = self._blobs.held(begin.report_id, begin.sealed_digest)
        if held > begin.sealed_size:
            self._blobs.drop_report(begin.report_id, begin.sealed_digest)
            held = 0
        return held

    def counted(self, begin: ReportBegin) -> int:
        """Note that a report, asked about again, is counted already: all of its bytes are here."""
        self._is_over(begin.report_id, begin)
        return begin.sealed_size

    def begin_after_the_end(self, store: Store, begin: ReportBegin) -> int:
        """Answer for a session whose round is over: a report that counts is all here.

        Raises:
            NotFound: no such session.
            NotAllowed: another session's token.
            RoundClosed: it never reported.
            AlreadyReported: it reported under another report id.
        """
        with store.reading() as connection:
            session = round_records.find_session(connection, begin.session_id)
        if session is None:
            raise NotFound("no such session; check in again")
        require_token(session, begin.upload_token)
        if session.state is not SessionState.REPORTED:
            raise RoundClosed("the round is over; check in again")
        require_same_report(session, begin.report_id)
        return self.counted(begin)

    def append(self, report_id: str, offset: int, chunk: bytes) -> None:
        """Add bytes at the end.

        Raises:
            NotFound: no such upload has begun.
            RoundClosed: its session ended meanwhile.
            OutOfBounds: they don't follow what is here, or are more than was announced.
        """
        begin = self._get(report_id)
        held = self._blobs.held(report_id, begin.sealed_digest)
        if offset != held:
            raise OutOfBounds(f"bytes at offset {offset}, but {held} are here; begin again and go on there")
        if held + len(chunk) > begin.sealed_size:
            raise OutOfBounds(f"more than the {begin.sealed_size} bytes that were announced; nothing was added")
        with self._blobs.partial_path(report_id, begin.sealed_digest).open("ab") as file:
            file.write(chunk)

    def whole(self, report_id: str) -> tuple[ReportBegin, bool]:
        """An upload all of whose bytes are here, and whether it is counted already.

        Raises:
            NotFound: no such upload has begun.
            RoundClosed: its session ended meanwhile.
            Interrupted: bytes are missing.
        """
        if (counted := self._over.get(report_id)) is not None:
            return counted, True
        begin = self._get(report_id)
        held = self._blobs.held(report_id, begin.sealed_digest)
        if held < begin.sealed_size:
            raise Interrupted(f"{held} of {begin.sealed_size} bytes are here; begin again and go on there")
        return begin, False

    def forget(self, report_id: str) -> None:
        """The upload has ended."""
        self._over.pop(report_id, None)
        begin = self._begun.pop(report_id, None)
        if begin is not None:
            self._by_session.pop(begin.session_id, None)

    def drop_all_but(self, sessions: set[str]) -> None:
        """Forget unfinished uploads of sessions that are over, and the bytes that came."""
        for session_id, report_id in list(self._by_session.items()):
            if session_id not in sessions:
                digest = self._begun[report_id].sealed_digest
                self.forget(report_id)
                self._is_over(report_id, None)
                self._blobs.drop_partial(report_id, digest)

    def _get(self, report_id: str) -> ReportBegin:
        try:
            return self._begun[report_id]
        except KeyError:
            if report_id in self._over:
                raise RoundClosed("the session ended while the report was on its way; check in again") from None
            raise NotFound("no such upload has begun here; begin it (again)") from None

    def _is_over(self, report_id: str, counted: ReportBegin | None) -> None:
        self._over[report_id] = counted
        if len(self._over) > OVER_KEPT:
            del self._over[next(iter(self._over))]

    def _drop_other(self, begin: ReportBegin) -> None:
        """A session that seals anew gives up what it had sent."""
        known = self._begun.get(self._by_session.get(begin.session_id, ""))
        if known and (known.report_id, known.sealed_digest) != (begin.report_id, begin.sealed_digest):
            self._blobs.drop_report(known.report_id, known.sealed_digest)
            self.forget(known.report_id)
