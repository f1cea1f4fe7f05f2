"""Reports on their way in: bytes into the spool, resumable, one upload for each session."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from umbel.errors import Conflict, Interrupted, NotFound, OutOfBounds, RoundClosed
from umbel.sealing import OVERHEAD
from umbel.visit import ReportBegin
from umbel_server import round_records
from umbel_server.blobs import Blobs
from umbel_server.round import SessionState, require_same_report
from umbel_server.runner import require_token
from umbel_server.store import Store

LATE_KEPT: Final = 10_000
"""Uploads cut off by their round's end that are remembered, to tell their devices why."""


@dataclass(frozen=True, slots=True)
class _Upload:
    begin: ReportBegin
    is_counted: bool


class Uploads:
    """The uploads that have begun and not ended. After a restart devices begin again, and go on where they were."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self._by_report: dict[str, _Upload] = {}
        self._by_session: dict[str, str] = {}
        self._late: dict[str, None] = {}

    def begin(self, begin: ReportBegin, largest: int) -> int:
        """Start or resume an upload; returns how many bytes are here already.

        Raises:
            OutOfBounds: a size that no report of the model has.
            Conflict: the report id is in use by another session.
        """
        if not OVERHEAD < begin.sealed_size <= largest:
            raise OutOfBounds(f"a report of {begin.sealed_size} bytes; this model's have at most {largest}")
        known = self._by_report.get(begin.report_id)
        if known is not None and known.begin.session_id != begin.session_id:
            raise Conflict("the report id is in use; draw another one")
        self._drop_other(begin)
        self._remember(_Upload(begin, is_counted=False))
        held = self._blobs.held(begin.report_id, begin.sealed_digest)
        if held > begin.sealed_size:
            self._blobs.drop_report(begin.report_id, begin.sealed_digest)
            held = 0
        return held

    def counted(self, begin: ReportBegin) -> int:
        """Note that a report, asked about again, is counted already: all of its bytes are here."""
        self._remember(_Upload(begin, is_counted=True))
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
        begin = self._get(report_id).begin
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
        upload = self._get(report_id)
        begin = upload.begin
        held = begin.sealed_size if upload.is_counted else self._blobs.held(report_id, begin.sealed_digest)
        if held < begin.sealed_size:
            raise Interrupted(f"{held} of {begin.sealed_size} bytes are here; begin again and go on there")
        return begin, upload.is_counted

    def forget(self, report_id: str) -> None:
        """The upload has ended."""
        upload = self._by_report.pop(report_id, None)
        if upload is not None:
            self._by_session.pop(upload.begin.session_id, None)

    def drop_all_but(self, sessions: set[str]) -> None:
        """Forget unfinished uploads of sessions that are over, and the bytes that came."""
        for session_id, report_id in list(self._by_session.items()):
            if session_id not in sessions:
                upload = self._get(report_id)
                if not upload.is_counted:
                    self.forget(report_id)
                    self._note_late(report_id)
                    self._blobs.drop_partial(report_id, upload.begin.sealed_digest)

    def _get(self, report_id: str) -> _Upload:
        try:
            return self._by_report[report_id]
        except KeyError:
            if report_id in self._late:
                raise RoundClosed("the session ended while the report was on its way; check in again") from None
            raise NotFound("no such upload has begun here; begin it (again)") from None

    def _note_late(self, report_id: str) -> None:
        self._late[report_id] = None
        if len(self._late) > LATE_KEPT:
            del self._late[next(iter(self._late))]

    def _remember(self, upload: _Upload) -> None:
        self._late.pop(upload.begin.report_id, None)
        self._by_report[upload.begin.report_id] = upload
        self._by_session[upload.begin.session_id] = upload.begin.report_id

    def _drop_other(self, begin: ReportBegin) -> None:
        """A session that seals anew gives up what it had sent."""
        report_id = self._by_session.get(begin.session_id)
        known = self._by_report.get(report_id) if report_id else None
        if known and (known.begin.report_id, known.begin.sealed_digest) != (begin.report_id, begin.sealed_digest):
            self._blobs.drop_report(known.begin.report_id, known.begin.sealed_digest)
            self.forget(known.begin.report_id)
