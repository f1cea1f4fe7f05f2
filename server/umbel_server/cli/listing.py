"""`umbel releases listing|draft|submit|mirror` and `umbel keys`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Final

import typer

from umbel.clock import SystemClock
from umbel.errors import BadInput, NotFound
from umbel.holding import alone_with
from umbel.v1 import admin_pb2 as pb
from umbel_server.cli import output
from umbel_server.cli.connection import state_folder
from umbel_server.cli.models import Model
from umbel_server.cli.releases import RELEASES
from umbel_server.cli.verbs import Json, Session, State, group, verb
from umbel_server.files import read_file, write_result

KEYS: Final = group("keys", "The keys that sign what devices trust.")

_ROLES: Final[list[output.Column]] = [
    ("role", lambda role: role.role),
    ("version", lambda role: str(role.version)),
    ("believed until (UTC)", lambda role: output.instant(role.expires_at_ms)),
]
_RELEASES: Final[list[output.Column]] = [
    ("model", lambda release: release.model),
    ("release", lambda release: str(release.number)),
    ("version", lambda release: str(release.version)),
    ("channel", lambda release: release.channel),
    ("content of", lambda release: output.number(release.content_of)),
    ("takes back", lambda release: output.number(release.from_number)),
    ("signed", lambda release: "yes" if release.signed else "waits"),
]


@verb(RELEASES, "listing", "umbel releases listing")
def listing(session: Session) -> None:
    """Show the release listing that devices verify: its releases, and how long its roles are believed."""
    answer = session.stub.GetListing(pb.GetListingRequest())
    if session.as_json:
        output.print_json(output.to_tree(answer))
        return
    for title, columns, rows in (("Releases", _RELEASES, answer.releases), ("Roles", _ROLES, answer.roles)):
        output.console().print(output.table(title, columns, rows))
    for model, reason in answer.held.items():
        output.console().print(f"held: {model} ({reason})")


@verb(RELEASES, "draft", "umbel releases draft smartwatch draft.json")
def draft(session: Session, model: Model, file: Annotated[Path, typer.Argument(metavar="FILE")]) -> None:
    """Write what waits for signatures to a file, to be signed where the keys are (`umbel keys sign`)."""
    answer = session.stub.DraftListing(pb.DraftListingRequest(model=model))
    write_result(file, answer.draft)
    session.show(answer, lambda: f"Wrote {file}; sign it, then `umbel releases submit {model} {file}`")


@verb(RELEASES, "submit", "umbel releases submit smartwatch draft.json", changes=True)
def submit(session: Session, model: Model, file: Annotated[Path, typer.Argument(metavar="FILE")]) -> None:
    """Publish a draft that came back signed by enough of the model's signers."""
    answer = session.stub.SubmitListing(pb.SubmitListingRequest(model=model, signed=read_file(file), **session.call))
    session.show(answer, lambda: f"{model}'s releases are listed")


@RELEASES.command("mirror")
def mirror(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The web server's folder.")],
    state: State = None,
    as_json: Json = False,
) -> None:
    """Fill a folder that any web server may hand out: the listing, and the files of all listed releases.

    Example: umbel releases mirror /var/www/umbel
    """
    from umbel_server.folder import Folder
    from umbel_server.mirroring import write_mirror

    here = Folder(state_folder(state))
    found = write_mirror(here.repository()[0], here.blobs / "bundles", folder)
    if as_json:
        output.print_json({"folder": str(folder)} | asdict(found))
        return
    words = f"{folder} has {found.releases} releases; {found.files} files were new ({output.size(found.bytes)})"
    output.console().print(words)


# Keys: on files, with no coordinator running or asked.


@KEYS.command("init")
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where private keys go.")], as_json: Json = False
) -> None:
    """Make a set of keys for signing elsewhere: root, targets, snapshot, timestamp; one file each.

    Example: umbel keys init offline-keys
    """
    from umbel_server.keyring import RULES, Keyring

    Keyring.create(folder)
    if as_json:
        rules = {
            role: {"keys": it.keys, "threshold": it.threshold, "offline": it.offline} for role, it in RULES.items()
        }
        output.print_json({"folder": str(folder), "roles": rules})
        return
    output.console().print(f"Wrote keys to {folder}.")
    for role, rule in RULES.items():
        where = "OFFLINE, on machines of different people" if rule.offline else "with the coordinator"
        output.console().print(f"  {role}: {rule.threshold} of {rule.keys}, {where}")


