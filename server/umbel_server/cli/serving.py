"""`umbel init` and `umbel serve`."""

from __future__ import annotations

import asyncio
import json
import logging
import shlex
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, TextIO, cast

import typer

from umbel.memory import give_back_what_is_freed
from umbel_server.cli import output
from umbel_server.cli.verbs import Json, State
from umbel_server.files import write_file
from umbel_server.identity import Addresses

if TYPE_CHECKING:
    from umbel_server.flower.program import Program

_INIT = """Make a coordinator's folder: authorities, keys, settings and a first admin.

Example: umbel init umbel-state --name coordinator.example.org
"""
_SERVE = """Run the coordinator of a folder until SIGTERM or Ctrl-C.

A port of 0 takes any free one. When it listens, the coordinator writes its addresses to addresses.json in the folder,
to --ready-file, and to standard output.

With --app it also runs a Flower ServerApp, as it is, over the devices of a task that was created with driven = true.

Example: umbel serve --state umbel-state --host 0.0.0.0
Example: umbel serve --state umbel-state --inference-port 7448
Example: umbel serve --state umbel-state --app my_app:app --app-task research --app-config num-server-rounds=3
"""

_LARGE: Final = 1 << 20
"""Bytes of a buffer that goes back to the system when it is freed: those of whole models, not those of messages."""


def add_to(program: typer.Typer) -> None:
    """Add the two commands."""
    program.command("init", help=_INIT)(init)
    program.command("serve", help=_SERVE)(serve)


def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to make.")],
    name: Annotated[
        list[str] | None, typer.Option("--name", help="Host name or address that others reach it by; may be repeated.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a coordinator's folder."""
    from umbel.clock import SystemClock
    from umbel_server.folder import Folder
    from umbel_server.settings import load_settings

    made = Folder.create(folder, tuple(name or ()), SystemClock().now())
    settings = load_settings(folder)
    authority = folder / "authority" / "server.pem"
    if as_json:
        facts = {"state": str(folder), "identity": str(made.first_admin), "server_authority": str(authority)}
        output.print_json(facts | {"warnings": list(settings.warnings)})
        return
    lines = [
        f"Made a coordinator in {folder}.",
        f"  first admin     {made.first_admin} (what `umbel` calls with; keep it private)",
        f"  for devices     {authority} (they need it to enrol, and may have it)",
        *(f"  {warning}" for warning in settings.warnings),
        f"Next: umbel serve --state {shlex.quote(str(folder))}",
    ]
    sys.stdout.write("\n".join(lines) + "\n")


def serve(
    state: State = None,
    host: Annotated[str | None, typer.Option(help="Address to listen at.")] = None,
    device_port: Annotated[int | None, typer.Option(help="Port for enrolled devices.")] = None,
    enrol_port: Annotated[int | None, typer.Option(help="Port for devices that enrol.")] = None,
    admin_port: Annotated[int | None, typer.Option(help="Port for operators.")] = None,
    inference_port: Annotated[
        int | None, typer.Option(help="Port for programs that ask released models; closed if left out.")
    ] = None,
    inference_http_port: Annotated[int | None, typer.Option(help="The same over HTTP; closed if left out.")] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="Port of plain HTTP for Prometheus; closed if left out.")
    ] = None,
    database_url: Annotated[str | None, typer.Option(help="SQLAlchemy URL; SQLite in the folder if left out.")] = None,
    profile: Annotated[str | None, typer.Option(help="development or production.")] = None,
    helper: Annotated[Path | None, typer.Option(help="The helper's card; private tasks need one.")] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    ready_file: Annotated[Path | None, typer.Option(help="Write the addresses here, as JSON, once it listens.")] = None,
    app_name: Annotated[str | None, typer.Option("--app", help="A Flower ServerApp to run: module:attribute.")] = None,
    app_task: Annotated[str | None, typer.Option(help="The task whose devices --app uses.")] = None,
    app_config: Annotated[
        list[str] | None, typer.Option(help="One entry of the app's run_config, key=value; may be repeated.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run the coordinator of a folder."""
    from umbel_server import app
    from umbel_server.cli.connection import state_folder
    from umbel_server.settings import load_settings

    settings = load_settings(
        state_folder(state),
        host=host,
        device_port=device_port,
        enrol_port=enrol_port,
        admin_port=admin_port,
        inference_port=inference_port,
        inference_http_port=inference_http_port,
        metrics_port=metrics_port,
        database_url=database_url,
        profile=profile,
        helper=helper,
        log_level=log_level,
    )
    log_to_stderr(settings.log_level)
    give_back_what_is_freed(_LARGE)
    program = _program(app_name, app_task, app_config or [])
    asyncio.run(app.serve(settings, lambda addresses: _tell(addresses, ready_file, as_json), program=program))


def _program(app_name: str | None, task: str | None, config: list[str]) -> Program | None:
    if app_name is None:
        if task or config:
            raise typer.BadParameter("--app-task and --app-config go with --app")
        return None
    if task is None:
        raise typer.BadParameter("--app needs --app-task, the driven task whose devices it uses")
    from umbel_server.flower.program import Program, load_app

    return Program(load_app(app_name), task, dict(map(_entry, config)))


def _entry(text: str) -> tuple[str, bool | float | int | str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise typer.BadParameter(f"--app-config {text!r}: write key=value")
    try:
        parsed = json.loads(value)
    except ValueError:
        return key, value
    return key, parsed if isinstance(parsed, bool | float | int | str) else value


def _tell(addresses: Addresses, ready_file: Path | None, as_json: bool) -> None:
    if ready_file is not None:
        write_file(ready_file, json.dumps(asdict(addresses)).encode())
    told = {"devices": addresses.device, "enrolment": addresses.enrol, "admin": addresses.admin}
    told |= {"tokens": addresses.tokens, "inference": addresses.inference}
    told |= {"inference over HTTP": f"https://{addresses.inference_http}" if addresses.inference_http else ""}
    told |= {"metrics": f"http://{addresses.metrics}/metrics" if addresses.metrics else ""}
    words = "ready: " + ", ".join(f"{name} {address}" for name, address in told.items() if address)
    output.announce({"ready": True, **asdict(addresses)}, words, as_json)


def log_to_stderr(level: str) -> None:
    """Send this program's log to standard error."""
    import structlog

    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            # Plain: the richer form tells the values of variables, and those are tokens, keys and updates.
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
            ),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.WriteLoggerFactory(cast(TextIO, _StandardError())),
    )


class _StandardError:
    """Standard error, wherever it is led to: what can't be told there (a full disk) must not end the rounds."""

    def write(self, text: str) -> None:
        """Write what can be written."""
        with suppress(OSError):
            sys.stderr.write(text)

    def flush(self) -> None:
        """Have it arrive, if it can."""
        with suppress(OSError):
            sys.stderr.flush()
