"""`umbel keys new|renew|delegate|publish`, and `rotate` with keys elsewhere: only files travel."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from umbel.clock import SystemClock
from umbel.errors import SignatureInvalid
from umbel_server.cli.connection import state_folder
from umbel_server.cli.listing import tell
from umbel_server.cli.verbs import Json, State
from umbel_server.files import read_file, write_result

ROLES: Final = "root, targets, or releases-MODEL."
Role = Annotated[str, typer.Argument(metavar="ROLE", help=ROLES)]
Draft = Annotated[Path | None, typer.Option("--draft", help="Write what has to be signed elsewhere to this file.")]


def new(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where the private key goes.")], as_json: Json = False
) -> None:
    """Make one key on the machine where it stays, and print its public half.

    Example: umbel keys new second-signer.key
    """
    from umbel_server.keyring import new_key

    public = new_key(file)
    tell(as_json, {"file": str(file), "public": public}, public)


def renew(role: Role, draft: Draft = None, state: State = None, as_json: Json = False) -> None:
    """Let a role be believed for longer, as it is; by itself where its keys lie here, else by --draft.

    Example: umbel keys renew targets --draft targets.json
    """
    from umbel_server.folder import Folder
    from umbel_server.repository import model_of

    repository, _ = Folder(state_folder(state)).repository()
    now = SystemClock().now()
    model = model_of(role)
    unborn = model in repository.models() and not repository.has_listing(model)
    drafted = repository.draft_empty(model, now) if unborn else repository.draft_renewal(role, now)
    if draft is not None:
        write_result(draft, drafted)
        tell(
            as_json,
            {"role": role, "draft": str(draft)},
            f"Wrote {draft}; sign it, then `umbel keys publish {role} {draft}`",
        )
        return
    try:
        repository.publish(role, repository.sign(drafted, role), now)
    except SignatureInvalid as error:
        raise SignatureInvalid(f"{error}; its keys aren't all here: use --draft, and sign where they are") from error
    tell(as_json, {"role": role}, f"{role} is believed for longer")


def delegate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model without signers yet.")],
    signers: Annotated[list[str], typer.Argument(metavar="PUBLIC…", help="Its signers' keys, as `keys new` printed.")],
    draft: Annotated[Path, typer.Option("--draft", help="Write what the targets' signers have to sign here.")],
    state: State = None,
    as_json: Json = False,
) -> None:
    """Name a model's signers whose keys lie elsewhere; then publish `targets`, and `renew releases-MODEL` by --draft.

    Example: umbel keys delegate smartwatch 8f3b… 91c2… 04aa… --draft targets.json
    """
    from umbel_server.folder import Folder
    from umbel_server.keyring import public_key

    repository, _ = Folder(state_folder(state)).repository()
    keys = [public_key(signer) for signer in signers]
    write_result(draft, repository.draft_signers(model, keys, SystemClock().now()))
    tell(
        as_json,
        {"model": model, "draft": str(draft)},
        f"Wrote {draft}; sign it, then `umbel keys publish targets {draft}`",
    )


def publish(
    role: Role,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A draft that came back signed by enough keys.")],
    state: State = None,
    as_json: Json = False,
) -> None:
    """Take a signed draft of root, targets or a model's role; devices follow at their next visit.

    Example: umbel keys publish root root.json
    """
    from umbel_server.folder import Folder

    repository, _ = Folder(state_folder(state)).repository()
    repository.publish(role, read_file(file), SystemClock().now())
    tell(as_json, {"role": role}, f"{role} is published")


def add_to(keys: typer.Typer) -> None:
    """Make these commands of `umbel keys`."""
    for command in (new, renew, delegate, publish):
        keys.command(command.__name__)(command)
