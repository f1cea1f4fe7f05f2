"""What people see while a simulation runs, and the tables at its end."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from umbel_simulations.judgement import is_go, judge
from umbel_simulations.outcome import Outcome
from umbel_simulations.report.figures import check_rows, figures

_LINES_EVERY_SECONDS: Final = 10.0


class Bar:
    """Progress as a bar with virtual and real time; where nothing can be drawn over, a line now and then.

    Args:
        name: of the run.
        console: where to; standard error, so that results stand alone on standard output.
    """

    def __init__(self, name: str, console: Console) -> None:
        self._name = name
        self._console = console
        self._next_line = time.monotonic() + _LINES_EVERY_SECONDS
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if console.is_terminal and not console.is_dumb_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%  virtual {task.fields[hours]:.2f} h  real"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[message]}", markup=False),
                console=console,
                transient=True,
            )

    def __enter__(self) -> Bar:
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task(self._name, total=None, hours=0.0, message="begins")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def step(self, done: float, total: float, hours: float, message: str) -> None:
        """See `umbel_simulations.engines.Progress`."""
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, hours=hours, message=message)
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _LINES_EVERY_SECONDS
            share = done / total if total else 0.0
            self._console.print(f"{self._name}: {share:.0%}, virtual {hours:.2f} h, {message}")


def figures_table(runs: Mapping[str, Outcome]) -> Table:
    """The main figures, a column for each run."""
    found = {name: figures(outcome) for name, outcome in runs.items()}
    labels = list(next(iter(found.values())))
    return table(("", *runs), [(label, *(texts[label] for texts in found.values())) for label in labels])


def judgement_table(outcome: Outcome) -> Table:
    """Each threshold and what was found, under the judgement."""
    checks = judge(outcome)
    title = Text("go", "bold green") if is_go(checks) else Text("no-go", "bold red")
    return table(("threshold", "wanted", "found", ""), check_rows(checks), title=title)


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, title: Text | None = None, words: bool = False
) -> Table:
    """Rows under headings; all columns but the first are numbers, unless all are words."""
    found = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for index, heading in enumerate(head):
        found.add_column(heading, justify="right" if index and not words else "left", overflow="fold")
    for row in rows:
        found.add_row(*row)
    return found
