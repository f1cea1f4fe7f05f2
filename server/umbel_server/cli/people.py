"""`umbel operators` and `umbel audit`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Final

import typer

from umbel.errors import DigestMismatch
from umbel.v1 import admin_pb2 as pb
from umbel_server.cli import output
from umbel_server.cli.verbs import Session, group, verb

OPERATORS: Final = group("operators", "Operators: who may ask what of the coordinator.")
AUDIT: Final = group("audit", "The audit: who did what, in a chain that shows later changes.")

_OPERATOR_COLUMNS: Final[list[output.Column]] = [
    ("name", lambda operator: operator.name),
    ("role", lambda operator: operator.role),
    ("id", lambda operator: operator.id),
    ("added (UTC)", lambda operator: output.instant(operator.added_at_ms)),
    ("state", lambda operator: "revoked" if operator.revoked_at_ms else "active"),
]
_AUDIT_COLUMNS: Final[list[output.Column]] = [
    ("row", lambda row: str(row.sequence)),
    ("at (UTC)", lambda row: output.instant(row.at_ms)),
    ("actor", lambda row: row.actor),
    ("action", lambda row: row.action),
    ("subject", lambda row: row.subject),
    ("detail", lambda row: row.detail),
]


@verb(OPERATORS, "add", "umbel operators add ada --role operator --out ada-identity", changes=True)
def add_operator(
    session: Session,
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the audit calls them.")],
    role: Annotated[str, typer.Option("--role", help="viewer, operator, approver, release-signer, auditor or admin.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to write their identity to.")],
) -> None:
    """Make an operator: a key, its certificate, and a folder to hand over (then `umbel --identity FOLDER …`)."""
    from cryptography.hazmat.primitives.asymmetric import ec

    from umbel_server.authority import key_to_pem, make_request
    from umbel_server.identity import Identity

    key = ec.generate_private_key(ec.SECP256R1())
    request = pb.AddOperatorRequest(name=name, role=role, certificate_request=make_request(key), **session.call)
    answer = session.stub.AddOperator(request)
    Identity(answer.certificate_chain, key_to_pem(key), session.identity.server_authority).write(out)
    session.rows(f"Wrote the identity to {out}", answer, [answer.operator], _OPERATOR_COLUMNS)


@verb(OPERATORS, "list", "umbel operators list")
def list_operators(session: Session) -> None:
    """List everyone who is or was an operator."""
    answer = session.stub.ListOperators(pb.ListOperatorsRequest())
    session.rows("", answer, answer.operators, _OPERATOR_COLUMNS)


@verb(OPERATORS, "revoke", "umbel operators revoke ada", changes=True)
def revoke_operator(
    session: Session, operator: Annotated[str, typer.Argument(metavar="NAME|ID", help="Their name or id.")]
) -> None:
    """Refuse an operator from the next call on."""
    answer = session.stub.RevokeOperator(pb.RevokeOperatorRequest(id=operator, **session.call))
    session.rows("", answer, [answer.operator], _OPERATOR_COLUMNS)


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
    file.write_text("".join(lines), "utf-8")
    session.show(pb.VerifyAuditResponse(rows=len(rows)), lambda: f"Wrote {len(rows)} rows to {file}")
