"""Which of a task's rounds are held against which, and what comes of it: `umbel_server.drift`, asked about the store.

A round counts once it is over and its cohort's sum is known, even if its candidate was refused: what the cohort
measured of the base is no worse for that, and data that change may well be why candidates are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa

from umbel.digests import Digest
from umbel.histograms import Histogram
from umbel.update import Metrics
from umbel_server.drift import Finding, Splits, findings
from umbel_server.drift_windows import MOST, Windows
from umbel_server.json_text import from_text, to_text
from umbel_server.registry import Registry
from umbel_server.round import RoundState
from umbel_server.tables import ROUNDS
from umbel_server.task import Task

_NEWEST_FIRST: Final = ROUNDS.c.number.desc()
_OVER: Final = [state.value for state in RoundState if state.is_over]


@dataclass(frozen=True, slots=True)
class Measured:
    """What a round's cohort measured."""

    number: int
    base: Digest
    """The bundle that was measured."""
    metrics: Metrics


@dataclass(frozen=True, slots=True)
class Rounds:
    """What there is to compare."""

    histograms: tuple[Histogram, ...]
    """Of the newest round's base."""
    reference: tuple[Measured, ...]
    recent: tuple[Measured, ...]
    passed_over: int
    """Rounds that were met whose base counts between other edges: a new lineage began after them."""

    @property
    def left_out(self) -> tuple[Histogram, ...]:
        """Histograms of a model's answers, unless one version gave them all: else it is versions that are compared."""
        is_one = len({it.base for it in (*self.reference, *self.recent)}) == 1
        return () if is_one else tuple(one for one in self.histograms if one.of_answers)


@dataclass(frozen=True, slots=True)
class DriftReport:
    """What an operator is told."""

    rounds: Rounds
    below: float
    problem: str
    """Why nothing can be told; empty if something can."""
    findings: tuple[Finding, ...]


def gather(connection: sa.Connection, registry: Registry, task: Task, windows: Windows) -> Rounds:
    """Read the rounds of both windows, as far as there are any."""
    newest = _newest(connection, task)
    if newest is None:
        return Rounds((), (), (), 0)
    histograms = registry.manifest(Digest(newest.base_bundle)).histograms
    counted = _counted(task)
    chosen = counted.where(ROUNDS.c.number.between(windows.first, windows.last)) if windows.last else counted
    older = _one_by_one(connection, chosen.order_by(ROUNDS.c.number))
    reference, before = _alike(older, registry, histograms, MOST if windows.last else windows.reference)
    beyond = windows.last or (reference[-1].number if reference else 0)
    later = _one_by_one(connection, counted.where(ROUNDS.c.number > beyond).order_by(_NEWEST_FIRST))
    recent, between = _alike(later, registry, histograms, windows.recent)
    return Rounds(histograms, reference, recent[::-1], before + between)


def newest_counted(connection: sa.Connection, task: Task) -> int:
    """The newest round that counts; 0 before the first. As long as it stays, so does what a report says."""
    newest = _newest(connection, task)
    return newest.number if newest else 0


def report(rounds: Rounds, windows: Windows) -> DriftReport:
    """Compare the windows, which takes some tenths of a second where they are large: nothing for an event loop."""
    if problem := _lacking(rounds, windows):
        return DriftReport(rounds, windows.below, problem, ())
    splits = Splits.of(len(rounds.reference), len(rounds.recent))
    measured = [it.metrics for it in (*rounds.reference, *rounds.recent)]
    problem = (
        f"{len(rounds.reference)} and {len(rounds.recent)} rounds give no p-value below {splits.least:.2g}, and one "
        f"below {windows.below:g} is asked for; compare more rounds"
    )
    compared = [one for one in rounds.histograms if one not in rounds.left_out]
    found = findings(splits, measured, compared, windows.below)
    return DriftReport(rounds, windows.below, problem if splits.least >= windows.below else "", tuple(found))


def _lacking(rounds: Rounds, windows: Windows) -> str:
    if windows.last and not rounds.reference:
        return f"no round from {windows.first} to {windows.last} has left a sum that can be compared"
    wanted = len(rounds.reference) if windows.last else windows.reference
    found = len(rounds.reference) + len(rounds.recent)
    if found >= wanted + windows.recent:
        return ""
    return (
        f"{found} rounds have left sums that can be compared, and {wanted + windows.recent} are needed: {wanted} for "
        f"the reference, and {windows.recent} after them"
    )


def _counted(task: Task) -> sa.Select[Any]:
    """A task's rounds that count."""
    own = (ROUNDS.c.task == task.name) & (ROUNDS.c.kind == task.plan.kind.value)
    query = sa.select(ROUNDS.c.number, ROUNDS.c.base_bundle, ROUNDS.c.metrics_json).where(own)
    return query.where(ROUNDS.c.state.in_(_OVER), ROUNDS.c.metrics_json != to_text({}))


def _newest(connection: sa.Connection, task: Task) -> Any:
    return connection.execute(_counted(task).order_by(_NEWEST_FIRST).limit(1)).first()


def _one_by_one(connection: sa.Connection, query: sa.Select[Any]) -> Iterator[Any]:
    """Rows, read by and by: there may be many thousand, of which few are wanted."""
    with connection.execute(query, execution_options={"yield_per": 50}) as rows:
        yield from rows


def _alike(
    rows: Iterable[Any], registry: Registry, histograms: tuple[Histogram, ...], most: int
) -> tuple[tuple[Measured, ...], int]:
    """The first rounds whose base has these histograms, and how many others were met."""
    found: list[Measured] = []
    others = 0
    for row in rows:
        if registry.manifest(Digest(row.base_bundle)).histograms != histograms:
            others += 1
            continue
        found.append(Measured(row.number, Digest(row.base_bundle), from_text(row.metrics_json)))
        if len(found) == most:
            break
    return tuple(found), others
