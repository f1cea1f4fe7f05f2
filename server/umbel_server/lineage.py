"""Where a version comes from and where it went: data contract, round, releases, rollouts, who let them go.

Put together from what the store keeps anyway; nothing is written for it. Read from the top, it is the answer to "how
did this model get onto that device, and who said so?".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from umbel.errors import NotFound
from umbel.manifest import Manifest, TensorSpec
from umbel_server import executions, rollout_records, task_records, views
from umbel_server.audit import AuditRow
from umbel_server.registry import Registry
from umbel_server.rollout_records import RolloutRecord
from umbel_server.tables import AUDIT, LISTED, RELEASES, ROLLOUTS
from umbel_server.task import Task
from umbel_server.versions import CANDIDATE, TRAINING, PublishedRelease, Version, release_from_row
from umbel_server.views import RoundSummary


@dataclass(frozen=True, slots=True)
class RolledOut:
    """A rollout of one of a version's releases."""

    record: RolloutRecord
    counts: Mapping[tuple[int, str], int]
    """(release, outcome) -> devices."""
    steps: Sequence[AuditRow]
    """Who did what with it, oldest first."""


@dataclass(frozen=True, slots=True)
class ReleaseStep:
    """A release of a version for devices to adopt."""

    release: PublishedRelease
    content_of: int
    """Not 0: the way back to this release's content."""
    steps: Sequence[AuditRow]
    """Who prepared, signed or published it, oldest first."""
    rollouts: Sequence[RolledOut]


@dataclass(frozen=True, slots=True)
class LineageStep:
    """One version, with all that led to it and came of it."""

    version: Version
    contract: Mapping[str, Any]
    """What data it takes, and under which terms they were learnt from; plain JSON values."""
    round: RoundSummary | None
    """None for a version that an operator brought."""
    releases: Sequence[ReleaseStep]


def trace(connection: sa.Connection, registry: Registry, model: str, number: int) -> list[LineageStep]:
    """A version, its parent, and so on back to the first, each from end to end; raises `NotFound`."""
    return [_step(connection, registry, version) for version in registry.lineage(connection, model, number)]


def _step(connection: sa.Connection, registry: Registry, version: Version) -> LineageStep:
    manifest, task = registry.bundle(version.bundle).manifest, version.lineage.task
    return LineageStep(
        version,
        data_contract(manifest, _task(connection, task)),
        views.one_round(connection, task, version.lineage.round) if task else None,
        [_release(connection, release, content_of) for release, content_of in _releases(connection, version)],
    )


def data_contract(manifest: Manifest, task: Task | None) -> dict[str, Any]:
    """What examples must look like, whose they are, and how much of them anybody sees."""
    contract: dict[str, Any] = {
        "inputs": list(map(_tensor, manifest.inputs)),
        "targets": list(map(_tensor, manifest.targets)),
        "labels": list(manifest.labels),
    }
    if task is not None:
        contract |= {
            "population": task.population,
            "least_examples": task.plan.min_examples,
            "least_devices": task.minimum,
            "updates_private": task.updates_private,
        }
    return contract


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)}


def _task(connection: sa.Connection, name: str) -> Task | None:
    try:
        return task_records.get(connection, name).task if name else None
    except NotFound:
        return None


def _releases(connection: sa.Connection, version: Version) -> list[tuple[PublishedRelease, int]]:
    """The version's releases for devices, lowest number first, each with what it takes back to."""
    here = (RELEASES.c.model == version.model) & (RELEASES.c.version == version.number)
    listed = (LISTED.c.model == RELEASES.c.model) & (LISTED.c.number == RELEASES.c.number)
    query = sa.select(RELEASES, LISTED.c.content_of).outerjoin(LISTED, listed)
    query = query.where(here, RELEASES.c.channel.not_in((TRAINING, CANDIDATE))).order_by(RELEASES.c.number)
    return [(release_from_row(row), row.content_of or 0) for row in connection.execute(query)]


def _release(connection: sa.Connection, release: PublishedRelease, content_of: int) -> ReleaseStep:
    query = sa.select(ROLLOUTS.c.id).where(ROLLOUTS.c.model == release.model).order_by(ROLLOUTS.c.created_at)
    records = [rollout_records.get(connection, found) for found in connection.scalars(query).all()]
    mine = [it for it in records if release.number in (*it.rollout.releases, it.rollout.spec.revert_release)]
    steps = _made(connection, release)
    return ReleaseStep(release, content_of, steps, [_rolled_out(connection, record, release.number) for record in mine])


def _made(connection: sa.Connection, release: PublishedRelease) -> list[AuditRow]:
    """How a release came to be listed: who prepared or published it, and the first signature that covers it."""
    made = ("release.prepare", "release.publish", "release.sign")
    this = (AUDIT.c.object == release.model) & AUDIT.c.action.in_(made)
    found: list[AuditRow] = []
    for row in connection.execute(sa.select(AUDIT).where(this).order_by(AUDIT.c.sequence)).mappings():
        body = json.loads(row["body_json"])
        signs = bool(found) and row["action"] == "release.sign" and int(body["listed"]) >= release.number
        if release.number in (body.get("number"), body.get("revert")) or signs:
            found.append(AuditRow(**row))
        if signs:
            break
    return found


def _rolled_out(connection: sa.Connection, record: RolloutRecord, number: int) -> RolledOut:
    found = record.rollout
    this = (AUDIT.c.object == found.id) & AUDIT.c.action.startswith("rollout.")
    rows = connection.execute(sa.select(AUDIT).where(this).order_by(AUDIT.c.sequence)).mappings()
    return RolledOut(record, executions.counts(connection, found.id, [number]), [AuditRow(**row) for row in rows])
