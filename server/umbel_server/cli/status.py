"""`umbel status`: the whole coordinator on one screen."""

from __future__ import annotations

from typing import Any

import typer
from rich.console import Group
from rich.text import Text

from umbel.v1 import admin_pb2 as pb
from umbel_server.cli import output
from umbel_server.cli.rounds import ROUND_COLUMNS, TASK_COLUMNS
from umbel_server.cli.verbs import Session, Watch, verb


def add_to(program: typer.Typer) -> None:
    """Add the command."""
    verb(program, "status", "umbel status --watch")(show_status)


def show_status(session: Session, watch: Watch = False) -> None:
    """Show tasks, open rounds, devices and traffic."""
    if watch:
        session.follow(lambda: _ask(session), _screen)
        return
    status = _ask(session)
    session.show(status, lambda: _screen(status))


def _ask(session: Session) -> pb.Status:
    return session.stub.GetStatus(pb.GetStatusRequest()).status


def _screen(status: Any) -> Group:
    up = (status.now_ms - status.started_at_ms) / 1000
    facts = [
        ("devices", f"{status.devices} enrolled, {status.devices_seen_lately} seen in the last day"),
        ("traffic", f"{output.size(status.bytes_up)} up, {output.size(status.bytes_down)} down"),
        ("running", f"{up / 3600:.1f} h, since {output.instant(status.started_at_ms)} UTC"),
        ("sessions", "  ".join(f"{shape} {count}" for shape, count in _most(status.shapes)) or "–"),
    ]
    releases = [
        (f"{release.model} {release.channel}", f"version {release.version} (release {release.number})")
        for release in status.newest_releases
    ]
    pair = [("", lambda fact: fact[0]), ("", lambda fact: fact[1])]
    return Group(
        output.table("", pair, [*facts, *releases]),
        output.table("\nTasks", TASK_COLUMNS, status.tasks),
        output.table("\nOpen rounds", ROUND_COLUMNS, status.open_rounds),
        *(Text(warning, style="yellow") for warning in status.warnings),
    )


def _most(shapes: Any) -> list[tuple[str, int]]:
    return sorted(shapes.items(), key=lambda entry: (-entry[1], entry[0]))[:8]
