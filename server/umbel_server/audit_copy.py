"""A copy of the audit log, checked by somebody who asks the coordinator nothing."""

from __future__ import annotations

import json

from umbel.errors import BadInput, MalformedMessage
from umbel_server import audit
from umbel_server.audit import AuditRow
from umbel_server.checkpoints import key_from_text, notes_of_text, open_note, require_witnessed


def check_copy(rows: str, notes: str = "", key: str = "") -> tuple[int, int]:
    """How many rows a copy has and how many checkpoints it was held against, all of them intact.

    Args:
        rows: the log as JSON lines, oldest first (`umbel audit export`).
        notes: what a witness kept; without it a cut at the end and a consistent rewriting can't be seen.
        key: that verifies them (`umbel audit key`), kept since before there was anything to hide.

    Raises:
        DigestMismatch: an edit, a deletion, a cut, a rewriting.
        SignatureInvalid: a checkpoint of another log.
        MalformedMessage: not such a copy, or not such notes.
        BadInput: checkpoints without the key that verifies them.
    """
    found = [_row(line) for line in rows.splitlines() if line.strip()]
    audit.verify_rows(found)
    kept = notes_of_text(notes)
    if kept and not key:
        raise BadInput("checkpoints prove nothing without --key; `umbel audit key` printed it once")
    checkpoints = [open_note(note, key_from_text(key)) for note in kept]
    require_witnessed([bytes.fromhex(row.hash) for row in found], checkpoints)
    return len(found), len(checkpoints)


def _row(line: str) -> AuditRow:
    try:
        tree = json.loads(line)
        row = AuditRow(
            sequence=tree["sequence"],
            at=tree["at"],
            actor=tree["actor"],
            action=tree["action"],
            object=tree["subject"],
            request_id=tree["request_id"],
            body_json=tree["detail"],
            previous=tree["previous_hash"],
            hash=tree["hash"],
        )
        bytes.fromhex(row.hash)
    except (ValueError, KeyError, TypeError) as error:
        raise MalformedMessage(f"not an audit log's row: {error!r}; `umbel audit export` writes such rows") from error
    return row
