"""`umbel tasks drift`: have the data of a fleet changed, that nobody sees?"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Annotated, Any, Final

import typer
from rich.console import Group

from umbel.v1 import admin_pb2 as pb
from umbel_server.cli import output
from umbel_server.cli.rounds import Name
from umbel_server.cli.verbs import Session, verb

BAR: Final = 24
"""Characters of the longest bar."""
_DRIFT: Final = "drift"
_COLUMNS: Final[list[output.Column]] = [
    ("what", lambda it: it.what),
    ("verdict", lambda it: it.verdict),
    ("p-value", lambda it: f"{it.p_value:.2g}"),
    ("before", lambda it: _level(it, it.before)),
    ("after", lambda it: _level(it, it.after)),
    ("PSI", lambda it: f"{it.psi:.3f}" if it.HasField("psi") else "–"),
]
_BINS: Final[list[output.Column]] = [
    ("", lambda row: row[0]),
    ("before", lambda row: _bar(row[1], row[3])),
    ("after", lambda row: _bar(row[2], row[3])),
]


def add_to(tasks: typer.Typer) -> None:
    """Add the command."""
    verb(tasks, "drift", "umbel tasks drift shoulder --reference 1-24 --recent 12")(task_drift)


def task_drift(
    session: Session,
    name: Name,
    reference: Annotated[
        str,
        typer.Option("--reference", metavar="A-B", help="Rounds to compare with; the task's first ones if left out."),
    ] = "",
    recent: Annotated[
        int, typer.Option("--recent", help="How many of the last rounds to compare; 0: as the settings say.", min=0)
    ] = 0,
    below: Annotated[float, typer.Option("--below", help="Which p-value is drift.", min=1e-9, max=0.5)] = 0.001,
) -> None:
    """Tell whether the data of a task's devices have changed, or its model has got worse on them; exit code 1 if so."""
    first, last = _span(reference)
    answer = session.stub.GetTaskDrift(
        pb.GetTaskDriftRequest(name=name, reference_first=first, reference_last=last, recent=recent, below=below)
    )
    session.show(answer, lambda: Group(*_picture(answer)))
    if found := [it.what for it in answer.findings if it.verdict == _DRIFT]:
        sys.stderr.write(f"umbel: drift of {', '.join(found)}\n")
        raise typer.Exit(1)


def _span(words: str) -> tuple[int, int]:
    if not words:
        return 0, 0
    found = re.fullmatch(r"(\d{1,9})-(\d{1,9})", words)
    if found is None:
        raise typer.BadParameter(f"{words!r} doesn't name rounds as 1-10 does", param_hint="--reference")
    return int(found[1]), int(found[2])


def _picture(answer: pb.GetTaskDriftResponse) -> Iterator[Any]:
    if answer.reference and answer.recent:
        yield f"{_rounds(answer.recent)} against {_rounds(answer.reference)}"
    if answer.passed_over:
        yield f"{answer.passed_over} others weren't compared: the model counted between other edges then"
    if answer.left_out:
        names = ", ".join(answer.left_out)
        yield f"{names}: not compared, as the model's answers change with its version, and these rounds are of several"
    if answer.problem:
        yield f"can't tell: {answer.problem}"
    if answer.findings:
        yield output.table("", _COLUMNS, answer.findings)
    for found in answer.findings:
        if found.edges:
            rows = zip(_between(found.edges), found.reference, found.recent, strict=True)
            most = max(*found.reference, *found.recent)
            yield output.table(f"\n{found.what}", _BINS, [(*row, most) for row in rows])


def _rounds(numbers: Sequence[int]) -> str:
    return f"rounds {numbers[0]}-{numbers[-1]} ({len(numbers)})"


def _level(found: pb.DriftFinding, value: float) -> str:
    return f"bin {value:.2f}" if found.edges else f"{value:.4g}"


def _between(edges: Sequence[float]) -> list[str]:
    inner = (f"{low:g} to {high:g}" for low, high in pairwise(edges))
    return [f"up to {edges[0]:g}", *inner, f"above {edges[-1]:g}"]


def _bar(share: float, most: float) -> str:
    filled = round(BAR * max(0.0, share) / most) if most > 0 else 0  # noise may have left less than nothing
    return f"{'█' * filled}{' ' if filled else ''}{share:.1%}"