@KEYS.command("status")
def status(state: State = None, as_json: Json = False) -> None:
    """Show every key that devices trust, whether it lies on this machine, and whether it should.

    Example: umbel keys status
    """
    from umbel_server.folder import Folder

    repository, _ = Folder(state_folder(state)).repository()
    found = repository.key_status()
    if as_json:
        # By the names that `umbel releases listing` gives them.
        keys = [
            pb.ListingKey(role=it.role, key_id=it.key_id, held_here=it.held_here, belongs_offline=it.offline)
            for it in found
        ]
        output.print_json({"keys": [output.to_tree(key) for key in keys]})
        return
    columns: list[output.Column] = [
        ("role", lambda key: key.role),
        ("key", lambda key: key.key_id[:16]),
        ("here", lambda key: "yes" if key.held_here else "no"),
        ("", lambda key: "development trust: belongs offline" if key.held_here and key.offline else ""),
    ]
    output.console().print(output.table("", columns, found))


@KEYS.command("rotate")
def rotate(
    role: Annotated[str, typer.Argument(metavar="ROLE", help="root, targets, snapshot, timestamp, releases-MODEL.")],
    key_id: Annotated[str, typer.Argument(metavar="KEY", help="The key to replace; the beginning is enough.")],
    new: Annotated[str, typer.Option("--new", help="The new key, made elsewhere (`umbel keys new`).")] = "",
    draft: Annotated[Path | None, typer.Option("--draft", help="With --new: write what has to be signed here.")] = None,
    state: State = None,
    as_json: Json = False,
) -> None:
    """Replace one key of a role by a new one; devices follow at their next visit. With keys elsewhere: --new, --draft.

    Example: umbel keys rotate timestamp 8f3b91c2
    """
    from umbel_server import renewal
    from umbel_server.folder import Folder
    from umbel_server.keyring import RULES, public_key, rule_of

    repository, keys = Folder(state_folder(state)).repository()
    ids = [key.key_id for key in repository.key_status() if key.role == role and key.key_id.startswith(key_id)]
    if len(ids) != 1:
        raise NotFound(f"{role} has {len(ids)} keys that begin with {key_id!r}; `umbel keys status` lists them")
    now = SystemClock().now()
    holder = "root" if role in RULES else "targets"
    if bool(new) != (draft is not None):
        raise BadInput("give --new and --draft together, or neither")
    if draft is not None:
        key = public_key(new)
        write_result(draft, repository.draft_rotation(role, ids[0], key, now))
        words = f"Wrote {draft}; sign it with keys of {holder}, then `umbel keys publish {holder} {draft}`"
        if rule_of(role).offline and role != "root":
            words += f". Before that, let the keys that stay sign {role} anew: `umbel keys renew {role} --draft FILE`"
        tell(as_json, {"role": role, "old": ids[0], "new": key.keyid, "draft": str(draft)}, words)
        return
    made = renewal.rotate(repository, keys, role, ids[0], now)
    tell(as_json, {"role": role, "old": ids[0], "new": made.keyid}, f"{role}: {ids[0][:16]} was replaced")


@KEYS.command("sign")
def sign(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A draft, as `umbel releases draft` wrote it.")],
    key: Annotated[Path, typer.Option("--key", help="The private key's file.")],
    as_json: Json = False,
) -> None:
    """Add a signature to a draft, on the machine where the key is; nothing else is needed there.

    Example: umbel keys sign draft.json --key offline-keys/releases-smartwatch-1.key
    """
    from umbel_server.drafts import sign_draft
    from umbel_server.keyring import read_key

    with alone_with(file):  # another signer's may come at this moment
        write_result(file, sign_draft(read_file(file), [read_key(key)]))
    tell(as_json, {"file": str(file)}, f"Added a signature to {file}.")


def tell(as_json: bool, facts: Mapping[str, object], words: str) -> None:
    """Print what was done with files: as JSON, or in words."""
    if as_json:
        output.print_json(facts)
    else:
        output.console().print(words)
