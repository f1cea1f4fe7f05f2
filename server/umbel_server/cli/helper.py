"""`umbel helper`: the second aggregator, for the party that runs it."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from umbel.errors import Unavailable
from umbel_server.cli import output
from umbel_server.cli.verbs import Json
from umbel_server.files import read_text

if TYPE_CHECKING:
    from umbel_server.helper.program import HelperParts

HELPER = typer.Typer(
    name="helper",
    no_args_is_help=True,
    help="Run the second aggregator, which lets a coordinator learn sums of updates and nothing else.",
)
Folder = Annotated[Path, typer.Option("--state", help="The helper's folder.", envvar="UMBEL_HELPER_STATE")]


@HELPER.command("init")
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to make.")],
    leader: Annotated[str, typer.Option(help="The coordinator's key, 64 hex digits, or @FILE that holds it.")],
    address: Annotated[str, typer.Option(help="host:port by which coordinator and devices reach it.")] = (
        "127.0.0.1:7446"
    ),
    operator: Annotated[str, typer.Option(help="Who runs it, if not the coordinator's own operator.")] = "",
    minimum_cohort: Annotated[int, typer.Option(help="Fewest devices of a sum.")] = 5,
    as_json: Json = False,
) -> None:
    """Make a helper's folder: keys, settings, and a card for coordinator and devices.

    Example: umbel helper init helper-state --leader @release.pub --address helper.example.org:7446 --operator "ACME IT"
    """
    from umbel.clock import SystemClock
    from umbel_server.addresses import host_and_port
    from umbel_server.helper.folder import HelperFolder, HelperSettings

    key = read_text(Path(leader[1:])).strip() if leader.startswith("@") else leader
    host, port = host_and_port(address)
    listens = host if host in ("127.0.0.1", "::1", "localhost") else "0.0.0.0"  # noqa: S104 - a service of its own machine
    settings = HelperSettings(leader=key, host=listens, port=port, minimum_cohort=minimum_cohort)
    made = HelperFolder.create(folder, settings, address, operator, SystemClock().now())
    card = folder / "card.json"
    if as_json:
        output.print_json({"state": str(folder), "card": str(card), "identity": made.card().identity.hex()})
        return
    lines = [
        f"Made a helper in {folder}.",
        f"  card      {card} (for the coordinator's operator and the app's developer; nothing in it is secret)",
        f"  identity  {made.card().identity.hex()}",
        f"Next: umbel helper run --state {shlex.quote(str(folder))}",
    ]
    sys.stdout.write("\n".join(lines) + "\n")


@HELPER.command("run")
def run(
    state: Folder,
    host: Annotated[str | None, typer.Option(help="Address to listen at.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes any free one, and writes it into the card.")] = None,
    health_port: Annotated[int | None, typer.Option(help="Port of plain HTTP: GET /healthz, and /metrics.")] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    as_json: Json = False,
) -> None:
    """Run a helper until SIGTERM or Ctrl-C.

    Example: umbel helper run --state helper-state --health-port 7447
    """
    from umbel_server.cli.serving import log_to_stderr
    from umbel_server.helper import program
    from umbel_server.helper.folder import HelperFolder

    folder = HelperFolder(state)
    settings = folder.settings(host=host, port=port, health_port=health_port)
    log_to_stderr(log_level)

    def ready(address: str, health: str) -> None:
        if settings.port == 0:
            folder.write_address(address)
        words = f"ready: {address}{', health at http://' + health + '/healthz' if health else ''}"
        output.announce({"ready": True, "address": address, "health": health}, words, as_json)

    with _usable_store(state):
        asyncio.run(program.serve(folder, settings, ready))


@HELPER.command("tokens")
def tokens(
    state: Folder,
    population: Annotated[str, typer.Option(help="For devices of this population.")],
    count: Annotated[int, typer.Option(help="How many.", min=1, max=10_000)] = 1,
    as_json: Json = False,
) -> None:
    """Make tokens that let devices take part, one device each.

    Example: umbel helper tokens --state helper-state --population wrists --count 20
    """
    with _opened(state) as parts:
        made = [parts.people.new_token(population) for _ in range(count)]
    if as_json:
        output.print_json({"tokens": made})
        return
    sys.stdout.write("\n".join(made) + "\n")


@HELPER.command("revoke")
def revoke(
    state: Folder,
    token: Annotated[str, typer.Argument(help="The token that its device enrolled with, or @FILE that holds it.")],
    as_json: Json = False,
) -> None:
    """Shut a participant out of all sums from now on.

    Example: umbel helper revoke --state helper-state @token
    """
    given = read_text(Path(token[1:])).strip() if token.startswith("@") else token
    with _opened(state) as parts:
        public_key = parts.people.holder_of(given)
        parts.people.revoke(public_key)
    if as_json:
        output.print_json({"revoked": public_key.hex()})
        return
    sys.stdout.write("revoked\n")


@HELPER.command("status")
def status(state: Folder, as_json: Json = False) -> None:
    """Rounds and participants of a helper.

    Example: umbel helper status --state helper-state
    """
    with _opened(state) as parts:
        facts = parts.records.counts()
    if as_json:
        output.print_json(facts)
        return
    sys.stdout.write("\n".join(f"{name.replace('_', ' '):16}{value}" for name, value in facts.items()) + "\n")


@contextlib.contextmanager
def _opened(state: Path) -> Iterator[HelperParts]:
    from umbel.clock import SystemClock
    from umbel_server.helper import program
    from umbel_server.helper.folder import HelperFolder

    folder = HelperFolder(state)
    with _usable_store(state):
        parts = program.build(folder, folder.settings(), SystemClock())
        try:
            yield parts
        finally:
            parts.records.close()


@contextlib.contextmanager
def _usable_store(state: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise Unavailable(
            f"the store in {state} can't be used: {error}; look at its disk, and at who may write there"
        ) from error
