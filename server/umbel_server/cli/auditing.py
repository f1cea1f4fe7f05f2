"""`umbel audit`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Final

import typer

from umbel.errors import DigestMismatch
from umbel.v1 import admin_pb2 as pb
from umbel_server.cli import output
from umbel_server.cli.verbs import Json, Session, group, verb
from umbel_server.files import read_text, write_result

AUDIT: Final = group("audit", "The audit: who did what, in a chain that shows later changes.")

_AUDIT_COLUMNS: Final[list[output.Column]] = [
    ("row", lambda row: str(row.sequence)),
    ("at (UTC)", lambda row: output.instant(row.at_ms)),
    ("actor", lambda row: row.actor),
    ("action", lambda row: row.action),
    ("subject", lambda row: row.subject),
    ("detail", lambda row: row.detail),
]


@verb(AUDIT, "list", "umbel audit list --limit 20")
def list_audit(
    session: Session,
    limit: Annotated[int, typer.Option("--limit", help="At most so many.", min=1, max=10_000)] = 50,
    before: Annotated[int, typer.Option("--before", help="Only rows before this one.", min=0)] = 0,
) -> None:
    """List what was done, newest first."""
    answer = session.stub.ListAudit(pb.ListAuditRequest(limit=limit, before=before))
    session.rows("", answer, answer.rows, _AUDIT_COLUMNS)


@verb(AUDIT, "verify", "umbel audit verify")
def verify_audit(session: Session) -> None:
    """Walk the whole chain; exit code 1 if it is broken."""
    answer = session.stub.VerifyAudit(pb.VerifyAuditRequest())
    if answer.intact or session.as_json:
        session.show(answer, lambda: f"intact: {answer.rows} rows")
    if not answer.intact:
        raise DigestMismatch(answer.problem)


@verb(AUDIT, "checkpoint", "umbel audit checkpoint")
def checkpoint(session: Session) -> None:
    """Print a signed checkpoint of the log as it is now; keep it where the coordinator can't reach."""
    answer = session.stub.GetCheckpoint(pb.GetCheckpointRequest())
    session.show(answer, lambda: answer.note)


@verb(AUDIT, "key", "umbel audit key")
def key(session: Session) -> None:
    """Print what verifies checkpoints, for whoever checks copies (`umbel audit check`)."""
    answer = session.stub.GetCheckpoint(pb.GetCheckpointRequest())
    if session.as_json:
        output.print_json({"key": answer.key})
    else:
        output.console().print(answer.key)


@verb(AUDIT, "export", "umbel audit export audit.jsonl")
def export(session: Session, file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write.")]) -> None:
    """Write the whole log to a file, oldest row first, one JSON object a line."""
    rows: list[pb.AuditRow] = []
    while True:
        before = rows[-1].sequence if rows else 0
        page = session.stub.ListAudit(pb.ListAuditRequest(limit=1_000, before=before)).rows
        if not page:
            break
        rows.extend(page)
    lines = [json.dumps(output.to_tree(row), ensure_ascii=False) + "\n" for row in reversed(rows)]
    write_result(file, "".join(lines).encode())
    if session.as_json:
        output.print_json({"file": str(file), "rows": len(rows)})
    else:
        output.console().print(f"Wrote {len(rows)} rows to {file}")


@AUDIT.command("check")
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The log, as `umbel audit export` wrote it.")],
    checkpoints: Annotated[
        Path | None, typer.Option("--checkpoints", help="Checkpoints that a witness kept, one after the other.")
    ] = None,
    key: Annotated[str, typer.Option("--key", help="What verifies them, as `umbel audit key` printed it once.")] = "",
    as_json: Json = False,
) -> None:
    """Check a copy of the log, asking nobody: its chain, and that it begins with what a witness saw.

    Example: umbel audit check audit.jsonl --checkpoints checkpoints.txt --key "$KEY"
    """
    from umbel_server.audit_copy import check_copy

    notes = read_text(checkpoints) if checkpoints else ""
    rows, witnessed = check_copy(read_text(file), notes, key)
    if as_json:
        output.print_json({"rows": rows, "checkpoints": witnessed})
    else:
        output.console().print(f"intact: {rows} rows, {witnessed} checkpoints")
