"""What devices tell of the release that answers, in use: to compare those that have a new one with those that don't.

A window begins when a rollout of the population starts: what each device had told last is then kept beside what it
tells from now on, and its troubles are counted anew. (A second rollout of the same population begins it anew for both.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from umbel.errors import BY_CODE, BadInput, ModelUnusable
from umbel.visit import CheckIn, Event, Health, SessionRecord
from umbel_server.gates import Drift
from umbel_server.tables import HEALTH

MEASURED: Final = ("accuracy", "latency_seconds", "memory_mb")
_LARGEST: Final = 2**31 - 1
"""What the store has room for: no release is numbered so high, whatever a device says."""
_INSERTS: Final = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}


@dataclass(frozen=True, slots=True)
class Told:
    """What one device has told since the last time that it was written down."""

    population: str
    at: float
    release: int
    health: Health
    troubles: int = 0

    @classmethod
    def of(cls, check_in: CheckIn, now: float, before: Told | None) -> Told:
        """After another check-in; what it doesn't tell stays as it was."""
        health, troubles = check_in.health, sum(map(is_trouble, check_in.sessions))
        if before is not None:
            troubles += before.troubles
            if before.release == check_in.release:
                old = before.health
                health = Health(**{name: _first(getattr(health, name), getattr(old, name)) for name in MEASURED})
        return cls(check_in.population, now, check_in.release, health, troubles)


@dataclass(frozen=True, slots=True)
class Seen:
    """One device during a window."""

    release: int
    """That answers now."""
    troubles: int
    drift: Drift


def is_trouble(session: SessionRecord) -> bool:
    """Whether a session failed by what the model or the device does, rather than by the network, a round or rights."""
    if not session.shape.endswith(Event.FAILED.value):
        return False
    kind = BY_CODE.get(session.error.partition(":")[0])
    return kind is None or kind.code == "internal" or issubclass(kind, ModelUnusable | BadInput)


def write(connection: sa.Connection, told: Mapping[str, Told]) -> None:
    """Write what devices told, beside what they had told when the window began."""
    # In an order that is everybody's, so that no two processes wait for each other.
    rows = [_row(device, told[device]) for device in sorted(told)]
    if rows:
        connection.execute(_merging(connection.dialect.name), rows)


@cache
def _merging(dialect: str) -> sa.Insert:
    """Write a row, or merge it into the one that is there; what it doesn't tell of the same release stays."""
    insert: Any = _INSERTS[dialect](HEALTH)
    new = insert.excluded
    same = HEALTH.c.release == new.release
    changed: dict[str, Any] = {name: sa.func.coalesce(new[name], sa.case((same, HEALTH.c[name]))) for name in MEASURED}
    changed |= {name: new[name] for name in ("population", "at", "release")}
    changed["troubles"] = HEALTH.c.troubles + new.troubles
    merging: sa.Insert = insert.on_conflict_do_update(index_elements=[HEALTH.c.device], set_=changed)
    return merging


def _row(device: str, told: Told) -> dict[str, object]:
    health = told.health
    return {
        "device": device,
        "population": told.population,
        "at": told.at,
        "release": min(told.release, _LARGEST),
        "troubles": told.troubles,
        "accuracy": health.accuracy,
        "latency_seconds": health.latency_seconds,
        "memory_mb": health.memory_mb,
    }


def begin_window(connection: sa.Connection, population: str) -> None:
    """From now on devices are compared with what they told last."""
    kept = {f"before_{name}": HEALTH.c[name] for name in MEASURED}
    connection.execute(HEALTH.update().where(HEALTH.c.population == population).values(troubles=0, **kept))


def seen_since(connection: sa.Connection, population: str, since: float) -> dict[str, Seen]:
    """Device -> what it has told since an instant; in the order of their ids."""
    this = (HEALTH.c.population == population) & (HEALTH.c.at >= since)
    rows = connection.execute(sa.select(HEALTH).where(this).order_by(HEALTH.c.device)).mappings()
    return {row["device"]: Seen(row["release"], row["troubles"], _drift(row)) for row in rows}


def _drift(row: sa.RowMapping) -> Drift:
    accuracy, before = row["accuracy"], row["before_accuracy"]
    return Drift(
        None if accuracy is None or before is None else accuracy - before,
        _ratio(row["latency_seconds"], row["before_latency_seconds"]),
        _ratio(row["memory_mb"], row["before_memory_mb"]),
    )


def _ratio(now: float | None, before: float | None) -> float | None:
    return now / before if now and before else None


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)
