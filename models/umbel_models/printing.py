"""What `umbel-compile` prints: one result as a table or as JSON, and a bar while one waits."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from umbel.program import writes_all


@contextmanager
def stages(count: int) -> Iterator[Callable[[str], None]]:
    """A bar on standard error, if that is a terminal, for a work of about as many stages; told the next one's name."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=count)
        begun: list[str] = []

        def begin(stage: str) -> None:
            begun.append(stage)
            progress.update(task, description=stage, completed=min(len(begun) - 1, count))

        yield begin


def show(result: dict[str, Any], as_json: bool) -> None:
    """Print a result on standard output."""
    if as_json:
        sys.stdout.write(json.dumps(result, indent=2, ensure_ascii=not writes_all(sys.stdout)) + "\n")
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in result.items():
        table.add_row(f"[bold]{name.replace('_', ' ')}[/]", escape(_plain(value)))
    Console().print(table, highlight=False)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(item)}" for name, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
