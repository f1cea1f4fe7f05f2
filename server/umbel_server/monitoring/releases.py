"""Rollouts, holds, and the listing of releases: what waits for a person, and until when it is believed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Final

import sqlalchemy as sa
from prometheus_client.core import Metric

from umbel.errors import UmbelError
from umbel_server import heads
from umbel_server.monitoring.families import gauge
from umbel_server.repository import Repository
from umbel_server.rollout import UNDER_WAY, Stage
from umbel_server.tables import AUDIT, EXECUTIONS, HOLDS, LISTED, ROLLOUTS

_WAITING: Final = (Stage.DRAFT, Stage.PENDING_APPROVAL, Stage.SCHEDULED)
_NOT_OVER: Final = tuple(stage.value for stage in (*_WAITING, *UNDER_WAY))


def rollouts(connection: sa.Connection) -> Iterator[Metric]:
    """How many stand where, and since when those do that aren't over."""
    stages = Counter({(stage.value,): 0 for stage in Stage})
    counted = sa.select(ROLLOUTS.c.stage, sa.func.count()).group_by(ROLLOUTS.c.stage)
    stages.update({(stage,): count for stage, count in connection.execute(counted)})
    yield gauge("umbel_rollouts", "Rollouts, by stage.", ("stage",), stages)
    columns = (ROLLOUTS.c.id, ROLLOUTS.c.model, ROLLOUTS.c.stage, ROLLOUTS.c.created_at)
    found = connection.execute(sa.select(*columns).where(ROLLOUTS.c.stage.in_(_NOT_OVER))).all()
    ids = [row.id for row in found]
    this = AUDIT.c.object.in_(ids) & AUDIT.c.action.startswith("rollout.")
    changes = sa.select(AUDIT.c.object, sa.func.max(AUDIT.c.at)).where(this).group_by(AUDIT.c.object)
    changed = {row[0]: row[1] for row in connection.execute(changes)}
    since = {(row.id, row.model, row.stage): changed.get(row.id, row.created_at) for row in found}
    words = "When a rollout that isn't over was changed last: its stage, its wave, or its spec."
    yield gauge("umbel_rollout_changed_timestamp_seconds", words, ("rollout", "model", "stage"), since)
    here = EXECUTIONS.c.rollout.in_(ids)
    moved = sa.select(EXECUTIONS.c.rollout, EXECUTIONS.c.outcome, sa.func.count()).where(here)
    answers = connection.execute(moved.group_by(EXECUTIONS.c.rollout, EXECUTIONS.c.outcome))
    told = {(rollout, outcome or "waiting"): float(count) for rollout, outcome, count in answers}
    words = "Devices that a rollout which isn't over has offered a release, by what they said last."
    yield gauge("umbel_rollout_devices", words, ("rollout", "outcome"), told)


def channels(connection: sa.Connection) -> Iterator[Metric]:
    """What devices get, and where they get nothing for now."""
    numbers = {(at.model, at.channel, at.population): float(it) for at, it in heads.read(connection).numbers.items()}
    words = "The release that devices get which no rollout takes; without a population, those of all."
    yield gauge("umbel_release_number", words, ("model", "channel", "population"), numbers)
    held = {(row.model,): row.at for row in connection.execute(sa.select(HOLDS))}
    yield gauge("umbel_release_held_timestamp_seconds", "Since when a model's offers are held.", ("model",), held)


class Listing:
    """The signed metadata in their folder, read anew when a file has changed."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository
        self._seen = 0
        self._expires: dict[tuple[str], float] = {}
        self._newest: dict[str, int] = {}

    def read(self, connection: sa.Connection) -> Iterator[Metric]:
        """Until when it is believed, and what it lacks."""
        self._look()
        words = "When a role's metadata are believed no more."
        yield gauge("umbel_metadata_expiry_timestamp_seconds", words, ("role",), self._expires)
        listed = ((LISTED.c.model == model) & (LISTED.c.number <= number) for model, number in self._newest.items())
        unsigned = sa.func.sum(sa.case((sa.or_(sa.false(), *listed), 0), else_=1))
        counts = connection.execute(sa.select(LISTED.c.model, unsigned).group_by(LISTED.c.model))
        waiting = {(model,): float(count) for model, count in counts}
        words = "Releases that no device gets before a model's signers have signed them."
        yield gauge("umbel_releases_unsigned", words, ("model",), waiting)

    def _look(self) -> None:
        try:
            if (changed := self._repository.changed) == self._seen:
                return
            expires = {(it.role,): it.expires_at for it in self._repository.freshness()}
            listed = {model: self._repository.releases(model) for model in self._repository.models()}
        except (UmbelError, OSError):
            return  # somebody publishes at this moment; what was read before holds until the next scrape
        newest = {model: max((it.number for it in releases), default=0) for model, releases in listed.items()}
        self._expires, self._newest, self._seen = expires, newest, changed
