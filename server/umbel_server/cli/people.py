"""`umbel operators`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from umbel.v1 import admin_pb2 as pb
from umbel_server.cli import output
from umbel_server.cli.connection import is_refusal, state_folder
from umbel_server.cli.listing import tell
from umbel_server.cli.verbs import Json, Session, State, group, verb

OPERATORS: Final = group("operators", "Operators: who may ask what of the coordinator.")

_OPERATOR_COLUMNS: Final[list[output.Column]] = [
    ("name", lambda operator: operator.name),
    ("role", lambda operator: operator.role),
    ("id", lambda operator: operator.id),
    ("added (UTC)", lambda operator: output.instant(operator.added_at_ms)),
    ("state", lambda operator: "revoked" if operator.revoked_at_ms else "active"),
]


@verb(OPERATORS, "add", "umbel operators add ada --role operator --out ada-identity", changes=True)
def add_operator(
    session: Session,
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the audit calls them.")],
    role: Annotated[
        str, typer.Option("--role", help="viewer, operator, approver, release-signer, auditor, admin or caller.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder to write their identity to.")],
) -> None:
    """Make an operator: a key, its certificate, and a folder to hand over (then `--identity FOLDER` with each verb)."""
    from cryptography.hazmat.primitives.asymmetric import ec

    from umbel_server.authority import key_from_pem, key_to_pem, make_request
    from umbel_server.identity import Identity, kept_first

    fresh = key_to_pem(ec.generate_private_key(ec.SECP256R1()))
    with kept_first(out, fresh, is_refusal) as key:
        asked = make_request(key_from_pem(key))
        request = pb.AddOperatorRequest(name=name, role=role, certificate_request=asked, **session.call)
        answer = session.stub.AddOperator(request)
    Identity(answer.certificate_chain, key, session.identity.server_authority).write(out)
    session.rows(f"Wrote the identity to {out}", answer, [answer.operator], _OPERATOR_COLUMNS)


@OPERATORS.command("renew")
def renew_operator(
    path: Annotated[
        Path | None,
        typer.Argument(metavar="[DIR|FILE]", help="An identity, or its certificate.pem; the first admin's."),
    ] = None,
    state: State = None,
    as_json: Json = False,
) -> None:
    """Give an operator's certificate a new term, on the coordinator's machine; an ended one too.

    The first admin's is good for a year again, any other's for `operator_certificate_days`.

    Only the certificate has to travel, never the key. Whoever was revoked stays refused.

    Example: umbel operators renew ada-identity/certificate.pem
    """
    from umbel.clock import DAY, SystemClock
    from umbel_server.authority import PeerKind, end_of
    from umbel_server.files import read_file, write_file
    from umbel_server.folder import FIRST_ADMIN_SECONDS, Folder
    from umbel_server.identity import CERTIFICATE_FILE
    from umbel_server.settings import load_settings

    settings = load_settings(state_folder(state))
    folder, now = Folder(settings.state), SystemClock().now()
    file = path or folder.first_admin
    file = file / CERTIFICATE_FILE if file.is_dir() else file
    is_first = file.resolve() == (folder.first_admin / CERTIFICATE_FILE).resolve()
    life = FIRST_ADMIN_SECONDS if is_first else settings.operator_certificate_days * DAY
    renewed = folder.authorities().operator.renew(read_file(file), PeerKind.OPERATOR, now, life)
    write_file(file, renewed)
    until = round(end_of(renewed) * 1000)
    words = f"Wrote {file}, good until {output.instant(until)} UTC"
    tell(as_json, {"certificate": str(file), "until_ms": until}, words)


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
