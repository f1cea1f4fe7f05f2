"""`umbel devices`."""

from __future__ import annotations

import sys
from typing import Annotated, Final

import typer

from umbel.enrolment_code import EnrolmentCode
from umbel.v1 import admin_pb2 as pb
from umbel_server.cli import output
from umbel_server.cli.verbs import Session, group, verb

DEVICES: Final = group("devices", "Devices: who is enrolled, and the tokens to enrol with.")
TOKENS: Final = group("tokens", "Enrolment tokens: single use, shown once.")
DEVICES.add_typer(TOKENS)

Id = Annotated[str, typer.Argument(metavar="ID", help="The device's id.")]

_COLUMNS: Final[list[output.Column]] = [
    ("id", lambda device: device.id),
    ("population", lambda device: device.population),
    ("last seen (UTC)", lambda device: output.instant(device.last_seen_ms)),
    ("visits", lambda device: str(device.visits)),
    ("reports", lambda device: str(device.reports)),
    ("runtimes", lambda device: ", ".join(device.runtimes) or "–"),
    ("sdk", lambda device: device.sdk or "–"),
    ("state", lambda device: "revoked" if device.revoked_at_ms else "enrolled"),
]


@verb(DEVICES, "list", "umbel devices list --population watches")
def list_devices(
    session: Session,
    population: Annotated[str, typer.Option("--population", help="Only this population's.")] = "",
    limit: Annotated[int, typer.Option("--limit", help="At most so many.", min=1, max=10_000)] = 1000,
    after: Annotated[str, typer.Option("--after", help="Only ids that come after this one.")] = "",
) -> None:
    """List the enrolled devices, by id."""
    request = pb.ListDevicesRequest(population=population, limit=limit, after=after)
    answer = session.stub.ListDevices(request)
    session.rows("", answer, answer.devices, _COLUMNS)


@verb(DEVICES, "show", "umbel devices show 3f2a…")
def show_device(session: Session, device: Id) -> None:
    """Show one device."""
    _show(session, session.stub.GetDevice(pb.GetDeviceRequest(id=device)).device)


@verb(DEVICES, "revoke", "umbel devices revoke 3f2a… --reason lost", changes=True)
def revoke_device(
    session: Session,
    device: Id,
    reason: Annotated[str, typer.Option("--reason", help="Why, for the audit.")] = "",
) -> None:
    """Refuse a device from its next call on."""
    _show(session, session.stub.RevokeDevice(pb.RevokeDeviceRequest(id=device, reason=reason, **session.call)).device)


def _show(session: Session, device: pb.Device) -> None:
    facts = [(heading, text(device)) for heading, text in _COLUMNS]
    session.facts(device, [*facts, ("enrolled (UTC)", output.instant(device.enrolled_at_ms))])


@verb(TOKENS, "create", "umbel devices tokens create --population watches --count 20", changes=True)
def create_tokens(
    session: Session,
    population: Annotated[str, typer.Option("--population", help="The population that its devices join.")],
    count: Annotated[int, typer.Option("--count", help="How many.", min=1, max=10_000)] = 1,
    hours: Annotated[float, typer.Option("--hours", help="How long they can be used.")] = 24.0,
    codes: Annotated[
        bool, typer.Option("--codes", help="Print enrolment codes: server, authority and token in one string.")
    ] = False,
    enrol_server: Annotated[
        str, typer.Option("--enrol-server", help="host:port in the codes; as in addresses.json if left out.")
    ] = "",
) -> None:
    """Make single-use enrolment tokens, printed one a line; the coordinator keeps only their hashes."""
    server = (enrol_server or session.enrol_address()) if codes else ""
    request = pb.CreateTokensRequest(population=population, count=count, lifetime_seconds=hours * 3600, **session.call)
    answer = session.stub.CreateTokens(request)
    found = [_code(session, server, token) for token in answer.tokens] if codes else list(answer.tokens)
    if session.as_json:
        output.print_json(output.to_tree(answer) | ({"codes": found} if codes else {}))
        return
    sys.stdout.write("".join(f"{line}\n" for line in found))
    at = f", at {server}" if codes else ""
    sys.stderr.write(f"good until {output.instant(answer.expires_at_ms)} UTC, for population {population}{at}\n")


def _code(session: Session, server: str, token: str) -> str:
    return EnrolmentCode(server, token, session.identity.server_authority).to_text()
